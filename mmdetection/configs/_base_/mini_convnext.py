"""Three mini ConvNeXt branches for the mini data, pretrained by `tools/pretrain_branches.py`; of every task."""

sizes = dict(mini_b=(96, (64, 96, 160, 224)), mini_s=(144, (32, 64, 128, 192)), mini_t=(192, (24, 48, 96, 160)))
mini_pyramid = dict(
    branches=[
        dict(
            arch="convnext",
            resolution=resolution,
            weights=f"{name}.safetensors",
            blocks=(1, 2, 3, 2),  # one interaction per ConvNeXt stage; down-sampling layers count
            options=dict(depths=(1, 1, 2, 1), widths=widths, layer_scale=1.0),
        )
        for name, (resolution, widths) in sizes.items()
    ],
    interactions=4,
    heads=4,
    drop_path=0.0,
)

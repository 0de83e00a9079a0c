"""Three mini ConvNeXt branches for the digits of the mini data: what `make demo-cls` trains.

sh dist_train.sh mini_3branch_convnext_64-48-32 1 --data-path MINI/imagefolder
"""

_sizes = ((32, (48, 72, 96, 128)), (48, (32, 48, 64, 96)), (64, (16, 24, 48, 64)))
model = dict(
    spec=dict(
        branches=[
            dict(
                arch="convnext",
                resolution=resolution,
                blocks=(1, 2, 3, 2),  # one interaction per ConvNeXt stage; down-sampling layers count
                options=dict(depths=(1, 1, 2, 1), widths=widths, layer_scale=1.0),
            )
            for resolution, widths in _sizes
        ],
        interactions=4,
        heads=4,
        drop_path=0.0,
        head="branches",
    ),
)

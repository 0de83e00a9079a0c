"""Three mini ConvNeXt branches for the digits of the mini data: what `make demo-cls` trains.

sh dist_train.sh mini_3branch_convnext_64-48-32 1 --data-path MINI/imagefolder
"""

_sizes = ((32, (40, 64, 80, 112)), (48, (24, 40, 56, 72)), (64, (16, 24, 32, 48)))
model = dict(
    spec=dict(
        branches=[
            dict(
                arch="convnext",
                resolution=resolution,
                blocks=(3, 5),  # an interaction at stride 8 and one at the end; down-sampling layers count
                options=dict(depths=(1, 1, 2, 1), widths=widths, layer_scale=1.0, stem="overlap_act"),
            )
            for resolution, widths in _sizes
        ],
        interactions=2,
        heads=4,
        drop_path=0.0,
        head="branches",
    ),
)

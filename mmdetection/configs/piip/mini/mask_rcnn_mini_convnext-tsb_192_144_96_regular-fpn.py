"""Mask R-CNN, three mini ConvNeXt branches and a regular FPN, on the mini data: what `make demo` trains.

sh tools/dist_train.sh configs/piip/mini/mask_rcnn_mini_convnext-tsb_192_144_96_regular-fpn.py 1
"""

_base_ = ["../../_base_/mask_rcnn_mini.py"]
sizes = dict(mini_b=(96, (64, 96, 160, 224)), mini_s=(144, (32, 64, 128, 192)), mini_t=(192, (24, 48, 96, 160)))
branches = [
    dict(
        arch="convnext",
        resolution=resolution,
        weights=f"{name}.safetensors",
        blocks=(1, 2, 3, 2),  # one interaction per ConvNeXt stage; down-sampling layers count
        options=dict(depths=(1, 1, 2, 1), widths=widths, layer_scale=1.0),
    )
    for name, (resolution, widths) in sizes.items()
]
model = dict(
    backbone=dict(spec=dict(branches=branches, interactions=4, heads=4, drop_path=0.0), taps=(0, 1, 2)),
    neck=dict(in_channels=[64, 96, 160, 224]),
)

"""Mask R-CNN, three mini ConvNeXt branches and a regular FPN, on the mini data: what `make demo` trains.

sh tools/dist_train.sh configs/piip/mini/mask_rcnn_mini_convnext-tsb_192_144_96_regular-fpn.py 1
"""

_base_ = ["../../_base_/mask_rcnn_mini.py", "../../_base_/mini_convnext.py"]
model = dict(
    backbone=dict(spec=_base_.mini_pyramid, taps=(0, 1, 2)),
    neck=dict(in_channels=[64, 96, 160, 224]),
)

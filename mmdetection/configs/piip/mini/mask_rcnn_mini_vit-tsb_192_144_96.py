"""Mask R-CNN, three mini ViT branches and a simple FPN, on the mini data.

sh tools/dist_train.sh configs/piip/mini/mask_rcnn_mini_vit-tsb_192_144_96.py 1
"""

_base_ = ["../../_base_/mask_rcnn_mini.py", "../../_base_/mini_vit.py"]
model = dict(
    backbone=dict(spec=_base_.mini_pyramid, scales=(2, 1, 0.5)),
    neck=dict(in_channels=[128] * 3),
)

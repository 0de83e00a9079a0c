"""Mask R-CNN, ConvNeXt-B 1024, regular FPN, 1x, 8 GPUs x 2 images. Published: 42.4 box AP, 38.7 mask AP.

sh tools/dist_train.sh configs/piip/baseline/mask_rcnn_convnext-base_1024_regular-fpn.py 8
"""

_base_ = ["../../_base_/mask_rcnn_1x.py", "../../_base_/coco_1024.py"]
model = dict(
    data_preprocessor=dict(pad_size_divisor=64),
    backbone=dict(spec="convnext-b-1024", taps=[0, 1, 2]),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
# No layer decay, and weight decay on everything.
optim_wrapper = dict(constructor="DefaultOptimWrapperConstructor", paramwise_cfg=None)

"""Mask R-CNN on pyramids with ConvNeXt branches: a regular FPN, ImageNet statistics, mmdet's usual image size.

Images have at most 1333 x 800 pixels, although the rows are named after a 1024-pixel pyramid: so they were trained.
"""

_base_ = ["./mask_rcnn_1x.py", "mmdet::_base_/datasets/coco_instance.py"]
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], pad_size_divisor=32),
    backbone=dict(taps=[0, 1, 10]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4), paramwise_cfg=dict(layer_decay_rate=0.8))

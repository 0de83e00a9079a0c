"""Mask R-CNN on InternViT-6B and pyramids with it; activations are recomputed to save memory."""

_base_ = ["./mask_rcnn_1x.py"]
model = dict(
    data_preprocessor=dict(pad_size_divisor=64),
    backbone=dict(grad_checkpointing=True),
    neck=dict(in_channels=[3200] * 4),
)

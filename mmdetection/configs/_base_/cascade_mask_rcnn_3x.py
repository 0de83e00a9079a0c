"""Cascade Mask R-CNN on a pyramid, 36 epochs."""

_base_ = ["./cascade_mask_rcnn_1x.py"]
train_cfg = dict(max_epochs=36)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=36, milestones=[27, 33])

"""Cascade Mask R-CNN on a pyramid, 12 epochs; a row adds its spec, its widths and its data."""

_base_ = ["mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py", "./recipe_1x.py"]
model = _base_.on_a_pyramid

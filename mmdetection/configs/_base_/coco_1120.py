"""COCO 2017 instances, long side at most 1120 pixels, short side at most 672."""

_base_ = ["mmdet::_base_/datasets/coco_instance.py"]
train_dataloader = _base_.train_dataloader
val_dataloader = _base_.val_dataloader
train_dataloader.dataset.pipeline[2].scale = (1120, 672)
val_dataloader.dataset.pipeline[1].scale = (1120, 672)
test_dataloader = val_dataloader

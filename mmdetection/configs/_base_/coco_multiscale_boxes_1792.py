"""COCO 2017 at the scales of `coco_multiscale_1792.py`, boxes alone."""

_base_ = ["./coco_multiscale_1792.py"]
train_pipeline = _base_.train_pipeline
train_pipeline[1].with_mask = False
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = _base_.val_dataloader
val_dataloader.dataset.pipeline[2].with_mask = False
test_dataloader = val_dataloader
val_evaluator = dict(metric=["bbox"])
test_evaluator = val_evaluator

"""COCO 2017 instances at one and a half times DETR's training scales, crops of at most 1536 x 1536."""

_base_ = ["./coco_multiscale_1024.py"]
train_pipeline = _base_.train_pipeline
val_dataloader = _base_.val_dataloader
train_scales = [(short, 1999) for short in range(720, 1201, 48)]
train_pipeline[3].transforms[0][0].scales = train_scales
train_pipeline[3].transforms[1][0].scales = [(600, 1999), (750, 1999), (900, 1999)]
train_pipeline[3].transforms[1][1].crop_size = (576, 900)
train_pipeline[3].transforms[1][2].scales = train_scales
train_pipeline[4].crop_size = (1536, 1536)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader.dataset.pipeline[1].scale = (1999, 1200)
test_dataloader = val_dataloader

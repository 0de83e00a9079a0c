"""COCO 2017 instances at one and three quarters of DETR's training scales, crops of at most 1792 x 1792."""

_base_ = ["./coco_multiscale_1024.py"]
train_pipeline = _base_.train_pipeline
val_dataloader = _base_.val_dataloader
train_scales = [(short, 2332) for short in range(840, 1401, 56)]
train_pipeline[3].transforms[0][0].scales = train_scales
train_pipeline[3].transforms[1][0].scales = [(700, 2332), (875, 2332), (1050, 2332)]
train_pipeline[3].transforms[1][1].crop_size = (672, 1050)
train_pipeline[3].transforms[1][2].scales = train_scales
train_pipeline[4].crop_size = (1792, 1792)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader.dataset.pipeline[1].scale = (2332, 1400)
test_dataloader = val_dataloader

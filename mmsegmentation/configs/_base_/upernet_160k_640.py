"""UperNet on a single ViT, 160k iterations, crops of 640 pixels."""

_base_ = ["./upernet_160k.py"]
crop_size = (640, 640)
model = dict(data_preprocessor=dict(size=crop_size), test_cfg=dict(crop_size=crop_size, stride=(426, 426)))
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = (2560, 640)
train_pipeline[3].crop_size = crop_size
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 640
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

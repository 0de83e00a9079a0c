"""UperNet, 160k iterations: rows of the paper whose configs and weights were never released.

What the paper leaves open is our reading: heads as wide as mmsegmentation's for networks of this size; crops as large
as the second branch's image, which the first branch enlarges; images scaled in proportion to the crop, as
mmsegmentation does for other crops than 512; all else as in the released rows.
"""

_base_ = ["./upernet.py", "./ade20k.py"]
crop_size = (448, 448)
model = dict(
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(channels=512),
    auxiliary_head=dict(channels=256),
    test_cfg=dict(crop_size=crop_size, stride=(298, 298)),
)
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = (1792, 448)
train_pipeline[3].crop_size = crop_size
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 448
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
param_scheduler = _base_.param_scheduler
param_scheduler[1].end = 160000
train_cfg = dict(max_iters=160000)

"""The toy task of `toy_task.py`: 4 epochs of 5 batches."""

custom_imports = dict(imports=["toy_task"])
default_scope = "mmengine"
model = dict(type="ToyModel", dropout=0.3)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="ToyDataset", size=10, noise=0.5),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="ToyDataset", size=4),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="ToyMetric")
test_evaluator = val_evaluator
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-2))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=6),
    dict(type="MultiStepLR", by_epoch=True, milestones=[2, 3], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(type="CheckpointHook", interval=1), logger=dict(type="LoggerHook", interval=1))
custom_hooks = [dict(type="RecordLosses", path="losses"), dict(type="KillAt")]

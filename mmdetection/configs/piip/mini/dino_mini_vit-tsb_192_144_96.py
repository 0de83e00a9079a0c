"""DINO, three mini ViT branches, on the mini data.

sh tools/dist_train.sh configs/piip/mini/dino_mini_vit-tsb_192_144_96.py 1
"""

_base_ = ["../../_base_/dino_4scale.py", "../../_base_/mini_coco.py", "../../_base_/mini_vit.py"]
deformable = dict(embed_dims=64)
ffn = dict(embed_dims=64, feedforward_channels=128)
model = dict(
    num_queries=50,
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(spec=_base_.mini_pyramid),
    neck=dict(in_channels=[128] * 3, out_channels=64),
    positional_encoding=dict(num_feats=32),
    encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=deformable, ffn_cfg=ffn)),
    decoder=dict(
        num_layers=2,
        layer_cfg=dict(self_attn_cfg=dict(embed_dims=64), cross_attn_cfg=deformable, ffn_cfg=ffn),
    ),
    bbox_head=dict(embed_dims=64, num_classes=10),
    dn_cfg=dict(group_cfg=dict(num_dn_queries=20)),
    test_cfg=dict(max_per_img=50),
)
train_pipeline = _base_.train_pipeline
train_pipeline[1].with_mask = False
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_evaluator = dict(metric=["bbox"])
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=5e-4), paramwise_cfg=dict(layer_decay_rate=1.0), clip_grad=dict(max_norm=5.0))
train_cfg = dict(max_epochs=12, val_interval=4)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=12, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=25))

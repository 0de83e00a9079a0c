"""Mask2Former, three mini ViT branches, on the mini data.

sh tools/dist_train.sh configs/piip/mini/mask2former_mini_vit-tsb_192_144_96.py 1
"""

_base_ = [
    "../../_base_/mask2former.py",
    "../../_base_/mini_ade.py",
    "../../../../mmdetection/configs/_base_/mini_vit.py",
]
attention = dict(embed_dims=64, num_heads=4)
model = dict(
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3, size=(192, 192)),
    backbone=dict(spec=_base_.mini_pyramid),
    decode_head=dict(
        in_channels=[128] * 4,
        strides=[2, 4, 8, 16],
        feat_channels=64,
        out_channels=64,
        num_classes=11,
        num_queries=20,
        pixel_decoder=dict(
            encoder=dict(
                num_layers=2,
                layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=dict(embed_dims=64, feedforward_channels=128)),
            ),
            positional_encoding=dict(num_feats=32),
        ),
        positional_encoding=dict(num_feats=32),
        transformer_decoder=dict(
            num_layers=3,
            layer_cfg=dict(
                self_attn_cfg=attention,
                cross_attn_cfg=attention,
                ffn_cfg=dict(embed_dims=64, feedforward_channels=128),
            ),
        ),
        loss_cls=dict(class_weight=[1.0] * 11 + [0.1]),
        train_cfg=dict(num_points=1024),
    ),
)
train_dataloader = dict(_delete_=True, **_base_.mini_train_dataloader)
val_dataloader = dict(_delete_=True, **_base_.mini_val_dataloader)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=450, val_interval=450)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=450)]
default_hooks = dict(checkpoint=dict(interval=75, save_best=None), logger=dict(interval=25))

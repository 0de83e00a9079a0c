"""Mask R-CNN on a three-branch pyramid small enough for a laptop: what `make demo` trains, on the mini data.

sh tools/dist_train.sh configs/piip/mini/mask_rcnn_mini_tsb_192_144_96.py 1
"""

_base_ = ["../../_base_/mask_rcnn_1x.py", "../../_base_/mini_coco.py"]

shape = dict(depth=6, patch_size=8, pos_grid=(8, 8), layer_scale=1.0)
spec = dict(
    branches=[
        dict(
            arch="vit", resolution=96, weights="mini_b.safetensors", options=dict(embed_dim=128, num_heads=4, **shape)
        ),
        dict(
            arch="vit", resolution=144, weights="mini_s.safetensors", options=dict(embed_dim=96, num_heads=4, **shape)
        ),
        dict(
            arch="vit", resolution=192, weights="mini_t.safetensors", options=dict(embed_dim=64, num_heads=4, **shape)
        ),
    ],
    interactions=3,
    heads=4,
    drop_path=0.0,
)
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(spec=spec, scales=(2, 1, 0.5)),
    neck=dict(in_channels=[128] * 3, out_channels=64, num_outs=4),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[3], ratios=[0.6, 1.0, 1.7], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, featmap_strides=[4, 8, 16]),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=64, featmap_strides=[4, 8, 16]),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_convs=2, num_classes=10),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=300),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300)),
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    paramwise_cfg=dict(layer_decay_rate=1.0),
    clip_grad=dict(max_norm=1.0),
)
train_cfg = dict(max_epochs=10, val_interval=5)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=10, convert_to_iter_based=True),
]

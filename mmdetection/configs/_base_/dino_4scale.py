"""DINO with four feature levels on a pyramid, 12 epochs, 32 images per step (16 GPUs x 2).

A row adds its spec, its widths and its data.
"""

_base_ = ["mmdet::_base_/schedules/schedule_1x.py", "mmdet::_base_/default_runtime.py", "./runtime.py"]
custom_imports = dict(imports=["piip.integrations.mmdet_dino"], allow_failed_imports=False)
deformable = dict(embed_dims=256, num_levels=4, dropout=0.0)
ffn = dict(embed_dims=256, feedforward_channels=2048, ffn_drop=0.0)
model = dict(
    type="PIIPDINO",
    num_queries=900,
    as_two_stage=True,
    with_box_refine=True,
    data_preprocessor=dict(
        type="DetDataPreprocessor", mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True, pad_size_divisor=64
    ),
    # The folder is relative to where the command runs, see the README. No level of scale 4.
    backbone=dict(type="mmengine.PIIPBackbone", pretrained="pretrained", scales=(2, 1, 0.5)),
    neck=dict(
        type="ChannelMapper",
        kernel_size=1,
        out_channels=256,
        act_cfg=None,
        norm_cfg=dict(type="GN", num_groups=32),
        num_outs=4,
    ),
    positional_encoding=dict(num_feats=128, temperature=20, normalize=True),
    encoder=dict(num_layers=6, layer_cfg=dict(self_attn_cfg=deformable, ffn_cfg=ffn)),
    decoder=dict(
        num_layers=6,
        return_intermediate=True,
        post_norm_cfg=None,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=256, num_heads=8, dropout=0.0), cross_attn_cfg=deformable, ffn_cfg=ffn
        ),
    ),
    bbox_head=dict(
        type="PIIPDINOHead",
        num_classes=80,
        embed_dims=256,
        sync_cls_avg_factor=True,
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="L1Loss", loss_weight=5.0),
        loss_iou=dict(type="GIoULoss", loss_weight=2.0),
    ),
    dn_cfg=dict(label_noise_scale=0.5, box_noise_scale=1.0, group_cfg=dict(dynamic=True, num_dn_queries=100)),
    train_cfg=dict(
        assigner=dict(
            type="HungarianAssigner",
            match_costs=[
                dict(type="FocalLossCost", weight=2.0),
                dict(type="BBoxL1Cost", weight=5.0, box_format="xywh"),
                dict(type="IoUCost", iou_mode="giou", weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=300),
)
# bf16 with --amp; the published rows were trained in bf16, neck and head in float32.
# The original's configs ask for clipped gradients, but its DeepSpeed never clipped them: the released models were
# trained without. To train as its configs say: --cfg-options optim_wrapper.clip_grad.max_norm=0.1
optim_wrapper = dict(
    constructor="LayerDecayOptimWrapperConstructor",
    optimizer=dict(_delete_=True, type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.85),
)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1))

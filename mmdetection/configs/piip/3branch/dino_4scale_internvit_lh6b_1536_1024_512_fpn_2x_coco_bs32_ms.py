"""DINO, PIIP-LH6B 1536/1024/512 (DeiT III, MAE, InternViT-6B), 2x, 16 GPUs x 2 images. Published: no figure.

sh tools/dist_train.sh configs/piip/3branch/dino_4scale_internvit_lh6b_1536_1024_512_fpn_2x_coco_bs32_ms.py 16
"""

_base_ = ["../../_base_/dino_4scale.py", "../../_base_/coco_multiscale_boxes_1536.py"]
model = dict(
    backbone=dict(spec="internvit-lh6b-1536-1024-512", grad_checkpointing=True),
    neck=dict(in_channels=[3200] * 3),
)
train_cfg = dict(max_epochs=24)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=24, milestones=[16, 22])

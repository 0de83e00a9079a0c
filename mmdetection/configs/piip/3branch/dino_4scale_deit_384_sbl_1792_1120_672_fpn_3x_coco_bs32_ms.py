"""DINO, PIIP-SBL 1792/1120/672 (DeiT III, 384), 3x, 16 GPUs x 2 images. Published: 57.8 box AP.

sh tools/dist_train.sh configs/piip/3branch/dino_4scale_deit_384_sbl_1792_1120_672_fpn_3x_coco_bs32_ms.py 16
"""

_base_ = ["../../_base_/dino_4scale.py", "../../_base_/coco_multiscale_boxes_1792.py"]
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], pad_size_divisor=224),
    backbone=dict(spec="deit3-384-sbl-1792-1120-672"),
    neck=dict(in_channels=[1024] * 3),
)
train_cfg = dict(max_epochs=36)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=36, milestones=[27, 33])

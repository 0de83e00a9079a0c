"""DINO, PIIP-H6B 1024/768 (MAE, InternViT-6B), 1x, 16 GPUs x 2 images. Published: 60.0 box AP.

sh tools/dist_train.sh configs/piip/2branch/dino_4scale_internvit_h6b_1024_768_fpn_1x_coco_bs32_ms.py 16
"""

_base_ = ["../../_base_/dino_4scale.py", "../../_base_/coco_multiscale_boxes_1024.py"]
model = dict(
    backbone=dict(spec="internvit-h6b-1024-768", grad_checkpointing=True),
    neck=dict(in_channels=[3200] * 3),
)

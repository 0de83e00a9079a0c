"""Mask R-CNN, PIIP-SBL 1568/1120/672 (DINOv2), 1x, 8 GPUs x 2 images. Published: 51.0 box AP, 44.7 mask AP.

sh tools/dist_train.sh configs/piip/3branch/mask_rcnn_dinov2_sbl_1568_1120_672_fpn_1x_coco_bs16.py 8
"""

_base_ = ["../../_base_/mask_rcnn_1x.py", "../../_base_/coco_1568.py"]
model = dict(backbone=dict(spec="dinov2-sbl-1568-1120-672"), neck=dict(in_channels=[1024] * 4))

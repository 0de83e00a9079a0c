"""Mask R-CNN, PIIP-SBL 1568/896/672 (DeiT III), 1x, 8 GPUs x 2 images. Published: 49.3 box AP, 43.7 mask AP.

sh tools/dist_train.sh configs/piip/3branch/mask_rcnn_deit_sbl_1568_896_672_fpn_1x_coco_bs16.py 8
"""

_base_ = ["../../_base_/mask_rcnn_1x.py", "../../_base_/coco_1568.py"]
model = dict(backbone=dict(spec="deit3-sbl-1568-896-672"), neck=dict(in_channels=[1024] * 4))

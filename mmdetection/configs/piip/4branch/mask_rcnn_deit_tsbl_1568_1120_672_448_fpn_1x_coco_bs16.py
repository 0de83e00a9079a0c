"""Mask R-CNN, PIIP-TSBL 1568/1120/672/448 (DeiT, DeiT III), 1x, 8 GPUs x 2 images.

Published: 48.2 box AP, 42.9 mask AP.

sh tools/dist_train.sh configs/piip/4branch/mask_rcnn_deit_tsbl_1568_1120_672_448_fpn_1x_coco_bs16.py 8
"""

_base_ = ["../../_base_/mask_rcnn_1x.py", "../../_base_/coco_1568.py"]
model = dict(backbone=dict(spec="deit3-tsbl-1568-1120-672-448"), neck=dict(in_channels=[1024] * 4))

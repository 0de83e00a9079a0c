"""Mask R-CNN, PIIP-SBL 1568/1120/672 (AugReg 384), faster form, 1x, 8 GPUs x 2 images.

Published: 48.1 box AP, 42.4 mask AP.

sh tools/dist_train.sh configs/piip/3branch/mask_rcnn_augreg_sbl_1568_1120_672_fpn_1x_coco_bs16_speedup.py 8
"""

_base_ = ["../../_base_/mask_rcnn_1x.py", "../../_base_/coco_1568.py"]
model = dict(backbone=dict(spec="augreg-sbl-1568-1120-672-speedup"), neck=dict(in_channels=[1024] * 4))

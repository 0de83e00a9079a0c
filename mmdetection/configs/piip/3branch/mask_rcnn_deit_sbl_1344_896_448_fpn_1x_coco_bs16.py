"""Mask R-CNN, PIIP-SBL 1344/896/448 (DeiT III), 1x, 8 GPUs x 2 images. Published: 48.3 box AP, 42.7 mask AP.

sh tools/dist_train.sh configs/piip/3branch/mask_rcnn_deit_sbl_1344_896_448_fpn_1x_coco_bs16.py 8
"""

_base_ = ["../../_base_/mask_rcnn_1x.py", "../../_base_/coco_1344.py"]
model = dict(backbone=dict(spec="deit3-sbl-1344-896-448"), neck=dict(in_channels=[1024] * 4))

"""Mask R-CNN, PIIP-TSBL 1792/1568/1120/448 (DeiT, DeiT III), 1x, 8 GPUs x 2 images.

Published: 49.4 box AP, 44.1 mask AP.

sh tools/dist_train.sh configs/piip/4branch/mask_rcnn_deit_tsbl_1792_1568_1120_448_fpn_1x_coco_bs16.py 8
"""

_base_ = ["../../_base_/mask_rcnn_1x.py", "../../_base_/coco_1792.py"]
model = dict(backbone=dict(spec="deit3-tsbl-1792-1568-1120-448"), neck=dict(in_channels=[1024] * 4))

"""Mask R-CNN, PIIP-VT-CS-CB 1024/672/448 (C: ConvNeXt, V: DeiT), 1x, 8 GPUs x 2 images.

Published: 45.2 box AP, 40.7 mask AP.

sh tools/dist_train.sh configs/piip/convnext/mask_rcnn_vit-t_convnext-s_convnext-b_1024_672_448_regular-fpn.py 8
"""

_base_ = ["../../_base_/mask_rcnn_convnext_1x.py"]
model = dict(backbone=dict(spec="vt-cs-cb-1024-672-448"), neck=dict(in_channels=[128, 256, 512, 1024]))

"""Mask R-CNN, PIIP-CT-VS-VB 1024/672/448 (C: ConvNeXt, V: DeiT), 1x, 8 GPUs x 2 images.

Published: 47.1 box AP, 42.4 mask AP.

sh tools/dist_train.sh configs/piip/convnext/mask_rcnn_convnext-t_vit-s_vit-b_1024_672_448_regular-fpn.py 8
"""

_base_ = ["../../_base_/mask_rcnn_convnext_1x.py"]
model = dict(backbone=dict(spec="ct-vs-vb-1024-672-448"), neck=dict(in_channels=[768] * 4))

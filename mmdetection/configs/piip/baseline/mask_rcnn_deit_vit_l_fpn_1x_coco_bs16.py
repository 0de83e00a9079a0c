"""Mask R-CNN, ViTDet-style ViT-L 1024 (DeiT III), 1x, 8 GPUs x 2 images. Published: 46.7 box AP, 42.5 mask AP.

sh tools/dist_train.sh configs/piip/baseline/mask_rcnn_deit_vit_l_fpn_1x_coco_bs16.py 8
"""

_base_ = ["../../_base_/mask_rcnn_1x.py", "../../_base_/coco_1024.py"]
model = dict(
    data_preprocessor=dict(pad_size_divisor=64),
    backbone=dict(spec="deit3-l-1024"),
    neck=dict(in_channels=[1024] * 4),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.95))

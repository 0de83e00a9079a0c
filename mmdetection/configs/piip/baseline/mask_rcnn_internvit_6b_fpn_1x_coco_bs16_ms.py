"""Mask R-CNN, InternViT-6B 1024, 1x, 8 GPUs x 2 images. Published: 53.8 box AP, 48.1 mask AP.

sh tools/dist_train.sh configs/piip/baseline/mask_rcnn_internvit_6b_fpn_1x_coco_bs16_ms.py 8
"""

_base_ = ["../../_base_/mask_rcnn_internvit_1x.py", "../../_base_/coco_multiscale_1024.py"]
model = dict(backbone=dict(spec="internvit-6b-1024"))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.95))

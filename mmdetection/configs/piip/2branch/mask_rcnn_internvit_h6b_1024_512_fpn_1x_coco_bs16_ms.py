"""Mask R-CNN, PIIP-H6B 1024/512 (MAE, InternViT-6B), 1x, 8 GPUs x 2 images. Published: 55.8 box AP, 49.0 mask AP.

sh tools/dist_train.sh configs/piip/2branch/mask_rcnn_internvit_h6b_1024_512_fpn_1x_coco_bs16_ms.py 8
"""

_base_ = ["../../_base_/mask_rcnn_internvit_1x.py", "../../_base_/coco_multiscale_1024.py"]
model = dict(backbone=dict(spec="internvit-h6b-1024-512"))

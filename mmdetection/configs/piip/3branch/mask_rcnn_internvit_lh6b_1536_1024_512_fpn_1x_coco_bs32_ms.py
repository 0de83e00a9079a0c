"""Mask R-CNN, PIIP-LH6B 1536/1024/512 (DeiT III, MAE, InternViT-6B), 1x, 16 GPUs x 2 images. Published: no figure.

sh tools/dist_train.sh configs/piip/3branch/mask_rcnn_internvit_lh6b_1536_1024_512_fpn_1x_coco_bs32_ms.py 16
"""

_base_ = ["../../_base_/mask_rcnn_internvit_1x.py", "../../_base_/coco_multiscale_1536.py"]
model = dict(backbone=dict(spec="internvit-lh6b-1536-1024-512"))
optim_wrapper = dict(optimizer=dict(lr=2e-4))

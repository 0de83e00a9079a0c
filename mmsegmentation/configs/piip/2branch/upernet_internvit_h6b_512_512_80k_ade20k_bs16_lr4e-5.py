"""UperNet, PIIP-H6B 512/512 (MAE, InternViT-6B), 80k, 8 GPUs x 2 images. Published: 59.85 mIoU.

sh tools/dist_train.sh configs/piip/2branch/upernet_internvit_h6b_512_512_80k_ade20k_bs16_lr4e-5.py 8
"""

_base_ = ["../../_base_/upernet_internvit_80k.py"]
model = dict(backbone=dict(spec="internvit-h6b-512-512"))

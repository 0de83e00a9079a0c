"""UperNet, InternViT-6B 512, 80k, 8 GPUs x 2 images. Published: 58.42 mIoU.

sh tools/dist_train.sh configs/piip/baseline/upernet_internvit_6b_512_80k_ade20k_bs16_lr4e-5.py 8
"""

_base_ = ["../../_base_/upernet_internvit_80k.py"]
model = dict(backbone=dict(spec="internvit-6b-512"))

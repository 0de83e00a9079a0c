"""UperNet, ViT-L 640 (DeiT III), 160k, 8 GPUs x 2 images. Published: 53.6 mIoU; no released weights.

sh tools/dist_train.sh configs/piip/baseline/upernet_deit_vit_l_640_160k_ade20k_bs16_lr4e-5.py 8
"""

_base_ = ["../../_base_/upernet_deit_160k_640.py"]
model = dict(
    backbone=dict(spec="deit3-l-640"),
    decode_head=dict(in_channels=[1024] * 4),
    auxiliary_head=dict(in_channels=1024),
)

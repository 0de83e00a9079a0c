"""UperNet, PIIP-SBL 1120/448/336 (DeiT III), 160k, 8 GPUs x 2 images. Published: 54.3 mIoU; no released weights.

sh tools/dist_train.sh configs/piip/3branch/upernet_deit_sbl_1120_448_336_160k_ade20k_bs16_lr4e-5.py 8
"""

_base_ = ["../../_base_/upernet_160k.py"]
model = dict(
    backbone=dict(spec="deit3-sbl-1120-448-336"),
    decode_head=dict(in_channels=[1024] * 4),
    auxiliary_head=dict(in_channels=1024),
)

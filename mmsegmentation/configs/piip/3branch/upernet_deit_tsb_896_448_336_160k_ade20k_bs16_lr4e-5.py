"""UperNet, PIIP-TSB 896/448/336 (DeiT III), 160k, 8 GPUs x 2 images. Published: 51.6 mIoU; no released weights.

sh tools/dist_train.sh configs/piip/3branch/upernet_deit_tsb_896_448_336_160k_ade20k_bs16_lr4e-5.py 8
"""

_base_ = ["../../_base_/upernet_160k.py"]
model = dict(
    backbone=dict(spec="deit3-tsb-896-448-336"),
    decode_head=dict(in_channels=[768] * 4),
    auxiliary_head=dict(in_channels=768),
)

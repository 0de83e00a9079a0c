"""UperNet, ViT-B 640 (AugReg), 160k, 8 GPUs x 2 images. Published: 51.0 mIoU; no released weights.

sh tools/dist_train.sh configs/piip/baseline/upernet_augreg_vit_b_640_160k_ade20k_bs16_lr4e-5.py 8
"""

_base_ = ["../../_base_/upernet_160k_640.py"]
model = dict(
    backbone=dict(spec="augreg-b-640"),
    decode_head=dict(in_channels=[768] * 4),
    auxiliary_head=dict(in_channels=768),
)

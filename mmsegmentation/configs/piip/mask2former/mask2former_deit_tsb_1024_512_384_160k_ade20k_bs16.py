"""Mask2Former, PIIP-TSB 1024/512/384 (DeiT III), 160k, 8 GPUs x 2 images: another head on the same backbone.

An example of ours, in neither paper; not trained here.

    sh tools/dist_train.sh configs/piip/mask2former/mask2former_deit_tsb_1024_512_384_160k_ade20k_bs16.py 8
"""

_base_ = ["../../_base_/mask2former.py"]
model = dict(
    backbone=dict(spec=dict(base="deit3-tsb-896-448-336", resolutions=(384, 512, 1024), input_resolution=512)),
    decode_head=dict(in_channels=[768] * 4, strides=[2, 4, 8, 16]),
)

"""UperNet, three mini ConvNeXt branches and a regular FPN, on the mini data: what `make demo-seg` trains.

sh tools/dist_train.sh configs/piip/mini/upernet_mini_convnext-tsb_192_144_96.py 1
"""

_base_ = ["../../_base_/upernet_mini.py", "../../../../mmdetection/configs/_base_/mini_convnext.py"]
model = dict(
    backbone=dict(spec=_base_.mini_pyramid, taps=(0, 1, 2)),
    decode_head=dict(in_channels=[64, 96, 160, 224]),
    auxiliary_head=dict(in_channels=160),
)

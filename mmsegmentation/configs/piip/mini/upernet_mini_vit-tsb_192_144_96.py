"""UperNet, three mini ViT branches and a simple FPN, on the mini data.

sh tools/dist_train.sh configs/piip/mini/upernet_mini_vit-tsb_192_144_96.py 1
"""

_base_ = ["../../_base_/upernet_mini.py", "../../../../mmdetection/configs/_base_/mini_vit.py"]
model = dict(
    backbone=dict(spec=_base_.mini_pyramid, scales=(2, 1, 0.5)),
    decode_head=dict(in_channels=[128] * 3, in_index=[0, 1, 2]),
    auxiliary_head=dict(in_channels=128, in_index=1),
)

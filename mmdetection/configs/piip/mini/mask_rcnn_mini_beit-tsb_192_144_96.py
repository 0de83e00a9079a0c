"""Mask R-CNN, mini BEiT branches (relative position bias, windows) and a mini ViT, on the mini data.

sh tools/dist_train.sh configs/piip/mini/mask_rcnn_mini_beit-tsb_192_144_96.py 1
"""

_base_ = ["../../_base_/mask_rcnn_mini.py", "../../_base_/mini_vit.py"]
beit = dict(family="beit", pos_grid=None, rel_pos="window", qkv_bias="q_and_v", layer_scale=1e-2)
pyramid = _base_.mini_pyramid
for branch, window in zip(pyramid["branches"][:2], (6, 9), strict=True):
    branch.update(window=window, options={**branch["options"], **beit})
model = dict(backbone=dict(spec=pyramid, scales=(2, 1, 0.5)), neck=dict(in_channels=[128] * 3))

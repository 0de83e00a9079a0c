"""Mask R-CNN, three mini ViT branches and a simple FPN, on the mini data.

sh tools/dist_train.sh configs/piip/mini/mask_rcnn_mini_vit-tsb_192_144_96.py 1
"""

_base_ = ["../../_base_/mask_rcnn_mini.py"]
vit = dict(depth=4, patch_size=8, pos_grid=(8, 8), layer_scale=1.0, num_heads=4)
branches = [
    dict(arch="vit", resolution=96, options=dict(embed_dim=128, **vit)),
    dict(arch="vit", resolution=144, window=9, options=dict(embed_dim=96, **vit)),
    dict(arch="vit", resolution=192, window=12, options=dict(embed_dim=64, **vit)),
]
model = dict(
    backbone=dict(spec=dict(branches=branches, interactions=4, heads=4, drop_path=0.0), scales=(2, 1, 0.5)),
    neck=dict(in_channels=[128] * 3),
)

"""Three mini ViT branches for the mini data; of every task."""

vit = dict(depth=4, patch_size=8, pos_grid=(8, 8), layer_scale=1.0, num_heads=4)
mini_pyramid = dict(
    branches=[
        dict(arch="vit", resolution=96, options=dict(embed_dim=128, **vit)),
        dict(arch="vit", resolution=144, window=9, options=dict(embed_dim=96, **vit)),
        dict(arch="vit", resolution=192, window=12, options=dict(embed_dim=64, **vit)),
    ],
    interactions=4,
    heads=4,
    drop_path=0.0,
)

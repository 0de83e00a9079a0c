"""PIIP-TSB 368/192/128 from DeiT, ImageNet-1K, 20 epochs, 8 GPUs x 128 images. Published: top-1 82.1.

sh dist_train.sh piip_3branch_tsb_368-192-128_cls_token_deit1 8 --data-path data/imagenet
"""

model = dict(spec="cls-deit1-tsb-368-192-128", grad_checkpointing=True)
pretrained = "pretrained"

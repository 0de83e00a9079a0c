"""PIIP-SBL 384/192/128 from AugReg, ImageNet-1K, 20 epochs, 8 GPUs x 128 images. Published: top-1 85.9.

sh dist_train.sh piip_3branch_sbl_384-192-128_cls_token_augreg 8 --data-path data/imagenet
"""

model = dict(spec="cls-augreg-sbl-384-192-128", grad_checkpointing=True)
pretrained = "pretrained"

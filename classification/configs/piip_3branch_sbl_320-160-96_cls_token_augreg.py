"""PIIP-SBL 320/160/96 from AugReg, ImageNet-1K, 20 epochs, 8 GPUs x 128 images. Published: top-1 85.2.

sh dist_train.sh piip_3branch_sbl_320-160-96_cls_token_augreg 8 --data-path data/imagenet
"""

model = dict(spec="cls-augreg-sbl-320-160-96", grad_checkpointing=True)
pretrained = "pretrained"

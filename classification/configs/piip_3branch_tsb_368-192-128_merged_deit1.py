"""PIIP-TSB 368/192/128 from DeiT with one head on the merged branches, ImageNet-1K. Not trained by us: not measured.

sh dist_train.sh piip_3branch_tsb_368-192-128_merged_deit1 8 --data-path data/imagenet
"""

model = dict(spec="cls-deit1-tsb-368-192-128", head="merged", grad_checkpointing=True)
pretrained = "pretrained"

"""PIIP-B 512/256/128 from scratch, 300 epochs (paper, appendix A.3 and Table 13). Paper: top-1 82.7.

The paper says "the recipe of DeiT III" and no more; the options below are that recipe's for its base model.

sh dist_train.sh piip_3branch_scratch-b_512-256-128_merged 8 --batch-size 256 --data-path data/imagenet
"""

model = dict(spec="cls-scratch-b-512-256-128", grad_checkpointing=True)
recipe = dict(
    epochs=300, opt="lamb", lr=3e-3, unscale_lr=True, weight_decay=0.02, warmup_epochs=5, min_lr=1e-5,
    bce_loss=True, smoothing=0.0, clip_grad=1.0, ThreeAugment=True, repeated_aug=True, reprob=0.0,
    mixup=0.8, cutmix=1.0, model_ema=False,
)  # fmt: skip

"""What detectors with anchors on a pyramid have in common: 12 epochs, 16 images per step (8 GPUs x 2)."""

_base_ = ["mmdet::_base_/schedules/schedule_1x.py", "mmdet::_base_/default_runtime.py", "./runtime.py"]
custom_imports = dict(imports=["piip.integrations.mmengine"], allow_failed_imports=False)
on_a_pyramid = dict(
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3, pad_size_divisor=224),
    # The folder is relative to where the command runs, see the README.
    backbone=dict(_delete_=True, type="mmengine.PIIPBackbone", pretrained="pretrained"),
)
# bf16 with --amp; the published rows were trained in bf16.
optim_wrapper = dict(
    constructor="LayerDecayOptimWrapperConstructor",
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.85),
)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1))

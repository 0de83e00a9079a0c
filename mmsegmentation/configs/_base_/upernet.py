"""UperNet on a pyramid, 80k iterations of 16 crops (8 GPUs x 2) of 512 pixels.

A row adds its data, its spec and its widths.
"""

_base_ = [
    "mmseg::_base_/models/upernet_r50.py",
    "mmseg::_base_/schedules/schedule_80k.py",
    "mmseg::_base_/default_runtime.py",
    "../../../mmdetection/configs/_base_/runtime.py",
]
custom_imports = dict(imports=["piip.integrations.mmseg"], allow_failed_imports=False)
model = dict(
    type="PIIPEncoderDecoder",
    pretrained=None,
    data_preprocessor=dict(size=(512, 512)),
    # The folder is relative to where the command runs, see the README.
    backbone=dict(_delete_=True, type="mmengine.PIIPBackbone", pretrained="pretrained"),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
# bf16 with --amp; the published rows were trained in bf16, the heads in float32.
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="LayerDecayOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=4e-5, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.95),
)
# The learning rate is the product of both: it falls from the first iteration on.
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=80000),
]
train_cfg = dict(val_interval=1000)
default_hooks = dict(checkpoint=dict(interval=2000, max_keep_ckpts=1))
auto_scale_lr = dict(enable=False, base_batch_size=16)

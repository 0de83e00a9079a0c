"""Mask2Former on a pyramid, as mmsegmentation trains it on ADE20K: 160k iterations of 16 crops (8 GPUs x 2).

A row adds its spec, its widths and its strides.
"""

_base_ = [
    "mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py",
    "../../../mmdetection/configs/_base_/runtime.py",
]
custom_imports = dict(_delete_=True, imports=["piip.integrations.mmseg", "mmdet.models"], allow_failed_imports=False)
model = dict(
    type="PIIPEncoderDecoder",
    # The folder is relative to where the command runs, see the README.
    backbone=dict(_delete_=True, type="mmengine.PIIPBackbone", pretrained="pretrained"),
)

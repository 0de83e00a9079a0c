"""UperNet on InternViT-6B and pyramids with it; activations are recomputed to save memory."""

_base_ = ["./upernet.py", "./ade20k.py"]
model = dict(
    backbone=dict(grad_checkpointing=True),
    decode_head=dict(in_channels=[3200] * 4, channels=1536),
    auxiliary_head=dict(in_channels=3200, channels=1536),
)

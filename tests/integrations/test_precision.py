"""bfloat16 in the backbone, float32 behind it: under autocast, and where an engine stores all weights in bfloat16."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import nn

import piip.integrations.mmengine  # noqa: F401  (stands in for mmcv's compiled ops, so it comes before mmdet)

# isort: split
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks

from piip.integrations.precision import bfloat16_backbone, compute_in_float32

MINI = Path(__file__).resolve().parents[2] / "mmdetection" / "configs" / "piip" / "mini"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_boxes_of_a_detector_are_in_float32(stored):
    """Proposals and losses, which mmdet computes in the type of the heads' outputs."""
    cfg = Config.fromfile(MINI / "mask_rcnn_mini_vit-tsb_192_144_96.py")
    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).to(stored)
    if stored == torch.bfloat16:
        compute_in_float32(model, leave_out=model.backbone)
    sizes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), (192, 192))
    objects = InstanceData(
        bboxes=torch.tensor([[10.0, 10.0, 60.0, 50.0]]),
        labels=torch.tensor([3]),
        masks=BitmapMasks(np.ones((1, 192, 192), dtype=np.uint8), 192, 192),
    )
    sample = DetDataSample(metainfo={**sizes, "scale_factor": (1, 1)}, gt_instances=objects)
    seen = {}
    model.backbone.merge.register_forward_hook(lambda *args: seen.update(merge=args[2].dtype))
    model.roi_head.bbox_roi_extractor.register_forward_hook(lambda *args: seen.update(rois=args[1][1].dtype))
    model.roi_head.bbox_head.fc_reg.register_forward_hook(lambda *args: seen.update(head=args[2].dtype))
    with bfloat16_backbone(model):
        losses = model.loss(torch.rand(1, 3, 192, 192), [sample])
        model.parse_losses(losses)[0].backward()
    assert seen == {"merge": torch.bfloat16, "rois": torch.float32, "head": torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {stored}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert model.rpn_head.rpn_reg.weight.grad.any()
    assert any(p.grad.any() for p in model.backbone.pyramid.parameters() if p.grad is not None)
    with torch.no_grad(), bfloat16_backbone(model.eval()):
        (found,) = model.predict(torch.rand(1, 3, 192, 192), [sample])
    assert found.pred_instances.bboxes.dtype == found.pred_instances.scores.dtype == torch.float32


def test_layers_stored_in_bfloat16_compute_in_float32():
    """The result is that of a float32 model with the same, rounded weights; gradients reach what is stored."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(16, 16)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.norm, self.head = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 1))

        def forward(self, x):
            x = self.backbone(x).float()
            return self.head(self.norm(self.attention(x, x, x)[0]))

    torch.manual_seed(0)
    stored, whole = Model().bfloat16(), Model()
    whole.load_state_dict(stored.state_dict())
    whole.backbone.bfloat16()
    x = torch.randn(2, 5, 16, dtype=torch.bfloat16)
    compute_in_float32(stored, leave_out=stored.backbone)
    out, expected = stored(x), whole(x)
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}
    for one, other in zip(stored.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad.float(), other.grad.float(), rtol=0.01, atol=1e-3)

"""The mini DINO of `mmdetection/configs/piip/mini`, on mini data."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="needs the detection extra")

from piip.integrations.mmdet_dino import PIIPDINO

# isort: split
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "mmdetection" / "tools"
DINO = ROOT / "mmdetection" / "configs" / "piip" / "mini" / "dino_mini_vit-tsb_192_144_96.py"

RECORDED = f"""
_base_ = [{str(DINO)!r}]
custom_imports = dict(imports=["piip.integrations.mmdet_dino", "toy_task"])
model = dict(backbone=dict(pretrained=None))
custom_hooks = [dict(type="mmengine.RecordLosses", path="losses")]
train_dataloader = dict(batch_size=2)
train_cfg = dict(max_epochs=1, val_interval=1)
"""


def test_trains_and_evaluates(mini_data, tool, losses, tmp_path, monkeypatch):
    monkeypatch.setenv("PIIP_DATA", str(mini_data.parent))
    path = tmp_path / "config.py"
    path.write_text(RECORDED)
    run = tool(sys.executable, TOOLS / "train.py", path, "--work-dir", "run")
    assert run.returncode == 0, run.stderr
    recorded = losses()
    assert len(recorded) == 4
    parts = {f"{stage}loss_{kind}" for stage in ("", "enc_", "dn_", "d0.", "d0.dn_") for kind in ("cls", "bbox", "iou")}
    assert all(parts <= line.keys() for line in recorded.values())
    assert all(0 < float.fromhex(line["loss"]) < 1000 for line in recorded.values())
    run = tool(sys.executable, TOOLS / "test.py", path, "run/epoch_1.pth", "--eval", "bbox")
    assert run.returncode == 0, run.stderr
    assert "coco/bbox_mAP_50" in run.stdout


def samples(*boxes: list[list[float]]) -> list[DetDataSample]:
    shape = {"img_shape": (64, 64), "batch_input_shape": (64, 64)}
    objects = [torch.tensor(b).reshape(-1, 4) for b in boxes]
    return [
        DetDataSample(metainfo=shape, gt_instances=InstanceData(bboxes=b, labels=torch.arange(len(b)))) for b in objects
    ]


def step(model: PIIPDINO, images: torch.Tensor, found: list[DetDataSample]) -> float:
    model.zero_grad()
    losses = model.loss(images, found)
    loss = sum(torch.as_tensor(value).sum() for value in losses.values())
    loss.backward()
    return loss.item()


def test_every_parameter_learns_with_and_without_objects_in_the_images():
    init_default_scope("mmdet")
    model = MODELS.build(Config.fromfile(DINO).model)
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.rand(2, 3, 64, 64)
    found = samples([[4.0, 8.0, 30.0, 40.0], [20.0, 20.0, 60.0, 50.0]], [[10.0, 5.0, 44.0, 22.0]])
    curve = []
    for _ in range(12):
        curve.append(step(model, images, found))
        optimizer.step()
    assert curve[-1] < 0.7 * curve[0]
    for objects in (found, samples([], [[10.0, 5.0, 44.0, 22.0]]), samples([], [])):
        assert step(model, images, objects) > 0
        # Under DDP a parameter without a gradient would stop the run.
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

"""The mini detectors of `mmdetection/configs/piip/mini` through the command line, on mini data."""

import signal
import sys
from pathlib import Path

import pytest
import torch
from tensors import relative_difference

from piip.checkpoint import read_state_dict

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "mmdetection" / "tools"
MINI = ROOT / "mmdetection" / "configs" / "piip" / "mini"
VIT = MINI / "mask_rcnn_mini_vit-tsb_192_144_96.py"
BEIT = MINI / "mask_rcnn_mini_beit-tsb_192_144_96.py"
CONVNEXT = MINI / "mask_rcnn_mini_convnext-tsb_192_144_96_regular-fpn.py"


RECORDED = """
custom_imports = dict(imports=["piip.integrations.mmengine", "toy_task", "average_loss"])
model = dict(backbone=dict(pretrained=None))
custom_hooks = [dict(type="mmengine.RecordLosses", path="losses"), dict(type="mmengine.RecordEnd", path="end")]
train_dataloader = dict(batch_size=2)
train_cfg = dict(max_epochs=1, val_interval=1)
"""


@pytest.mark.parametrize(
    "base", [VIT, CONVNEXT, pytest.param(BEIT, marks=pytest.mark.slow)], ids=["vit", "convnext", "beit"]
)
def test_trains_and_evaluates(base, config, tool, losses, tmp_path):
    path = config(base, RECORDED)
    run = tool(sys.executable, TOOLS / "train.py", path, "--work-dir", "run")
    assert run.returncode == 0, run.stderr
    recorded = losses()
    assert len(recorded) == 4
    names = {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"}
    assert all(names <= line.keys() and float.fromhex(line["loss"]) > 0 for line in recorded.values())
    run = tool(sys.executable, TOOLS / "test.py", path, "run/epoch_1.pth", "--eval", "bbox", "--show-dir", "drawn")
    assert run.returncode == 0, run.stderr
    assert "coco/bbox_mAP_50" in run.stdout
    assert len([*Path(tmp_path, "drawn").rglob("*.*")]) == 2


ENGINES = [
    pytest.param((), id="ddp"),
    *(pytest.param(("--deepspeed", f"zero{stage}"), id=f"zero{stage}", marks=pytest.mark.slow) for stage in (1, 2, 3)),
]

CURVE = (
    RECORDED
    + """
param_scheduler = None
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=5))
train_dataloader = dict(batch_size=2, num_workers=1)
train_cfg = dict(max_epochs=5)
custom_hooks = [
    dict(type="mmengine.RecordLosses", path="losses"),
    dict(type="mmengine.RecordEnd", path="end"),
    dict(type="mmengine.KillAt"),
]
"""
)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("precision", [(), ("--amp",)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_resume_and_are_evaluated_by_one(engine, precision, config, tool, losses, tmp_path):
    """The loss falls, ranks agree, a killed run continues its curve, one plain process reads the checkpoint."""
    path = config(VIT, CURVE)
    train = ("bash", TOOLS / "dist_train.sh", path, "2", *engine, *precision)
    whole = tool(*train, "--work-dir", "whole", "--cfg-options", "custom_hooks.0.path=whole")
    assert whole.returncode == 0, whole.stderr
    assert "Evaluating bbox" in whole.stdout  # and training goes on alike, whatever was found
    ends = [torch.load(tmp_path / f"end.{rank}") for rank in range(2)]
    assert len(ends[0]) > 300
    for name, parameter in ends[0].items():
        assert torch.equal(parameter, ends[1][name]), name
    curves = [losses(f"whole.{rank}") for rank in range(2)]
    for curve in curves:
        values = [float.fromhex(line["loss"]) for line in curve.values()]
        assert len(values) == 10 and sum(values[-3:]) < 0.8 * sum(values[:3])

    killed = tool(*train, "--work-dir", "run", "--cfg-options", "custom_hooks.2.iteration=7")
    assert killed.returncode != 0
    for rank in range(2):
        (tmp_path / f"losses.{rank}").unlink()
    resumed = tool(*train, "--work-dir", "run", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for rank in range(2):
        assert losses(f"losses.{rank}") == {number: curves[rank][number] for number in range(5, 10)}

    run = tool(sys.executable, TOOLS / "test.py", path, "run/iter_10.pth", "--eval", "bbox")
    assert run.returncode == 0, run.stderr
    assert "Evaluating bbox" in run.stdout
    tolerance = {"rtol": 0.0, "atol": 0.0} if not precision else {"rtol": 0.01, "atol": 1e-6}  # of masters and bfloat16
    state = read_state_dict(tmp_path / "run" / "iter_10.pth")
    for name, parameter in ends[0].items():
        torch.testing.assert_close(state[name].float(), parameter.float(), **tolerance)


AVERAGE = """
custom_imports = dict(imports=["piip.integrations.mmengine", "toy_task", "average_loss"])
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs"),
]
model = dict(type="mmengine.AverageLossDetector", backbone=dict(pretrained=None))
train_dataloader = dict(sampler=dict(shuffle=False), num_workers=0, dataset=dict(pipeline=pipeline))
optim_wrapper = dict(_delete_=True, type="OptimWrapper", optimizer=dict(type="SGD", lr=0.05))
custom_hooks = [dict(type="mmengine.RecordEnd", path="end"), dict(type="mmengine.RecordFirstGradients", path="first")]
param_scheduler = None
train_cfg = dict(max_epochs=5)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one_with_twice_the_batch(engine, config, tool, tmp_path):
    """First-step gradients to 1e-5, 20 steps of SGD to 1e-4, with the whole pyramid."""
    path = config(VIT, AVERAGE)
    for name, batch, command in (
        ("one", 2, (sys.executable, TOOLS / "train.py", path)),
        ("two", 1, ("bash", TOOLS / "dist_train.sh", path, "2", *engine)),
    ):
        run = tool(
            *command, "--work-dir", name, "--no-validate", "--cfg-options", f"train_dataloader.batch_size={batch}",
            f"custom_hooks.0.path={name}.end", f"custom_hooks.1.path={name}.gradients",
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
    for recorded, tolerance in (("gradients", 1e-5), ("end", 1e-4)):
        one, two = (torch.load(tmp_path / f"{name}.{recorded}.0") for name in ("one", "two"))
        assert len(one) > 200 and one.keys() <= two.keys()
        assert relative_difference([*one.values()], [two[name] for name in one]) < tolerance
        assert all(not two[name].any() for name in two.keys() - one.keys())


def test_resumes_exactly_after_sigkill(config, tool, losses, tmp_path):
    """The detector, its augmentations in a worker, its sampling of proposals: all of it continues to the last bit."""
    kill = 'custom_hooks = [dict(type="mmengine.RecordLosses", path="losses"), dict(type="mmengine.KillAt")]\n'
    path = config(VIT, RECORDED + kill)
    options = ["default_hooks.checkpoint.by_epoch=False", "default_hooks.checkpoint.interval=2"]
    train = (sys.executable, TOOLS / "train.py", path, "--no-validate")
    whole = tool(*train, "--work-dir", "whole", "--cfg-options", *options, "custom_hooks.0.path=whole")
    assert whole.returncode == 0, whole.stderr
    killed = tool(*train, "--work-dir", "run", "--cfg-options", *options, "custom_hooks.1.iteration=3")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    Path(tmp_path, "losses.0").unlink()
    resumed = tool(*train, "--work-dir", "run", "--resume", "--cfg-options", *options)
    assert resumed.returncode == 0, resumed.stderr
    expected = losses("whole.0")
    assert losses() == {number: expected[number] for number in (2, 3)}

"""The mini detectors of `mmdetection/configs/piip/mini` through the command line, on mini data."""

import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "mmdetection" / "tools"
MINI = ROOT / "mmdetection" / "configs" / "piip" / "mini"
VIT = MINI / "mask_rcnn_mini_vit-tsb_192_144_96.py"
CONVNEXT = MINI / "mask_rcnn_mini_convnext-tsb_192_144_96_regular-fpn.py"


@pytest.fixture
def config(tmp_path: Path, mini_data: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that writes a config based on a mini one; the mini data is where it looks for it."""
    monkeypatch.setenv("PIIP_DATA", str(mini_data.parent))

    def write(base: Path, text: str) -> Path:
        path = tmp_path / "config.py"
        path.write_text(f"_base_ = [{str(base)!r}]\n{text}\n")
        return path

    return write


RECORDED = """
custom_imports = dict(imports=["piip.integrations.mmengine", "toy_task", "average_loss"])
model = dict(backbone=dict(pretrained=None))
custom_hooks = [dict(type="mmengine.RecordLosses", path="losses"), dict(type="mmengine.RecordEnd", path="end")]
train_dataloader = dict(batch_size=2)
train_cfg = dict(max_epochs=1, val_interval=1)
"""


@pytest.mark.parametrize("base", [VIT, CONVNEXT], ids=["vit", "convnext"])
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


@pytest.mark.distributed
def test_ranks_stay_identical(config, tool, tmp_path):
    run = tool("bash", TOOLS / "dist_train.sh", config(VIT, RECORDED), "2", "--no-validate", "--work-dir", "run")
    assert run.returncode == 0, run.stderr
    ends = [torch.load(tmp_path / f"end.{rank}") for rank in range(2)]
    assert len(ends[0]) > 300
    for name, parameter in ends[0].items():
        assert torch.equal(parameter, ends[1][name]), name


AVERAGE = """
custom_imports = dict(imports=["piip.integrations.mmengine", "toy_task", "average_loss"])
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs"),
]
model = dict(type="mmengine.AverageLossDetector", backbone=dict(pretrained=None))
train_dataloader = dict(sampler=dict(shuffle=False), num_workers=0, dataset=dict(pipeline=pipeline))
optim_wrapper = dict(
    _delete_=True, type="mmengine.RecordFirstGradients", path="gradients", optimizer=dict(type="SGD", lr=0.05)
)
custom_hooks = [dict(type="mmengine.RecordEnd", path="end")]
param_scheduler = None
train_cfg = dict(max_epochs=5)
"""


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    one, other = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (one, other))
    return ((one - other).norm() / one.norm()).item()


@pytest.mark.distributed
def test_two_processes_train_as_one_with_twice_the_batch(config, tool, tmp_path):
    """First-step gradients to 1e-5, 20 steps of SGD to 1e-4, with the whole pyramid."""
    path = config(VIT, AVERAGE)
    train = ("--no-validate", "--cfg-options")
    one = tool(
        sys.executable, TOOLS / "train.py", path, "--work-dir", "one", *train, "train_dataloader.batch_size=2",
        "optim_wrapper.path=one.gradients", "custom_hooks.0.path=one.end",
    )  # fmt: skip
    assert one.returncode == 0, one.stderr
    two = tool(
        "bash", TOOLS / "dist_train.sh", path, "2", "--work-dir", "two", *train, "train_dataloader.batch_size=1",
        "optim_wrapper.path=two.gradients", "custom_hooks.0.path=two.end",
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    gradients = [torch.load(tmp_path / f"{name}.gradients.0") for name in ("one", "two")]
    assert len(gradients[0]) > 200 and difference(*gradients) < 1e-5
    ends = [torch.load(tmp_path / f"{name}.end.0") for name in ("one", "two")]
    assert difference([*ends[0].values()], [*ends[1].values()]) < 1e-4


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

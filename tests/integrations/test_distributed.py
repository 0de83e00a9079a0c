"""Two CPU processes (gloo): they agree with each other, and with one process that has twice the batch."""

import sys
from pathlib import Path

import pytest
import torch
from tensors import relative_difference

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "mmdetection" / "tools"
CONFIG = Path(__file__).with_name("toy") / "toy.py"

# Equality with one process: nothing random in data or model, a fixed order, and a loss that averages over images.
FIXED = ("model.dropout=0", "train_dataloader.dataset.noise=0", "train_dataloader.sampler.shuffle=False")


def test_two_processes_train_as_one_with_twice_the_batch(tool, tmp_path):
    options = [*FIXED, "optim_wrapper.optimizer.type=SGD", "train_cfg.max_epochs=2"]
    record = ["custom_hooks.0.type=RecordFirstGradients", "custom_hooks.1.type=RecordEnd"]

    def paths(name: str) -> list[str]:
        return [f"custom_hooks.0.path={name}.gradients", f"custom_hooks.1.path={name}.end", f"work_dir={name}"]

    one = tool(
        sys.executable, TOOLS / "train.py", CONFIG,
        "--cfg-options", *options, *record, *paths("one"), "train_dataloader.batch_size=4",
    )  # fmt: skip
    assert one.returncode == 0, one.stderr
    two = tool("sh", TOOLS / "dist_train.sh", CONFIG, "2", "--cfg-options", *options, *record, *paths("two"))
    assert two.returncode == 0, two.stderr

    for recorded in ("gradients", "end"):
        one, two = (torch.load(tmp_path / f"{name}.{recorded}.0") for name in ("one", "two"))
        assert len(one) == 4 and one.keys() == two.keys()
        assert relative_difference([*one.values()], [*two.values()]) < 1e-5


def test_ranks_stay_identical_and_resume(tool, losses, tmp_path):
    """With augmentation, dropout, validation and workers; killed in the second epoch, with a checkpoint within it."""
    train = ("sh", TOOLS / "dist_train.sh", CONFIG, "2", "--diff-seed", "--cfg-options")
    options = [
        "custom_hooks.1.type=RecordEnd",
        "train_dataloader.num_workers=1",
        "default_hooks.checkpoint.by_epoch=False",
        "default_hooks.checkpoint.interval=4",
        "train_cfg.max_epochs=3",
    ]
    whole = tool(*train, *options, "custom_hooks.1.path=end", "custom_hooks.0.path=whole", "work_dir=whole")
    assert whole.returncode == 0, whole.stderr
    ends = [torch.load(tmp_path / f"end.{rank}") for rank in range(2)]
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) == 4
    for name, parameter in ends[0].items():
        assert torch.equal(parameter, ends[1][name]), name
    # Each process has its own images.
    data = [[line["data"] for line in losses(f"whole.{rank}").values()] for rank in range(2)]
    assert {tuple(batch) for batch in data[0]} != {tuple(batch) for batch in data[1]}

    kill = ["custom_hooks.1.type=KillAt", "custom_hooks.1.iteration=6", "train_cfg.max_epochs=3"]
    killed = tool(*train, *options, *kill, "work_dir=run")
    assert killed.returncode != 0
    for rank in range(2):
        Path(tmp_path, f"losses.{rank}").unlink()
    train = (*train[:4], "--resume", *train[4:])
    resumed = tool(*train, *options, "custom_hooks.1.path=end", "work_dir=run")
    assert resumed.returncode == 0, resumed.stderr
    for rank in range(2):
        expected = losses(f"whole.{rank}")
        assert losses(f"losses.{rank}") == {number: expected[number] for number in range(4, len(expected))}


def test_two_processes_evaluate_every_image_once(tool, toy):
    toy({"work_dir": "run", "train_cfg.max_epochs": 1}).train()
    run = tool(
        "sh", TOOLS / "dist_test.sh", CONFIG, "run/epoch_1.pth", "2", "--cfg-options", "test_dataloader.dataset.size=5"
    )
    assert run.returncode == 0, run.stderr
    assert "count: 5" in run.stdout


def test_syncbn_trains_without_cuda(tool):
    if torch.cuda.is_available():
        pytest.skip("SyncBN works where there is CUDA")
    options = ("model.norm=True", "train_dataloader.batch_size=5", "train_cfg.max_epochs=1")
    run = tool("sh", TOOLS / "dist_train.sh", CONFIG, "1", "--cfg-options", *options)
    assert run.returncode == 0, run.stderr
    assert "SyncBN has no CPU kernel" in run.stdout + run.stderr

"""An interrupted run continues with the next batch and repeats the losses of an uninterrupted one, bit for bit."""

import signal
import sys
from pathlib import Path

import pytest
from mmengine.hooks import Hook

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "mmdetection" / "tools" / "train.py"
CONFIG = Path(__file__).with_name("toy") / "toy.py"

BY_ITERATION = {"default_hooks.checkpoint.by_epoch": False, "default_hooks.checkpoint.interval": 3}
BEST = {"default_hooks.checkpoint.save_best": "mean", "default_hooks.checkpoint.rule": "less"}
ITER_LOOP = {
    **BY_ITERATION,
    "train_cfg": {"by_epoch": False, "max_iters": 20, "val_interval": 5},
    "param_scheduler.1.by_epoch": False,
    "param_scheduler.1.milestones": [8, 14],
    "log_processor": {"by_epoch": False},
}


class Interrupted(Exception):
    pass


class InterruptAt(Hook):
    priority = "LOWEST"

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.iter + 1 == self.iteration:
            raise Interrupted


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("overrides", "stop", "checkpoint", "first"),
    [
        pytest.param(BY_ITERATION, 8, "iter_6.pth", 6, id="epochs-within"),
        pytest.param({}, 12, "epoch_2.pth", 10, id="epochs-between"),
        pytest.param({**BY_ITERATION, "default_hooks.checkpoint.interval": 5}, 6, "iter_5.pth", 5, id="epochs-edge"),
        pytest.param(BEST, 12, "epoch_2.pth", 10, id="epochs-best"),
        pytest.param(ITER_LOOP, 13, "iter_12.pth", 12, id="iters-finite"),
        pytest.param(
            {**ITER_LOOP, "train_dataloader.sampler.type": "InfiniteSampler"},
            13,
            "iter_12.pth",
            12,
            id="iters-infinite",
        ),
    ],
)
def test_resumed_run_repeats_the_losses(toy, losses, overrides, stop, checkpoint, first, workers):
    overrides = {**overrides, "train_dataloader.num_workers": workers}
    toy({**overrides, "work_dir": "whole", "custom_hooks.0.path": "whole"}).train()
    expected = losses("whole.0")
    assert sorted(expected) == list(range(20))

    interrupted = toy(overrides)
    interrupted.register_hook(InterruptAt(stop))
    with pytest.raises(Interrupted):
        interrupted.train()
    assert losses() == {number: expected[number] for number in range(stop)}
    assert Path("run/last_checkpoint").read_text().endswith(checkpoint)

    Path("losses.0").unlink()
    toy({**overrides, "resume": True}).train()
    assert losses() == {number: expected[number] for number in range(first, 20)}


def test_grouping_by_aspect_ratio_resumes(toy, losses):
    pytest.importorskip("mmdet")
    overrides = {**BY_ITERATION, "train_dataloader.batch_sampler": {"type": "mmdet.AspectRatioBatchSampler"}}
    toy({**overrides, "work_dir": "whole", "custom_hooks.0.path": "whole"}).train()
    interrupted = toy(overrides)
    interrupted.register_hook(InterruptAt(8))
    with pytest.raises(Interrupted):
        interrupted.train()
    Path("losses.0").unlink()
    toy({**overrides, "resume": True}).train()
    expected = losses("whole.0")
    assert losses() == {number: expected[number] for number in range(6, 20)}


def test_other_epochs_draw_other_augmentations(toy):
    runner = toy()
    loop = runner.build_train_loop(runner.cfg.train_cfg)
    dataset = loop.dataloader.dataset
    assert (dataset[0, 3]["inputs"] == dataset[0, 3]["inputs"]).all()
    assert (dataset[0, 3]["inputs"] != dataset[1, 3]["inputs"])[:3].all()
    assert (dataset[0, 3]["inputs"] - dataset[0, 4]["inputs"]).diff().abs().max() > 1e-3


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_reaches_the_workers(toy, workers):
    runner = toy({"train_dataloader.num_workers": workers, "train_dataloader.sampler.shuffle": False})
    loop = runner.build_train_loop(runner.cfg.train_cfg)
    seen = []
    for epoch in range(2):
        loop.dataloader.batch_sampler.epoch = epoch
        seen.append([batch["inputs"] for batch in loop.dataloader])
    for epoch in range(2):
        for number, batch in enumerate(seen[epoch]):
            for row, sample in enumerate(batch):
                assert (sample == loop.dataloader.dataset[epoch, 2 * number + row]["inputs"]).all()
    assert all((one != other)[:, :3].all() for one, other in zip(*seen, strict=True))


def test_sigkill_and_resume(tool, losses, tmp_path):
    """Through the command line, with workers: killed between checkpoints, and while one is written."""
    options = [
        "default_hooks.checkpoint.by_epoch=False",
        "default_hooks.checkpoint.interval=3",
        "default_hooks.checkpoint.max_keep_ckpts=1",  # which must not be deleted before the next one is there
        "train_dataloader.num_workers=2",
        "train_cfg.max_epochs=3",
    ]
    train = (sys.executable, TRAIN, CONFIG, "--seed", "3")
    whole = tool(*train, "--work-dir", "whole", "--cfg-options", *options, "custom_hooks.0.path=whole")
    assert whole.returncode == 0, whole.stderr

    for resume, kill in (((), "iteration=8"), (("--resume",), "while_saving=iter_9.pth")):
        killed = tool(*train, "--work-dir", "run", *resume, "--cfg-options", *options, f"custom_hooks.1.{kill}")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert [path.name for path in Path(tmp_path, "run").glob("*.pth")] == ["iter_6.pth"]
    assert Path(tmp_path, "run", "iter_9.pth.part").exists()

    Path(tmp_path, "losses.0").unlink()
    resumed = tool(*train, "--work-dir", "run", "--resume", "--cfg-options", *options)
    assert resumed.returncode == 0, resumed.stderr
    expected = losses("whole.0")
    assert losses() == {number: expected[number] for number in range(6, 15)}
    assert [path.name for path in Path(tmp_path, "run").iterdir() if ".pth" in path.name] == ["iter_15.pth"]


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path):
    from piip.errors import CheckpointError
    from piip.integrations.saving import latest_checkpoint

    assert latest_checkpoint(tmp_path) is None
    import torch

    for number in (2, 9, 10):
        torch.save({"number": number}, tmp_path / f"epoch_{number}.pth")
    assert latest_checkpoint(tmp_path).name == "epoch_10.pth"
    content = (tmp_path / "epoch_10.pth").read_bytes()
    (tmp_path / "epoch_10.pth").write_bytes(content[: len(content) // 2])
    assert latest_checkpoint(tmp_path).name == "epoch_9.pth"
    for number in (2, 9):
        (tmp_path / f"epoch_{number}.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* is complete"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"randomness.seed": 8}, r"seed 7 \(here 8\)"),
        ({"train_dataloader.batch_size": 5}, r"batch_size 2 \(here 5\)"),
        ({"train_dataloader.dataset.size": 12}, r"dataset_size 10 \(here 12\)"),
    ],
)
def test_a_run_with_other_batches_is_not_continued(toy, change, named):
    from piip.integrations.preflight import RunError

    toy({"train_cfg.max_epochs": 1}).train()
    with pytest.raises(RunError, match=named):
        toy({**change, "resume": True}).train()

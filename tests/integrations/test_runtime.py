"""Checkpoints are whole, plain and read safely; runs start only where they may; precision and limits of the runner."""

import json
import os
import pickle
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import checkpoint as stock_checkpoint

import piip.integrations.runtime  # noqa: F401  (makes mmengine's loaders safe)
from piip.errors import CheckpointError
from piip.integrations.preflight import RUN_FILE, RunError, check_data, claim_work_dir
from piip.integrations.process import random_state, seeded, set_random_state, settle_before_forks
from piip.integrations.runtime import start_distributed
from piip.integrations.saving import load_from_file


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def draws() -> list[float]:
    import random

    import numpy as np

    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_random_state_survives_a_file(tmp_path):
    draws()  # leaves half of a Gaussian pair in two of the generators
    torch.save(random_state(), tmp_path / "state")
    expected = draws()
    draws()
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draws() == expected


def test_seeded_draws_the_same_and_leaves_no_trace():
    with seeded(1, 2, 3):
        first = draws()
    before = random_state()
    with seeded(1, 2, 3):
        assert draws() == first
    with seeded(1, 3, 2):
        assert not set(draws()) & set(first)
    expected = draws()
    set_random_state(before)
    assert draws() == expected


def test_threads_settle_before_each_fork(monkeypatch):
    """Without it, about one of ten thousand data workers never started: the next batch was awaited for ever."""
    hooks = []
    monkeypatch.setattr(os, "register_at_fork", lambda before: hooks.append(before))
    settle_before_forks.cache_clear()
    for version, expected in (((3, 12, 0), 0), ((3, 11, 7), 1), ((3, 11, 7), 1)):
        monkeypatch.setattr(sys, "version_info", version)
        settle_before_forks()
        if not expected:
            settle_before_forks.cache_clear()
        assert len(hooks) == expected
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    settle_before_forks.cache_clear()
    settle_before_forks()
    settle_before_forks.cache_clear()
    hooks[1]()
    assert slept and slept[0] >= 0.01


def test_the_process_without_a_gpu_says_so_itself(monkeypatch):
    """The first process has one, and waits for the others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RunError, match="process 1 of this machine has no GPU") as error:
        start_distributed("pytorch", {})
    assert not error.value.common


def test_own_checkpoints_hold_plain_values(toy):
    toy({"train_cfg.max_epochs": 1}).train()
    checkpoint = torch.load("run/epoch_1.pth", weights_only=True)  # torch's own list of types, nothing added to it
    assert checkpoint["meta"]["epoch"] == 1
    history = checkpoint["message_hub"]["log_scalars"]["train/loss"]
    assert history["log_history"].shape == (5,)
    assert len(checkpoint["exact_resume"]["random_states"]) == 1
    assert not list(Path("run").glob("*.part"))


def test_log_histories_continue(toy):
    toy({"train_cfg.max_epochs": 2}).train()
    resumed = toy({"train_cfg.max_epochs": 3, "resume": True})
    resumed.train()
    assert len(resumed.message_hub.get_scalar("train/loss").data[0]) == 15


@pytest.mark.parametrize("option", ["load_from", "resume"])
def test_a_checkpoint_that_runs_code_is_refused(toy, option):
    trap = Path("trap").resolve()
    torch.save({"state_dict": {}, "meta": Payload(trap)}, "evil.pth")
    runner = toy({"load_from": str(Path("evil.pth").resolve()), "resume": option == "resume"})
    with pytest.raises(CheckpointError, match=r"evil\.pth .*could run code"):
        runner.train()
    assert not trap.exists()


@pytest.mark.parametrize("load", [stock_checkpoint._load_checkpoint, stock_checkpoint.load_from_openmmlab])
def test_no_loader_of_mmengine_unpickles(tmp_path, monkeypatch, load):
    """`load_from_openmmlab` stands for the loaders that go their own way to the file."""
    monkeypatch.setenv("MMENGINE_HOME", str(tmp_path))
    monkeypatch.setattr(stock_checkpoint, "get_external_models", lambda: {"evil": "evil.pth"})
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Payload(tmp_path / "trap")}))
    name = "open-mmlab://evil" if load is stock_checkpoint.load_from_openmmlab else str(tmp_path / "evil.pth")
    with pytest.raises(CheckpointError):
        load(name)
    assert not (tmp_path / "trap").exists()


def test_downloads_are_read_safely(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "good.pth")
    torch.save({"state_dict": Payload(tmp_path / "trap")}, tmp_path / "evil.pth")
    good = (tmp_path / "good.pth").as_uri()
    assert stock_checkpoint.load_from_http(good)["state_dict"]["a"] == 1
    (tmp_path / "good.pth").unlink()
    assert stock_checkpoint.load_from_http(good)["state_dict"]["a"] == 1  # from the cache
    with pytest.raises(CheckpointError):
        stock_checkpoint.load_from_http((tmp_path / "evil.pth").as_uri())
    assert not (tmp_path / "trap").exists()


def test_stored_config_is_not_executed(toy):
    toy({"train_cfg.max_epochs": 1}).train()
    checkpoint = torch.load("run/epoch_1.pth", weights_only=True)
    checkpoint["meta"]["config"] = "__import__('pathlib').Path('trap').touch()"
    torch.save(checkpoint, "old.pth")
    toy({"train_cfg.max_epochs": 1, "load_from": "old.pth", "resume": True}).train()
    assert not Path("trap").exists()


@pytest.mark.parametrize("key", ["state_dict", "model", "module", None])
def test_weights_are_found_under_every_known_name(tmp_path, key):
    weights = {"a": torch.ones(1)}
    torch.save(weights if key is None else {key: weights}, tmp_path / "file.pth")
    assert load_from_file(tmp_path / "file.pth")["state_dict"]["a"] == 1


def test_evaluating_other_weights_is_an_error(toy):
    torch.save({"state_dict": {"layers.0.weight": torch.zeros(8, 4)}}, "part.pth")
    training = {"train_cfg": None, "train_dataloader": None, "optim_wrapper": None, "param_scheduler": None}
    with pytest.raises(CheckpointError, match=r"part\.pth does not fit the model .* missing keys .*layers\.0\.bias"):
        toy({**training, "load_from": "part.pth"}).test()
    toy({"load_from": "part.pth", "train_cfg.max_epochs": 1}).train()  # but a new run may start from a part


def test_a_checkpoint_between_optimizer_steps_says_so(toy):
    toy({"optim_wrapper.accumulative_counts": 2, "train_cfg.max_epochs": 2}).train()  # 5 iterations per epoch
    assert next(Path("run").glob("*/*.log")).read_text().count("lies between two steps of the optimizer") == 1


def test_what_cannot_be_stored_is_named(toy):
    runner = toy({"train_cfg.max_epochs": 1})
    runner.message_hub.update_info("oddity", {"inner": object(), "kept": [1]})
    runner.train()
    log = next(Path("run").glob("*/*.log")).read_text()
    assert "message_hub.runtime_info.oddity.inner (object)" in log
    stored = torch.load("run/epoch_1.pth", weights_only=True)["message_hub"]["runtime_info"]["oddity"]
    assert stored == {"kept": [1]}


def test_new_checkpoint_is_written_before_the_old_goes(toy, monkeypatch):
    runner = toy({"default_hooks.checkpoint.max_keep_ckpts": 1})
    seen = []
    save = runner.save_checkpoint

    def watch(*args, **kwargs):
        save(*args, **kwargs)
        seen.append(sorted(path.name for path in Path("run").glob("*.pth")))

    monkeypatch.setattr(runner, "save_checkpoint", watch)
    runner.train()
    assert seen[:3] == [["epoch_1.pth"], ["epoch_1.pth", "epoch_2.pth"], ["epoch_2.pth", "epoch_3.pth"]]
    assert [path.name for path in Path("run").glob("*.pth")] == ["epoch_4.pth"]


def test_evaluation_leaves_the_training_config_alone(toy):
    toy({"train_cfg.max_epochs": 1}).train()
    before = Path("run/toy.py").read_text()
    training = {"train_cfg": None, "train_dataloader": None, "optim_wrapper": None, "param_scheduler": None}
    metrics = toy({**training, "load_from": "run/epoch_1.pth", "test_dataloader.batch_size": 1}).test()
    assert metrics["count"] == 4
    assert Path("run/toy.py").read_text() == before


def test_bfloat16(toy):
    runner = toy({"optim_wrapper.type": "BFloat16OptimWrapper", "train_cfg.max_epochs": 1})
    seen = set()
    runner.model.layers[0].register_forward_hook(lambda module, args, out: seen.add((runner.model.training, out.dtype)))
    runner.train()
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert {p.dtype for p in runner.model.parameters()} == {torch.float32}


def test_data_without_a_batch(toy):
    with pytest.raises(RunError, match="gives no batch: 10 images, 16 per batch"):
        toy({"train_dataloader.batch_size": 16, "train_dataloader.drop_last": True}).train()


def coco(root: Path, **parts: list) -> Config:
    (root / "images").mkdir(exist_ok=True)
    content = {"images": [{"id": 1}], "annotations": [{"id": 1}], "categories": [{"id": 1}], **parts}
    (root / "ann.json").write_text(json.dumps(content))
    dataset = {"data_root": str(root), "ann_file": "ann.json", "data_prefix": {"img": "images/"}}
    return Config({"train_dataloader": {"dataset": {"type": "RepeatDataset", "dataset": dataset}}})


def test_complete_data_pass(tmp_path):
    check_data(coco(tmp_path), ("train_dataloader", "val_dataloader"))


@pytest.mark.parametrize("part", ["images", "annotations", "categories"])
def test_empty_annotations_are_named(tmp_path, part):
    with pytest.raises(RunError, match=rf"ann\.json is empty: it has no {part}"):
        check_data(coco(tmp_path, **{part: []}), ("train_dataloader",))


@pytest.mark.parametrize(("text", "said"), [("", "is empty"), ("{", "is not JSON")])
def test_broken_annotations_are_named(tmp_path, text, said):
    cfg = coco(tmp_path)
    (tmp_path / "ann.json").write_text(text)
    with pytest.raises(RunError, match=said):
        check_data(cfg, ("train_dataloader",))


@pytest.mark.parametrize(("missing", "field"), [("ann.json", "ann_file"), ("images", "data_prefix.img")])
def test_missing_data_are_named(tmp_path, missing, field):
    cfg = coco(tmp_path)
    (tmp_path / missing).rename(tmp_path / "away")
    name = f"train_dataloader.dataset.dataset.{field}"
    with pytest.raises(RunError, match=rf"{name}: .*{missing} does not exist .* --cfg-options {name}=PATH"):
        check_data(cfg, ("train_dataloader",))


def test_an_evaluator_without_its_file_is_named(tmp_path):
    cfg = coco(tmp_path)
    cfg.train_evaluator = {"type": "CocoMetric", "ann_file": "nowhere.json"}
    with pytest.raises(RunError, match=r"train_evaluator\.ann_file: nowhere\.json does not exist"):
        check_data(cfg, ("train_dataloader",))


def run_config(work_dir: Path, **changes) -> Config:
    return Config({"model": {"type": "A", "sizes": (1, 2)}, "work_dir": str(work_dir), "load_from": "start", **changes})


def test_a_free_work_dir_is_claimed_and_resumed(tmp_path):
    cfg = run_config(tmp_path / "run")
    claim_work_dir(cfg, resume="auto")  # nothing there yet: a requeued job always asks for it
    assert (cfg.resume, cfg.load_from) == (False, "start")
    claim_work_dir(cfg, resume=None)  # killed before the first checkpoint
    torch.save({}, tmp_path / "run" / "epoch_1.pth")
    claim_work_dir(cfg, resume="auto")
    assert (cfg.resume, cfg.load_from) == (True, str(tmp_path / "run" / "epoch_1.pth"))


def test_a_work_dir_with_checkpoints_is_not_overwritten(tmp_path):
    torch.save({}, tmp_path / "iter_1.pth")
    with pytest.raises(RunError, match=r"already holds a run: add --resume .* or choose another --work-dir"):
        claim_work_dir(run_config(tmp_path), resume=None)
    assert not (tmp_path / RUN_FILE).exists()


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_work_dir_of_another_config_is_refused(tmp_path, resume):
    claim_work_dir(run_config(tmp_path), resume=None)
    before = (tmp_path / RUN_FILE).read_text()
    with pytest.raises(RunError, match=r"holds another run, .*: model\.sizes is \[1, 2\] there and \[1, 3\] here;"):
        claim_work_dir(run_config(tmp_path, model={"type": "A", "sizes": (1, 3)}), resume)
    assert (tmp_path / RUN_FILE).read_text() == before


def test_a_resumed_run_may_use_other_workers_and_paths(tmp_path):
    claim_work_dir(run_config(tmp_path, train_dataloader={"num_workers": 2, "dataset": {"data_root": "a"}}), None)
    claim_work_dir(run_config(tmp_path, train_dataloader={"num_workers": 4, "dataset": {"data_root": "b"}}), "auto")

"""DeepSpeed in the runner: settings, limits, safe reading. What two processes do is in `test_mini_detector.py`."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from piip.checkpoint import read_state_dict
from piip.errors import CheckpointError, RunError
from piip.integrations import cli
from piip.integrations.zero import PRESETS, ZeRORunner, deepspeed_config

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "mmdetection" / "tools"
CONFIG = Path(__file__).with_name("toy") / "toy.py"
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the train extra")


def test_settings_from_a_preset_a_file_and_the_command_line(tmp_path):
    assert deepspeed_config("zero2") == PRESETS["zero2"] and deepspeed_config("zero2") is not PRESETS["zero2"]
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 3, "overlap_comm": true}}')
    assert deepspeed_config(str(tmp_path / "own.json"))["zero_optimization"]["overlap_comm"]
    base = f"_base_ = [{str(ROOT / 'mmdetection/configs/_base_/deepspeed_zero1.py')!r}]\nmodel = dict()\n"
    (tmp_path / "config.py").write_text(base)

    def loaded(*options: str) -> Config:
        return cli.load_config(cli.parse_train([str(tmp_path / "config.py"), *options]))

    assert loaded().deepspeed == PRESETS["zero1"]
    assert loaded("--deepspeed", "zero3").deepspeed.zero_optimization.stage == 3
    changed = loaded("--deepspeed", "zero2", "--cfg-options", "deepspeed.zero_optimization.overlap_comm=False")
    assert changed.deepspeed.zero_optimization == {"stage": 2, "overlap_comm": False}
    assert loaded("--cfg-options", "deepspeed=zero3").deepspeed.zero_optimization.stage == 3
    assert loaded("--disable_deepspeed").deepspeed is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("zero4", r"unknown preset 'zero4'.*zero1.*JSON file"),
        ({"zero_optimization": {"stage": 0}}, r"stage is 0, it must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}, r"float16 is not supported.*bf16"),
        ({"zero_optimization": {"stage": 1}, "optimizer": {"type": "Adam"}}, r"are those of the config"),
    ],
)
def test_settings_that_cannot_be(value, text):
    with pytest.raises(RunError, match=text):
        deepspeed_config(value)


@pytest.mark.parametrize(
    "line", ["strategy = dict(type='FSDPStrategy')", "model_wrapper_cfg = dict(type='MMFullyShardedDataParallel')"]
)
def test_fsdp_is_refused_with_the_alternative(tmp_path, line):
    (tmp_path / "config.py").write_text(f"model = dict()\n{line}\n")
    with pytest.raises(RunError, match=r"FSDP .* not supported .*--deepspeed zero3"):
        cli.load_config(cli.parse_train([str(tmp_path / "config.py")]))


@needs_deepspeed
@pytest.mark.parametrize(
    ("wrapper", "text"),
    [
        ({"type": "AmpOptimWrapper"}, r"optim_wrapper.type AmpOptimWrapper.*--amp"),
        ({"type": "OptimWrapper", "clip_grad": {"type": "value", "clip_value": 1.0}}, r"by their L2 norm only"),
    ],
)
def test_optimizers_that_the_engine_does_not_know(toy, wrapper, text):
    runner = toy({"runner_type": "ZeRORunner", "deepspeed": PRESETS["zero1"]})
    assert type(runner) is ZeRORunner
    with pytest.raises(RunError, match=text):
        runner.build_optim_wrapper({**wrapper, "optimizer": {"type": "AdamW", "lr": 0.1}})


@needs_deepspeed
def test_one_process_trains_resumes_and_reads_safely(tool, losses, tmp_path):
    """ZeRO-3 in one process: killed in the third epoch, continued; a file with code in it is not executed."""
    train = (sys.executable, TOOLS / "train.py", CONFIG, "--deepspeed", "zero3", "--cfg-options")
    killed = tool(*train, "work_dir=run", "custom_hooks.1.iteration=12", "optim_wrapper.clip_grad.max_norm=0.5")
    assert killed.returncode != 0
    before = losses()
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pth")) == ["epoch_1.pth", "epoch_2.pth"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["deepspeed.zero_optimization.stage"] == 3
    (tmp_path / "losses.0").unlink()
    train = (*train[:5], "--resume", *train[5:])
    resumed = tool(*train, "work_dir=run", "optim_wrapper.clip_grad.max_norm=0.5")
    assert resumed.returncode == 0, resumed.stderr
    continued = losses()
    assert sorted(continued) == list(range(10, 20))
    assert {number: continued[number] for number in (10, 11)} == {number: before[number] for number in (10, 11)}
    state = read_state_dict(tmp_path / "run" / "epoch_4.pth")
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "layers.0.weight": (8, 4), "layers.0.bias": (8,), "layers.3.weight": (1, 8), "layers.3.bias": (1,)
    }  # fmt: skip

    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    (shard,) = (tmp_path / "run" / "epoch_4.pth").glob("*_optim_states.pt")
    torch.save({"optimizer_state_dict": Payload()}, shard)
    with pytest.raises(CheckpointError, match="could run code"):
        read_state_dict(tmp_path / "run" / "epoch_4.pth")
    attacked = tool(*train, "work_dir=run", "optim_wrapper.clip_grad.max_norm=0.5", "train_cfg.max_epochs=5")
    assert attacked.returncode == 2
    assert "could run code" in attacked.stderr
    assert not (tmp_path / "executed").exists()
    other = tool(*train[:4], "zero2", *train[5:], "work_dir=run", "optim_wrapper.clip_grad.max_norm=0.5")
    assert other.returncode == 2
    assert "zero_optimization.stage is 3 there and 2 here" in other.stderr

"""Checkpoints of a run: whole whenever they can be seen, plain values only, resumed exactly."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from piip.checkpoint import read_file
from piip.errors import CheckpointError
from piip.integrations.files import finish
from piip_cls.engine import Trainer, bare

FORMAT = "piip-classifier-1"
# Options that may change when a run goes on: they change no number of it.
FREE = {
    "output_dir", "resume", "data_path", "num_workers", "pin_mem", "eval_interval", "eval_batch_size", "launcher",
    "local_rank", "device", "tensorboard", "wandb", "dist_eval", "pretrained",
}  # fmt: skip


def save(path: Path, trainer: Trainer, epoch: int, best: float, figures: Mapping[str, float]) -> None:
    """Write everything that a run needs to go on after an epoch; `figures` are those of its log."""
    state = {
        "format": FORMAT,
        "model": bare(trainer.model).state_dict(),
        "model_ema": None if trainer.ema is None else trainer.ema.module.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.schedule.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "epoch": epoch,
        "best": best,
        "figures": dict(figures),
        "processes": trainer.processes.count,
        "args": {name: value for name, value in vars(trainer.args).items() if name != "recipe"},
    }
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    finish(part, path)


def resume(path: str, trainer: Trainer) -> tuple[int, float, dict[str, float]]:
    """Continue a run; returns its last epoch, its best top-1, and the last epoch's figures.

    The random numbers of an epoch follow from the seed and its number, so nothing else is needed.

    Raises:
        CheckpointError: There is no such file, it is no checkpoint of a run, or one of another run.
    """
    state = read_file(path)
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} holds no state of a run to continue: start a new one from its weights with --load-from, or "
            "evaluate it with --eval"
        )
    _check_same(path, state, trainer)
    schedule = state.get("schedule", {})  # not in the checkpoints of older versions
    if trainer.schedule.state_dict() and not schedule:
        raise CheckpointError(
            f"{path} holds no state of --sched {trainer.args.sched}, which an older version left out: start a new run "
            "from its weights with --load-from"
        )
    bare(trainer.model).load_state_dict(state["model"])
    if trainer.ema is not None and state["model_ema"] is not None:
        trainer.ema.module.load_state_dict(state["model_ema"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.schedule.load_state_dict(schedule)
    if state["scaler"]:  # empty where the run so far was not scaled: on a CPU
        trainer.scaler.load_state_dict(state["scaler"])
    return state["epoch"], state["best"], state["figures"]


def _check_same(path: str, state: Mapping[str, Any], trainer: Trainer) -> None:
    now, then = vars(trainer.args), state["args"]
    changed = [
        f"--{name.replace('_', '-')} {then[name]} is now {now.get(name)}"
        for name in then
        if name not in FREE and then[name] != now.get(name)
    ]
    if state["processes"] != trainer.processes.count:
        changed.append(f"{state['processes']} process(es) are now {trainer.processes.count}")
    if changed:
        raise CheckpointError(
            f"{path} is of another run: {'; '.join(changed)}. Give the options of its log, or start a new run from its "
            "weights with --load-from"
        )


def export(path: Path, model: nn.Module, args: argparse.Namespace, classes: list[str]) -> None:
    """Write a model's weights as safetensors, with the config and the names of the classes beside them."""
    part = path.with_name(path.name + ".part")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, part, {"format": "pt", "config": args.model, "classes": json.dumps(classes)})
    finish(part, path)

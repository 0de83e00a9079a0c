"""A task of milliseconds for tests of the runtime, and hooks that record what a run does.

The recorders work with any mmengine config: put this folder on PYTHONPATH, import `toy_task`, and name them in
`custom_hooks` (`RecordLosses`, `RecordEnd`, `RecordFirstGradients`, `KillAt`).
"""

import json
import os
import random
import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from torch import nn
from torch.utils.data import Dataset


@DATASETS.register_module()
class ToyDataset(Dataset):
    """`size` fixed points; `noise` is drawn from all three generators that augmentations use."""

    def __init__(self, size: int = 10, noise: float = 0.0, **_) -> None:
        self.size, self.noise = size, noise
        self.metainfo = {"classes": ("toy",)}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        noise = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item(), 0.0]) * self.noise
        return {"inputs": torch.linspace(-1, 1, 4) * (index + 1) / self.size + noise, "index": index}

    def get_data_info(self, index: int) -> dict:
        return {"width": 1 + index % 3, "height": 2}


@MODELS.register_module()
class ToyModel(BaseModel):
    """Two layers with dropout; the loss is an average over the batch."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        middle = nn.SyncBatchNorm(8) if norm else nn.GELU()
        self.layers = nn.Sequential(nn.Linear(4, 8), middle, nn.Dropout(dropout), nn.Linear(8, 1))

    def forward(self, inputs: torch.Tensor, index: torch.Tensor, mode: str = "tensor"):
        out = self.layers(inputs).squeeze(1)
        if mode == "loss":
            return {"loss": (out - index % 2).square().mean()}
        return [{"out": value.item(), "draw": torch.rand(()).item()} for value in out]


@METRICS.register_module()
class ToyMetric(BaseMetric):
    """The mean output."""

    def process(self, data_batch: dict, data_samples: list[dict]) -> None:
        self.results += [sample["out"] for sample in data_samples]

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return {"mean": float(np.mean(results)), "count": len(results)}


def _append(path: str, line: dict) -> None:
    with Path(f"{path}.{get_rank()}").open("a") as file:
        file.write(json.dumps(line) + "\n")


@HOOKS.register_module()
class RecordLosses(Hook):
    """Appends each iteration's losses, to the last bit, to PATH.RANK."""

    def __init__(self, path: str) -> None:
        self.path = path

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        losses = {name: float(torch.as_tensor(value).detach()).hex() for name, value in outputs.items()}
        data = [int(index) for index in data_batch["index"]] if "index" in data_batch else None
        _append(self.path, {"epoch": runner.epoch, "iter": runner.iter, "batch": batch_idx, "data": data, **losses})


@HOOKS.register_module()
class RecordEnd(Hook):
    """Writes the trained parameters, by name, to PATH.RANK."""

    def __init__(self, path: str) -> None:
        self.path = path

    def after_train(self, runner) -> None:
        model = getattr(runner.model, "module", runner.model)
        parameters = dict(model.named_parameters())
        whole = nullcontext()
        if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):  # DeepSpeed's, in parts
            import deepspeed

            whole = deepspeed.zero.GatheredParameters([*parameters.values()])
        with whole:
            torch.save({name: p.detach().clone() for name, p in parameters.items()}, f"{self.path}.{get_rank()}")


@HOOKS.register_module()
class KillAt(Hook):
    """Kills its own process as the system would, after iteration `iteration`, or while a checkpoint is written.

    Args:
        iteration: Number of iterations to finish.
        while_saving: Name of the checkpoint whose writing is cut short.
    """

    priority = "LOWEST"

    def __init__(self, iteration: int = -1, while_saving: str | None = None) -> None:
        self.iteration, self.while_saving = iteration, while_saving

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.iter + 1 == self.iteration:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_save_checkpoint(self, runner, checkpoint) -> None:
        if self.while_saving is not None and checkpoint["message_hub"]["runtime_info"]["last_ckpt"].endswith(
            self.while_saving
        ):
            save = torch.save

            def half(content, file, **kwargs) -> None:
                save(content, file, **kwargs)
                Path(runner.work_dir, f"{self.while_saving}.part").write_bytes(file.getvalue()[:500])
                os.kill(os.getpid(), signal.SIGKILL)

            torch.save = half


@HOOKS.register_module()
class RecordFirstGradients(Hook):
    """Writes the gradients of the first step, by name, to PATH.RANK."""

    def __init__(self, path: str) -> None:
        self.path = path

    def before_train(self, runner) -> None:
        wrapper, step = runner.optim_wrapper, runner.optim_wrapper.step
        model = getattr(runner.model, "module", runner.model)

        def record(**kwargs) -> None:
            gradients = {name: _gradient(parameter) for name, parameter in model.named_parameters()}
            torch.save({name: g for name, g in gradients.items() if g is not None}, f"{self.path}.{get_rank()}")
            wrapper.step = step
            step(**kwargs)

        wrapper.step = record


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):  # DeepSpeed's, perhaps in parts
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    return None if parameter.grad is None else parameter.grad.clone()

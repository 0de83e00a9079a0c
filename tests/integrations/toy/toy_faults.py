"""The toy task on image files, and a hook that makes its numbers infinite; see `toy_task.py`."""

from pathlib import Path

import torch
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS, TRANSFORMS

DATASETS.register_module("ImageFiles", module=BaseDataset)


@TRANSFORMS.register_module()
class PackToy:
    """Makes what the toy model takes of a loaded image whose file name is a number."""

    def __call__(self, results: dict) -> dict:
        inputs = torch.tensor(results["img"].reshape(-1)[:4] / 255.0, dtype=torch.float32)
        return {"inputs": inputs, "index": int(Path(results["img_path"]).stem)}


@HOOKS.register_module()
class Poison(Hook):
    """In the third step: makes the `loss` NaN, or leaves infinite `weights` after a finite loss."""

    priority = "HIGHEST"

    def __init__(self, what: str) -> None:
        self.what = what

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self.what == "loss" and runner.iter == 2:
            data_batch["inputs"][:] = float("nan")

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if self.what == "weights" and runner.iter == 2:
            next(runner.model.parameters()).data[0, 0] = float("inf")

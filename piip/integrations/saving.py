"""Checkpoints that are complete whenever they can be seen, hold plain values, and are read without running any code.

mmengine writes a checkpoint in place, deletes the previous one before that, pickles objects of its own into it, and
falls back to full unpickling when a safe reading fails.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.runner import checkpoint as stock_checkpoint
from torch import Tensor

from piip.checkpoint import read_file, refuse_shard
from piip.errors import CheckpointError
from piip.integrations.files import write_text

_PLAIN = (str, int, float, bool, complex, type(None), torch.dtype, torch.Size, torch.device, Tensor)
_DROPPED = object()


def _plain(value: Any, name: str, dropped: list[str]) -> Any:
    """Return `value` made of tensors, containers and primitives alone; names of what cannot be go to `dropped`."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, HistoryBuffer):
        logs, counts = value.data
        value = {"log_history": logs, "count_history": counts, "max_length": value.max_length}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        mapping = type(value) if type(value) in (OrderedDict, Counter) else dict
        items = ((key, _plain(entry, f"{name}.{key}", dropped)) for key, entry in value.items())
        return mapping({key: entry for key, entry in items if entry is not _DROPPED})
    for sequence in (list, tuple, set):
        if isinstance(value, sequence):
            entries = (_plain(entry, f"{name}.{i}", dropped) for i, entry in enumerate(value))
            return sequence(entry for entry in entries if entry is not _DROPPED)
    if isinstance(value, _PLAIN):
        return value
    dropped.append(f"{name} ({type(value).__name__})")
    return _DROPPED


def latest_checkpoint(work_dir: str | Path) -> Path | None:
    """Return the last complete `epoch_*.pth` or `iter_*.pth` of a work dir, or None if it holds none.

    Raises:
        CheckpointError: There are checkpoints, and none of them is whole.
    """
    numbered = {
        int(match[1]): path
        for path in Path(work_dir).glob("*.pth")
        if (match := re.fullmatch(r"(?:epoch|iter)_(\d+)\.pth", path.name))
    }
    found = [path for _, path in sorted(numbered.items(), reverse=True)]
    # A zip file's directory is at its end, so one that was cut short fails this test. DeepSpeed writes directories.
    whole = [path for path in found if path.is_dir() or zipfile.is_zipfile(path)]
    if found and not whole:
        raise CheckpointError(
            f"none of the checkpoints in {work_dir} is complete (last: {found[0].name}); start again in another "
            "--work-dir, or copy a whole one back"
        )
    return whole[0] if whole else None


def load_from_file(file: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
    """Read a checkpoint for mmengine without executing anything in it.

    Args:
        file: What `piip.checkpoint.read_file` reads; a DeepSpeed directory, for example.

    Returns:
        The checkpoint; its weights, on the CPU, are under `state_dict`, whatever they were called.

    Raises:
        CheckpointError: The file cannot be read, or could run code.
    """
    if not isinstance(file, (str, Path)):
        raise CheckpointError("checkpoints are read from files only: copy it from the remote store first")
    refuse_shard(file)
    checkpoint = read_file(Path(file).expanduser())
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{file} holds a {type(checkpoint).__name__}, not weights by name")
    if "state_dict" not in checkpoint:
        wrapped = (checkpoint[key] for key in ("module", "model") if isinstance(checkpoint.get(key), dict))
        checkpoint = {"state_dict": next(wrapped, checkpoint)}
    # Old mmcv stored its config here, and Runner.resume would run it as Python.
    checkpoint.get("meta", {}).pop("config", None)
    return checkpoint


def _load_from_url(url: str, *_: Any, **__: Any) -> dict[str, Any]:
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))  # under a temporary name until it is whole
    return load_from_file(path)


def install_safe_loading() -> None:
    """Route every checkpoint that mmengine reads through :func:`load_from_file`.

    mmengine falls back to full unpickling, which executes what the file says, whenever a safe reading fails, and
    unpickles downloads in any case. Its loaders for local files are replaced where mmengine provides for it; all others
    (URLs, model zoos, stores) end in the two functions that follow.
    """
    stock_checkpoint.CheckpointLoader.register_scheme("", loader=load_from_file, force=True)
    for name, ours in (("_safe_torch_load", load_from_file), ("load_url", _load_from_url)):
        if not hasattr(stock_checkpoint, name):
            raise ImportError(f"this mmengine has no mmengine.runner.checkpoint.{name}; PIIP needs onedl-mmengine 0.10")
        setattr(stock_checkpoint, name, ours)


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook that keeps a complete checkpoint at every moment and stores plain values only."""

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        # The stock order is delete, write, note: a kill in between leaves no checkpoint where only one is kept.
        outdated: list[int] = []
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            kept = [*self.keep_ckpt_ids, step]
            outdated = kept[: -self.max_keep_ckpts]
            self.keep_ckpt_ids.append(step)  # a deque of that length: the oldest falls out
            runner.message_hub.update_info("keep_ckpt_ids", kept[-self.max_keep_ckpts :])

        self.last_ckpt = str(Path(self.out_dir, self.filename_tmpl.format(step)))
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            self.filename_tmpl.format(step),
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            **self.args,
        )
        if is_main_process():
            write_text(Path(runner.work_dir, "last_checkpoint"), self.last_ckpt)
            for old in outdated:
                outdated_path = Path(self.out_dir, self.filename_tmpl.format(old))
                if outdated_path.is_dir():  # DeepSpeed's
                    shutil.rmtree(outdated_path)
                else:
                    outdated_path.unlink(missing_ok=True)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Leave nothing in the checkpoint that only a full unpickling could read."""
        dropped: list[str] = []
        for key in checkpoint.keys() - {"state_dict"}:
            checkpoint[key] = _plain(checkpoint[key], key, dropped)
        if dropped:
            runner.logger.warning(f"not stored in the checkpoint, since they are not plain values: {dropped}")

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Turn the log histories back into what mmengine expects."""
        scalars = checkpoint.get("message_hub", {}).get("log_scalars", {})
        for name, value in scalars.items():
            if isinstance(value, dict):
                value = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in value.items()}
                scalars[name] = HistoryBuffer(**value)

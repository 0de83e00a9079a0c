"""Checks before a run begins: its data exist, and its work dir is free or holds the run to continue."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process

from piip.integrations.saving import latest_checkpoint, write_text


class RunError(RuntimeError):
    """A run cannot start as asked; the message says what to change."""


RUN_FILE = "run.json"
"""In each work dir: which config the run has, for the comparison when it is resumed."""

# What makes a run another run, and below it, what may change without making it one.
_IDENTITY = ("model", "optim_wrapper", "train_dataloader", "randomness")
_FREE = {"num_workers", "persistent_workers", "prefetch_factor", "pin_memory", "data_root", "ann_file", "data_prefix"}

_PARSED_BYTES = 4 << 20  # An annotation file above this size is not empty.


def _datasets(config: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the configs of the datasets proper, inside any wrappers, with their dotted names."""
    if "dataset" in config:
        yield from _datasets(config["dataset"], f"{name}.dataset")
    elif "datasets" in config:
        for i, part in enumerate(config["datasets"]):
            yield from _datasets(part, f"{name}.datasets.{i}")
    else:
        yield name, config


def _paths(cfg: Config, loader: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the value of every path that a loader and its evaluator read."""
    for name, dataset in _datasets(cfg[loader]["dataset"], f"{loader}.dataset"):
        root = dataset.get("data_root") or ""
        prefixes = {f"data_prefix.{key}": value for key, value in (dataset.get("data_prefix") or {}).items()}
        for field, value in {"ann_file": dataset.get("ann_file"), **prefixes}.items():
            if value:
                yield f"{name}.{field}", value if _is_remote(value) else os.path.join(root, value)
    evaluator = loader.replace("dataloader", "evaluator")
    evaluators = cfg.get(evaluator) or []
    for part in evaluators if isinstance(evaluators, list) else [evaluators]:
        if part.get("ann_file"):
            yield f"{evaluator}.ann_file", part["ann_file"]


def _is_remote(path: str) -> bool:
    return "://" in path or "s3:" in path


def check_data(cfg: Config, loaders: Sequence[str]) -> None:
    """Check that what the named data loaders read exists and holds annotations.

    Args:
        cfg: The run's config.
        loaders: Names of its loaders, such as `train_dataloader`; absent ones are passed over.

    Raises:
        RunError: An annotation file or image folder is missing, or an annotation file is empty or not readable.
    """
    for name, value in (pair for loader in loaders if cfg.get(loader) for pair in _paths(cfg, loader)):
        if _is_remote(value):
            continue
        path = Path(value)
        if not path.exists():
            raise RunError(
                f"{name}: {path} does not exist (seen from {Path.cwd()}); put the data there, or name another place "
                f"with --cfg-options {name}=PATH"
            )
        if name.endswith(".ann_file"):
            _check_annotations(path, name)


def _check_annotations(path: Path, name: str) -> None:
    if path.stat().st_size > _PARSED_BYTES or path.suffix not in ("", ".json", ".txt"):
        return
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise RunError(f"{name}: annotation file {path} is empty")
    if path.suffix != ".json":
        return
    try:
        content = json.loads(text)
    except ValueError as error:
        raise RunError(f"{name}: annotation file {path} is not JSON: {error}") from error
    for part in ("images", "annotations", "categories"):
        if isinstance(content, dict) and not content.get(part):
            raise RunError(f"{name}: annotation file {path} is empty: it has no {part}")


def _identity(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that make a run what it is, by dotted name, as JSON stores them."""

    def flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for key, entry in value.items():
                if key not in _FREE:
                    yield from flat(entry, f"{name}.{key}")
        else:
            yield name, value

    settings = dict(pair for key in _IDENTITY if cfg.get(key) for pair in flat(cfg[key], key))
    return json.loads(json.dumps(settings, default=str))


def claim_work_dir(cfg: Config, resume: str | None) -> None:
    """Decide where the run starts, and note in its work dir that it is there.

    The first process decides, all others follow. Sets `cfg.resume` and, if there is something to continue,
    `cfg.load_from`.

    Args:
        cfg: The run's config.
        resume: None for a new run, `auto` to continue the run in the work dir, if there is one, or a checkpoint.

    Raises:
        RunError: The work dir holds another run, or this one's checkpoints without `resume`.
        CheckpointError: There are checkpoints to resume from, and none is complete.
    """
    decision: list[Any] = [None]
    if is_main_process():
        try:
            decision = [_decide(cfg, resume)]
        except RuntimeError as error:
            decision = [error]
    broadcast_object_list(decision)
    if isinstance(decision[0], RuntimeError):
        raise decision[0]
    cfg.resume = decision[0] is not None
    if cfg.resume:
        cfg.load_from = decision[0]


def _read_note(note: Path) -> dict[str, Any] | None:
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not there, or lost in a crash of the machine
        return None


def _decide(cfg: Config, resume: str | None) -> str | None:
    work_dir = Path(cfg.work_dir)
    note = work_dir / RUN_FILE
    config, settings = Path(cfg.filename or "a config").name, _identity(cfg)
    before = _read_note(note)
    if before is not None:
        names = sorted(before["settings"].keys() | settings.keys())
        changed = [name for name in names if before["settings"].get(name) != settings.get(name)]
        if changed:
            name, more = changed[0], f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            there, here = before["settings"].get(name), settings.get(name)
            raise RunError(
                f"{work_dir} holds another run, of {before['config']}: {name} is {there!r} there and {here!r} "
                f"here{more}; choose another --work-dir"
            )
    if resume is None and any(work_dir.glob("*.pth")):
        raise RunError(
            f"{work_dir} already holds a run: add --resume to continue it, or choose another --work-dir; nothing has "
            "been changed"
        )
    start = latest_checkpoint(work_dir) if resume == "auto" else resume
    work_dir.mkdir(parents=True, exist_ok=True)
    write_text(note, json.dumps({"config": config, "settings": settings}, indent=1))
    return None if start is None else str(start)

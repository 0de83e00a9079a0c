"""Checks before a run begins: its data exist, and its work dir is free or holds the run to continue."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process

from piip.errors import RunError
from piip.integrations import mmcv_ops
from piip.integrations.files import write_text
from piip.integrations.saving import latest_checkpoint

RUN_FILE = "run.json"
"""In each work dir: which config the run has, for the comparison when it is resumed."""

# What makes a run another run, and below it, what may change without making it one.
_IDENTITY = ("model", "optim_wrapper", "train_dataloader", "randomness", "deepspeed")
_FREE = {"num_workers", "persistent_workers", "prefetch_factor", "pin_memory", "data_root", "ann_file", "data_prefix"}

_HEADS = ("bbox_head", "mask_head", "decode_head", "auxiliary_head")

_PARSED_BYTES = 4 << 20  # An annotation file above this size is not empty.
_CATEGORIES_BYTES = 4 << 20  # More than any list of categories takes; LVIS, with descriptions, needs 0.4 MB.


def inner_datasets(config: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the configs of the datasets proper, inside any wrappers, with their dotted names."""
    if "dataset" in config:
        yield from inner_datasets(config["dataset"], f"{name}.dataset")
    elif "datasets" in config:
        for i, part in enumerate(config["datasets"]):
            yield from inner_datasets(part, f"{name}.datasets.{i}")
    else:
        yield name, config


def _paths(cfg: Config, loader: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the value of every path that a loader and its evaluator read."""
    for name, dataset in inner_datasets(cfg[loader]["dataset"], f"{loader}.dataset"):
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


_Categories = list[tuple[int, str]]


def _scan(path: Path) -> tuple[_Categories | None, set[int]]:
    """Return a COCO file's categories, in its order, and the category ids of its annotations, without parsing it.

    Parsing COCO's own takes ten seconds and gigabytes, in every process; this reads through it once. The categories are
    None where they cannot be found this way.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        used = {int(match[1]) for match in re.finditer(rb'"category_id"\s*:\s*(\d+)', text)}
        at = text.rfind(b'"categories"')  # the last of the file's parts in COCO's own
        while at >= 0:
            following = text[at + len('"categories"') : at + _CATEGORIES_BYTES].decode("utf-8", errors="ignore")
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a word within something else
                content = json.JSONDecoder().raw_decode(following.lstrip().removeprefix(":").lstrip())[0]
                return [(entry["id"], entry["name"]) for entry in content], used
            at = text.rfind(b'"categories"', 0, at)
    return None, used


def _read_categories(path: Path, name: str) -> tuple[_Categories | None, set[int]]:
    """Return what :func:`_scan` does, of a small file after parsing all of it."""
    if path.stat().st_size > _PARSED_BYTES:
        return _scan(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        categories = [(entry["id"], entry["name"]) for entry in content["categories"]]
        return categories, {entry["category_id"] for entry in content["annotations"]}
    except (KeyError, TypeError) as error:
        raise RunError(f"{name}: annotation file {path} is not in COCO's format: {error!r} not found") from error


def shown(names: Sequence[object]) -> str:
    """Return a list of class names for a message, cut where it is long."""
    if len(names) <= 12:
        return repr(tuple(names))
    return f"({', '.join(map(repr, names[:5]))}, ... {len(names)} in all)"


def _check_dataset(name: str, path: Path, classes: Sequence[str], subset: bool) -> None:
    """Check that a dataset's classes are those of its file, in the same order: labels count in the file's order."""
    categories, used = _read_categories(path, f"{name}.ann_file")
    if categories is None:
        return
    if unlisted := sorted(used - {number for number, _ in categories}):
        raise RunError(
            f"{name}.ann_file: annotations in {path} have category ids that its categories do not list: "
            f"{shown(unlisted)} (listed: {shown([number for number, _ in categories])}); add them to the file's "
            "categories, or remove these annotations"
        )
    there = [category for _, category in categories if not subset or category in classes]
    if there == list(classes):
        return
    extra, missing = [n for n in there if n not in classes], [n for n in classes if n not in there]
    difference = [f"only in the file: {shown(extra)}"] * bool(extra) + [f"missing there: {shown(missing)}"] * bool(
        missing
    )
    leave_out = "" if missing else " (or metainfo.subset=True, to leave the others out)" if extra else ""
    raise RunError(
        f"{name}: the categories of {path} are {shown(there)}, but metainfo.classes is {shown(classes)} "
        f"({'; '.join(difference) or 'the order differs'}); set metainfo=dict(classes=...) to the file's names in the "
        f"file's order{leave_out}, in every dataset of the config, and num_classes={len(there)} in the model's heads"
    )


def heads(model: Any, name: str = "model") -> Iterator[tuple[str, int]]:
    """Yield the dotted names and numbers of classes of the heads that classify boxes, masks or pixels."""
    if isinstance(model, Mapping):
        for key, value in model.items():
            for i, head in enumerate(value if isinstance(value, Sequence) else [value]):
                here = f"{name}.{key}.{i}" if isinstance(value, Sequence) else f"{name}.{key}"
                if key in _HEADS and isinstance(head, Mapping) and "num_classes" in head:
                    yield f"{here}.num_classes", head["num_classes"]
                yield from heads(head, here)


def check_heads(model: Mapping[str, Any], classes: Sequence[str], name: str) -> None:
    """Check that the heads of a model's config tell apart as many classes as there are.

    Args:
        model: The config's `model`.
        classes: Names of the classes.
        name: Where these come from.

    Raises:
        RunError: The numbers differ; the message says how to set them.
    """
    numbers = dict(heads(model))
    if any(number != len(classes) for number in numbers.values()):
        there = ", ".join(f"{head}={number}" for head, number in numbers.items())
        needed = " ".join(f"{head}={len(classes)}" for head in numbers)
        raise RunError(
            f"the model's heads and the data do not match: {there}, but {name} has {len(classes)} classes "
            f"{shown(classes)}; set --cfg-options {needed}"
        )


def _check_alike(derived: Mapping[str, Sequence[str]]) -> None:
    (first, expected), *others = derived.items()
    for name, classes in others:
        if classes != expected:
            raise RunError(
                f"the categories of the files differ, so labels would not mean the same: {first} has "
                f"{shown(expected)}, {name} has {shown(classes)}; write the same categories, in the same order, into "
                "every file, or choose some with metainfo=dict(classes=..., subset=True) in every dataset"
            )


def _derive_classes(name: str, path: Path, default: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a file's categories, in its order; the data set's own names where they cannot be found."""
    categories, _ = _read_categories(path, f"{name}.ann_file")
    return tuple(default) if categories is None else tuple(category for _, category in categories)


def check_classes(cfg: Config, loaders: Sequence[str]) -> None:
    """Check that the classes of the data are those of their files and of the model's heads.

    Where a dataset's config names no classes, they are those of its file, in its order, and are written into the
    config. Without this, COCO annotations of other names are left out in silence, and AP is 0. Files that are remote
    or not JSON are not checked, nor are datasets that read theirs otherwise than CocoDataset. For segmentation, see
    `piip.integrations.labels.check_segmentation`.

    Args:
        cfg: The run's config, its data checked by :func:`check_data`.
        loaders: Names of its loaders; absent ones are passed over.

    Raises:
        RunError: Names, their order or their number differ, or annotations use a category that the file does not list.
    """
    if cfg.get("default_scope") == "mmseg":
        from piip.integrations.labels import check_segmentation

        check_segmentation(cfg, loaders)
    if cfg.get("default_scope") != "mmdet":
        return
    mmcv_ops.install()
    from mmdet.datasets import CocoDataset
    from mmdet.registry import DATASETS

    derived: dict[str, tuple[str, ...]] = {}
    for loader in loaders:
        for name, dataset in inner_datasets(cfg[loader]["dataset"], f"{loader}.dataset") if cfg.get(loader) else ():
            kind = DATASETS.get(dataset["type"]) if isinstance(dataset["type"], str) else dataset["type"]
            file = dataset.get("ann_file") or ""
            # Subclasses with a reader of their own may number classes in another way.
            reader = getattr(kind, "load_data_list", None), getattr(kind, "COCOAPI", None)
            if reader != (CocoDataset.load_data_list, CocoDataset.COCOAPI) or not file.endswith(".json"):
                continue
            metainfo = kind._load_metainfo(dataset.get("metainfo"))  # the class's own, unless the config sets them
            classes = [metainfo["classes"]] if isinstance(metainfo["classes"], str) else metainfo["classes"]
            path = os.path.join(dataset.get("data_root") or "", file)
            if not _is_remote(path):
                if "classes" not in (dataset.get("metainfo") or {}):
                    derived[name] = classes = _derive_classes(name, Path(path), classes)
                    dataset["metainfo"] = {**(dataset.get("metainfo") or {}), "classes": classes}
                    _check_alike(derived)
                _check_dataset(name, Path(path), classes, metainfo.get("subset", False))
            check_heads(cfg.model, classes, name)


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

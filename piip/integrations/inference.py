"""A trained detector on pictures, from Python: :func:`load_detector` and :func:`detect`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from piip.integrations.cli import checkpoint_path
from piip.integrations.config import read_config
from piip.integrations.images import read_image
from piip.integrations.preflight import RunError, check_heads, inner_datasets
from piip.integrations.runtime import explained_mismatch
from piip.integrations.visualize import Detections


@dataclass(frozen=True)
class Detector:
    """A detector ready for :func:`detect`."""

    model: BaseModel
    prepare: Callable[[dict[str, Any]], dict[str, Any]]
    """The config's test pipeline, from a BGR image in memory."""
    classes: Sequence[str]


def _device(name: str | None) -> torch.device:
    count = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # no place to compute either
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise RunError(f"there is no device {name!r}: choose cpu, cuda or cuda:NUMBER")
    if (device.index or 0) >= count:
        raise RunError(f"device {name!r} is not there: torch sees {count} CUDA devices; choose another, or cpu")
    return device


def _pipeline(cfg: Config) -> Callable[[dict[str, Any]], dict[str, Any]]:
    from mmdet.utils import get_test_pipeline_cfg

    steps = []
    for step in get_test_pipeline_cfg(cfg):
        if step["type"].endswith("LoadImageFromFile"):
            steps.append({"type": "mmdet.LoadImageFromNDArray", "to_float32": step.get("to_float32", False)})
        elif not step["type"].endswith("LoadAnnotations"):
            steps.append(step)
    return Compose(steps)


def _classes(cfg: Config, checkpoint: Mapping[str, Any]) -> Sequence[str]:
    """Return the class names: the checkpoint's, or, of a file without any, those of the config's test data."""
    from mmdet.registry import DATASETS

    meta = checkpoint.get("meta") or {}
    classes = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES")
    if classes:
        return tuple(classes)
    _, dataset = next(inner_datasets(cfg.test_dataloader.dataset, "test_dataloader.dataset"))
    return tuple(DATASETS.get(dataset["type"])._load_metainfo(dataset.get("metainfo"))["classes"])


def load_detector(
    config: str | Path, checkpoint: str | Path, device: str | None = None, options: Mapping[str, Any] | None = None
) -> Detector:
    """Build the detector of a config and load its weights, all of them, without executing anything in the file.

    Args:
        config: Config file. Pretrained files that it names are not needed.
        checkpoint: What `tools/test.py` evaluates: a checkpoint of ours, a released file, a DeepSpeed directory.
        device: `cpu`, `cuda` or `cuda:NUMBER`; default: a GPU if there is one.
        options: Changes of the config, by dotted name.

    Raises:
        RunError: There is no such config or device, or the names of the classes do not fit the model.
        CheckpointError: The checkpoint cannot be read, or does not fit the model.
    """
    place = _device(device)
    cfg = read_config(config, options)
    if cfg.get("default_scope") != "mmdet" or "test_dataloader" not in cfg:
        raise RunError(f"{config} is no detector's config: it needs mmdet as its default_scope, and a test_dataloader")
    init_default_scope("mmdet")
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    with explained_mismatch(str(checkpoint)):
        content = load_checkpoint(model, checkpoint_path(str(checkpoint)), map_location="cpu", strict=True)
    classes = _classes(cfg, content)
    check_heads(cfg.model, classes, str(checkpoint))
    return Detector(model.to(place).eval(), _pipeline(cfg), classes)


def detect(detector: Detector, images: Iterable[str | Path | np.ndarray], threshold: float = 0.5) -> list[Detections]:
    """Find objects in images, one image at a time.

    Args:
        detector: From :func:`load_detector`.
        images: Files, or arrays (H, W, 3) uint8, RGB.
        threshold: Lowest score of a detection that is returned. The detector's config has one of its own.

    Returns:
        The detections of each image, in the image's pixels.

    Raises:
        BrokenImageError: A file is not there, or cannot be decoded.
    """
    results = []
    for image in images:
        pixels = image if isinstance(image, np.ndarray) else read_image(image)
        data = detector.prepare({"img": np.ascontiguousarray(pixels[..., ::-1]), "img_id": 0})
        with torch.no_grad():
            (sample,) = detector.model.test_step({key: [value] for key, value in data.items()})
        found = sample.pred_instances
        found = found[found.scores >= threshold].cpu()
        results.append(
            Detections(
                image=pixels,
                boxes=found.bboxes.numpy(),
                scores=found.scores.numpy(),
                classes=found.labels.numpy(),
                names=detector.classes,
                masks=found.masks.numpy() if "masks" in found else None,
            )
        )
    return results

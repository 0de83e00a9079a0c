"""Trained models on pictures, from Python: :func:`load_detector` and :func:`detect`, :func:`load_segmentor` and
:func:`segment`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

from piip.checkpoint import load_checkpoint
from piip.errors import RunError
from piip.integrations.cli import checkpoint_path
from piip.integrations.config import read_config
from piip.integrations.images import read_image
from piip.integrations.preflight import check_heads, inner_datasets
from piip.integrations.saving import load_from_file
from piip.integrations.visualize import Detections, Segmentation, spread_colours

_SCOPES = {"mmdet": "detector", "mmseg": "segmentor"}


@dataclass(frozen=True)
class Predictor:
    """A model ready for pictures."""

    model: BaseModel
    prepare: Callable[[dict[str, Any]], dict[str, Any]]
    """The config's test pipeline, from a BGR image in memory."""
    classes: Sequence[str]

    def samples(self, images: Iterable[str | Path | np.ndarray]) -> Iterator[tuple[np.ndarray, Any]]:
        """Yield each image's pixels, (H, W, 3) uint8, RGB, and what the model makes of it, one image at a time.

        Raises:
            BrokenImageError: A file is not there, or cannot be decoded.
        """
        for image in images:
            pixels = image if isinstance(image, np.ndarray) else read_image(image)
            data = self.prepare({"img": np.ascontiguousarray(pixels[..., ::-1]), "img_id": 0})
            with torch.no_grad():
                (sample,) = self.model.test_step({key: [value] for key, value in data.items()})
            yield pixels, sample


@dataclass(frozen=True)
class Detector(Predictor):
    """A detector ready for :func:`detect`."""


@dataclass(frozen=True)
class Segmentor(Predictor):
    """A segmentor ready for :func:`segment`."""

    palette: Sequence[Sequence[int]]
    """One colour (red, green, blue) per class."""


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
    """Return the pipeline of the test data, for an image in memory and without labels."""
    _, dataset = next(inner_datasets(cfg.test_dataloader.dataset, "test_dataloader.dataset"))
    steps = []
    for step in dataset["pipeline"]:
        if step["type"].endswith("LoadImageFromFile"):
            loader = f"{cfg.default_scope}.LoadImageFromNDArray"
            steps.append({"type": loader, "to_float32": step.get("to_float32", False)})
        elif not step["type"].endswith("LoadAnnotations"):
            steps.append(step)
    return Compose(steps)


def _data_meta(cfg: Config) -> dict[str, Any]:
    """Return what the test data of a config say of their classes."""
    datasets = import_module(f"{cfg.default_scope}.registry").DATASETS
    _, dataset = next(inner_datasets(cfg.test_dataloader.dataset, "test_dataloader.dataset"))
    return datasets.get(dataset["type"])._load_metainfo(dataset.get("metainfo"))


def _load(
    scope: str, config: str | Path, checkpoint: str | Path, device: str | None, options: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of a `Predictor` and the `classes` and `palette` of the checkpoint or the test data."""
    place = _device(device)
    cfg = read_config(config, options)
    if cfg.get("default_scope") != scope or "test_dataloader" not in cfg:
        raise RunError(
            f"{config} is no {_SCOPES[scope]}'s config: it needs {scope} as its default_scope, and a test_dataloader"
        )
    init_default_scope(scope)
    if str(cfg.model.backbone.type).endswith("PIIPBackbone"):
        cfg.model.backbone.on_meta = True
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    path = checkpoint_path(str(checkpoint)) or checkpoint
    stored = load_from_file(path).get("meta") or {}
    load_checkpoint(model, path)
    # Old files hold their classes in upper case. A file without any is of the config's data.
    meta = stored.get("dataset_meta") or {key.lower(): value for key, value in stored.items()}
    if not meta.get("classes"):
        meta = _data_meta(cfg)
    check_heads(cfg.model, meta["classes"], str(checkpoint))
    fields = {"model": model.to(place).eval(), "prepare": _pipeline(cfg), "classes": tuple(meta["classes"])}
    return fields, meta


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
    fields, _ = _load("mmdet", config, checkpoint, device, options)
    return Detector(**fields)


def load_segmentor(
    config: str | Path, checkpoint: str | Path, device: str | None = None, options: Mapping[str, Any] | None = None
) -> Segmentor:
    """Build the segmentor of a config and load its weights; see :func:`load_detector`.

    Names and colours of the classes are the checkpoint's, or, of a file without any, those of the config's test data.
    """
    fields, meta = _load("mmseg", config, checkpoint, device, options)
    palette = meta.get("palette") or spread_colours(len(meta["classes"]))
    if len(palette) != len(meta["classes"]):
        raise RunError(
            f"{checkpoint}: its palette has {len(palette)} colours for {len(meta['classes'])} classes; give one colour "
            "per class"
        )
    return Segmentor(**fields, palette=palette)


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
    for pixels, sample in detector.samples(images):
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


def segment(segmentor: Segmentor, images: Iterable[str | Path | np.ndarray]) -> list[Segmentation]:
    """Classify the pixels of images, one image at a time.

    Args:
        segmentor: From :func:`load_segmentor`.
        images: Files, or arrays (H, W, 3) uint8, RGB.

    Returns:
        The class of each pixel of each image.

    Raises:
        BrokenImageError: A file is not there, or cannot be decoded.
        RunError: An image is smaller than the window of slide inference.
    """
    return [
        Segmentation(pixels, sample.pred_sem_seg.data[0].cpu().numpy(), segmentor.classes, segmentor.palette)
        for pixels, sample in segmentor.samples(images)
    ]

"""Label maps of segmentation data, and settings that have to fit them: what mmseg would leave out, or crash at.

mmseg drops label values beyond the classes from its metric without a word, while the loss fails on them inside a CUDA
kernel. Here each file is checked when it is read, and a few of every data set before a run begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from PIL import Image

import piip.integrations.mmengine  # noqa: F401  (stands in for mmcv's compiled ops, so it comes before mmseg)

# isort: split
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import DATASETS, TRANSFORMS

from piip.errors import BrokenLabelError, RunError
from piip.integrations.images import UNREADABLE, CheckedImageLoader, replace_transforms
from piip.integrations.preflight import check_heads, heads, inner_datasets, shown

IGNORED = 255
"""The label that mmseg gives to padding, and to 0 where `reduce_zero_label` is set."""

_READ_BEFORE = 8  # files of each data set that are read before a run
_ONE_BYTE = ("1", "L", "P")  # modes of images with one number of 8 bits or less per pixel
_ONE_NUMBER = ("F", "I", "I;16", "I;16B", "I;16L")


@TRANSFORMS.register_module()
class CheckedLabelLoader(LoadAnnotations):
    """mmseg's LoadAnnotations that names the label map which is not usable, and says why.

    Args:
        num_classes: Number of classes.
        ignore_index: Label that is no class and left out.
        **options: Those of LoadAnnotations.
    """

    def __init__(self, num_classes: int, ignore_index: int = IGNORED, **options: Any) -> None:
        super().__init__(**options)
        self.num_classes, self.ignore_index = num_classes, ignore_index

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        path = results["seg_map_path"]
        own, data = self.reduce_zero_label, results["reduce_zero_label"]
        if own is not None and own != data:  # mmseg asserts it, as it asserts that there is a file
            raise BrokenLabelError(
                f"reduce_zero_label is {data} for the data set of {path} and {own} for the LoadAnnotations of its "
                "pipeline: set both to the same, or the second to None"
            )
        try:
            if Path(path).exists():  # else it is in some store
                self._check_numbers(path)
            super()._load_seg_map(results)
        except UNREADABLE as error:
            raise BrokenLabelError(
                f"{path} cannot be decoded as a label map"
                if Path(path).is_file()
                else f"there is no label map {path} for the image {results['img_path']}; check "
                "data_prefix.seg_map_path and seg_map_suffix"
            ) from error
        self._check_size(results)
        self._check_values(results)

    def _check_numbers(self, path: str) -> None:
        """Refuse colours, and numbers that mmseg would cut to 8 bits."""
        with Image.open(path) as image:
            mode = image.mode
            if mode in _ONE_BYTE:
                return
            if mode not in _ONE_NUMBER:
                raise BrokenLabelError(
                    f"{path} holds colours ({mode}), not one number per pixel; convert the label maps to class numbers"
                )
            most = np.asarray(image).max()
        if most > IGNORED:
            raise BrokenLabelError(f"{path} holds the value {most:.0f}: label maps have values from 0 to {IGNORED}")

    def _check_size(self, results: Mapping[str, Any]) -> None:
        size, image = results["gt_seg_map"].shape[:2], results.get("ori_shape")
        if image is not None and tuple(image) != tuple(size):
            raise BrokenLabelError(
                f"{results['seg_map_path']} has {size[0]} x {size[1]} pixels (height x width), and its image "
                f"{results['img_path']} has {image[0]} x {image[1]}; every pixel of an image needs its label"
            )

    def _check_values(self, results: Mapping[str, Any]) -> None:
        counts = np.bincount(results["gt_seg_map"].ravel(), minlength=256)
        counts[self.ignore_index] = counts[: self.num_classes] = 0
        wrong = np.flatnonzero(counts)
        if not len(wrong):
            return
        reduced = results["reduce_zero_label"]
        first = int(wrong[0]) + reduced
        more = f" (and {len(wrong) - 1} more values that are no class)" if len(wrong) > 1 else ""
        rule = "0 is ignored, class k is stored as k + 1" if reduced else "class k is stored as k"
        raise BrokenLabelError(
            f"{results['seg_map_path']} holds the value {first} at {counts[wrong[0]]} pixels{more}, but there are "
            f"{self.num_classes} classes, so values from {int(reduced)} to {self.num_classes - 1 + reduced} "
            f"(reduce_zero_label is {reduced}: {rule}), and {self.ignore_index} for what is ignored; correct the file, "
            "metainfo.classes or reduce_zero_label"
        )


def check_labels(loader: Any, model: Mapping[str, Any]) -> Any:
    """Return a data loader's config with :class:`CheckedLabelLoader` wherever it has mmseg's LoadAnnotations.

    Args:
        loader: Config of a data loader; a built one, or None, stays as it is.
        model: The config's `model`.
    """
    head = _decode_head(model)
    if "num_classes" not in head:
        return loader
    options = {"num_classes": head["num_classes"], "ignore_index": head.get("ignore_index", IGNORED)}
    return replace_transforms(loader, {"LoadAnnotations": {"type": CheckedLabelLoader, **options}})


def _decode_head(model: Mapping[str, Any]) -> Mapping[str, Any]:
    head = model.get("decode_head") or {}
    return head[-1] if isinstance(head, Sequence) else head


def check_segmentation(cfg: Config, loaders: Sequence[str]) -> None:
    """Check that the classes, palette and ignored label of segmentation data fit each other, the model and the files.

    Args:
        cfg: The run's config, its data checked by `piip.integrations.preflight.check_data`.
        loaders: Names of its loaders; absent ones are passed over.

    Raises:
        RunError: Something does not fit; the message says what to set.
        BrokenLabelError: Of the first few files, one is not usable.
    """
    for loader in loaders:
        for name, dataset in inner_datasets(cfg[loader]["dataset"], f"{loader}.dataset") if cfg.get(loader) else ():
            classes = _classes(dataset, name)
            check_heads(cfg.model, classes, name)
            _check_ignored(cfg, loader, dataset, name, classes)
            _read_some(cfg, dataset, name)
    _check_windows(cfg.model.get("test_cfg") or {})


def _classes(dataset: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the names of a data set's classes.

    Args:
        dataset: Its config.
        name: Its dotted name, for messages.

    Raises:
        RunError: There are no classes, the data set has others, or the palette does not fit them.
    """
    kind = DATASETS.get(dataset["type"]) if isinstance(dataset["type"], str) else dataset["type"]
    own, found = dataset.get("metainfo") or {}, kind._load_metainfo(dataset.get("metainfo"))
    classes, known = found.get("classes"), kind.METAINFO.get("classes")
    if not classes:
        raise RunError(f"{name}: the data have no class names; set metainfo=dict(classes=...)")
    if known and (foreign := [name for name in classes if name not in known]):
        raise RunError(
            f"{name}: {kind.__name__} has no class {foreign[0]!r}, it has {shown(known)}; data with classes of their "
            "own are of type='BaseSegDataset'"
        )
    # Where classes alone are set, to some of the data set's own, its palette is cut to them.
    palette = found.get("palette") if "palette" in own or "classes" not in own else None
    if palette is not None:
        if len(palette) != len(classes):
            raise RunError(
                f"{name}: metainfo.palette has {len(palette)} colours for {len(classes)} classes {shown(classes)}; "
                "give one colour (red, green, blue, each from 0 to 255) per class, in the order of the classes"
            )
        for colour, label in zip(palette, classes, strict=True):
            if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
                raise RunError(
                    f"{name}: metainfo.palette has {tuple(colour)!r} for the class {label!r}, which is no colour: give "
                    "red, green and blue, each from 0 to 255"
                )
    return tuple(classes)


def _ignored(cfg: Config, loader: str, dataset: Mapping[str, Any], name: str) -> Iterator[tuple[str, int]]:
    """Yield the dotted names and values of all settings that say which label is ignored."""
    for head, _ in heads(cfg.model):
        head = head.removesuffix(".num_classes")
        section = cfg.model
        for key in head.split(".")[1:]:
            section = section[int(key) if isinstance(section, Sequence) else key]
        yield f"{head}.ignore_index", section.get("ignore_index", IGNORED)
    yield "model.data_preprocessor.seg_pad_val", cfg.model.get("data_preprocessor", {}).get("seg_pad_val", IGNORED)
    yield f"{name}.ignore_index", dataset.get("ignore_index", IGNORED)
    evaluator = loader.replace("dataloader", "evaluator")
    if isinstance(cfg.get(evaluator), Mapping):
        yield f"{evaluator}.ignore_index", cfg[evaluator].get("ignore_index", IGNORED)


def _check_ignored(cfg: Config, loader: str, dataset: Mapping[str, Any], name: str, classes: Sequence[str]) -> None:
    settings = dict(_ignored(cfg, loader, dataset, name))
    for key, value in settings.items():
        if 0 <= value < len(classes):
            raise RunError(
                f"{key} is {value}, which is the class {classes[value]!r} too: its pixels would be left out; choose a "
                f"label that is no class, as mmsegmentation does: --cfg-options {key}={IGNORED}"
            )
    if dataset.get("reduce_zero_label"):
        settings[f"the label that {name}.reduce_zero_label makes of 0"] = IGNORED
    if len(set(settings.values())) > 1:
        there = ", ".join(f"{key}={value}" for key, value in settings.items())
        raise RunError(f"the settings for the label to be ignored differ: {there}; set all of them to {IGNORED}")


def _read_some(cfg: Config, dataset: Mapping[str, Any], name: str) -> None:
    if any("://" in str(path) for path in (dataset.get("data_root"), *(dataset.get("data_prefix") or {}).values())):
        return  # a store: read when it is needed
    built = DATASETS.build({**dataset, "pipeline": [], "serialize_data": False})
    if len(built) == 0:
        raise RunError(
            f"{name}: there is no image whose name ends in {built.img_suffix} in {built.data_prefix['img_path']}; "
            "check data_prefix.img_path and img_suffix"
        )
    read = CheckedImageLoader(on_broken="skip")
    kinds = ("LoadAnnotations", "mmseg.LoadAnnotations")
    own = [step for step in dataset.get("pipeline") or () if step.get("type") in kinds]
    (label,) = check_labels(own[:1] or [{"type": "LoadAnnotations"}], cfg.model)
    check = TRANSFORMS.build(label)
    for i in np.linspace(0, len(built) - 1, min(len(built), _READ_BEFORE)).astype(int):
        results = read(built.get_data_info(int(i)))
        if results is not None and "seg_map_path" in results:
            check(results)


def _check_windows(test_cfg: Mapping[str, Any]) -> None:
    if test_cfg.get("mode") != "slide":
        return
    window, stride = tuple(test_cfg["crop_size"]), tuple(test_cfg["stride"])
    if any(step > side or step < 1 for step, side in zip(stride, window, strict=True)):
        raise RunError(
            f"model.test_cfg.stride {stride} does not fit model.test_cfg.crop_size {window}: a stride of 1 up to the "
            "window's side leaves no part of the image out"
        )

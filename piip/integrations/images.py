"""Reading images, and what happens to those that cannot be read.

Training stops at such an image or goes on with another one, as the config's `on_broken_image` says; evaluation always
stops, since a metric over fewer images is another metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, TRANSFORMS
from mmengine.runner import Runner

from piip.errors import BrokenImageError, RunError, unknown

CHOICES = ("stop", "skip")
"""Of `on_broken_image`."""

UNREADABLE = (AssertionError, OSError, SyntaxError, ValueError, cv2.error)
"""What readers and decoders raise at a file that is missing or is no image; mmcv asserts that there is one."""

_MOST_IN_A_ROW = 100  # this many unreadable images are no accident, but a wrong folder


def _problem(path: str | Path) -> str:
    return f"{path} cannot be decoded as an image" if Path(path).is_file() else f"there is no image {path}"


def read_image(path: str | Path) -> np.ndarray:
    """Read an image as training does (turned as its EXIF data say): (H, W, 3) uint8, RGB.

    Raises:
        BrokenImageError: It is not there or cannot be decoded.
    """
    try:
        image = mmcv.imfrombytes(Path(path).read_bytes(), channel_order="rgb")
    except UNREADABLE as error:
        raise BrokenImageError(_problem(path)) from error
    if image is None:
        raise BrokenImageError(_problem(path))
    return image


@TRANSFORMS.register_module()
class CheckedImageLoader(LoadImageFromFile):
    """mmcv's LoadImageFromFile that names the image which cannot be read.

    Args:
        on_broken: `stop`: raise an error; `skip`: give no sample, upon which the dataset draws another one (of the
            random numbers that belong to this sample, so that a continued run draws the same).
        record: File that gets the path of each image skipped.
        **options: Those of LoadImageFromFile.
    """

    def __init__(self, on_broken: str = "stop", record: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.on_broken, self.record = on_broken, record
        self._in_a_row = 0

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Load the image at `img_path`, see LoadImageFromFile.

        Raises:
            BrokenImageError: It cannot be read, or, with `skip`, nor could very many before it.
        """
        try:
            loaded = super().transform(results)
        except UNREADABLE as error:
            self._report(results["img_path"], error)
            return None
        self._in_a_row = 0
        return loaded

    def _report(self, path: str, error: BaseException) -> None:
        if self.on_broken == "stop":
            raise BrokenImageError(
                f"{_problem(path)}; repair the file, or take it out of the data. In training, --cfg-options "
                "on_broken_image=skip goes on with another image and counts such files in the log"
            ) from error
        self._in_a_row += 1
        if self._in_a_row == _MOST_IN_A_ROW:
            raise BrokenImageError(
                f"{_problem(path)}, nor could {_MOST_IN_A_ROW - 1} images before it be read; check "
                "data_root and data_prefix"
            ) from error
        if self.record is not None:
            # Short lines that are appended do not mix, whichever processes write.
            with Path(self.record).open("a", encoding="utf-8") as file:
                file.write(f"{path}\n")


def check_images(loader: Any, on_broken: str = "stop", record: str | None = None) -> Any:
    """Return a config with :class:`CheckedImageLoader` wherever it has mmcv's LoadImageFromFile.

    Args:
        loader: Config of a data loader; a built one, or None, stays as it is.
        on_broken: See :class:`CheckedImageLoader`, like `record`.
        record: File for the paths of skipped images.

    Raises:
        RunError: There is no such `on_broken`.
    """
    if on_broken not in CHOICES:
        raise RunError(unknown("on_broken_image", on_broken, CHOICES))
    return replace_transforms(
        loader, {"LoadImageFromFile": {"type": CheckedImageLoader, "on_broken": on_broken, "record": record}}
    )


def replace_transforms(loader: Any, changes: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return a config in which transforms of some types have other options.

    Args:
        loader: Config of a data loader, or of a part of it; a built one, or None, stays as it is.
        changes: By the name of a type, in whichever scope: options to set, with the new type among them.
    """
    if isinstance(loader, Mapping):
        entries = {key: replace_transforms(value, changes) for key, value in loader.items()}
        kind = entries.get("type")
        name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
        entries.update(changes.get(name.rpartition(".")[2], {}))
        return type(loader)(entries)  # type: ignore[call-arg]  # a dict, or mmengine's ConfigDict
    if isinstance(loader, (list, tuple)):
        return type(loader)(replace_transforms(value, changes) for value in loader)
    return loader


@HOOKS.register_module()
class SkippedImagesHook(Hook):
    """Names in the log, and counts, the images that the data-loading processes of the whole run skip.

    Args:
        record: The file that they note them in.
    """

    def __init__(self, record: str) -> None:
        self.record = Path(record)
        self._read = 0
        self._seen: set[str] = set()

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Log those that are new."""
        if runner.rank != 0 or not self.record.exists() or self.record.stat().st_size == self._read:
            return
        with self.record.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        self._read += len(whole) + 1
        for path in whole.decode("utf-8").splitlines():
            if path not in self._seen:
                self._seen.add(path)
                runner.logger.warning(
                    f"{_problem(path)}: another one is used instead (images skipped so far: {len(self._seen)}, listed "
                    f"in {self.record})"
                )

    def after_train(self, runner: Runner) -> None:
        """Log what came last."""
        self.after_train_iter(runner)

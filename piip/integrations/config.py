"""Reading config files, also those that inherit from the installed mmdetection and mmsegmentation (`mmseg::`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from piip.errors import RunError
from piip.integrations import mmcv_ops


def read_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config file and apply changes to it; mmcv's ops are there for whatever it imports.

    Args:
        path: The file.
        options: Changes, by dotted name.

    Raises:
        RunError: There is no such file.
    """
    if not Path(path).is_file():
        raise RunError(f"there is no config {path} (seen from {Path.cwd()})")
    mmcv_ops.install()  # before mmdet or mmseg is imported, whatever the config imports first
    # mmengine looks for `mmseg::` in a distribution called mmsegmentation; its maintained successor has another name.
    MODULE2PACKAGE["mmseg"] = "mmseg"
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(dict(options or {}))
    return cfg

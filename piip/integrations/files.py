"""Files that nobody, and no kill, sees half written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a small file so that nobody, and no kill, sees it half written."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def finish(part: Path, path: Path) -> None:
    """Give a fully written file or folder its name, in an order that survives a crash of the machine."""
    for written in part.iterdir() if part.is_dir() else (part,):
        with written.open("rb") as file:
            os.fsync(file.fileno())
    if path.is_dir():
        shutil.rmtree(path)
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

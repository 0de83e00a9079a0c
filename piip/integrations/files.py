"""Files that nobody, and no kill, sees half written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


def write_text(path: Path, text: str) -> None:
    """Write a small file so that nobody, and no kill, sees it half written."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@contextmanager
def whole(path: Path, error: type[Exception]) -> Iterator[Path]:
    """Let a file appear under its name, whole or not at all; its folder is made where it is not there.

    The block writes to the path that it is given, `NAME.part`. It may make that a folder, for a file that refers to
    others beside it by their names: what it puts there moves beside the file, which comes last.

    Args:
        path: The file.
        error: The class of the error.

    Raises:
        error: It cannot be written; nothing half written is left then.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)  # of a run that was killed
        yield part
        if part.is_dir():
            for file in sorted(part.iterdir(), key=lambda file: file.name == path.name):
                file.replace(path.with_name(file.name))
            part.rmdir()
        else:
            part.replace(path)
    except (OSError, RuntimeError, SafetensorError) as reason:  # torch and safetensors report a full disk as their own
        said = " ".join(str(reason).split())
        hint = "; is the disk full?" if "inline_container" in said else ""  # torch's writer does not say why
        raise error(f"cannot write {path}: {said}{hint}") from None
    finally:
        with suppress(OSError):  # its folder may be what cannot be written
            _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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

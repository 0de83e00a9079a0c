"""Errors that name the culprit, what was expected and what to do."""

import difflib
from collections.abc import Iterable


class SpecError(ValueError):
    """A pyramid or branch is described in a way that cannot be built."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model."""


class RunError(RuntimeError):
    """A run cannot start or go on as asked; the message says what to change."""

    common = True
    """Whether every process of the run meets it, so that the first one reports it for all."""


class OwnError(RunError):
    """One process of several may meet this alone, so that it reports it itself."""

    common = False


def own_message(kind: type[Exception], message: str) -> str:
    """Return the message of an error without the traceback in front of it.

    torch hands an error of a data-loading process on as a whole traceback, which ends in the message.
    """
    return message.rstrip().rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2]


class FileError(OwnError):
    """A file of the data is not usable; the message names it."""

    def __init__(self, message: str) -> None:
        super().__init__(own_message(type(self), message))


class BrokenImageError(FileError):
    """An image file cannot be read."""


class BrokenLabelError(FileError):
    """A label map cannot be read, does not fit its image, or holds what is no class."""


class DownloadError(RunError):
    """A file cannot be fetched, whole and undamaged."""


class ExportError(RunError):
    """A model cannot be turned into a program for another runtime."""


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Return one line for an unknown name: the nearest known ones first, then all of them."""
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(str(name), known, n=3) or [k for k in known if name and str(name) in k][:3]
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"unknown {kind} {name!r}{hint}; known: {', '.join(known)}"

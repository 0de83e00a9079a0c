"""A stand-in for ``mmcv._ext``, the compiled half of mmcv, where mmcv was installed without a compiler.

``mmcv.ops`` imports its compiled extension module at import time and hands every operation to it. :func:`install`
lets Python find a replacement, last in line: a compiled extension always comes first. The replacement computes the
operations that Mask R-CNN, DINO and UperNet call (``mmcv_kernels.py``); any other name exists, so that imports
succeed, and raises an error that says what to do when it is called.

Order matters. mmdet and mmseg look for ``mmcv.ops`` once, while they are imported, and keep placeholders that raise
if it is missing at that moment. So :func:`install` comes before the first import of theirs, in every process:

- forked processes (the default start method of data-loader workers on Linux up to Python 3.13) inherit it;
- ``spawn`` and ``forkserver`` children run the top level of the main script again before they receive their data, so
  a script that supports those calls :func:`install` there, outside ``if __name__ == "__main__"``;
- a launcher such as torchrun starts the script itself once per process.

This module imports neither torch nor mmcv. Both wait until somebody asks for ``mmcv._ext``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import NoReturn

__all__ = ["ExtensionFinder", "MissingOpError", "StandInTooLateError", "install"]

_EXTENSION = "mmcv._ext"

# Modules that look for mmcv.ops while they are imported, and fall back to placeholders.
_BINDS_ONCE = (
    "mmdet.evaluation.metrics",
    "mmdet.models",
    "mmdet.structures.mask",
    "mmdet.utils.large_image",
    "mmseg.models",
)

# --no-cache-dir: pip would otherwise take the pure-Python wheel that it built and kept the first time.
_REMEDY = (
    "install a compiled mmcv with `pip install 'setuptools>=77,<81'` and then "
    "`pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation onedl-mmcv`"
)


class MissingOpError(NotImplementedError):
    """A compiled mmcv operation was called that has no replacement here."""

    def __init__(self, op: str) -> None:
        super().__init__(f"mmcv's {op} needs mmcv's compiled extension, which is not installed; {_REMEDY}")


class StandInTooLateError(RuntimeError):
    """mmdet or mmseg was imported before the stand-in and keeps operations that raise when called."""

    def __init__(self, module: str) -> None:
        super().__init__(
            f"{module} was imported before mmcv's operations were available and has kept placeholders that raise; "
            "in a new process, call piip.integrations.mmcv_ops.install() before the first import of mmdet or mmseg"
        )


def _missing_op(op: str) -> Callable[..., NoReturn]:
    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise MissingOpError(op)

    missing.__name__ = missing.__qualname__ = op
    return missing


def _stub_or_attribute_error(name: str) -> Callable[..., NoReturn]:
    # Python's own look-ups (__path__, __wrapped__, ...) must still see an ordinary module.
    if name.startswith("_"):
        raise AttributeError(f"module {_EXTENSION!r} has no attribute {name!r}")
    return _missing_op(name)


class ExtensionFinder(MetaPathFinder, Loader):
    """Finds and fills ``mmcv._ext``; belongs at the end of ``sys.meta_path``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the stand-in for ``mmcv._ext``, None for any other name."""
        return ModuleSpec(fullname, self, origin=__name__) if fullname == _EXTENSION else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the operations, and stubs for all others, into the module."""
        from piip.integrations import mmcv_kernels as kernels

        vars(module).update(kernels.OPS, __getattr__=_stub_or_attribute_error)


def _needs_stand_in() -> bool:
    mmcv = find_spec("mmcv")
    return mmcv is not None and PathFinder.find_spec(_EXTENSION, mmcv.submodule_search_locations or []) is None


def install() -> bool:
    """Make ``mmcv.ops`` importable where mmcv has no compiled extension; calling it again changes nothing.

    Returns:
        True where the stand-in serves ``mmcv._ext``; False where there is nothing to do, because the compiled
        extension is installed or mmcv is not.

    Raises:
        StandInTooLateError: mmdet or mmseg was imported first, so that some of its operations raise for good.
    """
    loaded = sys.modules.get(_EXTENSION)
    if loaded is not None:
        return loaded.__spec__ is not None and isinstance(loaded.__spec__.loader, ExtensionFinder)
    if any(isinstance(finder, ExtensionFinder) for finder in sys.meta_path):
        return True
    if not _needs_stand_in():
        return False
    for name in sorted(sys.modules):
        if any(name == module or name.startswith(f"{module}.") for module in _BINDS_ONCE):
            raise StandInTooLateError(name)
    sys.meta_path.append(ExtensionFinder())
    return True

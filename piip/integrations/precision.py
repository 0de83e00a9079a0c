"""bfloat16 as the released models were trained in it: the backbone computes in it, all that follows in float32.

Boxes and sampling positions in pixels need more digits than bfloat16 has: at 1000 its step is 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from mmengine.runner import autocast
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def bfloat16_backbone(model: nn.Module) -> AbstractContextManager[None]:
    """Return a region in which the backbone of a model computes in bfloat16, and returns float32.

    Args:
        model: One whose `backbone` is a `PIIPBackbone`; of another, all computes in bfloat16 where that is safe.
    """
    backbone = backbone_of(model)
    return autocast(dtype=torch.bfloat16) if backbone is None else _computing(backbone, torch.bfloat16)


def backbone_of(model: nn.Module) -> Any:
    """Return the `PIIPBackbone` of a model, which may be wrapped for several processes, or None."""
    backbone = getattr(getattr(model, "module", model), "backbone", None)
    return backbone if hasattr(backbone, "compute_dtype") else None


@contextmanager
def _computing(backbone: Any, dtype: torch.dtype) -> Iterator[None]:
    before, backbone.compute_dtype = backbone.compute_dtype, dtype
    try:
        yield
    finally:
        backbone.compute_dtype = before


def compute_in_float32(model: nn.Module, leave_out: nn.Module) -> None:
    """Let layers compute in float32 while their parameters stay in bfloat16, as an engine stores them.

    Args:
        model: Its layers are changed, for good.
        leave_out: A part of the model that is left as it is, with what it is in.
    """
    left = {id(module) for module in leave_out.modules()}
    for module in model.modules():
        holds_it = any(part is leave_out for part in module.modules())
        if id(module) not in left and not holds_it and any(True for _ in module.parameters(recurse=False)):
            module.forward = _in_float32(module)


def _in_float32(layer: nn.Module) -> Callable[..., Any]:
    inner = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # Looked up one by one: that is how ZeRO-3 learns what it has to gather. A layer may use its children's
        # parameters without calling them, as torch's multi-head attention does.
        stored = [(part, name, part._parameters[name]) for part in layer.modules() for name in list(part._parameters)]
        try:
            for part, name, parameter in stored:
                part._parameters[name] = _widen(parameter)
            return inner(*tree_map(_widen, args), **tree_map(_widen, kwargs))
        finally:
            for part, name, parameter in stored:
                part._parameters[name] = parameter

    return forward


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value

"""Comparisons of tensors."""

from collections.abc import Iterable

import torch
from torch import Tensor


def relative_difference(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """Relative L2 difference over all tensors together."""
    first, second = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (one, other))
    return ((first - second).norm() / first.norm()).item()

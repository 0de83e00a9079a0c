"""Merging: the branches' tokens become one map (arXiv 2406.04330, section 3.3, equations 3 and 4)."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from piip.errors import SpecError, unknown
from piip.init import init_layer
from piip.tokens import Tokens


def _convolution(dim: int, out_dim: int) -> list[nn.Module]:
    return [nn.Conv2d(dim, out_dim, kernel_size=3, padding=1, bias=False), *_normalisation(out_dim)]


def _normalisation(dim: int) -> list[nn.Module]:
    return [nn.GroupNorm(32, dim), nn.ReLU()]


def two_convolutions(dim: int, out_dim: int, first: bool) -> nn.Module:
    """Project by two 3x3 convolutions with group norm (what feeds a simple FPN)."""
    return nn.Sequential(*_convolution(dim, out_dim), *_convolution(out_dim, out_dim))


def one_convolution(dim: int, out_dim: int, first: bool) -> nn.Module:
    """Project by one 3x3 convolution with group norm; the first branch is normalised only (regular FPNs)."""
    return nn.Sequential(*(_normalisation(out_dim) if first else _convolution(dim, out_dim)))


def separable(dim: int, out_dim: int, first: bool) -> nn.Module:
    """Project by a 1x1 convolution and filter by a depthwise 3x3 one: a tenth of `two_convolutions`' cost and less.

    Not in the papers; for new training.
    """
    across = nn.Conv2d(dim, out_dim, kernel_size=1, bias=False)
    along = nn.Conv2d(out_dim, out_dim, kernel_size=3, padding=1, groups=out_dim, bias=False)
    return nn.Sequential(across, along, *_normalisation(out_dim))


class _Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


def linear(dim: int, out_dim: int, first: bool) -> nn.Module:
    """Project by a linear layer between two group norms; the first branch is normalised only (classification)."""
    if first:
        return nn.GroupNorm(32, dim)
    across = nn.Linear(dim, out_dim)
    return nn.Sequential(
        nn.GroupNorm(32, dim), _Permute(0, 2, 3, 1), across, _Permute(0, 3, 1, 2), nn.GroupNorm(32, out_dim)
    )


# From (channels, channels of the merged map, whether it is the first branch) to the branch's projection.
STYLES: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "two_convolutions": two_convolutions,
    "one_convolution": one_convolution,
    "linear": linear,
    "separable": separable,
}


class BranchMerge(nn.Module):
    """Project every branch, resize it to one grid, and sum by learnable scalars (equation 4).

    Args:
        dims: Channels of every branch; the merged map has the first one's (equation 3), a multiple of 32 (group norm).
        output_branch: Index of the branch whose grid the merged map takes.
        style: The projection, a key of `STYLES`.

    Raises:
        SpecError: Unknown style, or channels that group norm cannot split.
    """

    def __init__(self, dims: Sequence[int], output_branch: int, style: str = "two_convolutions") -> None:
        super().__init__()
        if style not in STYLES:
            raise SpecError(unknown("merging style", style, STYLES))
        out_dim = dims[0]
        for dim in dims if style == "linear" else (out_dim,):  # what the style normalises
            if dim % 32:
                raise SpecError(f"merging {dim} channels: group norm needs a multiple of 32")
        self.output_branch = output_branch
        self.projections = nn.ModuleList(STYLES[style](dim, out_dim, i == 0) for i, dim in enumerate(dims))
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in dims)
        self.apply(init_layer)

    def forward(self, states: Sequence[Tokens]) -> Tensor:
        """Merge one state per branch into `(B, dims[0], H, W)`, the grid being that of the output branch."""
        grid = states[self.output_branch].grid
        weighted = (
            weight * _resize(projection(state.to_map()), grid)
            for state, projection, weight in zip(states, self.projections, self.weights, strict=True)
        )
        return reduce(torch.add, weighted)


def _resize(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    if maps.shape[-2:] == grid:
        return maps
    return F.interpolate(maps.float(), size=grid, mode="bilinear", align_corners=False).to(maps.dtype)

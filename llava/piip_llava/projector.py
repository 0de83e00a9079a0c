"""From a tower's maps to tokens of the language model (arXiv 2501.07783, PIIP-LLaVA)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from piip.errors import SpecError, unknown
from piip.tokens import Tokens


class BranchMlp(nn.Module):
    """Linear, norm, GELU, linear on a map; the middle is as wide as the language model.

    Args:
        dim: Channels of the map.
        out_dim: Width of the language model.
        norm: `group` (32 groups), or `layer` without parameters.
    """

    def __init__(self, dim: int, out_dim: int, norm: str) -> None:
        super().__init__()
        if norm not in ("group", "layer"):
            raise SpecError(unknown("projector norm", norm, ("group", "layer")))
        if norm == "group" and out_dim % 32:
            raise SpecError(f"GroupNorm has 32 groups, a width of {out_dim} cannot be split: use norm='layer'")
        self.fc1 = nn.Linear(dim, out_dim)
        self.norm = nn.GroupNorm(32, out_dim) if norm == "group" else nn.LayerNorm(out_dim, elementwise_affine=False)
        self.fc2 = nn.Linear(out_dim, out_dim)

    def forward(self, maps: Tensor) -> Tensor:
        """Map `(B, dim, H, W)` to tokens `(B, H*W, out_dim)`."""
        x = self.fc1(maps.flatten(2).transpose(1, 2))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2) if isinstance(self.norm, nn.GroupNorm) else self.norm(x)
        return self.fc2(F.gelu(x))


class SeparateProjector(nn.Module):
    """One `BranchMlp` per map, on the grid of the last map; their results are added.

    Args:
        dims: Channels of each map.
        out_dim: Width of the language model.
        norm: See `BranchMlp`.
        out_size: Side of the grid that every map is resized to; None for the last map's own.
    """

    def __init__(self, dims: Sequence[int], out_dim: int, norm: str = "group", out_size: int | None = None) -> None:
        super().__init__()
        self.out_size = out_size
        self.branches = nn.ModuleList(BranchMlp(dim, out_dim, norm) for dim in dims)

    def forward(self, states: list[Tokens]) -> Tensor:
        """Map one token grid per branch to `(B, H*W, out_dim)`, row by row."""
        grid = (self.out_size, self.out_size) if self.out_size else states[-1].grid
        return torch.stack([mlp(_resize(t, grid)) for mlp, t in zip(self.branches, states, strict=True)]).sum(0)


def _resize(tokens: Tokens, grid: tuple[int, int]) -> Tensor:
    """Return the tokens as a map on another grid; bilinear, in float32."""
    maps = tokens.to_map()
    if tokens.grid == grid:
        return maps
    return F.interpolate(maps.float(), size=grid, mode="bilinear", align_corners=False).to(maps.dtype)


class MlpProjector(nn.Module):
    """Linear layers with GELU between them, token by token, for a tower with one map (LLaVA-1.5: two layers).

    Args:
        dims: Channels of the map.
        out_dim: Width of the language model.
        depth: Linear layers; 0 hands the tokens on as they are.
    """

    out_size = None

    def __init__(self, dims: Sequence[int], out_dim: int, depth: int = 2) -> None:
        super().__init__()
        if len(dims) != 1:
            raise SpecError(f"an 'mlp' projector takes one map, the tower has {len(dims)}: use type 'separate'")
        if not depth and dims[0] != out_dim:
            raise SpecError(f"a projector of no layers cannot map {dims[0]} channels to {out_dim}")
        sizes = [dims[0], *[out_dim] * depth]
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [*([nn.GELU()] if i else []), nn.Linear(sizes[i], sizes[i + 1])]
        self.layers = nn.Sequential(*layers)

    def forward(self, states: list[Tokens]) -> Tensor:
        """Map one token grid to `(B, P + H*W, out_dim)`, class tokens first where the tower hands them on."""
        (tokens,) = states
        return self.layers(tokens.x if tokens.prefix is None else torch.cat([tokens.prefix, tokens.x], dim=1))


PROJECTORS: dict[str, Callable[..., nn.Module]] = {"separate": SeparateProjector, "mlp": MlpProjector}


def build_projector(options: Mapping[str, Any], dims: Sequence[int], out_dim: int) -> nn.Module:
    """Build a projector from what a config holds: its `type`, a key of `PROJECTORS`, and the options of that class.

    Raises:
        SpecError: Unknown type or option, or a projector that does not fit the tower.
    """
    options = dict(options)
    kind = options.pop("type", "separate")
    if kind not in PROJECTORS:
        raise SpecError(unknown("projector type", kind, PROJECTORS))
    try:
        return PROJECTORS[kind](dims, out_dim, **options)
    except TypeError as error:
        raise SpecError(f"projector of type {kind!r}: {error}") from None

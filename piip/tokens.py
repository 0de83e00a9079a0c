"""The one value that travels through a pyramid."""

from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """A feature map in token form.

    Attributes:
        x: Patch tokens `(B, H*W, C)`, row-major.
        grid: `(H, W)` of the tokens.
        prefix: Class tokens `(B, P, C)`, or None for a branch without any.
    """

    x: Tensor
    grid: tuple[int, int]
    prefix: Tensor | None = None

    def to_map(self) -> Tensor:
        """Return the patch tokens as a map `(B, C, H, W)`: a view, channels last in memory where `x` is contiguous."""
        return tokens_to_map(self.x, self.grid)


def tokens_to_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """View `(B, H*W, C)` as `(B, C, H, W)` for `grid` = (H, W).

    The channels go last in one permutation: after a transposition and a split, a batch of one has strides that
    convolutions do not recognise as channels last, and they would copy the map.
    """
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


def map_to_tokens(maps: Tensor) -> Tensor:
    """Turn `(B, C, H, W)` into contiguous `(B, H*W, C)`: a view where the map has its channels last in memory."""
    return maps.permute(0, 2, 3, 1).contiguous().flatten(1, 2)

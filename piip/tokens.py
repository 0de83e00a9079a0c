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
        """Return the patch tokens as a map `(B, C, H, W)`."""
        return self.x.transpose(1, 2).unflatten(2, self.grid)

"""Feature pyramids for dense heads."""

from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from piip.errors import SpecError, unknown
from piip.init import init_layer

# Names, not list positions: a head that skips a level (DINO) leaves the others' parameter names as they are.
LEVELS = {4: "up4", 2: "up2", 1: "same", 0.5: "down2"}
NORMS = ("group", "layer")


def resample(dim: int, scale: float, norm: str = "group") -> nn.Module:
    """Build the layer that brings a map of `dim` channels to `scale` times its size.

    Args:
        dim: Channels.
        scale: 4, 2 (transposed convolutions), 1 (nothing) or 0.5 (max-pooling).
        norm: Norm inside scale 4: `group`, or `layer` over the channels.

    Raises:
        SpecError: Unknown scale or norm.
    """
    if norm not in NORMS:
        raise SpecError(unknown("FPN norm", norm, NORMS))
    if scale not in LEVELS:
        raise SpecError(unknown("FPN scale", scale, [str(known) for known in LEVELS]))

    def double() -> nn.Module:
        return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)

    if scale == 4:
        between = nn.GroupNorm(32, dim) if norm == "group" else LayerNorm2d(dim, eps=1e-6)
        layer: nn.Module = nn.Sequential(double(), between, nn.GELU(), double())
    elif scale == 2:
        layer = nn.Sequential(double())
    else:
        layer = nn.Identity() if scale == 1 else nn.MaxPool2d(kernel_size=2, stride=2)
    return layer.apply(init_layer)


class SimpleFPN(nn.Module):
    """Maps of several scales from one map, as in ViTDet (arXiv 2203.16527, section 3).

    Args:
        dim: Channels of the map and of every level.
        scales: Size of each level relative to the map: 4, 2, 1 or 0.5; DINO heads take (2, 1, 0.5).
        norm: Norm inside the scale-4 level: `group` (pyramids), or `layer` over the channels (single branches).

    Raises:
        SpecError: Unknown scale or norm.
    """

    def __init__(self, dim: int, scales: Sequence[float] = (4, 2, 1, 0.5), norm: str = "group") -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.levels = nn.ModuleDict({LEVELS.get(scale, "?"): resample(dim, scale, norm) for scale in scales})

    def forward(self, x: Tensor) -> list[Tensor]:
        """Turn a map `(B, C, H, W)` into one `(B, C, H * scale, W * scale)` per scale (rounded down)."""
        return [level(x) for level in self.levels.values()]


class RegularFPN(nn.Module):
    """One map per level, each brought from its own stride to the level's.

    Args:
        dims: Channels of each map.
        scales: Size of each level relative to its map, see `resample`.

    Raises:
        SpecError: Unknown scale.
    """

    def __init__(self, dims: Sequence[int], scales: Sequence[float]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(resample(dim, scale) for dim, scale in zip(dims, scales, strict=True))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Resample maps `(B, dims[i], H, W)`, each on its own."""
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]

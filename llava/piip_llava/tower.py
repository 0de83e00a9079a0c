"""Vision towers behind one interface: a pyramid, a plain CLIP, and CLIP at several scales (S2).

A tower turns images into one or more token grids; the projector turns those into the tokens of the language model.
Each tower says how many tokens an image becomes and what its encoder costs, so that towers can be compared at equal
numbers of tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from piip.branches import Branch, ConvNeXtBranch
from piip.budget import count_macs
from piip.errors import SpecError, unknown
from piip.tokens import Tokens
from piip.zoo.specs import PyramidSpec, build_branch, build_pyramid, resolve_spec


class TowerCost(NamedTuple):
    """What a tower costs for one image.

    Attributes:
        tokens: Tokens per image that reach the projector's output grid (its grid is the last map's).
        params: Parameters.
        macs: Multiply-adds of the encoder, one multiply-add counted as one; norms and activations are not counted.
    """

    tokens: int
    params: int
    macs: int


class VisionTower(nn.Module, ABC):
    """What the rest of the model knows of a tower.

    Attributes:
        image_size: Side of the square input image in pixels.
        dims: Channels of each map.
    """

    image_size: int
    dims: tuple[int, ...]

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tokens]:
        """Map normalised images `(B, 3, image_size, image_size)` to one token grid per map."""

    @abstractmethod
    def grids(self) -> list[tuple[int, int]]:
        """Return `(H, W)` of every map, and with it the number of tokens, without running the tower."""

    @property
    def prefix_tokens(self) -> int:
        """Class tokens in front of each map that are handed to the projector."""
        return 0

    @abstractmethod
    def branches(self) -> list[tuple[Branch, str | None]]:
        """Return the pretrained networks inside, and the file name of the weights that each starts from."""

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass."""


def _side(branch: Branch, resolution: int, stride: int) -> int:
    """Return the tokens per side of a square image; patches of a ViT may overlap."""
    return (resolution - getattr(branch, "patch_size", stride)) // stride + 1


def _blocks(branch: Branch) -> list[nn.Module]:
    """Return a branch's blocks in their order; none where their place is not known."""
    if isinstance(branch, ConvNeXtBranch):  # a down-sampling layer is a block too
        stages = enumerate(branch.stages)
        return [b for i, stage in stages for b in ([stage.downsample] if i else []) + list(stage.blocks)]
    return list(getattr(getattr(branch, "network", branch), "blocks", ()))


class PyramidTower(VisionTower):
    """A parameter-inverted image pyramid; hands on the last map of every branch, class tokens left out.

    Args:
        spec: Name of a row of the zoo, a `PyramidSpec`, or a mapping (see `piip.zoo.specs.resolve_spec`).
    """

    def __init__(self, spec: str | PyramidSpec | Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = resolve_spec(spec)
        self.pyramid = build_pyramid(self.spec)
        self.image_size = self.pyramid.input_resolution
        self.dims = tuple(self.pyramid.dims())

    def forward(self, images: Tensor) -> list[Tokens]:
        """See `VisionTower.forward`."""
        return [tokens._replace(prefix=None) for tokens in self.pyramid(images)[0]]

    def grids(self) -> list[tuple[int, int]]:
        """See `VisionTower.grids`."""
        pairs = zip(self.pyramid.branches, self.spec.branches, strict=True)
        sides = [_side(branch, spec.resolution, branch.strides[-1]) for branch, spec in pairs]
        return [(side, side) for side in sides]

    def branches(self) -> list[tuple[Branch, str | None]]:
        """See `VisionTower.branches`."""
        return [(b, spec.weights) for b, spec in zip(self.pyramid.branches, self.spec.branches, strict=True)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `VisionTower.set_grad_checkpointing`."""
        self.pyramid.set_grad_checkpointing(enable)


class PlainTower(VisionTower):
    """One plain network at one resolution, as LLaVA-1.5 uses CLIP.

    Args:
        spec: A spec of one branch.
        select_layer: Which state to hand on, counted as Hugging Face counts hidden states: -1 is the last block's,
            -2 the one before it.
        select_feature: `patch`, or `cls_patch` to hand on class tokens too.

    Raises:
        SpecError: The spec has several branches, or an option has an unknown value.
    """

    def __init__(
        self,
        spec: str | PyramidSpec | Mapping[str, Any],
        select_layer: int = -2,
        select_feature: str = "patch",
    ) -> None:
        super().__init__()
        self.spec = resolve_spec(spec)
        if len(self.spec.branches) != 1:
            raise SpecError(f"a plain tower has one branch, the spec has {len(self.spec.branches)}: use type 'pyramid'")
        if select_feature not in ("patch", "cls_patch"):
            raise SpecError(unknown("select_feature", select_feature, ("patch", "cls_patch")))
        self.branch = build_branch(self.spec.branches[0])
        states = range(self.branch.depth + 1)
        if select_layer not in range(-len(states), len(states)):
            raise SpecError(f"select_layer {select_layer} is no state of a branch with {self.branch.depth} blocks")
        self.blocks_run = states[select_layer]
        self.keep_prefix = select_feature == "cls_patch"
        self.image_size = self.spec.branches[0].resolution
        self.dims = (self.branch.dims[max(self.blocks_run - 1, 0)],)

    def forward(self, images: Tensor) -> list[Tokens]:
        """See `VisionTower.forward`."""
        return [self._encode(images)]

    def _encode(self, images: Tensor) -> Tokens:
        tokens = self.branch.run(self.branch.embed(images), 0, self.blocks_run)
        return tokens if self.keep_prefix else tokens._replace(prefix=None)

    def grids(self) -> list[tuple[int, int]]:
        """See `VisionTower.grids`."""
        side = _side(self.branch, self.image_size, self.branch.strides[max(self.blocks_run - 1, 0)])
        return [(side, side)]

    @property
    def prefix_tokens(self) -> int:
        """See `VisionTower.prefix_tokens`."""
        return 1 if self.keep_prefix else 0

    def branches(self) -> list[tuple[Branch, str | None]]:
        """See `VisionTower.branches`."""
        return [(self.branch, self.spec.branches[0].weights)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `VisionTower.set_grad_checkpointing`."""
        self.branch.grad_checkpointing = enable

    def unread_blocks(self) -> list[nn.Module]:
        """Return the blocks behind the selected state, which never run."""
        return _blocks(self.branch)[self.blocks_run :]


class S2Tower(PlainTower):
    """Scaling on scales (arXiv 2403.13043): one network on several scales of the image, at the tokens of one scale.

    Each larger scale is cut into tiles of the network's own size, which pass through it like images of their own. The
    tiles' maps are put together again and averaged down to the grid of the smallest scale; the maps of all scales are
    then joined channel by channel.

    Args:
        spec: A spec of one branch; its resolution is the tile size.
        scales: Multiples of the tile size, the first is 1.
        **options: Options of `PlainTower`, class tokens left out.

    Raises:
        SpecError: See `PlainTower`; or scales that are not whole numbers beginning with 1.
    """

    def __init__(
        self, spec: str | PyramidSpec | Mapping[str, Any], scales: Sequence[int] = (1, 2), **options: Any
    ) -> None:
        super().__init__(spec, **options)
        if self.keep_prefix:
            raise SpecError("S2 joins maps channel by channel and has no place for class tokens: use 'patch'")
        if not scales or scales[0] != 1 or any(not isinstance(s, int) or s < 1 for s in scales):
            raise SpecError(f"scales are whole numbers, the first is 1; got {list(scales)}")
        self.scales = tuple(scales)
        self.tile = self.image_size
        self.image_size = self.tile * max(scales)
        self.dims = (self.dims[0] * len(scales),)

    def forward(self, images: Tensor) -> list[Tokens]:
        """See `VisionTower.forward`."""
        maps = [self._encode_scale(images, scale) for scale in self.scales]
        size = (maps[0].shape[-2], maps[0].shape[-1])
        joined = torch.cat([F.adaptive_avg_pool2d(m, size) if m.shape[-2:] != size else m for m in maps], dim=1)
        return [Tokens(joined.flatten(2).transpose(1, 2), size)]

    def _encode_scale(self, images: Tensor, scale: int) -> Tensor:
        side = self.tile * scale
        if images.shape[-1] != side:
            images = F.interpolate(images.float(), size=(side, side), mode="bicubic").to(images.dtype)
        batch = len(images)
        tiles = images.unflatten(3, (scale, self.tile)).unflatten(2, (scale, self.tile))  # (B, 3, s, t, s, t)
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        maps = self._encode(tiles).to_map()  # (B * s * s, C, h, w)
        maps = maps.unflatten(0, (batch, scale, scale)).permute(0, 3, 1, 4, 2, 5)
        return maps.flatten(4, 5).flatten(2, 3)

    def grids(self) -> list[tuple[int, int]]:
        """See `VisionTower.grids`."""
        side = _side(self.branch, self.tile, self.branch.strides[max(self.blocks_run - 1, 0)])
        return [(side, side)]


TOWERS: dict[str, Callable[..., VisionTower]] = {"pyramid": PyramidTower, "plain": PlainTower, "s2": S2Tower}


def build_tower(options: Mapping[str, Any]) -> VisionTower:
    """Build a tower from what a config holds: its `type`, a key of `TOWERS`, and the options of that class.

    Raises:
        SpecError: Unknown type or option, or a tower that cannot be built.
    """
    options = dict(options)
    kind = options.pop("type", "pyramid")
    if kind not in TOWERS:
        raise SpecError(unknown("tower type", kind, TOWERS))
    try:
        return TOWERS[kind](**options)
    except TypeError as error:
        raise SpecError(f"tower of type {kind!r}: {error}") from None


def complete_tower(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tower's options with its whole structure written out, as JSON can hold it.

    A saved model then needs no table of ours to be built again.
    """
    return {"type": "pyramid", **options, "spec": asdict(resolve_spec(options["spec"]))}


def measure(tower: Mapping[str, Any]) -> TowerCost:
    """Count what a tower costs for one image, on the meta device: no memory or time is spent on weights."""
    with torch.device("meta"):
        built = build_tower(tower).eval()
        images = torch.empty(1, 3, built.image_size, built.image_size)
    params = sum(p.numel() for p in built.parameters())
    return TowerCost(num_tokens(built), params, count_macs(built, images))


def num_tokens(tower: VisionTower, out_size: int | None = None) -> int:
    """Return how many tokens an image becomes.

    Args:
        tower: The tower.
        out_size: Side of the grid that the projector resizes to; None for the grid of the last map.
    """
    height, width = (out_size, out_size) if out_size else tower.grids()[-1]
    return height * width + tower.prefix_tokens

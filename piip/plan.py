"""Choosing resolutions for a budget: the cost of a model in closed form, and the combinations worth trying.

`piip.budget.as_run` counts a model by running it without data, which takes seconds. The formulas here say the same
(within one percent, see `tools/plan.py --check`) in microseconds, so that thousands of combinations can be compared.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice, pairwise, product
from math import prod
from typing import Any, cast

import torch
from torch import nn

from piip.attention import CrossAttention, SelfAttention
from piip.branches import Branch, ConvNeXtBranch, ViTBranch
from piip.budget import MODELS
from piip.deformable import DeformableCrossAttention
from piip.errors import SpecError
from piip.fpn import RegularFPN
from piip.zoo.specs import PyramidSpec, resolve_spec

Grid = tuple[int, int]


def _linear(layer: Any, cells: int) -> int:
    return 0 if layer is None or isinstance(layer, nn.Identity) else _weights(layer) * cells


def _weights(module: Any) -> int:
    """Number of weights of matrices and kernels: what one cell costs."""
    return sum(p.numel() for name, p in module.named_parameters() if p.ndim > 1 and name.endswith("weight"))


def vit_macs(branch: ViTBranch, image: Grid, blocks: int | None = None) -> int:
    """Multiply-adds of a ViT branch on an image of `(height, width)` pixels; its windows are padded.

    Args:
        branch: The branch.
        image: Height and width in pixels.
        blocks: Number of blocks that run; None for all.
    """
    grid = (image[0] // branch.patch_size, image[1] // branch.patch_size)
    cells = prod(grid)
    extra = 0 if branch.cls_token is None else 1
    total = _weights(branch.patch_embed) * cells
    for block in islice(cast(Iterable[Any], branch.blocks), blocks):
        attn: SelfAttention = block.attn
        window, dim = attn.window, attn.qkv.in_features
        padded = prod(-(-side // window) * window for side in grid) if window else cells + extra
        in_qkv = padded if attn.window_pad == "before_qkv" else cells
        total += _weights(attn.qkv) * in_qkv + 2 * padded * (window**2 if window else padded) * dim
        total += (_weights(attn.proj) + _weights(block.mlp)) * (cells + extra)
    return total


def convnext_macs(branch: ConvNeXtBranch, image: Grid) -> int:
    """Multiply-adds of a ConvNeXt branch on an image of `(height, width)` pixels."""
    height, width = (side - side % 4 for side in image)
    total = 0
    for layer in branch.stem.modules():
        if isinstance(layer, nn.Conv2d):
            height, width = height // layer.stride[0], width // layer.stride[1]
            total += _weights(layer) * height * width
    for stage in cast(Iterable[Any], branch.stages):
        if not isinstance(stage.downsample, nn.Identity):
            height, width = height // 2, width // 2
            total += _weights(stage.downsample) * height * width
        total += sum(_weights(block) for block in stage.blocks) * height * width
    return total


def injector_macs(injector: Any, query: int, feat: int) -> int:
    """Multiply-adds of one direction of an interaction, for numbers of tokens of the query and of the features."""
    attn = injector.attn
    total = _linear(injector.proj, feat)
    if isinstance(attn, DeformableCrossAttention):
        width = attn.value_proj.out_features
        total += (_weights(attn.sampling_offsets) + _weights(attn.attention_weights)) * query
        total += _weights(attn.value_proj) * feat + _weights(attn.output_proj) * query
        total += 4 * attn.points * query * width
    else:
        assert isinstance(attn, CrossAttention)
        dim = attn.proj.in_features
        total += (_weights(attn.wq) + _weights(attn.proj)) * query + (_weights(attn.wk) + _weights(attn.wv)) * feat
        total += 2 * query * feat * dim
    return total + _linear(injector.ffn, query)


class ClosedForm:
    """The cost of a spec's model as a function of its branches' resolutions.

    It is that of the spec that `with_resolutions` returns: the branch with the largest image gives the merged map's
    grid, whatever the spec itself says.

    Args:
        spec: See `piip.models.DensePyramid`; its own resolutions do not matter.
        model: What the spec becomes, a key of `piip.budget.MODELS`.
        **options: Options of the model's class.

    Raises:
        SpecError: The spec cannot be built, or has a branch type without a formula.
    """

    def __init__(self, spec: str | PyramidSpec | Mapping[str, Any], model: str = "dense", **options: Any) -> None:
        self.spec, self.kind, self.options = resolve_spec(spec), model, options
        with torch.device("meta"):
            self.model = MODELS[model](self.spec, **options)
        for i, branch in enumerate(self.model.pyramid.branches):
            if not isinstance(branch, ViTBranch | ConvNeXtBranch):
                raise SpecError(f"branch {i + 1} is a {type(branch).__name__}: there are formulas for ViT and ConvNeXt")
        self.taps: list[int] = getattr(self.model, "taps", [])
        # The mergings by stage: only dense backbones have taps, only towers and single branches have none at the end.
        self.merges: dict[int, Any] = {int(k): merge for k, merge in getattr(self.model, "tap_merges", {}).items()}
        if (last := getattr(self.model, "merge", None)) is not None:
            self.merges[self.model.pyramid.depth - 1] = last
        self._branch_macs = lru_cache(None)(self._one_branch)
        self._fpn = lru_cache(None)(self._fpn_from)

    def _one_branch(self, index: int, side: int) -> int:
        branch: Branch = self.model.pyramid.branches[index]
        if isinstance(branch, ViTBranch):
            return vit_macs(branch, (side, side), self.model.pyramid.cuts[index][-1][1])
        assert isinstance(branch, ConvNeXtBranch)
        return convnext_macs(branch, (side, side))

    def _fpn_from(self, output: int) -> list[nn.Module]:
        """Return the levels for maps on the grid of a branch: a regular FPN's layers depend on its strides."""
        if not self.taps:
            return list(self.model.fpn.levels.children())
        pyramid, stages = self.model.pyramid, [*self.taps, self.model.pyramid.depth - 1]
        own = [pyramid.branches[output].strides[pyramid.cuts[output][k][1] - 1] for k in stages]
        scales = [stride / target for stride, target in zip(own, self.model.strides, strict=True)]
        with torch.device("meta"):
            return list(RegularFPN(self.model.out_channels, scales).levels.children())

    def params(self, resolutions: Sequence[int]) -> dict[str, int]:
        """Return parameters by part; those of a regular FPN depend on which branch has the largest image.

        Args:
            resolutions: Image side of every branch in pixels, in the order of the branches.

        Raises:
            SpecError: No FPN can start from that branch.
        """
        counts = {"branches": _count(self.model.pyramid.branches), "interactions": _count(self.model.pyramid.stages)}
        if self.kind != "tower":
            counts["merging"] = _count(self.merges.values())
        if self.kind == "dense":
            counts["fpn"] = _count(self._fpn(_output(resolutions)))
        if self.kind == "classifier":
            counts["head"] = _count([self.model.norm, self.model.head])
        return counts

    def __call__(self, resolutions: Sequence[int]) -> dict[str, int]:
        """Return multiply-adds on square images by part: `branches`, `interactions`, `total` and what the model has.

        That is `merging` and `fpn` of a dense backbone, `merging` and `head` of a classifier.

        Args:
            resolutions: Image side of every branch in pixels, in the order of the branches.

        Raises:
            SpecError: No FPN can start from the branch with the largest image.
        """
        pyramid = self.model.pyramid

        def cells(stage: int) -> list[int]:
            ends = [cut[stage][1] - 1 for cut in pyramid.cuts]
            strides = [branch.strides[end] for branch, end in zip(pyramid.branches, ends, strict=True)]
            return [(side // stride) ** 2 for side, stride in zip(resolutions, strides, strict=True)]

        costs = {"branches": sum(self._branch_macs(i, side) for i, side in enumerate(resolutions))}
        costs["interactions"] = 0
        for k, stage in enumerate(pyramid.stages):
            for unit, (low, high) in zip(cast(Iterable[Any], stage.units), pairwise(cells(k)), strict=True):
                costs["interactions"] += injector_macs(unit.to_low, low, high) + injector_macs(unit.to_high, high, low)
        if self.kind != "tower":
            costs["merging"] = sum(
                _weights(projection) * own
                for k, merge in self.merges.items()
                for projection, own in zip(merge.projections, cells(k), strict=True)
            )
        if self.kind == "dense":
            output = _output(resolutions)
            levels = self._fpn(output)
            # A simple FPN makes all levels of the last merged map, a regular one a level of each.
            stages = [*self.taps, pyramid.depth - 1] if self.taps else [pyramid.depth - 1] * len(levels)
            costs["fpn"] = sum(_level(level, cells(k)[output]) for level, k in zip(levels, stages, strict=True))
        if self.kind == "classifier":
            costs["head"] = _weights(self.model.head)  # on one token, or the mean of all
        return {**costs, "total": sum(costs.values())}


def _output(resolutions: Sequence[int]) -> int:
    """Return the branch whose grid the merged map takes, as `piip.pyramid.PIIP` chooses it."""
    return max(range(len(resolutions)), key=lambda i: (resolutions[i], i))


def _level(level: nn.Module, cells: int) -> int:
    """Multiply-adds of an FPN level: each transposed convolution quadruples the cells, and reads each once."""
    total = 0
    for layer in level.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            total, cells = total + layer.weight.numel() * cells, 4 * cells
    return total


def _count(modules: Any) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def combinations(branches: int, sides: Sequence[int], any_order: bool = False) -> Iterator[tuple[int, ...]]:
    """Yield one image side per branch, the largest model (the smallest image) first.

    Args:
        branches: Number of branches.
        sides: The sides to choose from, rising.
        any_order: Also where a larger model gets a larger image than a smaller one.
    """
    for chosen in product(sides, repeat=branches):
        if any_order or all(low <= high for low, high in pairwise(chosen)):
            yield chosen


def pareto(candidates: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the candidates that no other one matches or exceeds in every branch."""
    kept: list[tuple[int, ...]] = []
    for chosen in sorted(candidates, reverse=True):
        if not any(all(own <= other for own, other in zip(chosen, better, strict=True)) for better in kept):
            kept.append(chosen)
    # A later candidate is smaller in its first entry or equal, so it never exceeds an earlier one in every branch.
    return kept


def with_resolutions(spec: PyramidSpec, resolutions: Sequence[int]) -> PyramidSpec:
    """Return the spec with other image sides; its input is as large as the largest of them."""
    branches = tuple(replace(b, resolution=side) for b, side in zip(spec.branches, resolutions, strict=True))
    return replace(spec, branches=branches, input_resolution=None, output_branch=None)

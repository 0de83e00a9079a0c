"""What a model costs: parameters and multiply-adds, part by part, as it really runs."""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from piip.models import DensePyramid
from piip.zoo.specs import PyramidSpec


class Cost(NamedTuple):
    """Cost of one part.

    Attributes:
        params: Number of parameters.
        macs: Multiply-adds for one image; one multiply-add counts as one.
    """

    params: int
    macs: int


def _sampling_flops(value: tuple[int, ...], grid: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any) -> int:
    # Bilinear: four neighbours, one multiply-add each, and the counter's unit is half a multiply-add.
    return 8 * prod(out_shape)


def as_run(
    spec: str | PyramidSpec | Mapping[str, Any], size: tuple[int, int] | None = None, **options: Any
) -> dict[str, Cost]:
    """Count a backbone as it runs: windows padded, merging and FPN included. No memory or time is spent on weights.

    Counted are linear layers, convolutions, attention products and bilinear sampling; norms and activations are not.

    Args:
        spec: See `piip.models.DensePyramid`.
        size: `(height, width)` of the input; the spec's input resolution, square, by default.
        **options: Options of `DensePyramid`.

    Returns:
        Cost by part: `branch1`, `branch2`, ..., `interactions`, `merging`, `fpn` and `total`.

    Raises:
        SpecError: The spec cannot be built.
        ValueError: The size leaves a branch without a token.
    """
    with torch.device("meta"):
        model = DensePyramid(spec, **options).eval()
        side = model.pyramid.input_resolution
        images = torch.empty(1, 3, *(size or (side, side)))
    modules: dict[str, list[nn.Module]] = {f"branch{i + 1}": [b] for i, b in enumerate(model.pyramid.branches)}
    modules["interactions"] = [*model.pyramid.stages]
    modules["merging"] = [*model.tap_merges.values(), *([model.merge] if model.merge is not None else [])]
    modules["fpn"] = [model.fpn]
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.grid_sampler_2d: _sampling_flops})
    names = {id(module): name for name, module in model.named_modules()}
    with torch.no_grad(), counter:
        model(images)
    flops = counter.get_flop_counts()

    def macs(module: nn.Module) -> int:
        own = flops.get(f"DensePyramid.{names[id(module)]}")
        # Containers, and branches (entered by `embed` and `run`), are never called: their parts are what was counted.
        return sum(map(macs, module.children())) if own is None else sum(own.values()) // 2

    costs = {
        part: Cost(sum(p.numel() for m in group for p in m.parameters()), sum(macs(m) for m in group))
        for part, group in modules.items()
    }
    total = sum(flops["Global"].values()) // 2
    return {**costs, "total": Cost(sum(p.numel() for p in model.parameters()), total)}

"""What a model costs: parameters and multiply-adds, part by part, as it really runs and as the papers count."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from piip.attention import CrossAttention, SelfAttention
from piip.branches.vit import ViTBranch
from piip.checkpoint import unread_shapes
from piip.deformable import DeformableCrossAttention, Float32Linear
from piip.errors import SpecError, unknown
from piip.models import MODELS as TASK_MODELS
from piip.zoo.specs import PyramidSpec, build_pyramid, resolve_spec


class Cost(NamedTuple):
    """Cost of one part.

    Attributes:
        params: Number of parameters.
        macs: Multiply-adds for one image; one multiply-add counts as one.
    """

    params: int
    macs: int


Costs = dict[str, Cost]
Spec = str | PyramidSpec | Mapping[str, Any]


def _add(costs: list[Cost]) -> Cost:
    return Cost(sum(cost.params for cost in costs), sum(cost.macs for cost in costs))


def _with_total(costs: Costs) -> Costs:
    return {**costs, "total": _add(list(costs.values()))}


class _Tower(nn.Module):
    """A pyramid alone, as LLaVA's vision tower; LLaVA-1.5 leaves blocks at the end of its only branch unread."""

    def __init__(self, spec: Spec, kernel: str = "auto", unread_blocks: int = 0) -> None:
        super().__init__()
        self.spec = resolve_spec(spec)
        self.pyramid = build_pyramid(self.spec, kernel=kernel)
        if unread_blocks:
            self.pyramid.cuts = [[(start, stop - unread_blocks) for start, stop in cut] for cut in self.pyramid.cuts]

    def forward(self, images: Tensor) -> list[Tensor]:
        return [tokens.x for tokens in self.pyramid(images)[0]]


MODELS: dict[str, Callable[..., Any]] = {**TASK_MODELS, "tower": _Tower}
"""What a spec can become."""

# Where the children of these models are counted.
_CHILDREN = {"tap_merges": "merging", "merge": "merging", "fpn": "fpn", "norm": "head", "head": "head"}


def parts_of(model: Any) -> dict[str, list[nn.Module]]:
    """Return the modules that every part of a model consists of."""
    parts = {f"branch{i + 1}": [branch] for i, branch in enumerate(model.pyramid.branches)}
    parts["interactions"] = [*model.pyramid.stages]
    for name, child in model.named_children():
        if name != "pyramid":
            parts.setdefault(_CHILDREN[name], []).append(child)
    return parts


def _on_meta(kind: str, spec: Spec, size: tuple[int, int] | None, options: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """Return a model and one image that take neither memory nor time."""
    if kind not in MODELS:
        raise SpecError(unknown("model", kind, MODELS))
    with torch.device("meta"):
        model = MODELS[kind](spec, **options).eval()
        side = model.pyramid.input_resolution
        for module in model.modules():
            if isinstance(module, DeformableCrossAttention):
                module.sample = _sample_shapes
        return model, torch.empty(1, 3, *(size or (side, side)))


def _sample_shapes(value: Tensor, grid: tuple[int, int], locations: Tensor, weights: Tensor) -> Tensor:
    """Stand in for a sampling kernel: the right shape at once, where the meta device would take seconds."""
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


def as_run(spec: Spec, size: tuple[int, int] | None = None, *, model: str = "dense", **options: Any) -> Costs:
    """Count a model as it runs: windows padded, merging, FPN and head included. Weights take no memory and no time.

    Counted are linear layers, convolutions, attention products and bilinear sampling; norms and activations are not.

    Args:
        spec: See `piip.models.DensePyramid`.
        size: `(height, width)` of the input; the spec's input resolution, square, by default.
        model: What the spec becomes, a key of `MODELS`.
        **options: Options of the model's class.

    Returns:
        Cost by part: `branch1`, `branch2`, ..., `interactions`, `total`, and those of `merging`, `fpn` and `head` that
        the model has.

    Raises:
        SpecError: The spec cannot be built.
        ValueError: The size leaves a branch without a token.
    """
    network, images = _on_meta(model, spec, size, options)
    names = {id(module): name for name, module in network.named_modules()}
    counter, sampled = _count(network, images)
    flops = counter.get_flop_counts()

    def macs(module: nn.Module) -> int:
        own = flops.get(f"{type(network).__name__}.{names[id(module)]}")
        # Containers, and branches (entered by `embed` and `run`), are never called: their parts are what was counted.
        return sum(map(macs, module.children())) if own is None else sum(own.values()) // 2

    def cost(group: list[nn.Module]) -> Cost:
        inner = [module for top in group for module in top.modules()]
        params = sum(p.numel() for top in group for p in top.parameters())
        return Cost(params, sum(map(macs, group)) + sum(sampled.get(id(module), 0) for module in inner))

    return _with_total({part: cost(group) for part, group in parts_of(network).items()})


def count_macs(network: nn.Module, images: Tensor) -> int:
    """Count what :func:`as_run` counts in one forward pass of any network, the meta device included.

    Args:
        network: With its input `images`, on one device.
        images: `(B, 3, H, W)`.
    """
    counter, sampled = _count(network, images)
    return counter.get_total_flops() // 2 + sum(sampled.values())


def _count(network: nn.Module, images: Tensor) -> tuple[FlopCounterMode, dict[int, int]]:
    """Run a network; returns the counter of products, and the multiply-adds of sampling by the id of the module."""
    counter = FlopCounterMode(display=False)
    sampled: dict[int, int] = defaultdict(int)

    def count_sampling(module: Any, given: tuple[Any, ...], out: Tensor) -> None:
        batch, cells = given[0].shape[:2]
        # Bilinear: four neighbours of every point.
        sampled[id(module)] += 4 * module.points * batch * cells * module.value_proj.out_features

    attentions = [module for module in network.modules() if isinstance(module, DeformableCrossAttention)]
    hooks = [attention.register_forward_hook(count_sampling) for attention in attentions]
    with torch.no_grad(), counter:
        network(images)
    for hook in hooks:
        hook.remove()
    return counter, sampled


# The counter of the published tables. It sees modules of exactly these types, at each call; GELU, softmax, RMSNorm and
# layer norms of other classes are free.
def _count_conv(module: nn.Conv2d, out: Tensor) -> int:
    per_cell = module.weight.numel() // module.out_channels + (module.bias is not None)
    return out.numel() * per_cell


def _count_linear(module: nn.Linear, out: Tensor) -> int:
    return out.numel() * module.in_features


def _count_norm(module: nn.Module, out: Tensor) -> int:
    return 2 * out.numel()


def _count_relu(module: nn.Module, out: Tensor) -> int:
    return out.numel()


_PUBLISHED_RULES: dict[type[nn.Module], Callable[[Any, Tensor], int]] = {
    nn.Conv2d: _count_conv,
    nn.Linear: _count_linear,
    Float32Linear: _count_linear,
    nn.LayerNorm: _count_norm,
    nn.GroupNorm: _count_norm,
    nn.ReLU: _count_relu,
}

Convention = Literal["classification", "detection", "llava"]


def published(
    spec: Spec,
    convention: Convention,
    size: tuple[int, int] | None = None,
    *,
    model: str = "dense",
    **options: Any,
) -> Costs:
    """Count a model in the convention of the published tables.

    All conventions count branches and interactions: layers by `_PUBLISHED_RULES`, self-attention analytically as
    2 N² C (2 N w² C in windows of w², of at most N; padding never counts there), and deformable attention as
    5 points N C per direction. What differs is the script that the original counted with:

    * `classification` (the ViT rows, also those of detection and segmentation): a light merging by norms and one
      linear layer per branch, a classifier of 1000 classes instead of FPN and head, position tables as large as the
      branch's grid, and no window padding for DeiT's linear layers.
    * `detection` (the ConvNeXt rows): the backbone as it is; its FPN adds parameters, but no multiply-adds.
    * `llava`: the vision tower alone, and the grids of deformable attention are those of the first interaction at all
      depths (a mistake that matters for ConvNeXt, and that the published figures contain).

    Args:
        spec: See `piip.models.DensePyramid`.
        convention: Which of the three.
        size: `(height, width)` of the input; the spec's input resolution, square, by default.
        model: What the spec becomes, a key of `MODELS`.
        **options: Options of the model's class.

    Returns:
        Cost by part, as in `as_run`; with the classifier as `head` in the classification convention.

    Raises:
        SpecError: The spec cannot be built.
        ValueError: The size leaves a branch without a token.
    """
    # The table counts every block of a tower, read or not.
    network, images = _on_meta(model, spec, size, {} if model == "tower" else options)
    if convention == "classification":
        _like_the_classifiers(network)
    parts = parts_of(network)
    part_of = {id(m): part for part, group in parts.items() for module in group for m in module.modules()}
    macs = dict.fromkeys(parts, 0)
    first_cells: dict[str, int] = {}  # by unit and direction

    def count(name: str) -> Callable[[Any, tuple[Any, ...], Tensor], None]:
        def hook(module: Any, given: tuple[Any, ...], out: Tensor) -> None:
            if rule := _PUBLISHED_RULES.get(type(module)):
                macs[part_of[id(module)]] += rule(module, out)
            elif isinstance(module, SelfAttention):
                x, grid = given
                cells = prod(grid)
                seen = min(module.window**2, cells) if module.window else cells
                macs[part_of[id(module)]] += 2 * cells * seen * x.shape[-1]
            elif isinstance(module, CrossAttention):
                query, feat, *_ = given
                macs[part_of[id(module)]] += 2 * query.shape[1] * feat.shape[1] * query.shape[-1]
            elif isinstance(module, DeformableCrossAttention):
                query = given[0]
                cells = query.shape[1]
                if convention == "llava":
                    cells = first_cells.setdefault(name.partition(".units.")[2], cells)
                macs[part_of[id(module)]] += 5 * module.points * cells * query.shape[-1]

        return hook

    for name, module in network.named_modules():
        if id(module) in part_of:
            module.register_forward_hook(count(name))
    with torch.no_grad():
        states = network.pyramid(images)[0] if convention == "classification" and model == "dense" else []
        if not states:
            network(images)
            macs["fpn"] = 0
    costs = {
        part: Cost(sum(p.numel() for m in group for p in m.parameters()), macs[part]) for part, group in parts.items()
    }
    # Parameters of the original's branches that nothing reads; index tables are no parameters.
    unread = _unread_in_tower(network) if convention == "llava" else unread_shapes(network)
    for name, shape in unread.items():
        part = name.partition(".")[0] if name.startswith("branch") else "branch1"
        if not name.startswith("fpn") and not name.endswith("_index"):
            costs[part] = costs[part]._replace(params=costs[part].params + prod(shape))
    if convention == "classification" and model == "dense":
        del costs["fpn"], costs["merging"]
        costs.update(_classifier(network, [state.x for state in states]))
    return _with_total(costs)


def _unread_in_tower(tower: _Tower) -> dict[str, tuple[int, ...]]:
    """Name and shape of what LLaVA's towers hold and never read: final norms, and the layer of `_mlp` models' heads."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (branch, spec) in enumerate(zip(tower.pyramid.branches, tower.spec.branches, strict=True)):
        width = branch.dims[-1]
        shapes[f"branch{i + 1}.norm"] = (2, width)
        if "_mlp." in (spec.weights or ""):
            shapes[f"branch{i + 1}.head.fc"] = (width + 1, width)
    return shapes


def _like_the_classifiers(model: Any) -> None:
    """Give the ViT branches what the original's classification classes have: see `published`."""
    pyramid = model.pyramid
    for branch, resolution in zip(pyramid.branches, pyramid.resolutions, strict=True):
        if not isinstance(branch, ViTBranch):
            continue
        if branch.pos_embed is not None:
            side = resolution // branch.patch_size
            branch.pos_grid = (side, side)
            rows = branch.pos_prefix + side * side
            branch.pos_embed = nn.Parameter(branch.pos_embed.new_empty(1, rows, branch.pos_embed.shape[-1]))
        if branch.family == "deit":
            for module in branch.modules():
                if isinstance(module, SelfAttention):
                    module.window_pad = "after_qkv"


def _classifier(model: Any, states: list[Tensor], classes: int = 1000) -> Costs:
    """Count the light merging and the classifier that the original's script counts for every ViT row."""
    dim = states[0].shape[-1]
    cells = states[model.pyramid.output_branch].shape[1]
    linear = Cost(dim * classes + classes, dim * classes)
    if len(states) == 1:
        # The branch's own final norm; the script sees layer norms alone.
        norm = next(m for n, m in model.pyramid.branches[0].named_modules() if n.endswith("norm1"))
        counted = type(norm) in _PUBLISHED_RULES
        return {"head": _add([linear, Cost(sum(p.numel() for p in norm.parameters()), 2 * cells * dim * counted)])}

    def norm_cost(width: int, cells: int) -> Cost:
        return Cost(2 * width, 2 * width * cells)

    merging = [Cost(len(states), 0), norm_cost(dim, states[0].shape[1])]
    for state in states[1:]:
        _, own_cells, width = state.shape
        projection = Cost(width * dim + dim, own_cells * width * dim)
        merging += [norm_cost(width, own_cells), projection, norm_cost(dim, own_cells)]
    return {"merging": _add(merging), "head": _add([norm_cost(dim, cells), linear])}

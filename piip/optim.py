"""Layer-wise learning-rate decay, by parameter name."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

from torch import nn

from piip.checkpoint import released_names
from piip.models import Classifier, DensePyramid

EMBEDDING = re.compile(r"pos_embed|cls_token|patch_embed\.|visual_embed\.")
BLOCK = re.compile(r"(?:blocks|layers)\.(\d+)\.")


class ParamGroup(NamedTuple):
    """How one parameter is trained, relative to the optimizer's own settings.

    Attributes:
        lr_scale: Factor on the learning rate.
        decay: Whether the parameter is subject to weight decay.
    """

    lr_scale: float
    decay: bool


def layer_id(name: str, depths: Sequence[int]) -> int:
    """Return the depth of a parameter: 0 for embeddings, k + 1 for block k, depth + 1 for all that has no depth.

    Depths count in blocks of the first branch that takes part. Another branch's block k counts as (k + 1) times the
    ratio of the depths, rounded down; interactions, merging, FPN, neck and heads count as the very end.

    Args:
        name: Released name of the parameter within the backbone.
        depths: Blocks of every branch that takes part; 0 for one without layer decay (ConvNeXt).
    """
    layers = _layers(depths)
    branch, inner = 0, name
    if len(depths) > 1:
        match = re.match(r"branch(\d)\.(.+)", name)
        if match is None:
            return layers + 1
        branch, inner = int(match[1]) - 1, match[2]
    if depths[branch] and EMBEDDING.match(inner):
        return 0
    if depths[branch] and (block := BLOCK.match(inner)):
        return (int(block[1]) + 1) * layers // depths[branch]
    return layers + 1


def _layers(depths: Sequence[int]) -> int:
    return next((depth for depth in depths if depth), 0)


def layer_decay(model: nn.Module, rate: float, prefix: str = "backbone.") -> dict[str, ParamGroup]:
    """Return the learning-rate scale and the weight decay of every parameter.

    The scale is `rate ** (depth + 1 - layer_id)`. Weight decay leaves out one-dimensional tensors and biases only:
    position tables and the scalar weights of the merging are decayed, as in the released recipes.

    Args:
        model: A model with a `DensePyramid`, or the pyramid itself.
        rate: Decay per layer, 1 for none.
        prefix: Where the pyramid sits in the model; empty for the pyramid itself.

    Returns:
        One entry per trainable parameter, by its name in `model`.
    """
    backbone = cast(DensePyramid, model.get_submodule(prefix.rstrip(".")) if prefix else model)
    released = released_names(backbone)
    depths = [branch.depth if branch.layer_decay else 0 for branch in backbone.pyramid.branches]
    last = _layers(depths) + 1
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = name.removeprefix(prefix)
        layer = layer_id(released[inner], depths) if name.startswith(prefix) else last
        decay = parameter.ndim != 1 and not name.endswith(".bias")
        groups[name] = ParamGroup(rate ** (last - layer), decay)
    return groups


def classifier_groups(model: Classifier, scratch_ratio: float = 1.0, *, legacy: bool = False) -> dict[str, ParamGroup]:
    """Return how every parameter of a classifier is trained (arXiv 2406.04330, section 4.4).

    Branches and their own norms and heads are pretrained, everything else starts from scratch. Weight decay leaves out
    biases, one-dimensional tensors, position tables and class tokens.

    Args:
        model: The classifier.
        scratch_ratio: Factor on the learning rate of what starts from scratch.
        legacy: Decay as the original does: everything; only with a ratio of 1 biases and one-dimensional tensors not.

    Returns:
        One entry per trainable parameter, by name.
    """
    pretrained = ("pyramid.branches.", "norm.", "head.") if model.merge is None else ("pyramid.branches.",)
    without = set() if legacy else model.no_weight_decay()
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = parameter.ndim > 1 and not name.endswith(".bias") and name not in without
            everything = legacy and scratch_ratio != 1
            groups[name] = ParamGroup(1.0 if name.startswith(pretrained) else scratch_ratio, everything or decay)
    return groups


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], groups: dict[str, ParamGroup], lr: float, weight_decay: float
) -> list[dict]:
    """Gather parameters that are trained alike into an optimizer's parameter groups.

    Args:
        named_parameters: Names and parameters; those without an entry in `groups` are left out.
        groups: From `layer_decay`.
        lr: Base learning rate.
        weight_decay: Weight decay of the parameters that are decayed.
    """
    gathered: dict[ParamGroup, dict] = {}
    for name, parameter in named_parameters:
        if name not in groups:
            continue
        group = groups[name]
        if group not in gathered:
            decay = weight_decay if group.decay else 0.0
            gathered[group] = {"params": [], "names": [], "lr": lr * group.lr_scale, "weight_decay": decay}
        gathered[group]["params"].append(parameter)
        gathered[group]["names"].append(name)
    return list(gathered.values())

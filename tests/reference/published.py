"""What configs of published rows are held against: recipes, parameter lists and layer decay of the original."""

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from timm.layers import LayerScale, Mlp, RmsNorm
from torch import nn
from translate import BRANCHES, branch_class

from piip import DensePyramid, PyramidSpec
from piip.branches import Branch, ViTBranch, create_branch
from piip.checkpoint import released_names, released_shapes, unread_shapes
from piip.zoo.specs import build_branch

REFERENCE = Path(__file__).resolve().parent
# The spec's attention, by the original's name.
ATTENTION = {"deform": "deformable", "normal": "regular"}


def reference(folder: str, name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((REFERENCE / folder / f"{name}.json.gz").read_bytes()))


@functools.cache
def recipes() -> dict[str, Any]:
    return json.loads(gzip.decompress((REFERENCE / "recipes.json.gz").read_bytes()))


def branch_settings(branch: Branch) -> dict[str, Any]:
    """What a branch is, beside its weights and its drop path."""
    settings: dict[str, Any] = {
        "dims": branch.dims,
        "strides": branch.strides,
        "parameters": {name: tuple(parameter.shape) for name, parameter in branch.named_parameters()},
        "layer_scale": {m.init_values for m in branch.modules() if isinstance(m, LayerScale)},
        "norms": {(type(m), m.eps) for m in branch.modules() if isinstance(m, (torch.nn.LayerNorm, RmsNorm))},
        "activations": {type(m.act) for m in branch.modules() if isinstance(m, Mlp)},
    }
    if isinstance(branch, ViTBranch):
        settings |= {key: getattr(branch, key) for key in ("family", "patch_size", "pos_grid", "pos_prefix")}
        attention = [block.attn for block in branch.blocks]
        settings["attention"] = [(a.num_heads, a.window, a.rel_pos) for a in attention]
        settings["window_pad"] = {a.window_pad for a in attention if a.window}
    return settings


def drop_rates(branch: Branch) -> list[float]:
    blocks = branch.blocks if isinstance(branch, ViTBranch) else [b for stage in branch.stages for b in stage.blocks]
    paths = [getattr(block, "drop_path1", None) or block.drop_path for block in blocks]
    return [getattr(path, "drop_prob", 0.0) for path in paths]


def original_drop_rates(kind: str, values: dict[str, Any], depth: int) -> list[float]:
    rate = values.get("drop_path_rate", 0.0)
    return [rate] * depth if kind == "vit_models" else torch.linspace(0, rate, depth, dtype=torch.float64).tolist()


def check_branches(spec: PyramidSpec, pretrained: str, original: dict[str, Any], task: str) -> None:
    """Compare a config's branches, their drop path and their pretrained files with those of a recipe's backbone."""
    listed = [original[f"branch{i + 1}"] for i in range(9) if f"branch{i + 1}" in original]
    single = not listed
    listed = listed or [original]
    assert len(spec.branches) == len(listed)
    for branch_spec, values in zip(spec.branches, listed, strict=True):
        kind = values["type"] if single else branch_class(values["pretrained"])
        arch, options, _ = BRANCHES[kind](task, values, {})
        with torch.device("meta"):
            ours, theirs = build_branch(branch_spec), create_branch(arch, **options)
        assert branch_settings(ours) == branch_settings(theirs)
        rates = drop_rates(ours)
        assert rates == pytest.approx(original_drop_rates(kind, values, len(rates)), abs=1e-6)
        if kind.startswith("ConvN"):
            assert branch_spec.weights == f"{values['pretrained'].removeprefix('facebook/')}/pytorch_model.bin"
        else:
            assert f"{pretrained}/{branch_spec.weights}" == values["pretrained"].removeprefix("./")
    if not single:
        assert [b.resolution for b in spec.branches] == [v["real_size"] for v in listed]


def check_interactions(model: DensePyramid, original: dict[str, Any]) -> None:
    """Compare a backbone's interactions, and the blocks between them, with those of a recipe's backbone."""
    spec, pyramid = model.spec, model.pyramid
    if "branch1" not in original:
        assert len(spec.branches) == 1
        return
    wanted = {
        "attention": ATTENTION[original["interact_attn_type"]],
        "heads": original["deform_num_heads"],
        "points": original["n_points"],
        "value_ratio": original["deform_ratio"],
        "ffn_ratio": original["cffn_ratio"],
        "drop_path": original["interaction_drop_path_rate"],
        "proj": original.get("interaction_proj", True),
        "norm": original.get("norm_layer", "LayerNorm") != "none",
        "interactions": len(original["branch1"]["interaction_indexes"]),
    }
    assert {key: getattr(spec, key) for key in wanted} == wanted
    for i, cut in enumerate(pyramid.cuts):
        assert cut == [(first, last + 1) for first, last in original[f"branch{i + 1}"]["interaction_indexes"]]
    assert pyramid.output_branch == len(spec.branches) - 1
    assert pyramid.input_resolution == spec.branches[-1].resolution


def check_released(model: nn.Module, name: str) -> None:
    """Compare a whole model's parameter names and shapes, as released, with those of a file."""
    expected = {name: tuple(shape) for name, shape in reference("full_manifests", name)["state_dict"].items()}
    shapes = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.startswith("backbone.")
    }
    shapes |= {f"backbone.{name}": shape for name, shape in released_shapes(model.backbone).items()}
    assert shapes == expected


def check_released_backbone(model: DensePyramid, name: str) -> None:
    """Compare a backbone's parameter and buffer names and shapes, as released, with those of the original's."""
    expected = reference("manifests", name)
    shapes = {name: tuple(shape) for name, shape in expected["parameters"].items()}
    shapes |= {name: tuple(shape) for name, (shape, _) in expected["buffers"].items()}
    assert released_shapes(model) == shapes


def check_layer_decay(model: nn.Module, optim_wrapper: dict[str, Any], name: str) -> None:
    """Compare every parameter's learning rate and weight decay with the original's."""
    expected = reference("layer_decay", name)
    optimizer = build_optim_wrapper(model, optim_wrapper).optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    released = {f"backbone.{ours}": f"backbone.{name}" for ours, name in released_names(model.backbone).items()}
    groups = {
        released.get(names[id(parameter)], names[id(parameter)]): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(groups) == len(names)
    # The list's names outside the backbone are samples, of which some are made up.
    wanted = {
        name: (expected["optimizer"]["lr"] * scale, decay)
        for name, (scale, decay) in expected["params"].items()
        if name.startswith("backbone.")
    }
    unread = {f"backbone.{name}" for name in unread_shapes(model.backbone)}
    assert {name for name in groups if name.startswith("backbone.")} == set(wanted) - unread
    for name, values in wanted.items():
        if name in unread:
            continue
        assert groups[name] == pytest.approx(values, rel=1e-9), name
    for name, (lr, decay) in groups.items():
        if name not in wanted:
            no_decay = "constructor" in expected["optimizer"] and model.get_parameter(name).ndim == 1
            assert (lr, decay) == (expected["optimizer"]["lr"], 0 if no_decay else 0.05), name


def step(pipeline: list[dict], kind: str) -> dict:
    (found,) = [transform for transform in pipeline if transform["type"] == kind]
    return found


def shared(ours: Any, theirs: Any) -> Any:
    """Ours, cut down to the keys that theirs has."""
    if isinstance(theirs, dict):
        return {key: shared(ours.get(key), value) for key, value in theirs.items()}
    return ours

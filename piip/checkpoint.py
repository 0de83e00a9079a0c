"""Checkpoint files: reading them without unpickling code, and the authors' parameter names beside ours.

Our names follow our structure. The table below holds, for each of our names, the one that the released files use;
everything else (loading, converting, gradients under released names, layer decay) goes through it.
"""

import argparse
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from piip.attention import SelfAttention, relative_position_index
from piip.errors import CheckpointError
from piip.shards import is_shard, read_deepspeed

if TYPE_CHECKING:
    from piip.models import PyramidModel

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

# Ours on the left, released on the right. `{i}` and `{k}` are whole numbers, `*` is the rest of the name.
PYRAMID_RULES = (
    ("pyramid.branches.{i}.*", "branch{i+1}.*"),
    ("pyramid.stages.{k}.units.{i}.to_low.proj.*", "interactions.{k}.interaction_units_{i+1}{i+2}.branch2to1_proj.*"),
    ("pyramid.stages.{k}.units.{i}.to_high.proj.*", "interactions.{k}.interaction_units_{i+1}{i+2}.branch1to2_proj.*"),
    ("pyramid.stages.{k}.units.{i}.to_low.*", "interactions.{k}.interaction_units_{i+1}{i+2}.branch2to1_injector.*"),
    ("pyramid.stages.{k}.units.{i}.to_high.*", "interactions.{k}.interaction_units_{i+1}{i+2}.branch1to2_injector.*"),
    ("merge.weights.{i}", "w{i+1}"),
    ("merge.projections.{i}.*", "merge_branch{i+1}.*"),
    ("tap_merges.{k}.weights.{i}", "intermediate_merging_{k}_w{i+1}"),
    ("tap_merges.{k}.projections.{i}.*", "intermediate_merging_{k}_branch{i+1}.*"),
    ("fpn.levels.up4.*", "fpn1.*"),
    ("fpn.levels.up2.*", "fpn2.*"),
    ("fpn.levels.{i}.*", "fpn{i+1}.*"),
    ("norm.{i}.*", "branch{i+1}.norm.*"),
    ("head.{i}.*", "branch{i+1}.head.*"),
    ("norm.*", "cls_norm.*"),
    ("head.*", "cls_head.*"),
)
# A single branch is released as the bare network with its own FPN or head.
SINGLE_RULES = (
    ("pyramid.branches.0.*", "*"),
    ("fpn.levels.up4.*", "up1.*"),
    ("fpn.levels.up2.*", "up2.*"),
    ("norm.0.*", "norm.*"),
    ("head.0.*", "head.*"),
)
# A classifier's last layers, under our names and released ones.
HEAD = re.compile(r"(?:^|\.|cls_)head\.(?:\d+\.)?(?:weight|bias)$")
INJECTOR_RULES = (("ffn.dwconv.*", "ffn.dwconv.dwconv.*"),)
LAYER_SCALE_RULES = (
    ("blocks.{k}.ls1.gamma", "blocks.{k}.gamma_1"),
    ("blocks.{k}.ls2.gamma", "blocks.{k}.gamma_2"),
)
# Inside a branch, by `Branch.family`; a family that is not listed uses the same names.
FAMILY_RULES = {
    "deit": LAYER_SCALE_RULES,
    "beit": LAYER_SCALE_RULES,
    "uniperceiver": (
        ("patch_embed.proj.*", "visual_embed.patch_embed.proj.*"),
        ("pos_embed", "visual_embed.patch_embed.spatial_pos_embed.weight"),
        ("time_embed", "visual_embed.patch_embed.temporal_pos_embed.weight"),
        ("embed_norm.*", "visual_embed.embeddings_norm.*"),
        ("blocks.{k}.ls1.gamma", "layers.{k}.gamma_1"),
        ("blocks.{k}.ls2.gamma", "layers.{k}.gamma_2"),
        ("blocks.{k}.attn.qkv.*", "layers.{k}.self_attn.in_proj.*"),
        ("blocks.{k}.attn.proj.*", "layers.{k}.self_attn.out_proj.*"),
        ("blocks.{k}.mlp.fc1.*", "layers.{k}.linear1.*"),
        ("blocks.{k}.mlp.fc2.*", "layers.{k}.linear2.*"),
        ("blocks.{k}.*", "layers.{k}.*"),
    ),
    # Hugging Face's names, except that the released q, k and v projections are three tensors: see `join_qkv`.
    "clip": (
        ("cls_token", "clip_model.embeddings.class_embedding"),
        ("patch_embed.proj.*", "clip_model.embeddings.patch_embedding.*"),
        ("pos_embed", "clip_model.embeddings.position_embedding.weight"),
        ("embed_norm.*", "clip_model.pre_layrnorm.*"),
        ("blocks.{k}.norm1.*", "clip_model.encoder.layers.{k}.layer_norm1.*"),
        ("blocks.{k}.attn.qkv.*", "clip_model.encoder.layers.{k}.self_attn.qkv_proj.*"),
        ("blocks.{k}.attn.proj.*", "clip_model.encoder.layers.{k}.self_attn.out_proj.*"),
        ("blocks.{k}.norm2.*", "clip_model.encoder.layers.{k}.layer_norm2.*"),
        ("blocks.{k}.mlp.*", "clip_model.encoder.layers.{k}.mlp.*"),
    ),
    "timm": (("network.*", "*"),),
    "convnext": (
        ("stem.0.*", "convnext_model.embeddings.patch_embeddings.*"),
        ("stem.1.*", "convnext_model.embeddings.layernorm.*"),
        ("stages.{i}.downsample.*", "convnext_model.encoder.stages.{i}.downsampling_layer.*"),
        ("stages.{i}.blocks.{k}.gamma", "convnext_model.encoder.stages.{i}.layers.{k}.layer_scale_parameter"),
        ("stages.{i}.blocks.{k}.conv_dw.*", "convnext_model.encoder.stages.{i}.layers.{k}.dwconv.*"),
        ("stages.{i}.blocks.{k}.norm.*", "convnext_model.encoder.stages.{i}.layers.{k}.layernorm.*"),
        ("stages.{i}.blocks.{k}.mlp.fc1.*", "convnext_model.encoder.stages.{i}.layers.{k}.pwconv1.*"),
        ("stages.{i}.blocks.{k}.mlp.fc2.*", "convnext_model.encoder.stages.{i}.layers.{k}.pwconv2.*"),
    ),
}


# Released as `(N, C)`, ours is `(1, N, C)`.
WITHOUT_BATCH_AXIS = "visual_embed.patch_embed.spatial_pos_embed.weight"


def rename(name: str, rules: Iterable[tuple[str, str]]) -> str | None:
    """Return what the first rule that fits makes of a name, None where none fits."""
    for source, target in rules:
        pattern = re.escape(source).replace(r"\*", "(?P<rest>.+)")
        match = re.fullmatch(re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", pattern), name)
        if match:
            return _fill(target, match.groupdict())
    return None


def _fill(target: str, values: dict[str, str]) -> str:
    target = target.replace("*", values.get("rest", ""))
    return re.sub(r"{(\w)(?:\+(\d))?}", lambda m: str(int(values[m[1]]) + int(m[2] or 0)), target)


def join_qkv(name: str) -> tuple[str, int]:
    """Return the name of the joint projection that a separate q, k or v tensor belongs to, and its third (0, 1, 2).

    The third is -1 for a tensor of another kind, whose name comes back as it is.
    """
    match = re.fullmatch(r"(.+\.self_attn\.)([qkv])(_proj\.(?:weight|bias))", name)
    return (f"{match[1]}qkv{match[3]}", "qkv".index(match[2])) if match else (name, -1)


def released_names(model: "PyramidModel") -> dict[str, str]:
    """Return the released name of each parameter and buffer of a model, by our name."""
    branches = model.pyramid.branches
    names = {}
    for name in model.state_dict():
        inner = name
        if match := re.match(r"(pyramid\.branches\.(\d+)\.)(.+)", name):
            family = getattr(branches[int(match[2])], "family", "")
            inner = match[1] + (rename(match[3], FAMILY_RULES.get(family, ())) or match[3])
        elif match := re.match(r"(.+\.to_(?:low|high)\.)(.+)", name):
            inner = match[1] + (rename(match[2], INJECTOR_RULES) or match[2])
        released = rename(inner, SINGLE_RULES if len(branches) == 1 else PYRAMID_RULES)
        if released is None:
            raise CheckpointError(f"no released name is known for the parameter {name}")
        names[name] = released
    return names


def unread_shapes(model: "PyramidModel") -> Shapes:
    """Return name and shape of the tensors that a released file of this model holds and nothing reads."""
    branches = model.pyramid.branches
    shapes: Shapes = {}
    for i, branch in enumerate(branches):
        prefix = "" if len(branches) == 1 else f"branch{i + 1}."
        if getattr(branch, "family", "") == "convnext":  # the classifier's norm
            for leaf in ("weight", "bias"):
                shapes[f"{prefix}convnext_model.layernorm.{leaf}"] = (branch.dims[-1],)
        for name, module in branch.named_modules():
            if isinstance(module, SelfAttention) and module.rel_pos:  # follows from the window
                shapes[f"{prefix}{name}.relative_position_index"] = (module.rel_pos**2, module.rel_pos**2)
    # The original's three-branch class builds the scale-4 level for DINO too, and never calls it.
    scales = getattr(model, "scales", ())
    if len(branches) == 3 and scales and 4 not in scales:
        dim = branches[0].dims[-1]
        for layer, weight in (("0", (dim, dim, 2, 2)), ("1", (dim,)), ("3", (dim, dim, 2, 2))):
            shapes[f"fpn1.{layer}.weight"] = weight
            shapes[f"fpn1.{layer}.bias"] = (dim,)
    return shapes


def released_shapes(model: "PyramidModel") -> Shapes:
    """Return name and shape of every tensor that a released file of this model holds."""
    names = released_names(model)
    state = model.state_dict()
    shapes = {names[name]: tuple(_released_form(names[name], tensor).shape) for name, tensor in state.items()}
    return {**shapes, **unread_shapes(model)}


def _released_form(released: str, tensor: Tensor) -> Tensor:
    return tensor.squeeze(0) if released.endswith(WITHOUT_BATCH_AXIS) else tensor


def _our_form(released: str, tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0) if released.endswith(WITHOUT_BATCH_AXIS) else tensor


def _unread_value(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith(".relative_position_index"):
        return relative_position_index(math.isqrt(shape[0]))
    return torch.zeros(shape)


def from_released(model: "PyramidModel", state: Mapping[str, Tensor]) -> State:
    """Bring a complete released state to our names; what nothing reads is kept aside on the model.

    Raises:
        CheckpointError: The state is not one of this model.
    """
    check_complete(model, state, released_shapes(model))
    model.unread = {name: state[name] for name in unread_shapes(model)}
    return {ours: _our_form(released, state[released]) for ours, released in released_names(model).items()}


def to_released(model: "PyramidModel", state: Mapping[str, Tensor] | None = None) -> State:
    """Bring a state to the released names.

    Args:
        model: The model.
        state: Tensors by our names, for example gradients, some may be missing; the model's own state by default,
            then completed by the unread tensors (where no released file was loaded: index tables by their rule,
            zeros for parameters).

    Raises:
        CheckpointError: The whole state is asked for, and no released model computes what this one does.
    """
    if state is None and not model.released_form:
        raise CheckpointError(
            "released classifiers read the first patch token and give class tokens no position; this model does not, "
            "and a file of that form would be read wrongly: save it under the names of this project"
        )
    names = released_names(model)
    own = model.state_dict() if state is None else state
    released = {names[name]: _released_form(names[name], tensor) for name, tensor in own.items()}
    if state is not None:
        return released
    kept = getattr(model, "unread", {})
    unread = {n: kept[n] if n in kept else _unread_value(n, shape) for n, shape in unread_shapes(model).items()}
    return {**released, **unread}


def register_released_loading(model: "PyramidModel") -> None:
    """Let `load_state_dict` of a model, alone or inside a detector, take released names as well as ours.

    A state that is not complete, or not of this model, raises `CheckpointError` also for a caller that is not
    strict: a backbone that silently keeps random weights is never what was meant.
    """

    def convert(module: "PyramidModel", state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        given = {name[len(prefix) :]: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
        ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        if len(given.keys() & ours.keys()) >= len(given.keys() & released_shapes(module).keys()):
            check_complete(module, given, ours)
        else:
            module.use_released_form()
            given = from_released(module, given)
        state_dict.update({prefix + name: tensor for name, tensor in given.items()})

    model.register_load_state_dict_pre_hook(convert)


def check_complete(model: "PyramidModel", state: Mapping[str, Tensor], expected: Shapes) -> None:
    """Check that a state holds exactly the expected tensors.

    Raises:
        CheckpointError: It does not; the message says which part differs, and why it looks that way.
    """
    if differences := difference(state, expected):
        why = _why_it_differs(model, state)
        raise CheckpointError(f"the checkpoint does not fit this model: {why}{differences}")


def difference(state: Mapping[str, Tensor], expected: Shapes) -> str:
    """Return in words how the names and shapes of a state differ from the expected ones; empty where they do not."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [name for name in expected if name in state and tuple(state[name].shape) != expected[name]]
    parts = []
    if wrong:
        name = wrong[0]
        parts.append(f"{name} is {tuple(state[name].shape)}, expected {expected[name]} ({len(wrong)} such tensors)")
    parts += [
        f"{len(names)} {what} tensors ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    return "; ".join(parts)


def _why_it_differs(model: "PyramidModel", state: Mapping[str, Tensor]) -> str:
    """Compare what the names and shapes of a state tell of its branches with the model's."""
    branches = model.pyramid.branches
    patterns = (r"branch(\d)\.(.+)", r"pyramid\.branches\.(\d+)\.(.+)")
    seen: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        for first, pattern in zip((1, 0), patterns, strict=True):
            if match := re.match(pattern, name):
                seen.setdefault(int(match[1]) - first, {})[match[2]] = tensor
    if not state:
        return "it holds nothing for the backbone; is it a checkpoint of another model? "
    if not seen and "pos_embed" in state:
        seen = {0: dict(state)}
    if not seen:
        return f"it holds no branches (its names begin like {next(iter(state))!r}), so it is of another model; "
    if len(seen) != len(branches):
        return f"the file holds {len(seen)} branch(es), the spec {len(branches)}; "
    widths = {
        i: next((t.shape[0] for n, t in tensors.items() if n.endswith("patch_embed.proj.weight")), None)
        for i, tensors in seen.items()
    }
    expected = [branch.dims[0] for branch in branches]
    if [widths[i] for i in sorted(widths)] != expected:
        text = f"the file's branches are {[widths[i] for i in sorted(widths)]} channels wide, the spec's {expected}"
        if len(branches) == 4 and widths.get(3) == widths.get(2):
            text += " (the file's fourth branch repeats its third, as the original builds it: use the '-as-built' spec)"
        elif len(branches) == 4 and expected[3] == expected[2]:
            text += " (the file's fourth branch is its own network: use the spec without '-as-built')"
        return text + "; "
    depths = [
        len({m[1] for name in seen[i] if (m := re.match(r"(?:blocks|layers)\.(\d+)\.", name))}) or branch.depth
        for i, branch in enumerate(branches)
    ]
    if depths != [branch.depth for branch in branches]:
        return f"the file's branches have {depths} blocks, the spec's {[b.depth for b in branches]}; "
    for i, branch in enumerate(branches):
        windows = [m.rel_pos for m in branch.modules() if isinstance(m, SelfAttention) and m.rel_pos]
        rows = next((len(t) for n, t in seen[i].items() if n.endswith("relative_position_bias_table")), 0)
        if windows and rows and (2 * windows[0] - 1) ** 2 != rows:
            return (
                f"branch {i + 1} of the file has relative position tables for windows of {(math.isqrt(rows) + 1) // 2} "
                f"tokens, the spec's window is {windows[0]}; "
            )
    stages = {m[1] for name in state if (m := re.match(r"(?:interactions|pyramid\.stages)\.(\d+)\.", name))}
    if len(stages) != len(model.pyramid.stages):
        return f"the file holds {len(stages)} interactions, the spec {len(model.pyramid.stages)}; "
    classes = getattr(model, "num_classes", None)
    held = {len(tensor) for name, tensor in state.items() if HEAD.search(name) and name.endswith(".weight")}
    if classes is not None and len(held) == 1 and held != {classes}:
        return (
            f"the file's head has {held.pop()} classes, the model's {classes}: build the model for as many, or load "
            "everything but the head (drop_head=True, on the command line --drop-head); "
        )
    return ""


_DEEPSPEED_OBJECTS = (
    "runtime.fp16.loss_scaler.LossScaler",
    "runtime.fp16.loss_scaler.DynamicLossScaler",
    "utils.tensor_fragment.fragment_address",
)


def _safe_types() -> list[Any]:
    """Types that released files hold beside tensors; none of them runs code when it is rebuilt."""
    dtypes = [type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8", "u1", "?")]
    # What rebuilds a scalar. Files written by NumPy 1 name the first module, files written by NumPy 2 the second.
    scalar = np.float64().__reduce__()[0]
    scalars = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    # DeepSpeed's files hold a few small objects, which nothing here reads: a number and bags of attributes take their
    # place, so that DeepSpeed need not be there.
    deepspeed = [
        (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
        *((argparse.Namespace, f"deepspeed.{name}") for name in _DEEPSPEED_OBJECTS),
    ]
    return [argparse.Namespace, torch.Size, np.dtype, *scalars, *dtypes, *deepspeed]


def read_file(path: str | Path, *, map_location: str = "cpu", extra_types: Iterable[Any] = ()) -> Any:
    """Read a checkpoint file without running any code that it may hold.

    Args:
        path: A `.safetensors`, `.npz` or torch file, or a folder written by DeepSpeed (ZeRO-1, 2 or 3).
        map_location: Device of the tensors.
        extra_types: Further harmless types to allow in torch files.

    Returns:
        What the file holds; for `.safetensors` and `.npz` a mapping from name to tensor.

    Raises:
        CheckpointError: There is no such file, it is truncated or not a checkpoint, or it holds an object of a type
            that is not on the list of harmless ones (the message names the type).
    """
    path = Path(path)
    if path.is_dir():
        return read_deepspeed(path, lambda file: read_file(file, map_location=map_location, extra_types=extra_types))
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=map_location)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        mapped = zipfile.is_zipfile(path)  # memory is taken for what is read, when it is read
        if not mapped:
            warnings.warn(
                f"{path} is in torch's legacy format and cannot be memory-mapped: it is read into memory as a whole; "
                "write it again with torch.save where memory is short",
                stacklevel=2,
            )
        with torch.serialization.safe_globals([*_safe_types(), *extra_types]):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"type (\S+)", str(error))
        if refused is None:
            raise CheckpointError(f"{path} is truncated or not a checkpoint: get it again") from error
        raise CheckpointError(
            f"{path} holds an object of type {refused[1]}, which is not loaded because rebuilding it could run code: "
            "use a file of tensors only, or convert this one where you trust it"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, zipfile.BadZipFile, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a checkpoint: get it again ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def refuse_shard(path: str | Path) -> None:
    """Refuse one process's file of a DeepSpeed folder where whole weights are wanted.

    Raises:
        CheckpointError: It is one; the message names the folder.
    """
    if is_shard(Path(path)):
        raise CheckpointError(
            f"{path} holds one process's shards of a DeepSpeed checkpoint and no whole weights: give the folder it is "
            f"in ({Path(path).parent}), whose shards are put together when it is read"
        )


def read_state_dict(path: str | Path, *, map_location: str = "cpu") -> State:
    """Read the tensors of a checkpoint, out of whatever wraps them (`state_dict`, `model`, DeepSpeed's `module`).

    Raises:
        CheckpointError: See `read_file`; or the file holds no tensors by name.
    """
    refuse_shard(path)
    state = read_file(path, map_location=map_location)
    for key in ("state_dict", "model", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no tensors by name")
    state = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def load_checkpoint(model: nn.Module, path: str | Path, *, drop_head: bool = False) -> None:
    """Load a released checkpoint, or one of ours, into a model in place; nothing may be missing or left over.

    A backbone takes its part of a whole detector's file. A model on the meta device takes the file's tensors as they
    are, memory-mapped where the format allows: it needs the memory of the weights once.

    Args:
        model: A backbone or classifier, or a model that holds one (a detector).
        path: The file, see `read_file`.
        drop_head: Leave the file's classification head out, and keep the model's as it is.

    Raises:
        CheckpointError: The file cannot be read, or holds another model.
    """
    state = read_state_dict(path)
    if drop_head:
        ours = {name: tensor for name, tensor in model.state_dict().items() if HEAD.search(name)}
        if not state.keys() & model.state_dict().keys() - ours.keys():  # released names
            ours = to_released(cast("PyramidModel", model), ours)
        state = {**{name: tensor for name, tensor in state.items() if not HEAD.search(name)}, **ours}
    if hasattr(model, "pyramid"):
        backbone = {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}
        state = backbone or state
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    try:
        model.load_state_dict(state, assign=any(parameter.is_meta for parameter in model.parameters()))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model: {' '.join(str(error).split())[:400]}") from error
    for name, parameter in model.named_parameters():  # a file in half precision
        parameter.data = parameter.data.to(dtypes[name])
    _fill_buffers(model)


def _fill_buffers(model: nn.Module) -> None:
    """Compute the buffers that no file holds (timm's rotary positions) where a model was built on the meta device."""
    for module in model.modules():
        missing = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        module._buffers.update({name: torch.empty_like(buffer, device="cpu") for name, buffer in missing.items()})
        if missing:
            cast(Any, module).init_non_persistent_buffers()

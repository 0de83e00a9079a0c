"""Pretrained files of single branches: from their own names and sizes to a branch's."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from piip.branches.base import Branch
from piip.branches.convnext import ConvNeXtBranch
from piip.branches.vit import ViTBranch, resize_positions
from piip.checkpoint import FAMILY_RULES, LAYER_SCALE_RULES, join_qkv, read_state_dict, rename
from piip.errors import CheckpointError

TABLE = "attn.relative_position_bias_table"
# A branch keeps its initial value of these where the file has none.
OPTIONAL = re.compile(r"blocks\.\d+\.ls[12]\.gamma$")


def convert_vit(state: Mapping[str, Tensor], branch: ViTBranch) -> dict[str, Tensor]:
    """Bring the tensors of a pretrained ViT (any family of `ViTBranch`) to a branch.

    The position table is resized (bicubic) from its square grid to the branch's, a leading class-token row being kept
    or dropped as the branch needs; the patch kernel is resized (bicubic) without rescaling. Relative position tables
    (BEiT) are resized to the branch's windows, one that all blocks share goes to every block. Tensors of unknown name
    are left out; the file may hold a few tensors only, see `check_vit`.

    Args:
        state: Tensors by the file's names.
        branch: The branch they are meant for.

    Returns:
        Tensors by the branch's names.

    Raises:
        CheckpointError: A position table has no square grid, or lacks the row that the branch keeps.
    """
    own = branch.state_dict()
    names = {name: name for name in own}
    # Plain families follow timm, except that some name their layer scale as DeiT does.
    rules = FAMILY_RULES.get(branch.family, LAYER_SCALE_RULES)
    names.update({released: name for name in own if (released := rename(name, rules))})
    shared = state.get("rel_pos_bias.relative_position_bias_table")
    if shared is not None:
        state = {**state, **{name: shared for name in own if name.endswith(TABLE)}}
    converted = {names[name]: tensor for name, tensor in state.items() if name in names}
    if "pos_embed" in converted and branch.pos_grid is not None:
        table = converted["pos_embed"]
        table = table.unsqueeze(0) if table.ndim == 2 else table
        converted["pos_embed"] = _convert_positions(table, branch.pos_grid, branch.pos_prefix)
    for name, table in converted.items():
        if name.endswith(TABLE):
            converted[name] = resize_relative_positions(table, math.isqrt(len(own[name])))
    kernel = converted.get("patch_embed.proj.weight")
    if kernel is not None and kernel.shape[-1] != branch.patch_size:
        size = (branch.patch_size, branch.patch_size)
        resized = F.interpolate(kernel.float(), size=size, mode="bicubic", align_corners=False)
        converted["patch_embed.proj.weight"] = resized.to(kernel.dtype)
    return converted


def _convert_positions(table: Tensor, grid: tuple[int, int], kept_prefix: int) -> Tensor:
    rows = table.shape[1]
    prefix = 0 if math.isqrt(rows) ** 2 == rows else 1
    side = math.isqrt(rows - prefix)
    if side**2 != rows - prefix:
        raise CheckpointError(f"a position table of {rows} rows is no square grid, with or without a class-token row")
    if kept_prefix > prefix:
        raise CheckpointError(f"a position table of {rows} rows has no class-token row, which this branch type keeps")
    resized = resize_positions(table[:, prefix:], (side, side), grid).to(table.dtype)
    return torch.cat([table[:, :kept_prefix], resized], dim=1)


def resize_relative_positions(table: Tensor, side: int) -> Tensor:
    """Resize a relative position table to another window, as BEiT does.

    Near offsets keep their distance and far ones are stretched: the known offsets are put at 0, 1, 1 + q, 1 + q + q²,
    ... to both sides, with q such that they reach the ends of the new table, and a cubic spline is read at every whole
    offset.

    Args:
        table: `(offsets, heads)`; the offsets are those of a square window (an odd square number), three rows behind
            them (of pairs with a class token) are dropped.
        side: Offsets per side of the new table; odd.

    Returns:
        `(side * side, heads)`.

    Raises:
        CheckpointError: The table is not of a square window, or SciPy is missing.
    """
    for extra in (0, 3):
        source = math.isqrt(len(table) - extra)
        if source**2 == len(table) - extra and source % 2:
            break
    else:
        raise CheckpointError(f"a relative position table of {len(table)} rows is of no square window")
    grids = table[: source**2].T.unflatten(1, (source, source))
    if source == side:
        return grids.flatten(1).T
    try:  # here, because nothing else in the core needs SciPy
        from scipy.interpolate import RectBivariateSpline
    except ImportError:
        raise CheckpointError("resizing a relative position table needs SciPy: pip install scipy") from None
    reach = source // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:  # a bisection this coarse is part of what the released tables depend on
        ratio = (low + high) / 2
        if (1 - ratio**reach) / (1 - ratio) > side // 2:
            high = ratio
        else:
            low = ratio
    steps = np.cumsum(ratio ** np.arange(reach))
    known = np.concatenate([-steps[::-1], [0.0], steps])
    wanted = np.arange(side) - side // 2
    splines = [RectBivariateSpline(known, known, grid.double().numpy()) for grid in grids]
    resized = np.stack([spline(wanted, wanted).ravel() for spline in splines], axis=1)
    return torch.from_numpy(resized).to(table.dtype)


def convert_clip(state: Mapping[str, Tensor], branch: ViTBranch) -> dict[str, Tensor]:
    """Bring the image tower of a Hugging Face CLIP to the branch's names; sizes stay as they are.

    Args:
        state: Tensors by the file's names; a text tower beside the image tower is left out.
        branch: The branch they are meant for.

    Returns:
        Tensors by the branch's names; empty where the file is no such model.
    """
    names = {rename(name, FAMILY_RULES["clip"]): name for name in branch.state_dict()}
    given: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        joint, third = join_qkv(re.sub(r"^vision_model\.", "clip_model.", name))
        if third < 0:
            given[joint] = tensor
        else:
            thirds.setdefault(joint, {})[third] = tensor
    given.update({name: torch.cat([parts[i] for i in range(3)]) for name, parts in thirds.items() if len(parts) == 3})
    converted = {names[name]: tensor for name, tensor in given.items() if name in names}
    if "cls_token" in converted:
        converted["cls_token"] = converted["cls_token"].reshape(1, 1, -1)
    return converted


def check_vit(state: Mapping[str, Tensor], branch: ViTBranch) -> None:
    """Check that a pretrained file fits a branch.

    Raises:
        CheckpointError: A block or embedding is missing, has another shape, or the file holds more than the branch.
    """
    converted = convert_vit(state, branch)
    known = branch.state_dict()
    missing = [n for n in known if n not in converted and not OPTIONAL.search(n) and n != "cls_token"]
    wrong = [n for n, t in converted.items() if t.shape != known[n].shape]
    depth = len({m[1] for n in state if (m := re.match(r"(?:blocks|layers)\.(\d+)\.", n))})
    if wrong:
        name = wrong[0]
        raise CheckpointError(f"{name} is {tuple(converted[name].shape)}, the branch's {tuple(known[name].shape)}")
    if depth != branch.depth:
        raise CheckpointError(f"the file holds {depth} blocks, the branch has {branch.depth}")
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing, the first is {missing[0]}")


def convert_convnext(state: Mapping[str, Tensor], branch: ConvNeXtBranch) -> dict[str, Tensor]:
    """Bring the tensors of a ConvNeXt of Hugging Face, timm or OpenCLIP to a branch; final norm and head are left out.

    Args:
        state: Tensors by the file's names.
        branch: The branch they are meant for.

    Returns:
        Tensors by the branch's names; empty where the file is no such model.
    """
    own = branch.state_dict()
    names: dict[str | None, str] = {name: name for name in own}
    names.update({rename(name, FAMILY_RULES["convnext"]): name for name in own})
    given = {re.sub(r"^visual\.trunk\.", "", re.sub(r"^convnext\.", "convnext_model.", n)): t for n, t in state.items()}
    return {names[name]: tensor for name, tensor in given.items() if name in names}


AUGREG_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/(.+)/(kernel|scale|bias)")
# Names in AugReg's `.npz` files on the left: outside blocks, and inside.
AUGREG_NAMES = {
    "cls": "cls_token",
    "embedding/kernel": "patch_embed.proj.weight",
    "embedding/bias": "patch_embed.proj.bias",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "Transformer/encoder_norm/scale": "norm.weight",
    "Transformer/encoder_norm/bias": "norm.bias",
    "head/kernel": "head.weight",
    "head/bias": "head.bias",
}
AUGREG_PARTS = {
    "LayerNorm_0": "norm1",
    "LayerNorm_2": "norm2",
    "MlpBlock_3/Dense_0": "mlp.fc1",
    "MlpBlock_3/Dense_1": "mlp.fc2",
    "MultiHeadDotProductAttention_1/out": "attn.proj",
}


def from_augreg(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring the tensors of an AugReg `.npz` file (arXiv 2106.10270) to the names and layouts of plain ViTs.

    Args:
        state: Tensors by the file's names; kernels have their inputs first.

    Returns:
        Tensors by the names of `ViTBranch`, and `norm.*` and `head.*` where the file has them.

    Raises:
        CheckpointError: A block lacks one of its q, k and v.
    """
    converted: dict[str, Tensor] = {}
    joint: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name in AUGREG_NAMES:
            converted[AUGREG_NAMES[name]] = _kernel(name, tensor)
        elif match := AUGREG_BLOCK.fullmatch(name):
            block, part, leaf = f"blocks.{match[1]}", match[2], "bias" if match[3] == "bias" else "weight"
            if part in AUGREG_PARTS:
                converted[f"{block}.{AUGREG_PARTS[part]}.{leaf}"] = _kernel(name, tensor)
            else:
                joint.setdefault(f"{block}.attn.qkv.{leaf}", {})[part.rpartition("/")[2]] = tensor
    for name, parts in joint.items():
        if set(parts) != {"query", "key", "value"}:
            raise CheckpointError(f"{name} is made of query, key and value; the file has {', '.join(sorted(parts))}")
        # Kernels are (inputs, heads, channels per head), biases (heads, channels per head).
        qkv = torch.stack([parts["query"], parts["key"], parts["value"]], dim=-3)
        converted[name] = (qkv.flatten(1).T if name.endswith("weight") else qkv.flatten()).contiguous()
    return converted


def _kernel(name: str, tensor: Tensor) -> Tensor:
    if not name.endswith("/kernel"):
        return tensor
    if tensor.ndim == 4:  # of the patch embedding: (height, width, inputs, outputs)
        return tensor.permute(3, 2, 0, 1).contiguous()
    return tensor.flatten(0, -2).T.contiguous()


def find_weights(
    names: Sequence[str | None], folder: str | Path, instead: str = "start from random weights"
) -> list[Path | None]:
    """Return where the branches' pretrained files are.

    Args:
        names: File name per branch, None for a branch that starts from random weights.
        folder: The folder they are in; `$PIIP_PRETRAINED` replaces it.
        instead: For the error message: how to do without them.

    Raises:
        CheckpointError: A file is missing; the message names every missing one.
    """
    where = Path(os.environ.get("PIIP_PRETRAINED") or folder)
    paths = [None if name is None else where / name for name in names]
    if missing := sorted({str(path) for path in paths if path is not None and not path.is_file()}):
        raise CheckpointError(
            f"pretrained weights not found: {', '.join(missing)}. Put them there (the README says where each file "
            f"comes from), name their folder in $PIIP_PRETRAINED, or {instead}"
        )
    return paths


def read_pretrained(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a pretrained file; those of AugReg's `.npz` files come under the names of plain ViTs.

    Raises:
        CheckpointError: See `piip.checkpoint.read_file`.
    """
    state = read_state_dict(path)
    return from_augreg(state) if "embedding/kernel" in state else state


def load_pretrained(branch: Branch, path: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Load a pretrained file into a branch in place.

    Args:
        branch: The branch.
        path: A file as its authors released it, see `piip.checkpoint.read_file`, or one with the branch's own
            parameter names, which other branch types than ViT and ConvNeXt need.
        state: What `read_pretrained` returns for the file, where it was read already.

    Raises:
        CheckpointError: The file cannot be read, or is one of another family or size.
    """
    state = read_pretrained(path) if state is None else state
    try:
        if isinstance(branch, ViTBranch):
            state = (branch.family == "clip" and convert_clip(state, branch)) or state
            check_vit(state, branch)
            state = {**branch.state_dict(), **convert_vit(state, branch)}
        elif isinstance(branch, ConvNeXtBranch):
            state = convert_convnext(state, branch) or state
        elif getattr(branch, "family", None) == "timm":  # a file of timm's, of that very model; its head is left out
            own = branch.state_dict()
            state = {f"network.{name}": tensor for name, tensor in state.items() if f"network.{name}" in own} or state
        branch.load_state_dict(state)
    except (CheckpointError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit the branch: {' '.join(str(error).split())}") from None

"""Pretrained files of single branches: from their own names and sizes to a branch's."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from piip.branches.base import Branch
from piip.branches.vit import ViTBranch, resize_positions
from piip.checkpoint import FAMILY_RULES, read_state_dict, rename
from piip.errors import CheckpointError

# A branch keeps its initial value of these where the file has none.
OPTIONAL = re.compile(r"blocks\.\d+\.ls[12]\.gamma$")


def convert_vit(state: Mapping[str, Tensor], branch: ViTBranch) -> dict[str, Tensor]:
    """Bring the tensors of a pretrained ViT (DeiT, DeiT III, AugReg, MAE, DINOv2, InternViT) to a branch.

    The position table is resized (bicubic) from its square grid to the branch's, a leading class-token row being kept
    or dropped as the branch needs; the patch kernel is resized (bicubic) without rescaling. Tensors of unknown name
    are left out; the file may hold a few tensors only, see `check_vit`.

    Args:
        state: Tensors by the file's names.
        branch: The branch they are meant for.

    Returns:
        Tensors by the branch's names.

    Raises:
        CheckpointError: The position table has no square grid, or lacks the row that the branch keeps.
    """
    names = {name: name for name in branch.state_dict()}
    names.update({released: name for name in names if (released := rename(name, FAMILY_RULES["deit"]))})
    converted = {names[name]: tensor for name, tensor in state.items() if name in names}
    if "pos_embed" in converted:
        converted["pos_embed"] = _convert_positions(converted["pos_embed"], branch)
    kernel = converted.get("patch_embed.proj.weight")
    if kernel is not None and kernel.shape[-1] != branch.patch_size:
        size = (branch.patch_size, branch.patch_size)
        resized = F.interpolate(kernel.float(), size=size, mode="bicubic", align_corners=False)
        converted["patch_embed.proj.weight"] = resized.to(kernel.dtype)
    return converted


def _convert_positions(table: Tensor, branch: ViTBranch) -> Tensor:
    rows = table.shape[1]
    prefix = 0 if math.isqrt(rows) ** 2 == rows else 1
    side = math.isqrt(rows - prefix)
    if side**2 != rows - prefix:
        raise CheckpointError(f"a position table of {rows} rows is no square grid, with or without a class-token row")
    if branch.pos_prefix > prefix:
        raise CheckpointError(f"a position table of {rows} rows has no class-token row, which this branch type keeps")
    resized = resize_positions(table[:, prefix:], (side, side), branch.pos_grid).to(table.dtype)
    return torch.cat([table[:, : branch.pos_prefix], resized], dim=1)


def check_vit(state: Mapping[str, Tensor], branch: ViTBranch) -> None:
    """Check that a pretrained file fits a branch.

    Raises:
        CheckpointError: A block or embedding is missing, has another shape, or the file holds more than the branch.
    """
    converted = convert_vit(state, branch)
    known = branch.state_dict()
    missing = [n for n in known if n not in converted and not OPTIONAL.search(n) and n != "cls_token"]
    wrong = [n for n, t in converted.items() if t.shape != known[n].shape]
    depth = len({m[1] for n in state if (m := re.match(r"blocks\.(\d+)\.", n))})
    if wrong:
        name = wrong[0]
        raise CheckpointError(f"{name} is {tuple(converted[name].shape)}, the branch's {tuple(known[name].shape)}")
    if depth != branch.depth:
        raise CheckpointError(f"the file holds {depth} blocks, the branch has {branch.depth}")
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing, the first is {missing[0]}")


def load_pretrained(branch: Branch, path: str | Path) -> None:
    """Load a pretrained file into a branch in place.

    Args:
        branch: The branch.
        path: A file as its authors released it, see `piip.checkpoint.read_file`; for other branch types than the ViT
            a file with the branch's own parameter names.

    Raises:
        CheckpointError: The file cannot be read, or is one of another family or size.
    """
    state = read_state_dict(path)
    try:
        if isinstance(branch, ViTBranch):
            check_vit(state, branch)
            state = {**branch.state_dict(), **convert_vit(state, branch)}
        branch.load_state_dict(state)
    except (CheckpointError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit the branch: {' '.join(str(error).split())}") from None

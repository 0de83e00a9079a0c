"""Folders that DeepSpeed writes: which file of one holds the weights, and the whole tensors of ZeRO-3's shards."""

import re
from collections.abc import Callable, Mapping
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from piip.errors import CheckpointError

# ZeRO-1 and ZeRO-2: whole weights in one file.
WHOLE = "mp_rank_00_model_states.pt"
# ZeRO-3: parts of every tensor, in float32, in each process's second file; what they are parts of in its first.
_MODEL_SHARDS = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt")
_OPTIMIZER_SHARDS = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


def is_shard(path: Path) -> bool:
    """Return whether a file holds parts of tensors only."""
    return bool(_MODEL_SHARDS.fullmatch(path.name) or _OPTIMIZER_SHARDS.fullmatch(path.name))


def read_deepspeed(directory: Path, read: Callable[[Path], Any]) -> dict[str, Any]:
    """Read the weights of a DeepSpeed folder (ZeRO-1, 2 or 3), and what the run stored beside them.

    Args:
        directory: The folder of one step, with the `*_model_states.pt` in it.
        read: Reads one file safely.

    Returns:
        What the first model file holds; its weights, whole, under `module`.

    Raises:
        CheckpointError: The folder is none of DeepSpeed's, or a shard is missing.
    """
    if (directory / WHOLE).is_file():
        return read(directory / WHOLE)
    models, optimizers = (_by_rank(directory, pattern) for pattern in (_MODEL_SHARDS, _OPTIMIZER_SHARDS))
    if not models:
        raise CheckpointError(f"{directory} is a directory without {WHOLE}: give a checkpoint file")
    content = read(models[min(models)])
    processes = content.get("dp_world_size", len(models))
    for rank in range(processes):
        if rank not in models or rank not in optimizers:
            raise CheckpointError(
                f"{directory} holds ZeRO-3 shards of {processes} processes, and a file of process {rank} is missing: "
                "copy the whole folder"
            )
    content["module"] = _gather(content, [read(models[r]) for r in range(processes)], [
        read(optimizers[r])["optimizer_state_dict"] for r in range(processes)
    ])  # fmt: skip
    return content


def _by_rank(directory: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    return {int(match[1]): path for path in directory.iterdir() if (match := pattern.fullmatch(path.name))}


def _gather(first: Mapping[str, Any], models: list[Mapping[str, Any]], optimizers: list[Mapping[str, Any]]) -> Any:
    state: dict[str, Tensor] = {name: first["module"][name] for name in first["buffer_names"]}
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        state[name] = _joined([model["frozen_param_fragments"][name] for model in models], shape)
    # Every process holds an equal share of each tensor, the last share padded, one tensor after the other.
    flat = [torch.cat([group.flatten() for group in optimizer["fp32_flat_groups"]]) for optimizer in optimizers]
    start = 0
    for name, shape in chain.from_iterable(group.items() for group in first["param_shapes"]):
        share = -(-prod(shape) // len(flat))
        state[name] = _joined([part[start : start + share] for part in flat], shape)
        start += share
    for name, source in (first.get("shared_params") or {}).items():
        state[name] = state[source]
    return {name: state[name] for name in first["module"] if name in state}


def _joined(parts: list[Tensor], shape: torch.Size) -> Tensor:
    return torch.cat([part.flatten() for part in parts])[: prod(shape)].reshape(shape)

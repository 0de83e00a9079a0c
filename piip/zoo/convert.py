"""Files with the authors' parameter names, and with ours: from one to the other and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from piip.checkpoint import (
    State,
    check_complete,
    from_released,
    read_state_dict,
    released_shapes,
    rename,
    to_released,
    unread_shapes,
)
from piip.errors import CheckpointError
from piip.integrations.files import whole
from piip.models import PyramidModel

Names = Literal["ours", "released"]
Rules = Sequence[tuple[str, str]]
BACKBONE = "backbone."


def convert(
    model: PyramidModel,
    state: Mapping[str, Tensor],
    names: Names,
    *,
    unread: Mapping[str, Tensor] | None = None,
    rules: Rules = (),
) -> tuple[State, State]:
    """Bring the state of a backbone, of a classifier, or of a whole detector or segmentor to other names.

    Args:
        model: The backbone or classifier, also on the meta device: its names and shapes are what counts.
        state: Tensors by name; those of a detector's backbone begin with `backbone.`.
        names: Which names are wanted.
        unread: To released names: what nothing reads of a file that was converted before; made up where it is not
            given (index tables by their rule, zeros for parameters).
        rules: Names of a detector outside its backbone, ours on the left, where they differ (DINO).

    Returns:
        The state, and what nothing reads of a released one.

    Raises:
        CheckpointError: The state is not one of this model.
    """
    inside = {n.removeprefix(BACKBONE): t for n, t in state.items() if n.startswith(BACKBONE)}
    outside = {n: t for n, t in state.items() if not n.startswith(BACKBONE)} if inside else {}
    prefix, inside = (BACKBONE, inside) if inside else ("", dict(state))
    kept: State = {}
    if names == "ours":
        converted = from_released(model, inside)
        kept = model.unread
        rules = [(released, ours) for ours, released in rules]
    else:
        check_complete(model, inside, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
        made_up = unread or {n: t for n, t in to_released(model).items() if n in unread_shapes(model)}
        converted = {**to_released(model, inside), **made_up}
        check_complete(model, converted, released_shapes(model))
    result = {prefix + name: tensor for name, tensor in converted.items()}
    result.update({rename(name, rules) or name: tensor for name, tensor in outside.items()})
    return result, kept


def unread_file(path: Path) -> Path:
    """Return where the tensors are kept that nothing reads of a converted file."""
    return path.with_name(f"{path.stem}.unread.safetensors")


def write_state(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors by name, whole or not at all: `.safetensors`, or a torch file with a `state_dict`.

    Raises:
        CheckpointError: The file cannot be written.
    """
    path = Path(path)
    with whole(path, CheckpointError) as part:
        if path.suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, part)
        else:
            torch.save({"state_dict": dict(state)}, part)


def convert_file(
    model: PyramidModel, source: str | Path, target: str | Path, names: Names, *, rules: Rules = ()
) -> tuple[int, int]:
    """Convert a file; see `convert`. Tensors that nothing reads go beside the target, and come from beside the source.

    Returns:
        The number of tensors of the target, and of those that nothing reads.

    Raises:
        CheckpointError: The source cannot be read, is not one of this model, or the target cannot be written.
    """
    source, target = Path(source), Path(target)
    beside = unread_file(source)
    unread = read_state_dict(beside) if names == "released" and beside.is_file() else None
    try:
        state, kept = convert(model, read_state_dict(source), names, unread=unread, rules=rules)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    if kept:
        write_state(kept, unread_file(target))
    write_state(state, target)
    return len(state), len(kept)

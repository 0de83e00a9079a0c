"""The result of the first stage as a file: the projector, and interactions where they were trained."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from piip.checkpoint import read_state_dict
from piip.errors import CheckpointError
from piip_llava.modeling import PiipLlavaForConditionalGeneration, _gathered
from piip_llava.released import PROJECTOR, TOWER, NameMap

INTERACTIONS = f"{TOWER}interactions."


def _names(model: PiipLlavaForConditionalGeneration) -> NameMap:
    # Under ZeRO-3 a parameter's own shape is empty; its whole shape is kept beside it.
    shapes = {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
        if name.startswith(("vision_tower.", "projector."))
    }
    return NameMap(model.vision_tower, model.config.projector, shapes)


def save_adapter(model: PiipLlavaForConditionalGeneration, path: str | Path, write: bool = True) -> None:
    """Write the projector, and the interactions where they are trained, under the released names.

    The file is one that the authors' code reads too; interactions are extra there.

    Args:
        model: The model; with ZeRO-3, every process has to call this.
        path: The file, `mm_projector.bin` by custom.
        write: Whether this process writes.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        stage = name.startswith("vision_tower.pyramid.stages.") and parameter.requires_grad
        if stage or name.startswith("projector."):
            with _gathered(parameter):
                state[name] = parameter.detach().to("cpu", copy=True)
    if not write:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    torch.save(_names(model).to_released(state), fresh)
    fresh.replace(path)


def load_adapter(model: PiipLlavaForConditionalGeneration, path: str | Path) -> None:
    """Load what `save_adapter`, or the authors' first stage, wrote; in place.

    Raises:
        CheckpointError: The file cannot be read, or its projector belongs to another tower or language model.
    """
    names = _names(model)
    expected = names.released_shapes()
    given = {_full(name): tensor for name, tensor in read_state_dict(path).items()}
    wanted = {n: s for n, s in expected.items() if n.startswith(PROJECTOR)}
    if any(n.startswith(INTERACTIONS) for n in given):
        wanted |= {n: s for n, s in expected.items() if n.startswith(INTERACTIONS)}
    missing = [n for n in wanted if n not in given]
    other = [n for n in given if n not in wanted]
    wrong = [n for n in wanted if n in given and tuple(given[n].shape) != wanted[n]]
    if missing or other or wrong:
        name = (wrong or other or missing)[0]
        what = "is not in the model" if other else "is missing from the file"
        if wrong:
            what = f"is {tuple(given[name].shape)}, expected {wanted[name]}"
        raise CheckpointError(
            f"{path} is of another tower, projector or language model: {name} {what}; train the first stage with the "
            "same --vision_tower and language model"
        )
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name, tensor in given.items():
        parameter = parameters[names.ours[name][0]]
        with torch.no_grad(), _gathered(parameter):
            if parameter.numel():
                parameter.copy_(tensor)


def _full(name: str) -> str:
    """Return a name from where the model begins; the file may have been cut out of a wrapped model."""
    for start in (PROJECTOR, INTERACTIONS):
        if start in name:
            return name[name.index(start) :]
    return name

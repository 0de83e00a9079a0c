"""Directories and files that the authors' code writes: their names beside ours, read without running their code.

A released directory holds shards, an index and a `config.json` of type `llava_llama`; the tower's structure is in none
of them, only the name of a config file (`piip_llava.rows` knows what each name stands for).
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaConfig
from transformers.utils import cached_file

from piip.branches import ConvNeXtBranch, ViTBranch
from piip.branches.pretrained import convert_clip
from piip.checkpoint import FAMILY_RULES, INJECTOR_RULES, PYRAMID_RULES, difference, read_state_dict, rename
from piip.errors import CheckpointError, unknown
from piip_llava.config import PiipLlavaConfig
from piip_llava.rows import CLIP, IMAGENET, ROWS, Row
from piip_llava.tower import PlainTower, PyramidTower, VisionTower, complete_tower

TOWER, PROJECTOR = "model.vision_tower.vision_tower.", "model.mm_projector."
MODEL_TYPES = ("llava_llama", "llava")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# Ours on the left, released on the right, as in `piip.checkpoint`.
GATE_RULES = (("ca_gamma", "ca_weight"), ("cffn_gamma", "cffn_weight"))
CONVNEXT_RULES = (
    ("stages.{i}.blocks.{k}.gamma", "convnext_model.stages.{i}.blocks.{k}.weight"),
    ("*", "convnext_model.*"),
)
# A plain CLIP: transformers' CLIPVisionModel.
PLAIN_RULES = (("clip_model.*", "vision_model.*"),)
# Numbers are positions in the original's nn.Sequential.
SEPARATE_RULES = {
    "group": (
        ("branches.{i}.fc1.*", "branch{i+1}.1.*"),
        ("branches.{i}.norm.*", "branch{i+1}.3.*"),
        ("branches.{i}.fc2.*", "branch{i+1}.6.*"),
    ),
    "layer": (("branches.{i}.fc1.*", "branch{i+1}.1.*"), ("branches.{i}.fc2.*", "branch{i+1}.5.*")),
}


def released_name(name: str, tower: VisionTower, projector: Mapping[str, Any]) -> str:
    """Return the released name of a parameter of the model.

    Args:
        name: Our name, beginning with `vision_tower.`, `projector.` or `language_model.`.
        tower: The tower.
        projector: Options of the projector.

    Raises:
        CheckpointError: The authors have no name for it.
    """
    part, _, inner = name.partition(".")
    if part == "language_model":
        return inner
    result: str | None = None
    if part == "projector":
        if projector.get("type", "separate") == "separate":
            result = rename(inner, SEPARATE_RULES[projector.get("norm", "group")])
        else:  # a single layer stands alone, several are numbered with the activations between them
            result = re.sub(r"^layers\.0\." if projector.get("depth", 2) == 1 else r"^layers\.", "", inner)
        return _known(name, result and PROJECTOR + result)
    if isinstance(tower, PyramidTower):
        if match := re.match(r"(pyramid\.branches\.(\d+)\.)(.+)", inner):
            result = match[1] + _branch_name(match[3], tower.pyramid.branches[int(match[2])])
        elif match := re.match(r"(.+\.to_(?:low|high)\.)(.+)", inner):
            result = match[1] + (rename(match[2], (*GATE_RULES, *INJECTOR_RULES)) or match[2])
        result = result and rename(result, PYRAMID_RULES)
    elif isinstance(tower, PlainTower):
        result = rename(_branch_name(inner.removeprefix("branch."), tower.branch), PLAIN_RULES)
    return _known(name, result and TOWER + result)


def _known(name: str, released: str | None) -> str:
    if released is None:
        raise CheckpointError(f"no released name is known for the parameter {name}")
    return released


def _branch_name(name: str, branch: torch.nn.Module) -> str:
    rules = (
        CONVNEXT_RULES if isinstance(branch, ConvNeXtBranch) else FAMILY_RULES.get(getattr(branch, "family", ""), ())
    )
    return rename(name, rules) or name


class NameMap:
    """Names of a model's tensors, ours and the released ones; and their shapes.

    Args:
        tower: The tower.
        projector: Options of the projector.
        shapes: Shape of each of the model's tensors, by our name.
    """

    def __init__(self, tower: VisionTower, projector: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        self.ours: dict[str, tuple[str, int]] = {}  # released name -> ours, and which third of it (-1: all)
        for name in shapes:
            joint = released_name(name, tower, projector)
            if ".self_attn.qkv_proj." in joint:
                self.ours.update({joint.replace(".qkv_proj.", f".{q}_proj."): (name, i) for i, q in enumerate("qkv")})
            else:
                self.ours[joint] = (name, -1)
        self.tower = tower

    def released_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor of a released file that the model reads."""
        return {released: tuple(self._released_form(released).shape) for released in self.ours}

    def _released_form(self, released: str, tensor: Tensor | None = None) -> Tensor:
        name, third = self.ours[released]
        tensor = torch.empty(self.shapes[name], device="meta") if tensor is None else tensor
        if third >= 0:
            return tensor.chunk(3)[third]
        if released.endswith("class_embedding"):
            return tensor.flatten()
        return tensor.squeeze(0) if released.endswith("position_embedding.weight") else tensor

    def to_released(self, state: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Bring tensors (or gradients, where None means none) by our names to the released names."""
        return {
            released: None if state[name] is None else self._released_form(released, state[name])
            for released, (name, _) in self.ours.items()
            if name in state
        }

    def unread_shapes(self, given: Iterable[str] = ()) -> dict[str, tuple[int, ...]]:
        """Return name and shape of the tensors that a released file holds and nothing reads.

        Args:
            given: Names in the file: ConvNeXt-L brings a layer in front of its head that the other sizes lack.
        """
        shapes = {}
        given = set(given)
        for i, (branch, _) in enumerate(self.tower.branches()):
            prefix = f"{TOWER}branch{i + 1}." if isinstance(self.tower, PyramidTower) else TOWER
            width = branch.dims[-1]
            if isinstance(branch, ViTBranch):
                inner = "clip_model." if isinstance(self.tower, PyramidTower) else "vision_model."
                shapes.update({f"{prefix}{inner}post_layernorm.{leaf}": (width,) for leaf in ("weight", "bias")})
                if branch.cls_token is None:
                    shapes[f"{prefix}{inner}embeddings.class_embedding"] = (width,)
            else:
                head = f"{prefix}convnext_model.head"
                shapes.update({f"{head}.norm.{leaf}": (width,) for leaf in ("weight", "bias")})
                if f"{head}.pre_logits.fc.weight" in given:
                    shapes.update(
                        {f"{head}.pre_logits.fc.weight": (width, width), f"{head}.pre_logits.fc.bias": (width,)}
                    )
        return shapes

    def from_released(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Bring a stream of released tensors to our names.

        Raises:
            CheckpointError: Something is missing, left over, or of another shape.
        """
        expected = self.released_shapes()
        seen: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        thirds: dict[str, dict[int, Tensor]] = {}
        for released, tensor in tensors:
            released = _layer_scale_name(released)
            if released.endswith("rotary_emb.inv_freq") or released.endswith("embeddings.position_ids"):
                continue  # buffers that older versions of transformers saved
            seen[released] = tensor.to("meta")
            if released not in self.ours or tuple(tensor.shape) != expected[released]:
                continue
            name, third = self.ours[released]
            if third < 0:
                state[name] = tensor.reshape(self.shapes[name])
                continue
            parts = thirds.setdefault(name, {})
            parts[third] = tensor
            if len(parts) == 3:
                state[name] = torch.cat([parts[i] for i in range(3)])
                del thirds[name]
        if wrong := difference(seen, {**expected, **self.unread_shapes(seen)}):
            raise CheckpointError(f"the files do not hold the model that their name stands for: {wrong}")
        return state


def _layer_scale_name(name: str) -> str:
    """Accept timm's own name of ConvNeXt's layer scale too."""
    return re.sub(r"(\.convnext_model\.stages\.\d+\.blocks\.\d+)\.gamma$", r"\1.weight", name)


def is_released(directory: str | os.PathLike) -> bool:
    """Return whether a directory is one that the authors' code wrote."""
    file = Path(directory) / "config.json"
    return file.is_file() and has_released_fields(read_json(file))


def has_released_fields(fields: Mapping[str, Any]) -> bool:
    """Return whether these are the fields of a `config.json` that the authors' code wrote."""
    return fields.get("model_type") in MODEL_TYPES and "mm_vision_tower" in fields


def read_fields(path: str | os.PathLike, **options: Any) -> dict[str, Any]:
    """Return the fields of a model's `config.json`.

    Args:
        path: A directory, or a repository of the hub.
        **options: Options of `from_pretrained`; those that say how to reach the hub are used.

    Raises:
        CheckpointError: The directory holds none, or it cannot be read.
        OSError: The hub has no such repository, or cannot be reached.
    """
    if os.path.isdir(path):
        file = Path(path) / (options.get("subfolder") or "") / "config.json"
        if not file.is_file():
            raise CheckpointError(f"{path} holds no model, as there is no {file}: give the directory of a saved model")
        return read_json(file)
    hub = {name: options[name] for name in (*HUB_OPTIONS, "subfolder") if options.get(name) is not None}
    return read_json(Path(str(cached_file(path, "config.json", **hub))))


def recognise(path: str | os.PathLike, **options: Any) -> bool:
    """Return whether a directory, or a repository of the hub, is a released one; anything else must be ours.

    Args:
        path: The directory or repository.
        **options: See `read_fields`.

    Raises:
        CheckpointError: It is of another kind of model.
        OSError: See `read_fields`.
    """
    fields = read_fields(path, **options)
    if has_released_fields(fields):
        return True
    kind = fields.get("model_type")
    if kind != PiipLlavaConfig.model_type:
        raise CheckpointError(
            f"{path} is a {kind or 'model of no known type'}, no PIIP-LLaVA: give what the second stage of training "
            "wrote, or a released model (a language model is where train.py starts from: --model_name_or_path)"
        )
    return False


def fetch(path: str | os.PathLike, files: Sequence[str] | None = None, **options: Any) -> str | os.PathLike:
    """Return the directory of a released model; a repository of the hub is downloaded, or found in the cache.

    Args:
        path: The directory or repository.
        files: Patterns of the files that are needed; all by default.
        **options: See `read_fields`.

    Raises:
        OSError: The hub cannot be reached.
    """
    if os.path.isdir(path):
        return path
    hub = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
    return snapshot_download(str(path), allow_patterns=files and [*files], **hub)


def read_json(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def find_row(fields: Mapping[str, Any]) -> str:
    """Return the row that the `mm_vision_tower` of a released `config.json` stands for.

    Raises:
        CheckpointError: The name is of no published row.
    """
    given = str(fields["mm_vision_tower"])
    name = Path(given).name.removesuffix(".py")
    if name in ROWS:
        return name
    if "clip-vit-large-patch14-336" in given:
        return "llava-1.5_13B" if fields.get("hidden_size") == 5120 else "llava-1.5_7B"
    raise CheckpointError(f"{unknown('tower', name, ROWS)}; or say what it is: from_pretrained(..., tower={{...}})")


def check_shards(directory: str | os.PathLike) -> list[Path]:
    """Return the weight files of a directory.

    Raises:
        CheckpointError: There are none, or one that the index names is missing.
    """
    folder = Path(directory)
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            if lacking := [name for name in names if not (folder / name).is_file()]:
                raise CheckpointError(
                    f"{folder} lacks {len(lacking)} of its {len(names)} shards, the first is {lacking[0]}: get it again"
                )
            return [folder / name for name in names]
        if (folder / stem).is_file():
            return [folder / stem]
    raise CheckpointError(f"{folder} holds no weights: expected model.safetensors, or its index and shards")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not a checkpoint: get it again ({error})") from None


def _stream(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        if file.suffix != ".safetensors":
            yield from read_state_dict(file).items()
            continue
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def _position_grids(files: Iterable[Path]) -> dict[int, int]:
    """Return the side of each CLIP branch's position table (by branch number) as the files hold it."""
    sides = {}
    pattern = re.compile(re.escape(TOWER) + r"branch(\d+)\.clip_model\.embeddings\.position_embedding\.weight")
    for file in files:
        if file.suffix == ".safetensors":
            with _opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118
                    if match := pattern.fullmatch(name):
                        rows = opened.get_slice(name).get_shape()[0]
                        sides[int(match[1]) - 1] = round((rows - 1) ** 0.5)
    return sides


def released_config(fields: Mapping[str, Any], tower: Mapping[str, Any] | str | None = None) -> PiipLlavaConfig:
    """Return our configuration for the fields of a released `config.json`.

    Args:
        fields: The fields.
        tower: Options of the tower, or the name of a row; found by name by default.

    Raises:
        CheckpointError: The tower is of no published row.
    """
    if isinstance(tower, Mapping):
        row = Row(language_model="", tower=dict(tower))
    else:
        name = tower or find_row(fields)
        if name not in ROWS:
            raise CheckpointError(unknown("row", name, ROWS))
        row = ROWS[name]
    known = LlamaConfig().to_dict()
    text = {key: value for key, value in fields.items() if key in known and key not in ("model_type", "architectures")}
    text.pop("torch_dtype", None)
    text.pop("transformers_version", None)
    text["rope_theta"] = fields.get("rope_theta", 10000.0)
    statistics = CLIP if row.projector["type"] == "mlp" else IMAGENET
    options = complete_tower(row.tower)
    if row.projector["type"] == "mlp":
        options.update(
            select_layer=fields.get("mm_vision_select_layer", -2),
            select_feature=fields.get("mm_vision_select_feature", "patch"),
        )
    return PiipLlavaConfig(
        text_config={**text, "model_type": "llama"},
        tower=options,
        projector=row.projector,
        image_token_id=fields["vocab_size"],
        image_aspect_ratio=fields.get("image_aspect_ratio") or "square",
        sequence_length=fields.get("tokenizer_model_max_length") or 2048,
        bos_token_id=fields.get("bos_token_id"),
        eos_token_id=fields.get("eos_token_id"),
        pad_token_id=fields.get("pad_token_id"),
        dtype=fields.get("torch_dtype") or "bfloat16",
        **statistics,
    )


def read_directory(
    directory: str | os.PathLike,
    tower: Mapping[str, Any] | str | None = None,
    vision_weights: str | os.PathLike | None = None,
) -> tuple[PiipLlavaConfig, dict[str, Tensor]]:
    """Read a released directory, shard by shard and strictly.

    Args:
        directory: The directory.
        tower: See `released_config`.
        vision_weights: CLIP's own file, for a LLaVA-1.5 directory, which may hold none of it.

    Returns:
        Our configuration and tensors by our names.

    Raises:
        CheckpointError: A shard is missing or truncated, or the tensors are of another model.
    """
    from piip_llava.modeling import PiipLlavaForConditionalGeneration

    files = check_shards(directory)
    fields = read_json(Path(directory) / "config.json")
    config = released_config(fields, tower)
    # How large the pretrained grids were is told by the tensors alone.
    for i, side in _position_grids(files).items():
        branches = config.tower["spec"]["branches"]
        if i < len(branches):
            branches[i]["options"] = {**branches[i]["options"], "pos_grid": (side, side)}
    with torch.device("meta"):
        model = PiipLlavaForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = NameMap(model.vision_tower, config.projector, shapes)
    extra: dict[str, Tensor] = {}
    if vision_weights is not None and isinstance(model.vision_tower, PlainTower):
        converted = convert_clip(read_state_dict(vision_weights), model.vision_tower.branch)
        given = {f"vision_tower.branch.{name}": tensor for name, tensor in converted.items()}
        extra = {name: tensor for name, tensor in names.to_released(given).items() if tensor is not None}
        extra |= {name: torch.empty(shape) for name, shape in names.unread_shapes().items()}
    stream = list(extra.items())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from stream
        yield from _stream(files)

    try:
        return config, names.from_released(tensors())
    except CheckpointError as error:
        hint = ""
        if isinstance(model.vision_tower, PlainTower) and not vision_weights and f"{TOWER}vision_model" in str(error):
            hint = (
                "; a directory of LLaVA-1.5 may leave CLIP out: give CLIP's file as vision_weights (--vision_weights)"
            )
        raise CheckpointError(f"{directory}: {error}{hint}") from None

"""The published rows: which tower, projector and language model each one is."""

from dataclasses import dataclass, field
from typing import Any

IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
CLIP = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}


@dataclass(frozen=True)
class Row:
    """A model of the tables.

    Attributes:
        language_model: Hub name of the language model that training starts from.
        tower: Options of the tower, see `piip_llava.tower.build_tower`.
        projector: Options of the projector, see `piip_llava.projector.build_projector`.
        statistics: Mean and standard deviation that images are normalised with.
    """

    language_model: str
    tower: dict[str, Any]
    projector: dict[str, Any] = field(default_factory=lambda: {"type": "separate"})
    statistics: dict[str, Any] = field(default_factory=lambda: IMAGENET)


def _piip(size: str, spec: str) -> Row:
    return Row(f"lmsys/vicuna-{size}-v1.5", {"type": "pyramid", "spec": spec})


def _llava(size: str) -> Row:
    tower = {"type": "plain", "spec": "clip-l-336", "select_layer": -2, "select_feature": "patch"}
    return Row(f"lmsys/vicuna-{size}-v1.5", tower, {"type": "mlp", "depth": 2}, CLIP)


# By the names of the authors' config files, which is also what a released `config.json` tells of the tower. The 13B
# rows with ConvNeXt have twice the interactions of the 7B rows. `piip.zoo.released` has the published figures.
ROWS = {
    "llava-1.5_7B": _llava("7b"),
    "llava-1.5_13B": _llava("13b"),
    "piip-llava_clip-bl_512-256_7B": _piip("7b", "clip-bl-512-256"),
    "piip-llava_convnext-b_clip-l_640-224_7B": _piip("7b", "convnext-b-clip-l-640-224"),
    "piip-llava_clip-bl_512-448_7B": _piip("7b", "clip-bl-512-448"),
    "piip-llava_convnext-b_clip-l_1024-336_7B": _piip("7b", "convnext-b-clip-l-1024-336"),
    "piip-llava_convnext-l_clip-l_1024-336_7B": _piip("7b", "convnext-l-clip-l-1024-336"),
    "piip-llava-plus_convnext-l_clip-l_1024-336_7B": _piip("7b", "convnext-l-clip-l-1024-336"),
    "piip-llava_clip-bl_512-448_13B": _piip("13b", "clip-bl-512-448"),
    "piip-llava_convnext-b_clip-l_1024-336_13B": _piip("13b", "convnext-b-clip-l-1024-336-24"),
    "piip-llava_convnext-l_clip-l_1024-336_13B": _piip("13b", "convnext-l-clip-l-1024-336-24"),
}

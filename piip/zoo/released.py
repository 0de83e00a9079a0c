"""What was published: the rows of the papers' tables, and where their files and the pretrained branches come from.

Everything that shows these figures (README tables, `tools/get_flops.py`, `tools/download.py`, model cards) reads them
here. Accuracies, #Param and #FLOPs are the authors' (README of OpenGVLab/PIIP); none of them was measured with this
code.
"""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from piip.errors import SpecError, unknown
from piip.zoo.specs import SPECS, resolve_spec

HUB = "OpenGVLab/PIIP"
"""The repository on the Hugging Face hub that holds the released detectors, segmentors and classifiers."""

ENDPOINT = "https://huggingface.co"


@dataclass(frozen=True)
class Table:
    """A published table.

    Attributes:
        title: Its heading.
        metrics: Names of the accuracies, in the order of `Row.metrics`.
        origin: What they were measured on.
        task: Folder of the task's configs and tools in this repository.
        model: What a row's spec becomes: a dense backbone, a classifier, or LLaVA's vision tower.
        convention: How the costs were counted, see `piip.budget.published`.
        folder: Where its files are in `HUB`.
        log: Name of a released log: what follows the config's name in it; its link is to the raw text where `raw`.
        raw: Whether logs are text that the hub shows.
        digits: Decimals of the accuracies.
    """

    title: str
    metrics: tuple[str, ...]
    origin: str
    task: str
    model: Literal["dense", "classifier", "tower"] = "dense"
    convention: Literal["classification", "detection", "llava"] = "classification"
    folder: str = ""
    log: str = ".log.json"
    raw: bool = True
    digits: int = 1


_AP: dict[str, Any] = {
    "metrics": ("box AP", "mask AP"),
    "origin": "COCO val2017",
    "task": "mmdetection",
    "folder": "detection",
}
_BENCHMARKS = ("MMB-EN", "MM-Vet", "TextVQA", "SQA-I", "GQA", "VQAv2", "SEED-I", "POPE", "average")
TABLES: dict[str, Table] = {
    "coco": Table("COCO, Mask R-CNN, 1x", **_AP),
    "variants": Table("COCO, other pretraining and heads", **_AP),
    "speedup": Table("COCO, faster form", **_AP),
    "convnext": Table("COCO, ConvNeXt and ViT branches, Mask R-CNN, 1x", **_AP, convention="detection", log=".log"),
    "ade20k": Table(
        "ADE20K, UperNet, 80k", ("mIoU",), "ADE20K val", "mmsegmentation", folder="segmentation", log=".log", digits=2
    ),
    "imagenet": Table(
        "ImageNet-1K",
        ("top-1",),
        "ImageNet-1K val",
        "classification",
        "classifier",
        folder="classification",
        log=".txt",
        raw=False,
    ),
    "llava": Table("Multimodal understanding", _BENCHMARKS, "the benchmarks' own sets", "llava", "tower", "llava"),
}


@dataclass(frozen=True)
class Row:
    """A row of a published table.

    Attributes:
        table: Its table, a key of `TABLES`.
        backbone: What the table calls the model.
        spec: The row of `piip.zoo.specs` that describes it.
        resolution: Image sides, the largest first.
        metrics: Published accuracies in the table's order; None where the table has none.
        config: Path of the config in this repository; empty where the original has none.
        params: Published #Param in millions, None where the table has none.
        flops: Published #FLOPs (multiply-adds) in 1e9, None where the table has none.
        head: Detector or segmentor.
        pretraining: What the branches were pretrained on.
        schedule: Training schedule.
        options: Options of the model, beside the spec.
        released: Whether weights were released, in the table's folder of `HUB` under the config's name.
        repository: A hub repository of its own that holds the weights.
        language_model: What reads the tower's tokens.
        case: The reference case (`tests/reference/cases`) of a small model of this kind, or of the nearest kind.
        note: Why a cost that is counted here is not the published one.
    """

    table: str
    backbone: str
    spec: str
    resolution: str
    metrics: tuple[float | None, ...]
    config: str
    params: float | None = None
    flops: float | None = None
    head: str = ""
    pretraining: str = ""
    schedule: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    released: bool = True
    repository: str = ""
    language_model: str = ""
    case: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        """Name of the config, of the released files and in command lines."""
        return (self.config.removesuffix(".py") or self.repository or self.backbone).rpartition("/")[2]

    @property
    def weights(self) -> str | None:
        """Path of the released weights inside `HUB`, None without such a file."""
        return f"{TABLES[self.table].folder}/{self.name}.pth" if self.released and not self.repository else None

    @property
    def weights_url(self) -> str | None:
        """Link to the released weights, a file or a repository."""
        if self.repository:
            return f"{ENDPOINT}/{self.repository}"
        return self.weights and f"{ENDPOINT}/{HUB}/resolve/main/{self.weights}"

    @property
    def log_url(self) -> str | None:
        """Link to the released training log."""
        table = TABLES[self.table]
        kind = "raw" if table.raw else "resolve"
        return self.weights and f"{ENDPOINT}/{HUB}/{kind}/main/{table.folder}/{self.name}{table.log}"


def _read(cells: Mapping[str, str]) -> Row:
    def numbers(text: str) -> tuple[float | None, ...]:
        return tuple(None if value == "-" else float(value) for value in text.split())

    options = dict(part.split("=") for part in cells["options"].split(";") if part)
    return Row(
        **{key: cells[key] for key in ("table", "backbone", "spec", "head", "pretraining", "resolution", "schedule")},
        **{key: cells[key] for key in ("language_model", "config", "case", "note")},
        metrics=numbers(cells["metrics"]),
        params=float(cells["params"]) if cells["params"] else None,
        flops=float(cells["flops"]) if cells["flops"] else None,
        options={key: _values(value) for key, value in options.items()},
        released=bool(cells["weights"]),
        repository=cells["weights"] if "/" in cells["weights"] else "",
    )


def _values(text: str) -> float | tuple[float, ...]:
    values = tuple(float(value) if "." in value else int(value) for value in text.split())
    return values if len(values) > 1 else values[0]


with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as _file:
    ROWS: tuple[Row, ...] = tuple(map(_read, csv.DictReader(_file)))
"""The published rows, in the order of the papers' tables (`released.csv` beside this file)."""


PUBLISHED: dict[str, Row] = {
    alias: row for row in reversed(ROWS) for alias in (row.spec, row.name, row.config, row.repository) if alias
}
"""The published rows by spec, by name and path of their config, and by repository; the first of several."""


def find_row(name: str) -> Row:
    """Return a row by one of the names of `PUBLISHED`.

    Raises:
        SpecError: There is no such row; the message lists the nearest names.
    """
    if name not in PUBLISHED:
        raise SpecError(_unknown_row(name))
    return PUBLISHED[name]


def _unknown_row(name: str) -> str:
    nearest, _, _ = unknown("row", name, [*PUBLISHED, *SPECS]).partition("; known: ")
    return f"{nearest}; piip.list_models() and tools/download.py list show what there is"


# What a config may say beside the spec: options of `piip.models.DensePyramid` and of `piip.models.Classifier`.
_OF_BACKBONES = ("scales", "taps", "merge")
_OF_CLASSIFIERS = ("head", "num_classes", "readout")


def row_of(name: str) -> Row:
    """Return a row for anything that names a model: a published row, a spec, or a config file with a PIIP backbone.

    Raises:
        SpecError: There is no such row, or the config describes no backbone of PIIP, or a classifier with its options.
    """
    path = Path(name)
    if path.suffix != ".py":
        return find_row(name) if name in PUBLISHED or name not in SPECS else _row_of_spec(name, name, {})
    if name in PUBLISHED or path.stem in PUBLISHED:
        return find_row(name if name in PUBLISHED else path.stem)
    if not path.is_file():
        raise SpecError(f"there is no config {path}; {_unknown_row(path.stem)}")
    from piip.integrations.config import read_config  # mmengine: of use only where such configs are

    model = read_config(path).get("model", {})
    model = model.get("backbone", model)  # a classifier's config has its options at the top
    if "spec" not in model:
        raise SpecError(f"{path} has no model.backbone.spec: give a config of a PIIP detector, segmentor or classifier")
    options = {key: model[key] for key in (*_OF_BACKBONES, *_OF_CLASSIFIERS) if key in model}
    return _row_of_spec(model["spec"], name, options)


def _row_of_spec(spec: Any, shown: str, options: dict[str, Any]) -> Row:
    resolved = resolve_spec(spec)
    resolution = "/".join(str(branch.resolution) for branch in reversed(resolved.branches))
    classifier = resolved.head != "dense" or any(key in options for key in _OF_CLASSIFIERS)
    if classifier and (odd := [key for key in _OF_BACKBONES if key in options]):
        raise SpecError(f"{shown} describes a classifier, and {odd[0]} is an option of dense backbones: leave it out")
    table = "imagenet" if classifier else "convnext" if options.get("taps") else "variants"
    config = shown if shown.endswith(".py") else ""
    return Row(table, shown, spec, resolution, (), config, options=options, released=False)


@dataclass(frozen=True)
class Source:
    """Where a family of pretrained branch files comes from.

    Attributes:
        family: What the files are called.
        pattern: Regular expression of their names, as `BranchSpec.weights` has them.
        url: Their address; `{0}` is the whole name, `{1}`, `{2}` are the groups of the pattern.
        licence: Licence of the weights, as their authors state it.
    """

    family: str
    pattern: str
    url: str
    licence: str


_META = "https://dl.fbaipublicfiles.com"
_ON_HUB = ENDPOINT + "/{}/resolve/main/{{2}}"
SOURCES: tuple[Source, ...] = (
    Source("DeiT", r"deit_\w+_patch16_224-\w{8}\.pth", f"{_META}/deit/{{0}}", "Apache-2.0"),
    Source("DeiT III", r"deit_3_\w+\.pth", f"{_META}/deit/{{0}}", "Apache-2.0"),
    Source("MAE", r"mae_pretrain_vit_\w+\.pth", f"{_META}/mae/pretrain/{{0}}", "CC-BY-NC-4.0"),
    Source("DINOv2", r"(dinov2_vit\w14)_pretrain\.pth", f"{_META}/dinov2/{{1}}/{{0}}", "Apache-2.0"),
    Source("BEiTv2", r"beitv2_\w+\.pth", "https://github.com/addf400/files/releases/download/BEiT-v2/{0}", "MIT"),
    Source(
        "Uni-Perceiver",
        r"uni-perceiver-.+_converted\.pth",
        "https://github.com/czczup/ViT-Adapter/releases/download/v0.3.1/{0}",
        "Apache-2.0",
    ),
    Source(
        "AugReg (384)", r"\w+_16-i21k-.+-res_384\.pth", f"{ENDPOINT}/{HUB}/resolve/main/detection/{{0}}", "Apache-2.0"
    ),
    Source(
        "AugReg (224)",
        r"\w+_16-i21k-.+-res_224\.npz",
        "https://storage.googleapis.com/vit_models/augreg/{0}",
        "Apache-2.0",
    ),
    Source("InternViT-6B", r"intern_vit_6b_\w+\.pth", f"{ENDPOINT}/OpenGVLab/InternVL/resolve/main/{{0}}", "MIT"),
    Source("ConvNeXt", r"(convnext-\w+-224)/(.+)", _ON_HUB.format("facebook/{1}"), "Apache-2.0"),
    Source("CLIP", r"(clip-vit-(?:base-patch16|large-patch14-336))/(.+)", _ON_HUB.format("openai/{1}"), "MIT"),
    Source(
        "CLIP, patches of 16", r"(clip-vit-large-patch14to16-\d+)/(.+)", _ON_HUB.format("OpenGVLab/{1}"), "not stated"
    ),
    Source("CLIP ConvNeXt", r"(convnext_\w+\.clip_\w+)/(.+)", _ON_HUB.format("timm/{1}"), "MIT"),
)
"""Where the pretrained branches come from, by the name of their file."""


def find_source(weights: str) -> tuple[Source, str]:
    """Return the source of a pretrained branch file, and the file's address.

    Args:
        weights: The file's name, see `piip.zoo.specs.BranchSpec.weights`.

    Raises:
        SpecError: No source is known for such a name.
    """
    for source in SOURCES:
        if match := re.fullmatch(source.pattern, weights):
            return source, source.url.format(weights, *match.groups())
    raise SpecError(f"nobody's pretrained file is called {weights!r}; known: {', '.join(s.family for s in SOURCES)}")


def branch_weights(spec: str) -> list[str]:
    """Return the names of the pretrained files that a row of the zoo starts from, each once.

    Raises:
        SpecError: There is no such row.
    """
    return list(dict.fromkeys(branch.weights for branch in resolve_spec(spec).branches if branch.weights))

"""Models as directories of the Hugging Face hub: `config.json`, `model.safetensors` and a model card.

    from piip.integrations.hub import from_pretrained, save_pretrained

    save_pretrained(model, "my-detector", metrics={"box AP": 51.2}, origin="COCO val2017, measured with tools/test.py")
    model = from_pretrained("my-detector")          # or "user/my-detector", from the hub

`hf upload user/my-detector my-detector` publishes such a directory.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from piip.checkpoint import load_checkpoint
from piip.errors import CheckpointError, DownloadError, SpecError, unknown
from piip.integrations.files import whole
from piip.models import MODELS, PyramidModel
from piip.zoo.released import find_source
from piip.zoo.specs import PyramidSpec

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_FORMAT = 1


def save_pretrained(
    model: PyramidModel,
    folder: str | Path,
    *,
    name: str | None = None,
    metrics: Mapping[str, float] | None = None,
    origin: str | None = None,
) -> Path:
    """Write a backbone or classifier as a directory that `from_pretrained` reads.

    Args:
        model: The model.
        folder: The directory; made where it is not there, files in it are replaced.
        name: Title of the model card; the folder's name by default.
        metrics: Accuracies for the card.
        origin: Where they come from: who measured them, on what, how.

    Returns:
        The directory.

    Raises:
        ValueError: Metrics without an origin.
        CheckpointError: The weights cannot be written.
    """
    if metrics and not origin:
        raise ValueError("metrics need an origin: say who measured them, on what data and with which command")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with whole(folder / WEIGHTS, CheckpointError) as part:
        save_file(state, part, metadata={"format": "pt"})
    _write(folder / CARD, model_card(model, name or folder.name, metrics or {}, origin))
    _write(folder / CONFIG, json.dumps(describe(model), indent=1) + "\n")  # last: it makes the directory a model
    return folder


def _write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def describe(model: PyramidModel) -> dict[str, Any]:
    """Return what `from_pretrained` builds a model from, ready for JSON.

    Raises:
        ValueError: The model is of no class that can be built again.
    """
    kind = next((kind for kind, known in MODELS.items() if isinstance(model, known)), None)
    if kind is None:
        raise ValueError(f"a {type(model).__name__} is neither of {', '.join(MODELS)}")
    return {
        "library_name": "piip",
        "format": _FORMAT,
        "model": kind,
        "spec": asdict(model.spec),
        "options": model.describe(),
        "released_form": model.released_form,
    }


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> PyramidModel:
    """Build a model from a directory that `save_pretrained` wrote, or from a hub repository that holds one.

    Args:
        source: The directory, or the repository (`user/name`).
        revision: Branch, tag or commit of the repository.
        endpoint: Another hub; `$HF_ENDPOINT` by default.
        token: Access token for private repositories.
        cache_dir: Where repositories are kept.
        **options: Options of the model's class that do not change its weights (`kernel`, `grad_checkpointing`).

    Raises:
        CheckpointError: The directory holds no such model, or its files do not fit each other.
        DownloadError: The repository cannot be fetched.
    """
    path = Path(source)
    if path.is_dir():
        files = {name: path / name for name in (CONFIG, WEIGHTS)}
    elif path.exists() or os.sep * 2 in str(source) or str(source).count("/") != 1 or str(source).startswith("."):
        raise CheckpointError(f"there is no directory {source}; a hub repository is called user/name")
    else:
        settings = {"revision": revision, "endpoint": endpoint, "token": token, "cache_dir": cache_dir}
        files = {name: _from_hub(str(source), name, settings) for name in (CONFIG, WEIGHTS)}
    config = _read_config(files[CONFIG])
    try:
        with torch.device("meta"):
            model = MODELS[config["model"]](config["spec"], **{**config["options"], **options})
    except (SpecError, TypeError) as error:
        raise CheckpointError(f"{files[CONFIG]} describes no model that can be built: {error}") from None
    if config["released_form"]:
        model.use_released_form()
    load_checkpoint(model, files[WEIGHTS])
    return model


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("library_name") != "piip":
        raise CheckpointError(f"{path} is not the config of a PIIP model")
    if config.get("format") != _FORMAT:
        raise CheckpointError(f"{path} has format {config.get('format')!r}, this version reads {_FORMAT}: update piip")
    if config.get("model") not in MODELS:
        raise CheckpointError(f"{path}: {unknown('model', config.get('model'), MODELS)}")
    if missing := [key for key in ("spec", "options", "released_form") if key not in config]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}: get it again")
    return config


def _from_hub(repository: str, name: str, settings: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, library_name="piip", **settings))
    except LocalEntryNotFoundError:
        raise DownloadError(
            f"cannot reach the hub for {repository}: give a local directory where there is no network; $HF_ENDPOINT "
            "names a mirror"
        ) from None
    except EntryNotFoundError:
        raise CheckpointError(f"the hub repository {repository} has no {name}: it holds no PIIP model") from None
    except (HfHubHTTPError, OSError) as error:
        raise DownloadError(f"cannot get {name} of {repository}: {' '.join(str(error).split())[:300]}") from None


def licences(spec: PyramidSpec) -> list[tuple[str, str, str]]:
    """Return file name, family and licence of the pretrained weights that each branch started from."""
    found = []
    for branch in spec.branches:
        if branch.weights is None:
            found.append(("-", "random weights", "-"))
            continue
        try:
            source, _ = find_source(branch.weights)
            found.append((branch.weights, source.family, source.licence))
        except SpecError:
            found.append((branch.weights, "unknown to piip", "unknown: state it here"))
    return found


def model_card(model: PyramidModel, title: str, metrics: Mapping[str, float], origin: str | None) -> str:
    """Return the model card: what the model is, what its accuracy rests on, and whose licences apply."""
    from huggingface_hub import ModelCardData

    used = licences(model.spec)
    free = all(licence in ("MIT", "Apache-2.0", "-") for *_, licence in used)
    data = ModelCardData(library_name="piip", license="mit" if free else "other", tags=["piip", "image-pyramid"])
    rows = [
        f"| {i + 1} | `{branch.arch}` | {branch.resolution} | `{file}` | {family} | {licence} |"
        for i, (branch, (file, family, licence)) in enumerate(zip(model.spec.branches, used, strict=True))
    ]
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {title}",
        "",
        f"A parameter-inverted image pyramid ([arXiv 2406.04330](https://arxiv.org/abs/2406.04330)), "
        f"{parameters:.1f}M parameters.",
        "",
        "```python",
        "from piip.integrations.hub import from_pretrained",
        "",
        'model = from_pretrained("DIRECTORY_OR_REPOSITORY")',
        "```",
        "",
        "## Accuracy",
        "",
    ]
    if metrics:
        lines += ["| metric | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in metrics.items())]
        lines += ["", f"Origin: {origin}."]
    else:
        lines += ["Not stated: nobody gave a measured figure when this model was saved."]
    lines += [
        "",
        "## Branches and licences",
        "",
        "The code of PIIP is under the MIT licence. Weights that come from these files fall under their licences too:",
        "",
        "| branch | network | image | started from | family | licence |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)

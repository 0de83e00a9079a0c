"""Config files: Python files that say what the model is."""

import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from piip.errors import RunError, unknown

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class Config:
    """What a config file holds.

    Attributes:
        name: Name of the file, without its suffix.
        model: Arguments of `piip.Classifier`.
        pretrained: Folder of the branches' pretrained files, None to start from random weights.
        recipe: Other defaults of the command line.
    """

    name: str
    model: dict[str, Any]
    pretrained: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)


def load_config(name: str) -> Config:
    """Read a config by its name, with or without `.py`, or by its path.

    Raises:
        RunError: There is no such config, or it does not say what the model is.
    """
    path = Path(name if name.endswith(".py") else f"{name}.py")
    path = path if path.is_file() else CONFIGS / path.name
    if not path.is_file():
        known = sorted(file.stem for file in CONFIGS.glob("*.py"))
        raise RunError(f"--model: {unknown('config', name.removesuffix('.py'), known)}")
    try:
        values = {key: value for key, value in runpy.run_path(str(path)).items() if not key.startswith("_")}
    except Exception as error:
        raise RunError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    allowed = ("model", "pretrained", "recipe")
    if wrong := [key for key in values if key not in allowed and not hasattr(values[key], "__file__")]:
        raise RunError(f"{path}: {unknown('setting', wrong[0], allowed)}")
    if not isinstance(values.get("model"), dict) or "spec" not in values["model"]:
        raise RunError(f"{path} needs model = dict(spec=...), with the arguments of piip.Classifier")
    return Config(path.stem, **{key: values[key] for key in allowed if key in values})

"""Runs of the toy task in `toy/`: in this process (fast), or through the command line (as a user starts it)."""

import importlib.util
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import run_command

ROOT = Path(__file__).resolve().parents[2]
TOY = Path(__file__).with_name("toy")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A function that builds the toy task's runner in this process, with overrides of its config."""
    from mmengine.config import Config
    from mmengine.registry import RUNNERS

    monkeypatch.syspath_prepend(str(TOY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow on a busy disk

    def build(overrides: dict[str, Any] | None = None) -> Any:
        import piip.integrations.runtime  # noqa: F401
        from piip.integrations import mmcv_ops

        mmcv_ops.install()
        cfg = Config.fromfile(TOY / "toy.py")
        cfg.merge_from_dict({"runner_type": "PIIPRunner", "work_dir": str(tmp_path / "run"), "randomness.seed": 7})
        cfg.merge_from_dict({"experiment_name": uuid.uuid4().hex})
        for name, value in (overrides or {}).items():
            if name in cfg:
                cfg[name] = value  # replaces all of it
            else:
                cfg.merge_from_dict({name: value})
        return RUNNERS.build(cfg)

    yield build


@pytest.fixture
def tool(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs a command in `tmp_path`, where the toy task can be imported."""

    def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, (str(TOY), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **variables}
        return run_command(command, cwd=tmp_path, env=environment)

    return run


def read_losses(path: Path) -> dict[int, dict[str, Any]]:
    """What `RecordLosses` wrote, by iteration; of an iteration done twice, the last."""
    return {line["iter"]: line for line in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def losses(tmp_path: Path) -> Callable[..., dict[int, dict[str, Any]]]:
    """A function that reads the losses that a run of this test recorded."""
    return lambda name="losses.0": read_losses(tmp_path / name)


@pytest.fixture(scope="session")
def mini_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training and two held-out images in COCO's and ADE20K's layout, to read only; `$PIIP_DATA` is the folder's
    parent.
    """
    spec = importlib.util.spec_from_file_location("make_mini_data", ROOT / "tools" / "make_mini_data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.make_mini_data(tmp_path_factory.mktemp("data") / "mini", ("coco", "ade"), train=8, val=2)


@pytest.fixture
def config(tmp_path: Path, mini_data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], Path]:
    """A function that writes a config based on a mini one; the mini data is where it looks for it."""
    monkeypatch.setenv("PIIP_DATA", str(mini_data.parent))

    def write(base: Path, text: str) -> Path:
        path = tmp_path / "config.py"
        path.write_text(f"_base_ = [{str(base)!r}]\n{text}\n")
        return path

    return write

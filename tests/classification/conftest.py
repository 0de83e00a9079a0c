"""A tiny pyramid on tiny data, and `main.py` in this process."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_classifier import CONFIG, FEW, write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), {"train": 24, "val": 13})


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def cls(config: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A function that runs `main.py` with these and further options, and returns its exit status."""
    from piip_cls.run import main

    monkeypatch.chdir(tmp_path)
    # `main` sets it where there is a launcher, and other tests would then take themselves for one of several processes.
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow on a busy disk

    def run(*options: object) -> int:
        given = ["--model", config, "--data-path", images, "--batch-size", 8, "--epochs", 2, *FEW, *options]
        try:
            return main([str(word) for word in given])
        except SystemExit as exit:
            return int(exit.code)

    return run

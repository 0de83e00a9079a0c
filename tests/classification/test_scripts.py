"""`dist_train.sh` and `slurm_train.sh`, as they are typed."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "classification"


@pytest.fixture
def run(tmp_path):
    """A function that runs a script with an `srun` and a Python that print their arguments, one per line."""
    for name in ("srun", "python"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(stat.S_IRWXU)

    def start(script, *arguments, **variables):
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHON": "python", **variables}
        command = ["sh", FOLDER / script, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return start


def test_slurm_train_has_the_published_recipe_and_takes_more_options(run):
    from piip_cls.options import parse

    done = run("slurm_train.sh", "part", "job", "tiny", "--data-path", "my data", "--epochs", "3", GPUS="16")
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    start = words.index(str(FOLDER / "main.py"))
    assert "--ntasks=16" in words[:start]
    args = parse(words[start + 1 :])
    assert (args.model, args.data_path, args.launcher, args.output_dir) == ("tiny", "my data", "slurm", "exp/tiny")
    assert (args.batch_size, args.lr, args.epochs, args.from_scratch_lr_ratio) == (128, 3e-5, 3, 10)
    assert (args.unscale_lr, args.repeated_aug, args.reprob, args.weight_decay) == (True, False, 0.0, 0.1)


def test_dist_train(run):
    done = run("dist_train.sh", "tiny", 2, "--data-path", "d")
    words = done.stdout.splitlines()
    assert "--nproc_per_node=2" in words
    assert words[words.index(str(FOLDER / "main.py")) :][1:] == [
        "--model", "tiny", "--data-path", "d", "--launcher", "pytorch",
    ]  # fmt: skip


@pytest.mark.parametrize(("script", "arguments"), [("dist_train.sh", ["tiny"]), ("slurm_train.sh", ["part", "job"])])
def test_scripts_say_what_they_need(run, script, arguments):
    done = run(script, *arguments)
    assert done.returncode == 2
    assert f"usage: {script}" in done.stderr


def test_main_finds_its_packages_from_anywhere(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, FOLDER / "main.py", "--model", "nothing", "--data-path", "d"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model: unknown config 'nothing'; known: ")

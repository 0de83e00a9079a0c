"""Whole runs of `main.py` on tiny data: files, exact resume, evaluation, bad input."""

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from commands import run_command
from tiny_classifier import FEW, PLAIN, write_images

from piip import Classifier, create_model
from piip.checkpoint import read_file, to_released
from piip_cls import run
from piip_cls.config import load_config
from piip_cls.data import Batches, build_loader, build_samples
from piip_cls.engine import Result, evaluate
from piip_cls.options import parse
from piip_cls.processes import SET_BY_SLURM, SET_BY_TORCHRUN, Processes

ROOT = Path(__file__).resolve().parents[2]
NO_PAIRS = torch.empty(0, 3, dtype=torch.int64)


def same(one: object, other: object) -> bool:
    """Whether two states are equal bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_run_leaves_everything_behind(cls, config, tmp_path, capsys):
    assert cls("--output_dir", "exp") == 0
    out = tmp_path / "exp"
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[0].keys() >= {"train_loss", "train_lr", "test_acc1", "test_acc5", "test_loss", "ema_acc1"}
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["model"]["images"] == sum(map(sum, evaluation["model"]["confusion"])) == 13
    assert evaluation["model"]["acc1"] == lines[1]["test_acc1"]
    assert not list(out.glob("*.part"))
    # The safetensors files are complete models, and the checkpoint's weights.
    state = read_file(out / "checkpoint.pth")
    spec = load_config(str(config)).model["spec"]
    model = create_model(spec, num_classes=3, checkpoint=out / "model.safetensors")
    assert same(dict(model.state_dict()), dict(state["model"]))
    average = create_model(spec, num_classes=3, checkpoint=out / "model_ema.safetensors")
    assert same(dict(average.state_dict()), dict(state["model_ema"]))
    # Evaluating the file gives the run's own figures, the moving average's included.
    capsys.readouterr()
    assert cls("--eval", "--resume", out / "checkpoint.pth", "--output-dir", "eval", "--eval-batch-size", 5) == 0
    shown = capsys.readouterr().out
    again = json.loads((tmp_path / "eval/evaluation.json").read_text())
    for name in ("model", "model_ema"):
        assert again[name]["confusion"] == evaluation[name]["confusion"]
        assert again[name]["loss"] == pytest.approx(evaluation[name]["loss"], rel=1e-5)
    assert f"* Acc@1 {again['model']['acc1']:.3f} Acc@5 100.000 loss {again['model']['loss']:.3f}" in shown
    assert cls("--output-dir", "exp", "--resume", out / "checkpoint.pth") == 0
    assert "the run is finished" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_uninterrupted_one(workers, cls, tmp_path, monkeypatch):
    """With augmentation, repeated augmentation, mixup, random erasing and drop path."""
    options = ("--num-workers", workers, "--reprob", 0.5, "--epochs", 3, "--model-ema-decay", 0.9)
    assert cls("--output-dir", "whole", *options) == 0

    def kill(self: run.Logs, epoch: int, figures: dict) -> None:
        raise KeyboardInterrupt  # after the checkpoint, before the log

    with monkeypatch.context() as patch:
        patch.setattr(run.Logs, "epoch", kill)
        with pytest.raises(KeyboardInterrupt):
            cls("--output-dir", "cut", *options)
    torch.rand(7)  # whatever the random state is now
    assert cls("--output-dir", "cut", *options, "--resume", tmp_path / "cut/checkpoint.pth") == 0
    whole, cut = (read_file(tmp_path / name / "checkpoint.pth") for name in ("whole", "cut"))
    for key in ("model", "model_ema", "optimizer", "epoch", "best"):
        assert same(whole[key], cut[key]), key
    logs = [(tmp_path / name / "log.txt").read_text().splitlines() for name in ("whole", "cut")]
    whole_log, cut_log = ([{**json.loads(line), "seconds": 0} for line in log] for log in logs)
    assert whole_log == cut_log
    assert len(whole_log) == 3


def test_accumulated_batches_equal_a_larger_one(cls, tmp_path):
    plain = (*PLAIN, "--epochs", 1, "--opt", "sgd", "--lr", 0.1)
    assert cls("--output-dir", "large", *plain, "--batch-size", 8) == 0
    assert cls("--output-dir", "small", *plain, "--batch-size", 4, "--accum-iter", 2) == 0
    large, small = (read_file(tmp_path / name / "checkpoint.pth")["model"] for name in ("large", "small"))
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
def test_a_resumed_run_waits_as_long_for_a_plateau(cls, tmp_path, capsys, monkeypatch):
    """Killed while epochs without an improvement are counted, and while noise hides the real learning rate."""
    options = (*PLAIN, "--epochs", 6, "--sched", "plateau", "--patience-epochs", 1, "--min-lr", 0, "--lr-noise", 0.5)
    # The accuracy never improves after the first epoch.
    monkeypatch.setattr(run, "evaluate", lambda model, loader, classes, *_: Result(50, 50, 1, 13, classes, NO_PAIRS))
    assert cls("--output-dir", "whole", *options) == 0
    rates = [json.loads(line)["train_lr"] for line in (tmp_path / "whole/log.txt").read_text().splitlines()]
    assert rates[0] > rates[-1] > 0
    for last in (1, 3, 4):

        def kill(self: run.Logs, epoch: int, figures: dict, last: int = last) -> None:
            if epoch == last:
                raise KeyboardInterrupt

        folder = f"cut{last}"
        with monkeypatch.context() as patch:
            patch.setattr(run.Logs, "epoch", kill)
            with pytest.raises(KeyboardInterrupt):
                cls("--output-dir", folder, *options)
        assert cls("--output-dir", folder, *options, "--resume", tmp_path / folder / "checkpoint.pth") == 0
        whole, cut = (read_file(tmp_path / name / "checkpoint.pth") for name in ("whole", folder))
        for key in ("model", "optimizer", "schedule"):
            assert same(whole[key], cut[key]), (last, key)
    # The state of an older version is not enough.
    old = {key: value for key, value in whole.items() if key != "schedule"}
    torch.save(old, tmp_path / "old.pth")
    message = error(cls, capsys, "--output-dir", "old", *options, "--resume", tmp_path / "old.pth")
    assert re.search(r"old\.pth holds no state of --sched plateau.* --load-from$", message)


def test_a_checkpoint_of_an_older_version_goes_on(cls, tmp_path):
    assert cls("--output-dir", "exp") == 0
    state = read_file(tmp_path / "exp/checkpoint.pth")
    assert state.pop("schedule") == {}
    torch.save(state, tmp_path / "old.pth")
    assert cls("--output-dir", "exp", "--resume", tmp_path / "old.pth") == 0


def test_a_cpu_run_goes_on_where_the_loss_is_scaled(cls, tmp_path, monkeypatch):
    def kill(self: run.Logs, epoch: int, figures: dict) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.Logs, "epoch", kill)
        with pytest.raises(KeyboardInterrupt):
            cls()
    checkpoint = tmp_path / "exp/checkpoint.pth"
    assert read_file(checkpoint)["scaler"] == {}
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda kind, enabled: scaler(kind, init_scale=8.0, enabled=True))
    assert cls("--resume", checkpoint) == 0
    assert read_file(checkpoint)["scaler"]["scale"] == 8.0


def test_a_moving_average_on_the_cpu_is_evaluated_there(cls, monkeypatch):
    """Its figures are summed where the processes compute: NCCL takes nothing from a CPU."""
    measured, places = [], set()

    def measure(model: torch.nn.Module, loader: object, classes: int, processes: Processes, autocast: object) -> Result:
        measured.append(evaluate(model, loader, classes, processes, autocast))
        return measured[-1]

    def add(self: Processes, values: torch.Tensor) -> torch.Tensor:
        places.add(str(self.device))
        return values

    monkeypatch.setattr(run, "evaluate", measure)
    monkeypatch.setattr(run, "join", lambda args: Processes(device=torch.device("cpu", 0)))
    monkeypatch.setattr(Processes, "sum", add)
    assert cls("--epochs", 1, "--model-ema-force-cpu") == 0
    assert [result.images for result in measured] == [13, 13]
    assert places == {"cpu:0"}  # a model's device reads "cpu"


def test_a_model_is_evaluated_on_its_own_device(images, config):
    model = Classifier(**load_config(str(config)).model, num_classes=3)
    samples = build_samples(parse(["--model", "x", "--data-path", str(images)]), 48, "val")
    places = Together(0, 1, torch.device("meta"))
    loader = build_loader(samples, Batches(len(samples), 8, places), 0, False)
    assert evaluate(model, loader, 3, places).images == 13


@pytest.mark.parametrize(
    "option", [("--cosub", "--smoothing", 0), ("--bce-loss", "--smoothing", 0), ("--legacy-recipe",)]
)
def test_other_recipes_train(option, cls):
    assert cls(*option, "--epochs", 1, "--clip-grad", 1.0, "--no-model-ema") == 0


def test_options_are_weighed_with_the_configs_recipe(cls, config, capsys):
    assert "give --smoothing 0 (" in error(cls, capsys, "--bce-loss", "--epochs", 1)
    config.write_text(config.read_text() + "recipe = dict(smoothing=0.0, model_ema=False)\n")
    assert cls("--bce-loss", "--epochs", 1) == 0


def plain_loop(model: Classifier, data: Path) -> tuple[float, float, float]:
    """Top-1, top-5 and loss, one image at a time."""
    samples = build_samples(parse(["--model", "x", "--data-path", str(data)]), 48, "val")
    hits, near, losses = 0, 0, 0.0
    model.eval()
    with torch.no_grad():
        for i in range(len(samples)):
            image, label = samples[(0, i, i)]
            (logits,) = model(image[None])
            hits += int(logits.argmax()) == label
            near += label in logits.topk(5).indices
            losses += float(F.cross_entropy(logits, torch.tensor(label)))
    return 100 * hits / len(samples), 100 * near / len(samples), losses / len(samples)


class Together(Processes):
    """One process that keeps what it would send to the others."""

    sums: ClassVar[list[torch.Tensor]] = []
    rows: ClassVar[list[torch.Tensor]] = []

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.sums.append(values)
        return values

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        self.rows.append(rows)
        return torch.cat(self.rows)


def test_evaluation_is_exact_on_any_number_of_processes(tmp_path, config):
    """101 images in batches of 16, shared by two processes, against a plain loop."""
    data = write_images(tmp_path / "data", {"val": 101}, classes=3, size=48)
    for extra in range(4):
        (data / "val" / f"none{extra}").mkdir()
        shutil.copy(data / "val/class0/0.png", data / "val" / f"none{extra}/0.png")
    spec = load_config(str(config)).model["spec"]
    model = Classifier(spec, num_classes=7)
    samples = build_samples(parse(["--model", "x", "--data-path", str(data)]), 48, "val")
    Together.sums, Together.rows = [], []
    for rank in range(2):
        places = Together(rank, 2)
        result = evaluate(model, build_loader(samples, Batches(len(samples), 16, places), 0, False), 7, places)
    top1, top5, loss, count = torch.stack(Together.sums).sum(0).tolist()
    assert [len(rows) for rows in Together.rows] == [53, 52]
    alone = evaluate(model, build_loader(samples, Batches(len(samples), 16, Processes()), 0, False), 7, Processes())
    assert same(result.pairs, alone.pairs)
    assert same(result.confusion.sum(1), torch.bincount(torch.tensor([label for _, label in samples.items])))
    assert int(result.confusion.trace()) == round(top1)
    expected = plain_loop(model, data)
    assert count == 105
    assert (100 * top1 / count, 100 * top5 / count) == pytest.approx(expected[:2], rel=1e-12)
    assert loss / count == pytest.approx(expected[2], rel=1e-6)


def test_the_confusion_of_thousands_of_classes_is_a_list(tmp_path):
    """Memory and files grow with the images, not with the square of the classes."""
    classes, labels = 1_000_000, torch.tensor([3, 999_999, 3, 5])

    class Scores(torch.nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return F.one_hot(images, classes).float()

    batches = [(torch.tensor([3, 7]), labels[:2]), (torch.tensor([3, 5]), labels[2:])]
    result = evaluate(Scores(1, 1), batches, classes, Processes())
    assert result.pairs.tolist() == [[3, 3, 2], [5, 5, 1], [999_999, 7, 1]]
    run.write_results(tmp_path / "many.json", {"model": result})
    written = json.loads((tmp_path / "many.json").read_text())["model"]
    assert written["confusion_pairs"] == result.pairs.tolist()
    assert "confusion" not in written
    few = Result(50, 100, 1, 2, 1000, torch.tensor([[0, 0, 1], [999, 0, 1]]))
    run.write_results(tmp_path / "few.json", {"model": few})
    matrix = torch.tensor(json.loads((tmp_path / "few.json").read_text())["model"]["confusion"])
    assert matrix.shape == (1000, 1000)
    assert matrix.nonzero().tolist() == [[0, 0], [999, 0]]


def test_processes_gather_different_numbers_of_rows(monkeypatch):
    def gather(parts: list, mine: torch.Tensor) -> None:
        parts[:] = [torch.tensor([4, 5, 6]), mine]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert Processes(1, 2).gather(torch.tensor([7])).tolist() == [4, 5, 6, 7]
    assert Processes().gather(torch.tensor([7])).tolist() == [7]


def test_a_released_file_is_evaluated(cls, config, tmp_path, capsys):
    model = Classifier(**load_config(str(config)).model, num_classes=3)
    model.use_released_form()
    torch.save(
        {"model": to_released(model), "args": argparse.Namespace(lr=1.0), "epoch": 19}, tmp_path / "released.pth"
    )
    assert cls("--eval", "--resume", tmp_path / "released.pth") == 0
    assert "* Acc@1" in capsys.readouterr().out
    assert cls("--resume", tmp_path / "released.pth") == 2
    assert "no state of a run to continue: start a new one from its weights with --load-from" in capsys.readouterr().err
    assert cls("--load-from", tmp_path / "released.pth", "--epochs", 1) == 0


def error(cls, capsys, *options: object) -> str:
    assert cls(*options) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    return message


def test_bad_input(cls, config, images, tmp_path, capsys, monkeypatch):
    assert "there is no checkpoint at nothing.pth" in error(cls, capsys, "--resume", "nothing.pth")
    assert "there is no checkpoint at nothing.pth" in error(cls, capsys, "--eval", "--resume", "nothing.pth")
    assert "--eval needs weights" in error(cls, capsys, "--eval")
    assert "unknown config 'tinny'" in error(cls, capsys, "--model", "tinny")
    assert "--drop-path is an old option" in error(cls, capsys, "--drop_path", "0.1")
    assert "must be 1 or more" in error(cls, capsys, "--epochs", 0)
    other = write_images(tmp_path / "four", {"train": 24, "val": 12}, classes=3)
    (other / "val/class2").rename(other / "val/class7")
    assert "train and val differ: class2 of train" in error(cls, capsys, "--data-path", other)
    broken = write_images(tmp_path / "broken", {"train": 24, "val": 12})
    (broken / "train/class1/4.png").write_bytes(b"no image")
    message = error(cls, capsys, "--data-path", broken, "--no-repeated-aug")
    assert re.fullmatch(r"error: \S+/broken/train/class1/4\.png cannot be read as an image", message)
    again = ("--no-repeated-aug", "--num-workers", 1, "--output-dir", "other")
    message = error(cls, capsys, "--data-path", broken, *again)
    assert re.fullmatch(r"error: \S+/broken/train/class1/4\.png cannot be read as an image", message)
    for rank in range(2):
        monkeypatch.setattr(run, "join", lambda args, r=rank: Processes(r, 30))
        monkeypatch.setattr(Processes, "wait", lambda self: None)
        message = error(cls, capsys) if rank == 0 else ""
        assert rank or "13 images for 30 processes: start 13 at most" in message


def test_weights_with_other_classes(cls, config, tmp_path, capsys):
    torch.save(Classifier(**load_config(str(config)).model, num_classes=5).state_dict(), tmp_path / "five.pth")
    message = error(cls, capsys, "--load-from", tmp_path / "five.pth")
    assert "head has 5 classes, the model's 3" in message
    assert "--drop-head" in message
    assert cls("--load-from", tmp_path / "five.pth", "--drop-head", "--epochs", 1) == 0


def test_a_run_is_neither_overwritten_nor_continued_with_other_options(cls, tmp_path, capsys):
    assert cls("--epochs", 1) == 0
    assert "exp holds a run: continue it with --resume exp/checkpoint.pth" in error(cls, capsys, "--epochs", 1)
    message = error(cls, capsys, "--epochs", 1, "--resume", "exp/checkpoint.pth", "--lr", 0.5, "--num-workers", 1)
    assert "of another run: --lr 0.001 is now 0.5. Give" in message


def test_a_loss_that_is_not_finite_stops_the_run(cls, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("piip_cls.run.build_loss", lambda args: lambda logits, targets: logits.sum() * float("nan"))
    assert "the loss is nan in step 1: nothing was saved" in error(cls, capsys)
    assert not (tmp_path / "exp/checkpoint.pth").exists()


def test_a_process_reports_itself_what_it_alone_meets(cls, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with monkeypatch.context() as patch:
        patch.setattr("piip_cls.run.build_loss", lambda args: lambda logits, targets: logits.sum() * float("nan"))
        assert "process 1: the loss is nan in step 1" in error(cls, capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "process 1 of this machine has no GPU: torch sees 1" in error(cls, capsys, "--device", "cuda")


def test_a_launcher_that_did_not_start_the_process(cls, capsys, monkeypatch):
    for name in (*SET_BY_TORCHRUN, *SET_BY_SLURM, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    message = error(cls, capsys, "--launcher", "pytorch")
    assert "--launcher pytorch, and the environment has no RANK and no WORLD_SIZE: start with torchrun" in message
    message = error(cls, capsys, "--launcher", "slurm")
    assert "--launcher slurm, and the environment has no SLURM_PROCID" in message
    assert "start with srun or sh slurm_train.sh, or leave --launcher out" in message


def test_wandb_has_to_be_installed(cls, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "--wandb needs Weights & Biases: pip install wandb" in error(cls, capsys, "--wandb", "piip")


def torchrun(processes: int, cwd: Path, *options: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [ROOT / "classification/main.py", *FEW, *options]
    done = run_command(command, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_equal_one(config, images, tmp_path):
    """Augmentation, mixup and drop path off; the same batches in the same order."""
    data = write_images(tmp_path / "data", {"train": 40, "val": 101})
    given = ("--model", config, "--data-path", data, *PLAIN, "--epochs", 4, "--opt", "sgd", "--lr", 0.05)
    torchrun(1, tmp_path, *given, "--batch-size", 8, "--output-dir", "one")
    torchrun(2, tmp_path, *given, "--batch-size", 4, "--output-dir", "two", "--eval-batch-size", 16)
    one, two = (read_file(tmp_path / name / "checkpoint.pth")["model"] for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
    # Two processes, batches of 16, 101 images: as a plain loop.
    model = create_model(
        load_config(str(config)).model["spec"], num_classes=3, checkpoint=tmp_path / "two/checkpoint.pth"
    )
    samples = build_samples(parse(["--model", "x", "--data-path", str(data)]), 48, "val")
    measured = json.loads((tmp_path / "two/evaluation.json").read_text())["model"]
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(samples[(0, i, i)][0][None]) for i in range(101)])
    labels = torch.tensor([label for _, label in samples.items])
    assert measured["images"] == sum(map(sum, measured["confusion"])) == 101
    assert measured["acc1"] == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()))
    assert measured["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)

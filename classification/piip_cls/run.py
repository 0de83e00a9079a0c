"""A run from its command line to its files."""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from piip import Classifier
from piip.checkpoint import read_file
from piip.errors import RunError
from piip.integrations import command
from piip.integrations.files import write_text
from piip_cls import checkpoints, data
from piip_cls.config import load_config
from piip_cls.engine import Result, Trainer, bare, evaluate
from piip_cls.logs import Logs
from piip_cls.options import parse
from piip_cls.processes import Processes, join
from piip_cls.recipe import Schedule, build_loss, build_mixup, build_model, build_optimizer

LARGEST_MATRIX = 1000  # classes whose confusion matrix is written in full: about 3 MB


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def read_and_run(args: argparse.Namespace) -> None:
        config = load_config(args.model)
        run(parse(argv, config.recipe), config)  # read again: the config's recipe changes defaults

    return command.main(read_and_run, parse(argv, check=False))


def run(args: argparse.Namespace, config: Any) -> None:
    """Train or evaluate as the options say.

    Raises:
        RunError: The data, the folder or an option does not allow it.
        CheckpointError: A checkpoint or pretrained file is missing or does not fit.
    """
    processes = join(args)
    folder = Path(args.output_dir)
    checkpoint = folder / "checkpoint.pth"
    if not args.eval and not args.resume and checkpoint.is_file():
        raise RunError(f"{folder} holds a run: continue it with --resume {checkpoint}, or give another --output-dir")
    seed_epoch(args.seed, 0, 0)  # the same initial weights in every process
    with torch.device("meta"):
        side = Classifier(**config.model).pyramid.input_resolution
    val = data.build_samples(args, side, "val")
    train = None if args.eval else data.build_samples(args, side, "train")
    if train is not None:
        data.check_classes(train, val)
    model = build_model(config, args, len(val.classes)).to(processes.device)
    if processes.first:
        folder.mkdir(parents=True, exist_ok=True)
    processes.wait()
    logs = Logs(folder, args, processes.first)
    size = args.eval_batch_size if args.eval_batch_size > 0 else max(args.batch_size * 3 // 2, 1)
    loader = data.build_loader(val, data.Batches(len(val), size, processes), args.num_workers, pinned(args, processes))
    try:
        if train is None:
            evaluate_file(args, config.name, model, loader, processes, logs)
        else:
            Run(args, model, train, loader, processes, logs).train()
    finally:
        logs.close()
    if processes.count > 1:  # not after an error: the others may still wait for this process
        torch.distributed.destroy_process_group()


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Let every random number of an epoch follow from the seed, the epoch and the process."""
    words = np.random.SeedSequence([seed, epoch, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


def evaluate_file(
    args: argparse.Namespace, name: str, model: Classifier, loader: DataLoader, processes: Processes, logs: Logs
) -> None:
    """Evaluate the weights of a file, and the moving average in it where there is one; writes `evaluation.json`."""
    path = args.resume or args.load_from
    autocast = precision(args, processes)
    results = {"model": evaluate(model, loader, model.num_classes, processes, autocast)}
    logs.say(str(results["model"]))
    state = read_file(path) if args.model_ema else None
    average = state.get("model_ema") if isinstance(state, dict) else None
    if average:
        model.load_state_dict(average)
        results["model_ema"] = evaluate(model, loader, model.num_classes, processes, autocast)
        logs.say(f"moving average: {results['model_ema']}")
    if processes.first:
        write_results(Path(args.output_dir) / "evaluation.json", results, config=name, checkpoint=path)
        logs.say(f"written to {Path(args.output_dir) / 'evaluation.json'}")


def write_results(path: Path, results: dict[str, Result], **about: Any) -> None:
    """Write evaluations as JSON, each with its confusion matrix (rows are classes, columns predictions).

    Beyond `LARGEST_MATRIX` classes it is a list of `[class, prediction, images]`, of the pairs that occur.
    """
    figures: dict[str, Any] = {}
    for name, result in results.items():
        full = result.classes <= LARGEST_MATRIX
        confusion = {"confusion": result.confusion.tolist()} if full else {"confusion_pairs": result.pairs.tolist()}
        figures[name] = {**result.figures(), **confusion}
    write_text(path, json.dumps({**about, **figures}) + "\n")


def pinned(args: argparse.Namespace, processes: Processes) -> bool:
    """Return whether batches are put into pinned memory, which only the way to a GPU needs."""
    return args.pin_mem and processes.device.type == "cuda"


def precision(args: argparse.Namespace, processes: Processes) -> torch.autocast:
    """Return the precision that models run in: mixed on GPUs, unless it is switched off."""
    kind = processes.device.type
    dtype = torch.bfloat16 if kind == "cpu" else getattr(torch, args.amp_dtype)
    return torch.autocast(kind, dtype, enabled=kind == "cuda" and not args.disable_autocast)


class Run:
    """A training run.

    Args:
        args: Options.
        model: The model, on its device.
        train: Training data.
        val_loader: This process's share of the validation data.
        processes: This process among the others.
        logs: Where figures go.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: Classifier,
        train: data.Samples,
        val_loader: DataLoader,
        processes: Processes,
        logs: Logs,
    ) -> None:
        self.args, self.processes, self.logs, self.val_loader = args, processes, logs, val_loader
        self.folder, self.classes = Path(args.output_dir), train.classes
        self.batches = data.Batches(len(train), args.batch_size, processes, args.seed, args.repeated_aug)
        self.loader = data.build_loader(train, self.batches, args.num_workers, pinned(args, processes))
        optimizer = build_optimizer(model, args, processes.count)
        ema = None
        if args.model_ema:
            ema = ModelEmaV3(model, args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None)
        wrapped: nn.Module = model
        if processes.count > 1:
            gpu = [processes.device.index] if processes.device.type == "cuda" else None
            wrapped = DistributedDataParallel(model, device_ids=gpu)
        half = processes.device.type == "cuda" and not args.disable_autocast and args.amp_dtype == "float16"
        self.trainer = Trainer(
            model=wrapped,
            optimizer=optimizer,
            schedule=Schedule(optimizer, args),
            scaler=torch.amp.GradScaler(processes.device.type, enabled=half),
            loss=build_loss(args),
            mixup=build_mixup(args, len(train.classes)),
            ema=ema,
            autocast=precision(args, processes),
            args=args,
            classes=len(train.classes),
            processes=processes,
        )
        self.first, self.best = 0, 0.0
        if args.resume:
            last, self.best, figures = checkpoints.resume(args.resume, self.trainer)
            self.first = last + 1
            logs.catch_up(last, figures)

    def train(self) -> None:
        """Train to the last epoch; every epoch ends with a checkpoint."""
        if self.first >= self.args.epochs:
            self.logs.say(f"the run is finished: {self.args.epochs} epochs are done")
        for epoch in range(self.first, self.args.epochs):
            start = time.monotonic()
            seed_epoch(self.args.seed, epoch + 1, self.processes.rank)
            self.trainer.schedule.start(epoch, self.best)
            self.batches.epoch = epoch
            loss = self.trainer.train_epoch(
                self.loader, len(self.batches), lambda line, e=epoch: self.logs.say(f"epoch {e} {line}")
            )
            figures = {"train_loss": loss, "train_lr": max(g["lr"] for g in self.trainer.optimizer.param_groups)}
            results = self._evaluate(epoch)
            for name, result in results.items():
                figures |= {f"{'test' if name == 'model' else 'ema'}_{key}": v for key, v in result.figures().items()}
            figures["seconds"] = time.monotonic() - start
            self._save(epoch, results, figures)
            self.logs.epoch(epoch, figures)
        if self.processes.first:
            self._export()

    def _evaluate(self, epoch: int) -> dict[str, Result]:
        if (epoch + 1) % self.args.eval_interval and epoch + 1 < self.args.epochs:
            return {}
        models = {"model": bare(self.trainer.model)}
        if self.trainer.ema is not None:
            models["model_ema"] = self.trainer.ema.module
        results = {}
        for name, model in models.items():
            results[name] = evaluate(model, self.val_loader, len(self.classes), self.processes, self.trainer.autocast)
            self.logs.say(f"epoch {epoch} {'' if name == 'model' else 'moving average: '}{results[name]}")
        return results

    def _save(self, epoch: int, results: dict[str, Result], figures: dict[str, float]) -> None:
        better = bool(results) and results["model"].top1 > self.best
        if better:
            self.best = results["model"].top1
        if not self.processes.first:
            return
        if results:
            write_results(self.folder / "evaluation.json", results, epoch=epoch, classes=self.classes)
        if better:
            checkpoints.save(self.folder / "best_checkpoint.pth", self.trainer, epoch, self.best, figures)
        checkpoints.save(self.folder / "checkpoint.pth", self.trainer, epoch, self.best, figures)

    def _export(self) -> None:
        checkpoints.export(self.folder / "model.safetensors", bare(self.trainer.model), self.args, self.classes)
        if self.trainer.ema is not None:
            average = self.trainer.ema.module
            checkpoints.export(self.folder / "model_ema.safetensors", average, self.args, self.classes)

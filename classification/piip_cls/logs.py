"""Where the figures of a run go: the terminal, `log.txt`, TensorBoard, Weights & Biases."""

import argparse
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from piip.errors import RunError


class Logs:
    """Logs of the first process; the others write nothing.

    Args:
        folder: The run's folder.
        args: Options.
        active: Whether this process writes.

    Raises:
        RunError: Weights & Biases is asked for and not installed.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, active: bool) -> None:
        self.folder, self.active, self.wandb, self.board = folder, active, None, None
        if args.wandb and importlib.util.find_spec("wandb") is None:
            raise RunError("--wandb needs Weights & Biases: pip install wandb")
        if not active or args.eval:
            return
        if args.tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"))
        if args.wandb:
            import wandb

            self.wandb = wandb.init(project=args.wandb, dir=str(folder), config=vars(args), resume="allow")

    def say(self, line: str) -> None:
        """Print a line."""
        if self.active:
            print(line, flush=True)

    def epoch(self, epoch: int, figures: Mapping[str, Any]) -> None:
        """Record the figures of an epoch."""
        if not self.active:
            return
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": epoch, **figures}) + "\n")
        for name, value in figures.items():
            if self.board is not None:
                self.board.add_scalar(name, value, epoch)
        if self.board is not None:
            self.board.flush()
        if self.wandb is not None:
            self.wandb.log({"epoch": epoch, **figures})

    def catch_up(self, epoch: int, figures: Mapping[str, Any]) -> None:
        """Record the figures of an epoch whose checkpoint is there, where the run was killed before its log was."""
        path = self.folder / "log.txt"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if self.active and (not lines or json.loads(lines[-1])["epoch"] < epoch):
            self.epoch(epoch, figures)

    def close(self) -> None:
        """Write out what waits."""
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()

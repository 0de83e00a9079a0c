"""Command lines: errors of the user's are one line, and options of old are refused with the new spelling."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from piip.errors import CheckpointError, RunError, SpecError


class Parser(argparse.ArgumentParser):
    """Reports an error as one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


class Refused(argparse.Action):
    """An old option: the error gives the new spelling."""

    def __init__(self, option_strings: Sequence[str], dest: str, instead: str) -> None:
        super().__init__(option_strings, dest, nargs="*", help=argparse.SUPPRESS)
        self.instead = instead

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Report the option."""
        parser.error(f"{self.option_strings[0]} is an old option; {self.instead}")


def main(run: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> int:
    """Call `run` and return the exit status: its own if it returns one; an error of the user's is one line on stderr.

    The line comes from the first process, or from each that met it where they may meet different ones.
    """
    # Whoever finds LOCAL_RANK takes the process for one of several: it is set where a launcher passed it as an option.
    if getattr(args, "launcher", "none") != "none":
        os.environ.setdefault("LOCAL_RANK", getattr(args, "local_rank", "0"))
    try:
        result = run(args)
    except (CheckpointError, RunError, SpecError) as error:
        rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
        if rank == 0 or not getattr(error, "common", True):  # CheckpointError and SpecError are common to all
            sys.stderr.write(f"error: {f'process {rank}: ' if rank else ''}{error}\n")
        return 2
    return result if isinstance(result, int) else 0

"""What the command-line programs share."""

import argparse
import logging
import sys
from collections.abc import Callable
from typing import NoReturn

from piip.errors import CheckpointError, SpecError
from piip_llava.errors import InputError


class Parser(argparse.ArgumentParser):
    """Reports an error as one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model answers, and where."""
    parser.add_argument("--model_path", required=True, help="directory or hub repository; ours or a released one")
    parser.add_argument("--vision_weights", help="CLIP's own file, for a LLaVA-1.5 directory that holds none of it")
    parser.add_argument("--device", help="a GPU if there is one by default")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="float16 on a GPU by default")


def run(program: str, function: Callable[[], None]) -> int:
    """Call a function; an error that a user can put right becomes one line and status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        function()
    except (InputError, CheckpointError, SpecError, OSError) as error:
        sys.stderr.write(f"{program}: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0

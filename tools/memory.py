#!/usr/bin/env python3
"""Compute how much memory training a backbone takes, and how many images fit on a GPU. No memory or GPU is needed.

    python tools/memory.py deit3-tsb-1568-1120-672 deit3-l-1024
    python tools/memory.py deit3-sbl-1568-1120-672 --dtype fp32 --size 800 1216

A training step runs on tensors without data, and the bytes of live tensors are counted, operator by operator, with and
without activation checkpointing. The peak of a step does not grow evenly with the batch (with few images it lies in the
backward pass, where gradients are; with many at its start, where all activations are), so the images that fit are found
by running: the printed batch fits, and one image more does not. To the weights AdamW adds 12 bytes per parameter (two
moments and, beside bf16 weights, a float32 copy) or 8 (float32 weights); all that is "fixed". "Per image" is what one
image more takes between the two largest batches computed. Detection heads, what operators need inside, and
fragmentation are not in it: `--reserve` of the memory is left to them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmark import prepare, write
from torch._subclasses.fake_tensor import FakeTensorMode

from piip.budget import MODELS
from piip.errors import SpecError
from piip.integrations import command
from piip.measure import PeakMemory
from piip.zoo.released import TABLES, row_of
from piip.zoo.specs import resolve_spec

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OPTIMIZER_BYTES = {"bf16": 12, "fp32": 8}  # AdamW, per parameter


class TrainingSteps:
    """Training steps of one model, on tensors without data.

    Args:
        name: The model, see `piip.zoo.released.row_of`.
        dtype: Type of weights and activations, a key of `DTYPES`.
        size: Height and width of the images in pixels; None for the spec's side, square.

    Attributes:
        params: Number of parameters.
        weights: Bytes of parameters and buffers.

    Raises:
        SpecError: There is no such model.
    """

    def __init__(self, name: str, dtype: str, size: Sequence[int] | None = None) -> None:
        row = row_of(name)
        spec = resolve_spec(row.spec)
        side = spec.input_resolution or max(branch.resolution for branch in spec.branches)
        self.size, self.dtype, self._mode = tuple(size or (side, side)), DTYPES[dtype], FakeTensorMode()
        # Fake parameters cannot change their type, so they are built in it.
        with self._mode, _default_dtype(self.dtype):
            self.model = MODELS[TABLES[row.table].model](row.spec, **row.options)
        self.params = sum(p.numel() for p in self.model.parameters())
        self.weights = PeakMemory([*self.model.parameters(), *self.model.buffers()]).live

    def peak(self, batch: int, checkpointing: bool) -> int:
        """Return the peak of one step in bytes, without the optimizer's tensors.

        Raises:
            ValueError: The size leaves a branch without a token.
        """
        self.model.pyramid.set_grad_checkpointing(checkpointing)
        self.model.zero_grad(set_to_none=True)
        with self._mode, _default_dtype(self.dtype):
            images = torch.empty(batch, 3, *self.size)
            with PeakMemory([images, *self.model.parameters(), *self.model.buffers()]) as memory:
                out = self.model(images)
                sum(level.sum() for level in (out if isinstance(out, list) else [out])).backward()
        return memory.peak


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def largest_batch(peak: Callable[[int], int], limit: float, known: dict[int, int]) -> int:
    """Return the largest batch whose peak is within a limit, 0 if there is none; the next one's was computed too.

    Args:
        peak: Bytes of a batch; more images take more.
        limit: Bytes.
        known: Peaks by batch, those of one and two images among them; what is computed here is added.
    """
    while True:
        fits = max((batch for batch, held in known.items() if held <= limit), default=0)
        over = min((batch for batch, held in known.items() if held > limit), default=None)
        if over == fits + 1:
            return fits
        # On the line through the nearest known batches; several steps where the peak lies on several lines.
        low, high = (fits, over) if over else sorted(known)[-2:]
        guess = low + int((limit - known[low]) * (high - low) / (known[high] - known[low]))
        guess = max(guess, fits + 1) if over is None else min(max(guess, fits + 1), over - 1)
        known[guess] = peak(guess)


def requirements(name: str, dtype: str, size: Sequence[int] | None, gigabytes: Sequence[float], reserve: float) -> dict:
    """Return what one model takes: bytes of weights and optimizer, bytes per image, and the images that fit.

    Raises:
        SpecError: There is no such model.
        ValueError: The size leaves a branch without a token.
    """
    found: dict[str, Any] = {"spec": name, "dtype": dtype}
    steps = TrainingSteps(name, dtype, size)
    optimizer = steps.params * OPTIMIZER_BYTES[dtype]
    for checkpointing in (False, True):

        def peak(batch: int, checkpointing: bool = checkpointing) -> int:
            return steps.peak(batch, checkpointing) + optimizer

        known = {batch: peak(batch) for batch in (1, 2)}
        # The most memory first: its peaks lie around those of the others.
        limits = {gb: gb * 1e9 * (1 - reserve) for gb in sorted(gigabytes, reverse=True)}
        images = {gb: largest_batch(peak, limit, known) for gb, limit in limits.items()}
        before, last = sorted(known)[-2:]
        found["checkpointing" if checkpointing else "plain"] = {
            "fixed_bytes": steps.weights + optimizer,
            "image_bytes": (known[last] - known[before]) // (last - before),
            "images": {str(gb): images[gb] for gb in gigabytes},
            "peaks": {str(batch): known[batch] for batch in sorted(known)},
        }
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.Parser("memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", nargs="+", metavar="SPEC", help="a spec of the zoo, or name or path of a config")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of weights and activations")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: the spec's, square")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[16, 24, 48, 80])
    parser.add_argument("--reserve", type=float, default=0.1, help="share of the memory that is left free")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if args.size and min(args.size) < 1:
        parser.error(f"--size is a height and a width in pixels, got {args.size[0]} {args.size[1]}")
    if min(args.gigabytes) <= 0 or not 0 <= args.reserve < 1:
        parser.error("--gigabytes are positive numbers, --reserve is a share from 0 to below 1")
    prepare(parser, "json", args.json)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = parse(arguments)
    width = max(23, *map(len, args.spec))
    heads = " ".join(f"{gb:>5g}" for gb in args.gigabytes)
    title = f"{'computed, backbone only':{width}} {'checkpointing':>13}"
    print(f"{title} {'fixed':>9} {'per image':>10}  images in GB: {heads}")
    found = []
    for name in args.spec:
        try:
            found.append(requirements(name, args.dtype, args.size, args.gigabytes, args.reserve))
        except (SpecError, ValueError) as error:
            print(f"memory.py: error: {error}", file=sys.stderr)
            return 2
        for key, on in (("plain", "off"), ("checkpointing", "on")):
            need = found[-1][key]
            fits = " ".join(f"{count:>5}" for count in need["images"].values())
            print(
                f"{name:{width}} {on:>13} {need['fixed_bytes'] / 1e9:>6.2f} GB {need['image_bytes'] / 1e9:>7.2f} GB "
                f"{'':>13} {fits}",
                flush=True,
            )
    if args.json:
        write(args.json, json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

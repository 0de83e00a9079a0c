#!/usr/bin/env python3
"""Compute how much memory training a backbone takes, and how many images fit on a GPU. No memory or GPU is needed.

    python tools/memory.py deit3-tsb-1568-1120-672 deit3-l-1024
    python tools/memory.py deit3-sbl-1568-1120-672 --dtype fp32 --size 800 1216

A training step runs on tensors without data, and the bytes of live tensors are counted, operator by operator: for one
image and for two, with and without activation checkpointing. The difference is what an image takes; the rest are
weights and gradients, to which AdamW adds 12 bytes per parameter (two moments and, beside bf16 weights, a float32 copy)
or 8 (float32 weights). Detection heads, what operators need inside, and fragmentation are not in it: `--reserve` of
the memory is left to them.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from get_flops import row_of
from torch._subclasses.fake_tensor import FakeTensorMode

from piip.budget import MODELS
from piip.errors import SpecError
from piip.measure import PeakMemory
from piip.zoo.released import TABLES
from piip.zoo.specs import resolve_spec

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OPTIMIZER_BYTES = {"bf16": 12, "fp32": 8}  # AdamW, per parameter


def step_bytes(name: str, batch: int, dtype: str, checkpointing: bool, size: Sequence[int] | None) -> tuple[int, int]:
    """Return the peak of one training step in bytes, and the number of parameters.

    Raises:
        SpecError: There is no such model.
    """
    row = row_of(name)
    spec = resolve_spec(row.spec)
    side = spec.input_resolution or max(branch.resolution for branch in spec.branches)
    # Fake parameters cannot change their type, so they are built in it.
    with FakeTensorMode(), _default_dtype(DTYPES[dtype]):
        model = MODELS[TABLES[row.table].model](row.spec, **row.options)
        model.pyramid.set_grad_checkpointing(checkpointing)
        images = torch.empty(batch, 3, *(size or (side, side)))
        with PeakMemory([images, *model.parameters(), *model.buffers()]) as memory:
            out = model(images)
            sum(level.sum() for level in (out if isinstance(out, list) else [out])).backward()
    return memory.peak, sum(p.numel() for p in model.parameters())


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def requirements(name: str, dtype: str, size: Sequence[int] | None, gigabytes: Sequence[float], reserve: float) -> dict:
    """Return bytes of weights, gradients and optimizer, bytes per image, and the images that fit, for one model."""
    found: dict[str, Any] = {"spec": name, "dtype": dtype}
    for checkpointing in (False, True):
        (one, params), (two, _) = (step_bytes(name, batch, dtype, checkpointing, size) for batch in (1, 2))
        image = two - one
        fixed = one - image + params * OPTIMIZER_BYTES[dtype]
        found["checkpointing" if checkpointing else "plain"] = {
            "fixed_bytes": fixed,
            "image_bytes": image,
            "images": {str(gb): max(0, int((gb * 1e9 * (1 - reserve) - fixed) // image)) for gb in gigabytes},
        }
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec", nargs="+", metavar="SPEC", help="a spec of the zoo, or name or path of a config")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of weights and activations")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: the spec's, square")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[16, 24, 48, 80])
    parser.add_argument("--reserve", type=float, default=0.1, help="share of the memory that is left free")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


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
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

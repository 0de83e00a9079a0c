#!/usr/bin/env python3
"""Export a backbone or classifier to ONNX or as a torch.export program, and check the result's numbers.

    python tools/export.py cls-deit1-tsb-368-192-128 --out classifier.onnx --dynamic
    python tools/export.py deit3-tsb-1120-896-448 --out backbone.pt2 --size 448 672 --checkpoint FILE

The name of a row or config of the zoo, a spec, or a directory for the hub. The format follows from the name of the
output: .onnx, or .pt2 for torch.export. What is written runs on random images (with --dynamic in another batch size),
and the largest difference from the model is printed, relative to the largest value of each output.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from piip.errors import ExportError
from piip.integrations import command
from piip.integrations.export import (
    export_onnx,
    export_program,
    largest_difference,
    run_onnx,
    run_program,
    save_program,
)
from piip.integrations.hub import from_pretrained
from piip.models import PyramidModel, create_model
from piip.zoo.released import row_of

TOLERANCE = 1e-4  # float32, other orders of summation


def build(args: argparse.Namespace) -> PyramidModel:
    """Return the model that is to be exported."""
    if Path(args.model).is_dir():
        return from_pretrained(args.model)
    row = row_of(args.model)
    return create_model(row.spec, checkpoint=args.checkpoint, **row.options)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="row, config or spec of the zoo, or a directory for the hub")
    parser.add_argument("--out", type=Path, required=True, help="NAME.onnx or NAME.pt2")
    parser.add_argument("--checkpoint", help="weights; random ones without it")
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="input; the spec's by default")
    parser.add_argument("--batch", type=int, default=1, help="images (default: %(default)s)")
    parser.add_argument("--dynamic", action="store_true", help="leave the number of images open")
    args = parser.parse_args(arguments)
    if args.out.suffix not in (".onnx", ".pt2"):
        parser.error(f"--out is NAME.onnx or NAME.pt2, got {args.out}")
    if args.checkpoint and Path(args.model).is_dir():
        parser.error(f"--checkpoint goes with a row, config or spec: the directory {args.model} has its own weights")
    if args.batch < 1 or (args.size and min(args.size) < 1):
        parser.error("--batch and --size are positive numbers")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parse(arguments)
    torch.manual_seed(0)
    model = build(args).eval()
    side = model.pyramid.input_resolution
    height, width = args.size or (side, side)
    batch = max(args.batch, 2) if args.dynamic else args.batch
    images = torch.randn(batch, 3, height, width)
    if args.out.suffix == ".onnx":
        run = run_onnx(export_onnx(model, images, args.out, dynamic=args.dynamic))
    else:
        program = export_program(model, images, dynamic=args.dynamic)
        run = run_program(torch.export.load(save_program(program, args.out)))
    given = torch.randn(batch + 1 if args.dynamic else batch, 3, height, width)
    difference = largest_difference(model, run, given)
    shape = f"{'any' if args.dynamic else batch} x 3 x {height} x {width}"
    print(f"{args.out}: input {shape}; largest relative difference {difference:.1e} on {len(given)} random image(s)")
    if not difference < TOLERANCE:
        raise ExportError(f"the exported program differs by {difference:.1e}, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    sys.exit(command.main(lambda _: main(), argparse.Namespace()))

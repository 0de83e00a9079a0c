#!/usr/bin/env python3
"""List, fetch, verify and convert the files that were released: whole models, and the branches they start from.

    python tools/download.py list sbl                          # rows and branch files whose name has "sbl"
    python tools/download.py get deit3-sbl-1568-1120-672       # released weights of a row, into checkpoints/
    python tools/download.py get deit3-sbl-1568-1120-672 --branches --out mmdetection/pretrained
    python tools/download.py verify checkpoints/NAME.pth --model deit3-sbl-1568-1120-672
    python tools/download.py convert SOURCE TARGET --model NAME --to ours

An interrupted download goes on where it stopped. Checksums are compared where one is known: the hub states them, and
some file names end with one. Nothing in a file is ever executed. A mirror of the Hugging Face hub is named by
--endpoint or $HF_ENDPOINT; a web server with the files under their own names by --mirror (a name with a folder, like
convnext-tiny-224/pytorch_model.bin, in that folder).
"""

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from piip.branches.pretrained import load_pretrained
from piip.checkpoint import read_state_dict
from piip.errors import CheckpointError
from piip.integrations import command
from piip.models import AS_BUILT, create_model
from piip.zoo.convert import BACKBONE
from piip.zoo.download import Progress, download, download_released, file_sha256, mirrored
from piip.zoo.released import ROWS, branch_weights, find_row, find_source, row_of
from piip.zoo.specs import SPECS, BranchSpec, build_branch, resolve_spec


def show_progress(name: str) -> Progress:
    """Return what keeps a line of the terminal up to date; without a terminal, nothing is printed."""

    def show(done: int, total: int | None) -> None:
        if sys.stderr.isatty():
            share = f" of {total / 1e6:.1f} MB ({done / total:.0%})" if total else " MB"
            sys.stderr.write(f"\r{name}: {done / 1e6:.1f}{share}" + ("\n" if done == total else ""))

    return show


def all_branch_weights() -> list[str]:
    """Return the names of every pretrained file that a row of the zoo starts from."""
    return list(dict.fromkeys(weights for spec in SPECS for weights in branch_weights(spec)))


def list_files(args: argparse.Namespace) -> None:
    """Print rows and branch files."""
    rows = [(row.name, row.weights_url or "no weights were released") for row in ROWS]
    files = [(name, find_source(name)[1]) for name in all_branch_weights()]
    for title, entries in (("released models", rows), ("pretrained branches", files)):
        chosen = [entry for entry in entries if args.pattern.lower() in entry[0].lower()]
        print(f"{title} ({len(chosen)})")
        for name, url in chosen:
            print(f"  {name}\n    {url}")


def get_files(args: argparse.Namespace) -> None:
    """Fetch what is named."""
    where: dict[str, Any] = {"endpoint": args.endpoint, "mirror": args.mirror}
    for name in args.name:
        weights = [name] if name in all_branch_weights() else branch_weights(row_of(name).spec) if args.branches else []
        for file in weights:
            url = mirrored(find_source(file)[1], **where, name=file)
            target = args.out or Path("pretrained")
            print(download(url, target / file, progress=show_progress(file)))
        if not weights:
            row = find_row(name.removesuffix(AS_BUILT))  # one file was released for both forms
            print(download_released(row, args.out or Path("checkpoints"), **where, progress=show_progress(row.name)))


def verify(args: argparse.Namespace) -> None:
    """Check a file's checksum, and that it holds the model that it is meant for."""
    if not args.file.is_file():
        raise CheckpointError(f"there is no file {args.file}")
    found = file_sha256(args.file)
    if args.sha256 and not found.startswith(args.sha256.lower()):
        raise CheckpointError(f"{args.file}: SHA-256 is {found}, expected {args.sha256}: get it again")
    print(f"{args.file}: SHA-256 {found}")
    if not args.model:
        return
    row = row_of(args.model)
    spec = resolve_spec(row.spec)
    if branch := find_branch(spec.branches, args.file):
        with torch.device("meta"):  # names and shapes are what counts
            network = build_branch(branch)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
            load_pretrained(network, args.file)
        print(f"fits the branch {branch.arch} of {args.model}")
        return
    create_model(row.spec, checkpoint=args.file, **row.options)
    if any(name.startswith(BACKBONE) for name in read_state_dict(args.file)):
        print(f"the backbone fits {args.model}: nothing is missing or left over; neck and heads are not compared")
    else:
        print(f"fits {args.model}: nothing is missing or left over")


def find_branch(branches: Sequence[BranchSpec], file: Path) -> BranchSpec | None:
    """Return the branch that a pretrained file is meant for, by its name; by its folder too where names are alike."""
    named = [branch for branch in branches if branch.weights and Path(branch.weights).name == file.name]
    path = file.resolve().as_posix()
    exact = [branch for branch in named if path.endswith(f"/{branch.weights}")]
    return next(iter(exact or named), None)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("list", help="what there is")
    sub.add_argument("pattern", nargs="?", default="", help="part of the name")
    sub.set_defaults(run=list_files)
    sub = commands.add_parser("get", help="fetch released models or pretrained branches")
    sub.add_argument("name", nargs="+", help="row, config, spec, hub repository, or name of a branch file")
    sub.add_argument("--branches", action="store_true", help="the pretrained branches that the row starts from")
    sub.add_argument("--out", type=Path, help="folder (default: checkpoints, branches: pretrained)")
    sub.add_argument("--endpoint", help="another Hugging Face hub (default: $HF_ENDPOINT)")
    sub.add_argument("--mirror", help="web server that has the files under their own names")
    sub.set_defaults(run=get_files)
    sub = commands.add_parser("verify", help="check a file")
    sub.add_argument("file", type=Path)
    sub.add_argument("--model", help="what it is meant for: row, config or spec")
    sub.add_argument("--sha256", help="its checksum, or the first digits")
    sub.set_defaults(run=verify)
    return parser.parse_args(arguments)


def convert(arguments: Sequence[str]) -> None:
    """Hand over to the tool beside this one."""
    spec = importlib.util.spec_from_file_location("convert", Path(__file__).with_name("convert_checkpoint.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["convert"]:
        convert(arguments[1:])
        return
    args = parse(arguments)
    args.run(args)


if __name__ == "__main__":
    sys.exit(command.main(lambda _: main(), argparse.Namespace()))

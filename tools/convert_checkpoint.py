#!/usr/bin/env python3
"""Convert a checkpoint from the authors' parameter names to ours, to a directory for the hub, or back.

    python tools/convert_checkpoint.py released.pth ours.safetensors --model deit3-sbl-1568-1120-672 --to ours
    python tools/convert_checkpoint.py ours.safetensors again.pth    --model deit3-sbl-1568-1120-672 --to released
    python tools/convert_checkpoint.py released.pth my-model/        --model CONFIG --to hub

A file of a backbone, of a classifier, or of a whole detector or segmentor; nothing may be missing or left over. A
released LLaVA directory becomes a directory of transformers (--to hub or ours; not back).
Training loads files of both kinds, so this is for other programs, and for publishing. Tensors that a released file
holds and nothing reads go into `NAME.unread.safetensors` beside the result, for an exact way back.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from piip.errors import SpecError
from piip.integrations import command
from piip.integrations.hub import save_pretrained
from piip.models import Classifier, PyramidModel, create_model
from piip.zoo.convert import Rules, convert_file
from piip.zoo.released import TABLES, Row, row_of


def build(row: Row) -> PyramidModel:
    """Return a row's model in the form of released files, without memory for its weights."""
    with torch.device("meta"):
        model = create_model(row.spec, **row.options)
    model.use_released_form()
    return model


def rules_of(row: Row) -> Rules:
    """Return how a detector's names differ outside its backbone."""
    if row.head != "DINO":
        return ()
    from piip.integrations.mmdet_dino import RULES  # needs mmdet

    return RULES


def to_hub(row: Row, source: Path, target: Path) -> None:
    """Write a checkpoint's backbone or classifier as a directory for the hub."""
    model = create_model(row.spec, checkpoint=source, **row.options)
    save_pretrained(model, target)


def convert_llava(args: argparse.Namespace) -> None:
    """Bring a released LLaVA directory to a directory of transformers, with our names."""
    if args.to == "released":
        raise SpecError(
            "a LLaVA model is not written back as the authors' directory: its config.json and tokenizer are of their "
            "program; piip_llava reads both kinds"
        )
    from piip_llava import PiipLlavaForConditionalGeneration, PiipLlavaProcessor  # needs transformers

    tower = row_of(args.model).name
    options = {"tower": tower, "vision_weights": args.vision_weights}
    PiipLlavaForConditionalGeneration.from_pretrained(args.source, **options).save_pretrained(args.target)
    PiipLlavaProcessor.from_pretrained(args.source, tower=tower).save_pretrained(args.target)
    print(f"{args.target}: a directory for transformers")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the checkpoint")
    parser.add_argument("target", type=Path, help=".safetensors or .pth; with --to hub a directory")
    parser.add_argument("--model", required=True, help="row of the published tables, spec, or config file")
    parser.add_argument("--to", choices=("ours", "released", "hub"), required=True)
    parser.add_argument(
        "--first-patch",
        action="store_true",
        help="classifiers, to released names: the heads of this file do read the first patch, as released ones do",
    )
    parser.add_argument(
        "--vision-weights",
        "--vision_weights",
        type=Path,
        help="CLIP's own file, for a LLaVA-1.5 directory that holds none of it",
    )
    args = parser.parse_args(arguments)
    if args.target.exists() and args.to != "hub":
        parser.error(f"{args.target} is there already: choose another name, or remove it")
    if args.to == "hub" and args.target.exists() and not args.target.is_dir():
        parser.error(f"{args.target} is a file, and --to hub writes a directory: choose another name, or remove it")
    row = row_of(args.model)
    if TABLES[row.table].model == "tower":
        convert_llava(args)
        return
    if args.to == "hub":
        to_hub(row, args.source, args.target)
        print(f"{args.target}: config.json, model.safetensors, README.md")
        return
    model = build(row)
    if isinstance(model, Classifier) and args.to == "released" and not args.first_patch:
        parser.error(
            "released classifiers read the first patch token, ours the class token: with --first-patch you say that "
            "this file was trained, or released, in the first form"
        )
    count, unread = convert_file(model, args.source, args.target, args.to, rules=rules_of(row))
    print(f"{args.target}: {count} tensors" + (f", and {unread} that nothing reads beside it" if unread else ""))


if __name__ == "__main__":
    sys.exit(command.main(lambda _: main(), argparse.Namespace()))

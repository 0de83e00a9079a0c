"""The command line of `tools/image_demo.py`: pictures of detections, and a JSON file of them."""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from piip.errors import RunError
from piip.integrations.cli import Overrides, Parser
from piip.integrations.files import write_text
from piip.integrations.images import BrokenImageError
from piip.integrations.inference import detect, load_detector
from piip.integrations.visualize import draw, save_picture

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Of the files that are taken from a folder."""

RESULTS = "detections.json"


def _score(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return value


def parse_image_demo(argv: Sequence[str] | None = None, prog: str = "image_demo.py") -> argparse.Namespace:
    """Return the options of `tools/image_demo.py`; exits with one line if they are wrong."""
    parser = Parser(prog=prog, description="Detect objects in pictures and draw them.", allow_abbrev=False)
    parser.add_argument("images", help="a picture, a folder of pictures, or a pattern in quotes: 'photos/**/*.jpg'")
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="checkpoint file; also a DeepSpeed directory or the model file in it")
    parser.add_argument("--out", required=True, metavar="DIR", help=f"folder for the drawn pictures and {RESULTS}")
    parser.add_argument(
        "--confidence-threshold", type=_score, default=0.5, metavar="SCORE", help="lowest score (default: 0.5)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:NUMBER (default: a GPU if there is one)")
    parser.add_argument("--cfg-options", nargs="+", action=Overrides, default={}, metavar="KEY=VALUE")
    return parser.parse_args(argv)


def find_images(pattern: str) -> list[Path]:
    """Return the files that a path or pattern means, sorted.

    Args:
        pattern: A file, a folder (the pictures in it, not those in its subfolders), or a pattern with `*`, `?`, `[]`
            and `**`.

    Raises:
        RunError: There are none.
    """
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        if not found:
            raise RunError(f"there are no pictures in {path} (of {', '.join(SUFFIXES)})")
        return found
    found = sorted(file for file in map(Path, glob.glob(pattern, recursive=True)) if file.is_file())
    if not found:
        raise RunError(f"there is no picture, folder of pictures or match for {pattern!r} (seen from {Path.cwd()})")
    return found


def _pictures(images: Sequence[Path], out: Path) -> list[Path]:
    """Return where each image's picture goes: as the images lie to each other, under names that differ.

    Raises:
        RunError: One would replace an image.
    """
    root = os.path.commonpath([image.parent.absolute() for image in images])
    stems = [Path(os.path.relpath(image.absolute(), root)).with_suffix("") for image in images]
    pictures = [
        out / (f"{stem}.png" if stems.count(stem) == 1 else f"{stem}{image.suffix}.png")
        for stem, image in zip(stems, images, strict=True)
    ]
    if replaced := {image.resolve() for image in images} & {picture.resolve() for picture in pictures}:
        raise RunError(f"--out {out}: the picture would replace the image {sorted(replaced)[0]}; choose another folder")
    return pictures


def image_demo(args: argparse.Namespace) -> int:
    """Detect and draw as the options of :func:`parse_image_demo` say.

    Returns:
        The exit status: 1 if not one of the images could be read.

    Raises:
        RunError: The config, the images, the device or the output folder is not usable.
        CheckpointError: The checkpoint cannot be read, or does not fit the config's model.
    """
    images, out = find_images(args.images), Path(args.out)
    pictures = _pictures(images, out)
    detector = load_detector(args.config, args.checkpoint, args.device, args.cfg_options)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {out} cannot be made a folder: {error.strerror}") from error
    records: list[dict[str, object]] = []
    count = 0
    for image, picture in zip(images, pictures, strict=True):
        try:
            (found,) = detect(detector, [image], args.confidence_threshold)
        except BrokenImageError as error:
            sys.stderr.write(f"skipped: {error}\n")
            continue
        picture.parent.mkdir(parents=True, exist_ok=True)
        save_picture(draw(found), picture)
        records.append({"file": str(image), **found.record()})
        count += len(found)
    if skipped := len(images) - len(records):
        sys.stderr.write(f"images that could not be read: {skipped} of {len(images)}\n")
    if not records:
        return 1
    lines = ",\n".join(map(json.dumps, records))  # one line per image
    write_text(out / RESULTS, f"[\n{lines}\n]\n")
    sys.stdout.write(f"images: {len(records)}, detections: {count}; pictures and {RESULTS} are in {out}\n")
    return 0

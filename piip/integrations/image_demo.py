"""The command lines of `tools/image_demo.py`: pictures of what a model finds in images, and a JSON file of it."""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piip.errors import RunError
from piip.integrations.cli import Overrides, Parser
from piip.integrations.files import write_text
from piip.integrations.images import BrokenImageError
from piip.integrations.inference import detect, load_detector, load_segmentor, segment
from piip.integrations.visualize import Detections, Segmentation, draw, draw_segmentation, save_picture

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Of the files that are taken from a folder."""

CLASS_MAPS = "class_maps"
"""Folder for the class maps of segmentations."""


@dataclass(frozen=True)
class Task:
    """What differs between the tasks.

    Attributes:
        purpose: Of the command.
        results: Name of the JSON file.
        load: Returns the model of a config, a checkpoint, a device and changes of the config.
        predict: Returns the results for a list of images, from the model, the images and the options.
        write: Writes the pictures of a result to the given paths.
        folders: Below the output folder, of each of these pictures.
        count: What a result says in the summary, and how many of it there are.
    """

    purpose: str
    results: str
    load: Callable[..., Any]
    predict: Callable[[Any, Sequence[Path], argparse.Namespace], list[Any]]
    write: Callable[[Any, Sequence[Path]], None]
    folders: tuple[str, ...]
    count: tuple[str, Callable[[Any], int]]


def _write_detections(found: Detections, paths: Sequence[Path]) -> None:
    save_picture(draw(found), paths[0])


def _write_segmentation(found: Segmentation, paths: Sequence[Path]) -> None:
    save_picture(draw_segmentation(found), paths[0])
    save_picture(found.class_map(), paths[1])


TASKS = {
    "detection": Task(
        purpose="Detect objects in pictures and draw them.",
        results="detections.json",
        load=load_detector,
        predict=lambda model, images, args: detect(model, images, args.confidence_threshold),
        write=_write_detections,
        folders=("",),
        count=("detections", len),
    ),
    "segmentation": Task(
        purpose="Classify the pixels of pictures and draw the classes.",
        results="segmentations.json",
        load=load_segmentor,
        predict=lambda model, images, _: segment(model, images),
        write=_write_segmentation,
        folders=("", CLASS_MAPS),
        count=("classes found", lambda found: len(found.shares())),
    ),
}


def score(text: str) -> float:
    """Return a command line's score, which must be from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return value


def parse_image_demo(
    argv: Sequence[str] | None = None, prog: str = "image_demo.py", task: str = "detection"
) -> argparse.Namespace:
    """Return the options of a task's `tools/image_demo.py`; exits with one line if they are wrong."""
    parser = Parser(prog=prog, description=TASKS[task].purpose, allow_abbrev=False)
    parser.set_defaults(task=task)
    parser.add_argument("images", help="a picture, a folder of pictures, or a pattern in quotes: 'photos/**/*.jpg'")
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="checkpoint file; also a DeepSpeed directory or the model file in it")
    parser.add_argument("--out", required=True, metavar="DIR", help=f"folder for pictures and {TASKS[task].results}")
    if task == "detection":
        parser.add_argument(
            "--confidence-threshold", type=score, default=0.5, metavar="SCORE", help="lowest score (default: 0.5)"
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


def _pictures(images: Sequence[Path], out: Path, folders: Sequence[str]) -> list[list[Path]]:
    """Return where each image's pictures go: as the images lie to each other, under names that differ.

    Raises:
        RunError: One would replace an image, or another picture.
    """
    root = os.path.commonpath([image.parent.absolute() for image in images])
    stems = [Path(os.path.relpath(image.absolute(), root)).with_suffix("") for image in images]
    names = [
        f"{stem}.png" if stems.count(stem) == 1 else f"{stem}{image.suffix}.png"
        for stem, image in zip(stems, images, strict=True)
    ]
    pictures = [[out / folder / name for folder in folders] for name in names]
    every = [picture.resolve() for group in pictures for picture in group]
    if replaced := {image.resolve() for image in images} & set(every):
        raise RunError(f"--out {out}: the picture would replace the image {sorted(replaced)[0]}; choose another folder")
    if len(set(every)) < len(every):
        raise RunError(f"images in a folder called {folders[-1]!r} would share their pictures' names with others")
    return pictures


def image_demo(args: argparse.Namespace) -> int:
    """Predict and draw as the options of :func:`parse_image_demo` say.

    Returns:
        The exit status: 1 if not one of the images could be read.

    Raises:
        RunError: The config, the images, the device or the output folder is not usable.
        CheckpointError: The checkpoint cannot be read, or does not fit the config's model.
    """
    task = TASKS[args.task]
    images, out = find_images(args.images), Path(args.out)
    pictures = _pictures(images, out, task.folders)
    model = task.load(args.config, args.checkpoint, args.device, args.cfg_options)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {out} cannot be made a folder: {error.strerror}") from error
    records: list[dict[str, object]] = []
    what, count = task.count
    total = 0
    for image, paths in zip(images, pictures, strict=True):
        try:
            (found,) = task.predict(model, [image], args)
        except BrokenImageError as error:
            sys.stderr.write(f"skipped: {error}\n")
            continue
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        task.write(found, paths)
        records.append({"file": str(image), **found.record()})
        total += count(found)
    if skipped := len(images) - len(records):
        sys.stderr.write(f"images that could not be read: {skipped} of {len(images)}\n")
    if not records:
        return 1
    lines = ",\n".join(map(json.dumps, records))  # one line per image
    write_text(out / task.results, f"[\n{lines}\n]\n")
    sys.stdout.write(f"images: {len(records)}, {what}: {total}; pictures and {task.results} are in {out}\n")
    return 0

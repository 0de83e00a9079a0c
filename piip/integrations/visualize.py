"""Detections and segmentations drawn on their image, for the demos, the command line and notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, get_data_path
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle
from torchvision.ops import nms

_LEGIBLE = 640  # px: images whose longer side is below this are enlarged, so that labels leave something to see
_FONT = Path(get_data_path(), "fonts/ttf/DejaVuSans-Bold.ttf")
_PALETTE = [tuple(round(255 * value) for value in colormaps["tab10"](i)[:3]) for i in range(10)]
_SOLID = 0.45  # of a mask


@dataclass(frozen=True)
class Detections:
    """N things found in an image of H x W pixels."""

    image: np.ndarray
    """(H, W, 3) uint8, RGB."""
    boxes: np.ndarray
    """(N, 4) float: x0, y0, x1, y1 in pixels."""
    scores: np.ndarray
    """(N,) float, 0 to 1."""
    classes: np.ndarray
    """(N,) int, to be looked up in `names`."""
    names: Sequence[str] | Mapping[int, str]
    masks: np.ndarray | None = None
    """(N, H, W) bool; None from a detector that makes boxes only."""

    def __len__(self) -> int:
        return len(self.scores)

    def one_per_place(self, overlap: float = 0.5) -> Detections:
        """Return the best detection of each place, whatever its class, in ascending order of score.

        Detectors suppress duplicates within each class only.

        Args:
            overlap: Boxes whose intersection over union is above this are of one place.
        """
        boxes, scores = (torch.from_numpy(np.asarray(value, dtype=np.float32)) for value in (self.boxes, self.scores))
        kept = nms(boxes.reshape(-1, 4), scores, overlap).flip(0).numpy()
        masks = None if self.masks is None else self.masks[kept]
        return replace(self, boxes=self.boxes[kept], scores=self.scores[kept], classes=self.classes[kept], masks=masks)

    def record(self) -> dict[str, Any]:
        """Return the detections for a JSON file, the best first: the image's size, and of each its label, score, box
        (x0, y0, x1, y1 in pixels) and mask (COCO's compressed run lengths), if there are masks.
        """
        found = []
        for i in np.argsort(-self.scores, kind="stable"):
            entry: dict[str, Any] = {
                "label": self.names[int(self.classes[i])],
                "score": round(float(self.scores[i]), 4),
                "box": [round(float(value), 2) for value in self.boxes[i]],
            }
            if self.masks is not None:
                mask = rle.encode(np.asfortranarray(self.masks[i], dtype=np.uint8))
                entry["mask"] = {"size": mask["size"], "counts": mask["counts"].decode("ascii")}
            found.append(entry)
        return {"width": self.image.shape[1], "height": self.image.shape[0], "detections": found}


@dataclass(frozen=True)
class Segmentation:
    """The class of every pixel of an image of H x W pixels."""

    image: np.ndarray
    """(H, W, 3) uint8, RGB."""
    labels: np.ndarray
    """(H, W) int, to be looked up in `names` and `palette`."""
    names: Sequence[str]
    palette: Sequence[Sequence[int]]
    """One colour (red, green, blue) per class."""

    def shares(self) -> dict[int, float]:
        """Return the share of the pixels of each class that is there, the largest first."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.names))
        order = np.argsort(-counts, kind="stable")
        return {int(i): float(counts[i] / self.labels.size) for i in order if counts[i]}

    def record(self) -> dict[str, Any]:
        """Return the image's size, and of each class that is there its label, number and share, for a JSON file."""
        found = [{"label": self.names[i], "class": i, "share": round(s, 6)} for i, s in self.shares().items()]
        return {"width": self.image.shape[1], "height": self.image.shape[0], "classes": found}

    def class_map(self) -> Image.Image:
        """Return an indexed image (H, W): the value of a pixel is its class, and its colour that of the palette."""
        picture = Image.fromarray(self.labels.astype(np.uint8), mode="P")
        picture.putpalette(np.asarray(self.palette, dtype=np.uint8).reshape(-1).tolist())
        return picture


def enlarge(image: np.ndarray, zoom: int) -> np.ndarray:
    """Return an RGB image (H, W, 3) `zoom` times as large."""
    if zoom == 1:
        return image
    size = (image.shape[1] * zoom, image.shape[0] * zoom)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def draw(found: Detections, zoom: int | None = None) -> np.ndarray:
    """Draw masks, boxes and labels on the image: of each place the best detection.

    Args:
        found: What to draw.
        zoom: How many times as large the picture is; default: as many times as makes a small image legible.

    Returns:
        The picture, (H * zoom, W * zoom, 3) uint8.
    """
    zoom = zoom or _legible(found.image)
    found = found.one_per_place()
    pixels = enlarge(found.image, zoom).astype(np.float32)
    colours = [_PALETTE[number % len(_PALETTE)] for number in found.classes]
    if found.masks is not None:
        for mask, colour in zip(found.masks, colours, strict=True):
            covered = mask.repeat(zoom, 0).repeat(zoom, 1)
            pixels[covered] += _SOLID * (np.float32(colour) - pixels[covered])
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    longer = max(picture.size)
    width, font = max(3, round(longer / 400)), ImageFont.truetype(str(_FONT), max(16, round(longer / 60)))
    corners = found.boxes * zoom
    for box, colour in zip(corners.tolist(), colours, strict=True):
        pen.rectangle(box, outline=colour, width=width)
    # After all boxes: no line crosses a label.
    for box, colour, number, score in zip(corners.tolist(), colours, found.classes, found.scores, strict=True):
        _label(pen, picture.size, box, f"{found.names[number]} {score:.2f}", colour, font)
    return np.asarray(picture)


def draw_segmentation(found: Segmentation, zoom: int | None = None) -> np.ndarray:
    """Draw the classes' colours over the image, and beside it what they mean and how much of the image they are.

    Args:
        found: What to draw.
        zoom: How many times as large the picture is; default: as many times as makes a small image legible.

    Returns:
        The picture, (H * zoom, W * zoom + width of the legend, 3) uint8.
    """
    zoom = zoom or _legible(found.image)
    colours = np.asarray(found.palette, dtype=np.float32)[found.labels].repeat(zoom, 0).repeat(zoom, 1)
    pixels = enlarge(found.image, zoom).astype(np.float32)
    overlay = (pixels + _SOLID * (colours - pixels)).round().astype(np.uint8)
    return np.hstack([overlay, _legend(found, overlay.shape[0])])


def _legend(found: Segmentation, height: int) -> np.ndarray:
    """Return the legend of a picture of that height: the classes that are there, as many as fit."""
    size = max(12, min(22, round(height / 30)))
    font, row = ImageFont.truetype(str(_FONT), size), round(1.6 * size)
    lines = [(found.palette[i], f"{found.names[i]} {share:.1%}") for i, share in found.shares().items()]
    if (fits := max(1, height // row - 1)) < len(lines):
        lines = [*lines[:fits], ((255, 255, 255), f"{len(lines) - fits} more")]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = round(max(pen.textlength(text, font) for _, text in lines) + 2.5 * size)
    legend = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(legend)
    for i, (colour, text) in enumerate(lines):
        top = i * row + row // 2
        pen.rectangle((size // 2, top, size // 2 + size, top + size), fill=tuple(colour))
        pen.text((2 * size, top + size / 2), text, fill="black", font=font, anchor="lm")
    return np.asarray(legend)


def spread_colours(count: int) -> list[tuple[int, int, int]]:
    """Return as many colours (red, green, blue) that are easy to tell apart, the same ones every time."""
    hues = ((i * 0.61803398875) % 1 for i in range(count))  # the golden ratio: never near one of the last few
    colours = (hsv_to_rgb(hue, 0.55 + 0.4 * (i % 2), 0.95 - 0.25 * (i % 3)) for i, hue in enumerate(hues))
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colours]


def _legible(image: np.ndarray) -> int:
    return -(-_LEGIBLE // max(image.shape[:2]))


def _label(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: Sequence[float],
    text: str,
    colour: tuple[int, ...],
    font: ImageFont.FreeTypeFont,
) -> None:
    """Write a label above its box, or inside where there is no room, and never beyond the picture."""
    margin = font.size / 4
    width, height = pen.textlength(text, font) + 2 * margin, font.size + 2 * margin
    left = max(0.0, min(box[0], size[0] - width))
    top = box[1] - height if box[1] >= height else max(0.0, min(box[1], size[1] - height))
    pen.rectangle((left, top, left + width, top + height), fill=colour)
    light = sum(weight * value for weight, value in zip((0.299, 0.587, 0.114), colour, strict=True)) > 150
    pen.text((left + margin, top + height / 2), text, fill="black" if light else "white", font=font, anchor="lm")


def save_picture(picture: np.ndarray | Image.Image, path: str | Path) -> None:
    """Write a picture, (H, W, 3) or Pillow's, as a PNG file that appears under its name when it is whole."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(part, format="PNG")
    part.replace(path)

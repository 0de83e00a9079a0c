"""Images as the tower takes them: Pillow, one square, normalised."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

AspectRatio = Literal["pad", "square"]


def pad_to_square(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    """Return the image in the middle of a square as wide as its longer side."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    canvas = Image.new(image.mode, (side, side), fill)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def preprocess(
    image: Image.Image,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    aspect_ratio: AspectRatio = "pad",
) -> np.ndarray:
    """Turn an image into the tower's input.

    The shorter side is resized to `size` (Pillow's bicubic, on bytes) and the middle cut out; with `pad`, the image is
    first set in a square of the mean colour, so that nothing is cut off.

    Args:
        image: Any mode; becomes RGB.
        size: Side of the result in pixels.
        mean: Mean per channel, for values from 0 to 1.
        std: Standard deviation per channel.
        aspect_ratio: `pad` or `square`.

    Returns:
        `(3, size, size)`, float32.
    """
    image = image.convert("RGB")
    if aspect_ratio == "pad":
        image = pad_to_square(image, tuple(int(value * 255) for value in mean))
    width, height = image.size
    short = min(width, height)
    target = tuple(size if side == short else int(size * side / short) for side in (width, height))
    image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float64) / 255
    return ((pixels - np.asarray(mean)) / np.asarray(std)).astype(np.float32).transpose(2, 0, 1)

"""A tiny pyramid's config, options for short runs, and images."""

from pathlib import Path

import numpy as np
from PIL import Image

CONFIG = """
_branches = [
    dict(
        arch="vit",
        resolution=side,
        drop_path=0.2,
        options=dict(embed_dim=32, depth=2, num_heads=2, pos_grid=(side // 16, side // 16), pos_prefix=1,
                     class_token=True, layer_scale=1.0, family="deit"),
    )
    for side in (32, 48)
]
model = dict(spec=dict(branches=_branches, interactions=2, heads=2, drop_path=0.2, head="branches"))
"""
PLAIN = ["--no-aug", "--mixup", "0", "--cutmix", "0", "--no-repeated-aug", "--no-train-mode", "--smoothing", "0"]
FEW = ["--num-workers", "0", "--no-tensorboard", "--unscale-lr", "--lr", "1e-3", "--warmup-epochs", "0"]


def write_images(root: Path, counts: dict[str, int], classes: int = 3, size: int = 56) -> Path:
    """Write noise with a colour per class, as `root/SPLIT/CLASS/N.png`."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for i in range(count):
            label = i % classes
            pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
            pixels[..., label] += 100
            path = root / split / f"class{label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root

#!/usr/bin/env python3
"""Make small, real data for demos and tests, without a download: handwritten digits on photographs.

scikit-learn ships 1,797 handwritten digits (8x8 pixels) and two photographs, scikit-image ships more photographs. This
tool pastes the digits at several scales onto crops of the photographs. Boxes and masks are exact, since they come from
the rendered ink. No digit and no photograph is used in both splits (`train`, `val`); the split is fixed, so a network
pretrained on one seed has not seen the held-out digits of another. Writers are not recorded by scikit-learn: one
person's digits can be in both splits.

    python tools/make_mini_data.py                                      # COCO layout, 600 + 120 images of 192 px
    python tools/make_mini_data.py --layout coco,imagefolder --out data # writes data/coco and data/imagefolder

Each layout is a folder of its own below the output folder:

    coco/         train/*.jpg, val/*.jpg, annotations/instances_{train,val}.json (RLE masks; zero ... nine are 1 ... 10)
    imagefolder/  {train,val}/{0 ... 9}/*.jpg: one digit per image, for classification
    ade/          images/{training,validation}/*.jpg, annotations/{training,validation}/*.png as in ADE20K: 0 is
                  unlabelled (not used here), 1 is background, 2 ... 11 are zero ... nine; mmseg's `reduce_zero_label`
                  turns that into background = 0, zero ... nine = 1 ... 10
    llava/        images/{train,val}/*.jpg, train.json (questions), pretrain.json (captions), in_words.json (every
                  training image as a text of 16 words, to train a language model on), val.jsonl (held-out questions
                  with their answers)

Beside them lies manifest.json: the options, and the photograph and the digits of every image. The same options give
the same bytes (with the same Pillow); image number i does not depend on how many images follow it.
"""

import argparse
import dataclasses
import importlib.util
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

log = logging.getLogger("make_mini_data")

FORMAT = 1  # raise it when the same options begin to give other images or other files
SPLITS = ("train", "val")
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHOTOS = {
    "train": (
        "china.jpg",
        "astronaut.png",
        "brick.png",
        "camera.png",
        "coffee.png",
        "grass.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "motorcycle_left.png",
        "retina.jpg",
    ),
    "val": ("flower.jpg", "chelsea.png", "gravel.png", "moon.png", "rocket.jpg"),
}
INSTALL = "pip install scikit-learn scikit-image pycocotools"

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
MAX_HIDDEN = 0.15  # share of a digit's ink that may lie under or over other digits
MAX_TILT = 12.0  # degrees
SMALLEST = 8  # px: a digit is an 8x8 image, fewer pixels cannot show it


# ------------------------------------------------------------------------------------------------- what is drawn


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the images of one layout. Sizes are in pixels, and mean the longer side of the ink."""

    image_size: int
    train: int
    val: int
    seed: int
    digits_per_image: tuple[int, int]
    min_size: int
    max_size: int

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: an option is impossible; the message is one line that names it.
        """
        low, high = self.digits_per_image
        if self.image_size < 2 * SMALLEST:
            raise ValueError(f"--image-size is {self.image_size}: at least {2 * SMALLEST} px are needed to show digits")
        for split in SPLITS:
            if self.count(split) < 1:
                raise ValueError(f"--{split} is {self.count(split)}: at least one image is needed")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}: it must be 0 or more")
        if not 1 <= low <= high:
            raise ValueError(f"--digits-per-image is {low} {high}: expected two numbers with 1 <= least <= most")
        if self.min_size < SMALLEST:
            raise ValueError(f"--min-size is {self.min_size}: digits are illegible below {SMALLEST} px")
        if self.min_size > self.max_size:
            raise ValueError(f"--min-size {self.min_size} is larger than --max-size {self.max_size}")
        if self.max_size + 2 > self.image_size:
            raise ValueError(
                f"--max-size {self.max_size} does not fit an image of {self.image_size} px: "
                f"choose {self.image_size - 2} or less, or a larger image"
            )

    def count(self, split: str) -> int:
        """Return the number of images of a split."""
        return {"train": self.train, "val": self.val}[split]


@dataclasses.dataclass(frozen=True)
class Scene:
    """One image with its N digits, and where each part of it came from."""

    index: int  # position in its split, from 0
    image: np.ndarray  # (H, W, 3) uint8, RGB
    masks: np.ndarray  # (N, H, W) bool, the visible ink; no pixel belongs to two digits
    boxes: np.ndarray  # (N, 4) int, x0, y0, x1, y1 of the mask; x1 and y1 are exclusive
    labels: np.ndarray  # (N,) int, 0 to 9
    digits: np.ndarray  # (N,) int, indexes into sklearn.datasets.load_digits()
    photo: str  # file name of the photograph


@dataclasses.dataclass(frozen=True)
class Material:
    """The real images that scenes are made of."""

    glyphs: np.ndarray  # (1797, 8, 8) float32, ink from 0 to 1
    labels: np.ndarray  # (1797,) int
    members: dict[str, list[np.ndarray]]  # split -> for each class, the indexes of its digits
    photos: dict[str, list[tuple[str, Image.Image]]]  # split -> (file name, RGB image)


def load_material() -> Material:
    """Read digits and photographs from the installed packages; no network is ever used.

    Raises:
        ModuleNotFoundError: scikit-learn or scikit-image is not installed.
        FileNotFoundError: an installed package does not hold a photograph that its releases normally ship.
    """
    # The photographs are read as files: skimage.data's functions would download what is not there.
    folders = [package_folder("sklearn") / "datasets" / "images", package_folder("skimage") / "data"]
    photos = {split: [(name, read_photo(name, folders)) for name in names] for split, names in PHOTOS.items()}
    from sklearn.datasets import load_digits

    bunch = load_digits()
    by_class = [np.flatnonzero(bunch.target == label) for label in range(len(CLASSES))]
    held_out = [np.arange(len(indexes)) % 5 == 4 for indexes in by_class]
    return Material(
        glyphs=(bunch.images / 16).astype(np.float32),
        labels=bunch.target,
        members={
            "train": [indexes[~held] for indexes, held in zip(by_class, held_out, strict=True)],
            "val": [indexes[held] for indexes, held in zip(by_class, held_out, strict=True)],
        },
        photos=photos,
    )


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"mini data needs the package {name}, which is not installed: {INSTALL}")
    return Path(spec.submodule_search_locations[0])


def read_photo(name: str, folders: list[Path]) -> Image.Image:
    """Read a photograph from the first of the folders that has it, as RGB."""
    for folder in folders:
        if (folder / name).is_file():
            with Image.open(folder / name) as image:
                photo = image.convert("RGB")
            photo.thumbnail((800, 800))  # the largest are far sharper than any crop needs, and slow to resample
            return photo
    raise FileNotFoundError(
        f"photograph {name} is in none of {', '.join(map(str, folders))}: "
        "reinstall scikit-learn and scikit-image from wheels that ship it"
    )


def make_scene(material: Material, recipe: Recipe, split: str, index: int) -> Scene:
    """Draw one scene; it depends on the recipe's seed, sizes and digit counts, the split and the index alone.

    Raises:
        ValueError: fewer digits than the recipe's least number found room.
    """
    rng = np.random.default_rng([recipe.seed, SPLITS.index(split), index])
    photo, canvas = draw_background(rng, material.photos[split], recipe.image_size)
    least, most = recipe.digits_per_image
    wanted = int(rng.integers(least, most + 1))
    masks: list[np.ndarray] = []
    full_ink: list[int] = []
    chosen: list[int] = []
    for position in range(wanted):
        # The first digits of successive scenes cycle through the classes: small sets hold every class, too.
        label = index % len(CLASSES) if position == 0 else int(rng.integers(len(CLASSES)))
        digit = int(rng.choice(material.members[split][label]))
        placed = place_digit(rng, canvas, masks, full_ink, material.glyphs[digit], recipe)
        if placed is None:
            continue
        for mask in masks:
            mask &= ~placed
        masks.append(placed)
        full_ink.append(int(placed.sum()))
        chosen.append(digit)
    if len(chosen) < least:
        raise ValueError(
            f"{least} digits of at least {recipe.min_size} px find no room in an image of {recipe.image_size} px: "
            "lower --digits-per-image or --min-size"
        )
    return Scene(
        index=index,
        image=canvas.round().astype(np.uint8),
        masks=np.stack(masks),
        boxes=np.array([tight_box(mask) for mask in masks]),
        labels=material.labels[chosen],
        digits=np.array(chosen),
        photo=photo,
    )


def draw_background(
    rng: np.random.Generator, photos: list[tuple[str, Image.Image]], size: int
) -> tuple[str, np.ndarray]:
    """Cut a random square out of a random photograph: its name and the (size, size, 3) float32 crop, 0 to 255."""
    name, photo = photos[rng.integers(len(photos))]
    side = round(float(rng.uniform(0.4, 1.0)) * min(photo.size))
    left = int(rng.integers(photo.width - side + 1))
    top = int(rng.integers(photo.height - side + 1))
    crop = photo.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    pixels = np.asarray(crop, dtype=np.float32) * np.float32(rng.uniform(0.35, 0.6))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return name, np.clip(pixels, 0, 255)


def place_digit(
    rng: np.random.Generator,
    canvas: np.ndarray,
    masks: list[np.ndarray],
    full_ink: list[int],
    glyph: np.ndarray,
    recipe: Recipe,
) -> np.ndarray | None:
    """Paint one digit onto the canvas (H, W, 3), in place, where it hides little of the others.

    Returns its mask (H, W), or None if no room was found.
    """
    size = float(np.exp(rng.uniform(np.log(recipe.min_size), np.log(recipe.max_size))))
    tilt = float(rng.uniform(-MAX_TILT, MAX_TILT))
    alpha = render_glyph(glyph, round(size), tilt)
    for attempt in range(40):
        if attempt % 10 == 9:  # crowded: a smaller one may still fit
            size = max(size * 0.7, recipe.min_size)
            alpha = render_glyph(glyph, round(size), tilt)
        height, width = alpha.shape
        top = int(rng.integers(recipe.image_size - height + 1))
        left = int(rng.integers(recipe.image_size - width + 1))
        window = (slice(top, top + height), slice(left, left + width))
        ink = alpha >= 0.5
        if not has_room(ink, [mask[window] for mask in masks], masks, full_ink):
            continue
        patch = canvas[window]
        matte = alpha[..., None] * np.float32(rng.uniform(0.92, 1.0))
        canvas[window] = patch + matte * (choose_ink(rng) - patch)
        placed = np.zeros(canvas.shape[:2], dtype=bool)
        placed[window] = ink
        return placed
    return None


def render_glyph(glyph: np.ndarray, size: int, tilt: float) -> np.ndarray:
    """Turn an 8x8 digit (ink 0 to 1) into a smooth alpha matte whose ink is about `size` px along its longer side.

    Returns (h, w) float32 from 0 to 1, with one soft pixel around the ink (alpha >= 0.5).
    """
    scale, border = 8, 3  # the border keeps a tilted digit, and the soft pixel around it, inside the picture
    large = Image.fromarray(np.pad(glyph, border))
    large = large.resize((large.width * scale, large.height * scale), Image.Resampling.BICUBIC)
    large = large.rotate(tilt, Image.Resampling.BILINEAR)
    # Scans have soft grey edges; a steep curve turns them into strokes with a definite outline.
    matte = np.clip((np.asarray(large) - 0.25) / 0.2, 0, 1)
    x0, y0, x1, y1 = tight_box(matte >= 0.5)
    step = max(x1 - x0, y1 - y0) / size  # pixels of the large picture per pixel of the result
    shape = (max(round((x1 - x0) / step), 1) + 2, max(round((y1 - y0) / step), 1) + 2)
    small = Image.fromarray(matte).resize(
        shape, Image.Resampling.BICUBIC, box=(x0 - step, y0 - step, x1 + step, y1 + step)
    )
    return np.clip(np.asarray(small), 0, 1)


def has_room(ink: np.ndarray, under: list[np.ndarray], masks: list[np.ndarray], full_ink: list[int]) -> bool:
    """Say whether new ink (h, w) leaves itself and every earlier digit readable.

    `under` holds the earlier masks in the new ink's window, `full_ink` their areas before anything covered them.
    """
    overlaps = [int((ink & mask).sum()) for mask in under]
    if sum(overlaps) > MAX_HIDDEN * ink.sum():
        return False
    return all(
        overlap == 0 or mask.sum() - overlap >= (1 - MAX_HIDDEN) * total
        for overlap, mask, total in zip(overlaps, masks, full_ink, strict=True)
    )


def choose_ink(rng: np.random.Generator) -> np.ndarray:
    """Draw the colour of a digit, (3,) float32: light, with some tint. Backgrounds are dimmed to stay below it."""
    return np.float32(rng.uniform(215, 255) - rng.uniform(0, 55, size=3))


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return x0, y0, x1, y1 (x1, y1 exclusive) of a mask (H, W) that is not empty."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# ------------------------------------------------------------------------------------------------- layouts
# A writer gets its folder, the split and the split's scenes, one at a time.


def save_jpeg(image: np.ndarray, path: Path) -> None:
    """Save an RGB image (H, W, 3) as a JPEG with full colour resolution."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=88, subsampling=0)


def save_json(value: Any, path: Path) -> None:
    """Save a value as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def write_coco(folder: Path, split: str, scenes: Iterable[Scene]) -> None:
    """Write one split as COCO instances; the masks are compressed RLE."""
    try:
        from pycocotools import mask as coco_mask
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the coco layout needs pycocotools, which is not installed: {INSTALL}") from error
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for scene in scenes:
        name = f"{scene.index:06d}.jpg"
        save_jpeg(scene.image, folder / split / name)
        height, width = scene.image.shape[:2]
        image_id = scene.index + 1
        images.append({"id": image_id, "file_name": name, "width": width, "height": height, "photo": scene.photo})
        for mask, (x0, y0, x1, y1), label, digit in zip(
            scene.masks, scene.boxes.tolist(), scene.labels.tolist(), scene.digits.tolist(), strict=True
        ):
            rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                    "iscrowd": 0,
                    "digit_index": digit,
                }
            )
    document = {
        "info": {"description": f"PIIP mini data: handwritten digits on photographs, split {split}"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name, "supercategory": "digit"} for i, name in enumerate(CLASSES)],
    }
    save_json(document, folder / "annotations" / f"instances_{split}.json")


def write_imagefolder(folder: Path, split: str, scenes: Iterable[Scene]) -> None:
    """Write one split as a folder per class: 0 to 9, so that the sorted folder names are in the order of the digits."""
    for scene in scenes:
        save_jpeg(scene.image, folder / split / str(scene.labels[0]) / f"{scene.index:06d}.jpg")


def write_ade(folder: Path, split: str, scenes: Iterable[Scene]) -> None:
    """Write one split as ADE20K does: images, and maps with 1 for background and 2 to 11 for the digits."""
    name = {"train": "training", "val": "validation"}[split]
    (folder / "annotations" / name).mkdir(parents=True)
    for scene in scenes:
        save_jpeg(scene.image, folder / "images" / name / f"{scene.index:06d}.jpg")
        classes = np.ones(scene.image.shape[:2], dtype=np.uint8)
        for mask, label in zip(scene.masks, scene.labels, strict=True):
            classes[mask] = label + 2
        Image.fromarray(classes).save(folder / "annotations" / name / f"{scene.index:06d}.png")


def write_llava(folder: Path, split: str, scenes: Iterable[Scene]) -> None:
    """Write one split as LLaVA conversations (train) or as questions with answers (val)."""
    chats: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    pictures: dict[str, str] = {}
    for scene in scenes:
        image = f"{split}/{scene.index:06d}.jpg"
        save_jpeg(scene.image, folder / "images" / image)
        asked = ask(scene)
        common = {"id": f"{split}_{scene.index:06d}", "image": image}
        turns = []
        # Each in turn comes first, as every held-out question does.
        first = scene.index % len(asked)
        for number, (_, question, answer) in enumerate(asked[first:] + asked[:first]):
            turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
            turns.append({"from": "gpt", "value": answer})
        chats.append({**common, "conversations": turns})
        caption = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": describe(scene)}]
        captions.append({**common, "conversations": caption})
        pictures[common["id"]] = draw_in_words(scene)
        for category, question, answer in asked:
            entry = {"question_id": len(questions), "image": image, "text": question, "answer": answer}
            questions.append({**entry, "category": category})
    if split == "train":
        save_json(chats, folder / "train.json")
        save_json(captions, folder / "pretrain.json")
        save_json(pictures, folder / "in_words.json")
    else:
        lines = "".join(json.dumps(question) + "\n" for question in questions)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def ask(scene: Scene) -> list[tuple[str, str, str]]:
    """Return (category, question, answer) for a scene, leaving out what a careful reader could answer in two ways."""
    names = [CLASSES[label] for label in scene.labels]
    found = [("count", "How many digits are in the image?", str(len(names)))]
    sizes = (scene.boxes[:, 2:] - scene.boxes[:, :2]).max(axis=1)
    by_size = np.argsort(-sizes)
    if len(names) == 1 or sizes[by_size[0]] >= 1.2 * sizes[by_size[1]]:
        found.append(("largest", "Which digit is the largest?", names[by_size[0]]))
    centres = (scene.boxes[:, 0] + scene.boxes[:, 2]) / 2
    by_place = np.argsort(centres)
    gaps = np.diff(centres[by_place]) >= 0.04 * scene.image.shape[1]
    if len(names) == 1 or gaps[0]:
        found.append(("leftmost", "Which digit is the leftmost?", names[by_place[0]]))
    for rank in range(1, len(names)):
        here, before = names[by_place[rank]], names[by_place[rank - 1]]
        # The left neighbour must be clear of the digit itself and of the next one further left.
        if names.count(here) == 1 and gaps[rank - 1] and (rank == 1 or gaps[rank - 2]):
            found.append(("left of", f"Which digit is directly left of the {here}?", before))
    return found


def draw_in_words(scene: Scene, side: int = 4) -> str:
    """Return a scene as `side` x `side` words, row by row: the digit that covers most of a cell of the image.

    A cell of which no digit covers 8 % is "none".
    """
    cover = np.stack(
        [Image.fromarray(np.float32(mask)).resize((side, side), Image.Resampling.BOX) for mask in scene.masks]
    )
    words = np.array([CLASSES[label] for label in scene.labels])
    return " ".join(np.where(cover.max(axis=0) >= 0.08, words[cover.argmax(axis=0)], "none").flat)


def describe(scene: Scene) -> str:
    """Return a caption that lists the digits of a scene from left to right."""
    order = np.argsort(scene.boxes[:, 0] + scene.boxes[:, 2])
    return "From left to right: " + ", ".join(CLASSES[label] for label in scene.labels[order]) + "."


WRITERS: dict[str, Callable[[Path, str, Iterable[Scene]], None]] = {
    "coco": write_coco,
    "imagefolder": write_imagefolder,
    "ade": write_ade,
    "llava": write_llava,
}


# ------------------------------------------------------------------------------------------------- building


def default_out() -> Path:
    """Return where mini data lives by default: $PIIP_DATA/mini, else piip/mini in the user's cache folder."""
    if os.environ.get("PIIP_DATA"):
        return Path(os.environ["PIIP_DATA"]).expanduser() / "mini"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "piip" / "mini"


def make_mini_data(
    out: str | Path | None = None,
    layouts: Iterable[str] = ("coco",),
    *,
    image_size: int = 192,
    train: int = 600,
    val: int = 120,
    seed: int = 0,
    digits_per_image: tuple[int, int] = (3, 8),
    min_size: int | None = None,
    max_size: int | None = None,
    crop_size: int = 64,
    crops_per_image: int = 5,
    overwrite: bool = False,
) -> Path:
    """Make the mini data in each of the layouts, or find it already made with the same options.

    A layout appears under its name only when it is complete.

    Args:
        out: folder that gets one folder per layout; None means `default_out()`.
        layouts: names out of `WRITERS`.
        image_size: side of the square images, px.
        train: number of training images.
        val: number of held-out images.
        seed: 0 or more.
        digits_per_image: least and most digits in an image; a crowded image stops short of its drawn number.
        min_size: smallest digit, px along the longer side of its ink; None means 10, or less in tiny images.
        max_size: largest digit; None means half of the image. Sizes in between are spread log-uniformly.
        crop_size: side of the imagefolder layout's images, px.
        crops_per_image: images of the imagefolder layout per image asked for in `train` and `val`.
        overwrite: replace data that an earlier call made with other options.

    Returns:
        The folder that holds the layouts' folders.

    Raises:
        ValueError: an option is impossible, or a layout's folder holds something else than was asked for.
        ModuleNotFoundError: a package is missing.
        OSError: reading or writing failed.
    """
    names = list(dict.fromkeys(layouts))
    unknown = [name for name in names if name not in WRITERS]
    if unknown or not names:
        raise ValueError(f"unknown layout '{', '.join(unknown)}': known are {', '.join(WRITERS)}")
    if max_size is None:
        max_size = image_size // 2
    if min_size is None:
        min_size = max(min(10, max_size), SMALLEST)
    least, most = digits_per_image
    recipe = Recipe(image_size, train, val, seed, (least, most), min_size, max_size)
    recipes = dict.fromkeys(names, recipe)
    if "imagefolder" in names:
        recipes["imagefolder"] = crop_recipe(recipe, crop_size, crops_per_image)

    out = default_out() if out is None else Path(out).expanduser()
    missing = [name for name in names if not is_made(out / name, recipes[name], overwrite)]
    for name in names:
        if name not in missing:
            log.info("%s: found, made earlier with the same options", out / name)
    if missing:
        material = load_material()
        out.mkdir(parents=True, exist_ok=True)
        for name in missing:
            build(out / name, recipes[name], material, overwrite)
            log.info("%s: %d + %d images", out / name, recipes[name].train, recipes[name].val)
    return out


def crop_recipe(recipe: Recipe, crop_size: int, crops_per_image: int) -> Recipe:
    """Derive the recipe of images with one digit each, which fills 35 % to 90 % of the image."""
    if crops_per_image < 1:
        raise ValueError(f"--crops-per-image is {crops_per_image}: it must be 1 or more")
    if crop_size < 3 * SMALLEST:
        raise ValueError(f"--crop-size is {crop_size}: at least {3 * SMALLEST} px are needed to show digits")
    counts = {split: crops_per_image * recipe.count(split) for split in SPLITS}
    for split, count in counts.items():
        if count < len(CLASSES):
            raise ValueError(
                f"--{split} x --crops-per-image is {count}: the imagefolder layout needs {len(CLASSES)} or more, "
                "one per class"
            )
    return dataclasses.replace(
        recipe,
        image_size=crop_size,
        digits_per_image=(1, 1),
        min_size=max(round(0.35 * crop_size), SMALLEST),
        max_size=round(0.9 * crop_size),
        **counts,
    )


def is_made(folder: Path, recipe: Recipe, overwrite: bool) -> bool:
    """Say whether a layout is there already; False means that it can be built.

    Raises:
        ValueError: the folder holds something that is not ours to replace, or (without `overwrite`) other data.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        made, files = manifest["options"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} holds something that this tool did not make (no readable manifest.json): choose another --out"
        ) from error
    if overwrite:
        return False
    asked = options_of(recipe)
    if made != asked:
        names = sorted(name for name in asked.keys() | made.keys() if made.get(name) != asked.get(name))
        differences = ", ".join(f"{name} {made.get(name)} instead of {asked.get(name)}" for name in names)
        raise ValueError(f"{folder} was made with other options ({differences}): pass --overwrite or another --out")
    for name, size in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{folder} is damaged ({name} is missing or changed): pass --overwrite to make it again")
    return True


def options_of(recipe: Recipe) -> dict[str, Any]:
    """Return what a manifest records about a recipe, in JSON's types."""
    return {"format": FORMAT, **dataclasses.asdict(recipe), "digits_per_image": list(recipe.digits_per_image)}


def build(folder: Path, recipe: Recipe, material: Material, overwrite: bool) -> None:
    """Write a layout into a temporary sibling, then move it to its place in one step."""
    origin: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}

    def scenes(split: str) -> Iterator[Scene]:
        for index in range(recipe.count(split)):
            scene = make_scene(material, recipe, split, index)
            origin[split].append({"photo": scene.photo, "digits": scene.digits.tolist()})
            yield scene

    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        for split in SPLITS:
            WRITERS[folder.name](fresh, split, scenes(split))
        files = sorted(path for path in fresh.rglob("*") if path.is_file())
        manifest = {
            "options": options_of(recipe),
            "classes": CLASSES,
            "origin": origin,
            "files": {path.relative_to(fresh).as_posix(): path.stat().st_size for path in files},
        }
        save_json(manifest, fresh / "manifest.json")
        if overwrite and folder.exists():
            folder.rename(Path(scratch) / "old")
        try:
            fresh.rename(folder)
        except OSError:
            # Another process may have been faster with the same data.
            if not is_made(folder, recipe, overwrite=False):
                raise


# ------------------------------------------------------------------------------------------------- command line


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_arguments(arguments: list[str] | None) -> dict[str, Any]:
    """Turn command-line arguments into keyword arguments of `make_mini_data`."""
    parser = OneLineParser(description="Make small, real data without a download: handwritten digits on photographs.")
    known = ", ".join(WRITERS)
    add = parser.add_argument
    add("--out", type=Path, default=default_out(), help="gets one folder per layout (default: %(default)s)")
    add("--layout", action="append", help=f"one of {known}; repeat it or use commas (default: coco)")
    add("--image-size", type=int, help="side of the images, px (default: %(default)s)")
    add("--train", type=int, help="training images (default: %(default)s)")
    add("--val", type=int, help="held-out images (default: %(default)s)")
    add("--seed", type=int, help="0 or more (default: %(default)s)")
    add("--digits-per-image", type=int, nargs=2, metavar=("LEAST", "MOST"), help="between these (default: %(default)s)")
    add("--min-size", type=int, help="longer side of the smallest digit, px (default: 10)")
    add("--max-size", type=int, help="longer side of the largest digit, px (default: half of the image)")
    add("--crop-size", type=int, help="imagefolder: side of the images, px (default: %(default)s)")
    add("--crops-per-image", type=int, help="imagefolder: this many times more images (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace data that was made with other options")
    parser.set_defaults(**(make_mini_data.__kwdefaults__ or {}))
    options = vars(parser.parse_args(arguments))
    given = options.pop("layout") or ["coco"]
    options["layouts"] = [name.strip() for text in given for name in text.split(",") if name.strip()]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 for impossible options or a failure."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse_arguments(arguments)
    try:
        make_mini_data(**options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f"make_mini_data.py: error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

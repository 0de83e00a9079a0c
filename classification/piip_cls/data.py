"""Data sets, augmentation, and the order of the samples.

Three rules make a run independent of workers, of the number of processes, and of where it was interrupted: the order
depends on (seed, epoch), a sample's augmentation on (seed, epoch, position in that order), and processes share each
batch out position by position.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR100, ImageFolder

from piip.errors import BrokenImageError, RunError
from piip.integrations.process import end_with_parent, seeded
from piip_cls.processes import Processes
from piip_cls.recipe import first_line

REPEATS = 3  # of an image under repeated augmentation (arXiv 1902.05509)


class Samples(Dataset):
    """Images by number, as `(image, class)`.

    Args:
        items: Path or image, and class, of every sample.
        classes: Names of the classes.
        transform: From an RGB image to a tensor `(3, H, W)`.
        seed: First part of every augmentation's seed.
    """

    def __init__(self, items: Sequence[tuple[Any, int]], classes: Sequence[str], transform: Any, seed: int) -> None:
        self.items, self.classes, self.transform, self.seed = items, list(classes), transform, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, draw: tuple[int, int, int]) -> tuple[Tensor, int]:
        """Return the sample of `(epoch, position, index)`.

        Raises:
            BrokenImageError: The image cannot be read.
        """
        epoch, position, index = draw
        source, label = self.items[index]
        image = source if isinstance(source, Image.Image) else read_image(source)
        with seeded(self.seed, epoch, position):
            return self.transform(image), label


def read_image(path: str | Path) -> Image.Image:
    """Read an image as RGB.

    Raises:
        BrokenImageError: It is not there or cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise BrokenImageError(f"{path} cannot be read as an image") from error


class Batches:
    """The batches of one process: lists of `(epoch, position, index)`, for a `DataLoader`.

    Args:
        count: Number of samples.
        size: Samples per batch and process.
        processes: This process among the others.
        seed: Seed of the order; None keeps the samples in order, once each, whatever the number of processes.
        repeated: Draw every image several times, and so many images less.
    """

    def __init__(
        self, count: int, size: int, processes: Processes, seed: int | None = None, repeated: bool = False
    ) -> None:
        self.count, self.size, self.processes, self.seed, self.repeated = count, size, processes, seed, repeated
        self.epoch = 0
        if processes.count > count:
            raise RunError(
                f"{count} images for {processes.count} processes: start {count} at most, or give more images"
            )
        if seed is not None and not len(self):
            raise RunError(
                f"the training data hold {count} images, fewer than one batch of {size} on {processes.count} "
                f"process(es): use --batch-size {count // processes.count} or less"
            )

    def __len__(self) -> int:
        if self.seed is None:
            return -(-len(range(self.processes.rank, self.count, self.processes.count)) // self.size)
        return self.count // (self.size * self.processes.count)  # training drops the rest, as the original does

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        mine = range(self.processes.rank, self.count, self.processes.count)
        order = self._order()
        for start in range(0, len(self) * self.size, self.size):
            yield [(self.epoch, position, order[position]) for position in mine[start : start + self.size]]

    def _order(self) -> list[int]:
        if self.seed is None:
            return list(range(self.count))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator)
        if self.repeated:  # neighbours in the order go to different processes
            order = order.repeat_interleave(REPEATS)[: self.count]
        return order.tolist()


def build_samples(args: argparse.Namespace, size: int, split: str) -> Samples:
    """Return a split of the data set that the options name.

    Args:
        args: Options.
        size: Side of the model's images in pixels.
        split: `train` or `val`.

    Raises:
        RunError: The data are not there, or not of the layout.
    """
    transform = build_transform(args, size, split == "train")
    root = Path(args.data_path)
    if not root.is_dir():
        raise RunError(f"--data-path: there is no folder {root} (seen from {Path.cwd()})")
    if args.data_set == "CIFAR":
        try:
            data = CIFAR100(root, train=split == "train")
        except RuntimeError as error:
            raise RunError(f"{root} holds no CIFAR-100 (the folder cifar-100-python of its archive)") from error
        images = [Image.fromarray(array) for array in data.data]
        return Samples(list(zip(images, data.targets, strict=True)), data.classes, transform, args.seed)
    if args.data_set == "IMNET":
        folder = root / split
        if not folder.is_dir():
            raise RunError(f"{root} has no folder {split}: expected {folder}/CLASS/IMAGE")
        try:
            data = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise RunError(f"{folder}: {first_line(error)}; expected {folder}/CLASS/IMAGE") from error
        return Samples(data.samples, data.classes, transform, args.seed)
    year = {"INAT": 2018, "INAT19": 2019}[args.data_set]
    return Samples(*_inaturalist(root, split, year, args.inat_category), transform, args.seed)


def _inaturalist(root: Path, split: str, year: int, category: str) -> tuple[list[tuple[str, int]], list[str]]:
    """Read iNaturalist's json files; classes are numbered as they first appear in the training annotations."""

    def read(name: str) -> Any:
        if not (root / name).is_file():
            raise RunError(f"{root} has no {name}: expected the files of iNaturalist {year}")
        return json.loads((root / name).read_text(encoding="utf-8"))

    kinds = read("categories.json")
    number: dict[str, int] = {}
    for annotation in read(f"train{year}.json")["annotations"]:
        number.setdefault(kinds[int(annotation["category_id"])][category], len(number))
    items = []
    for image in read(f"{split}{year}.json")["images"]:
        parts = Path(image["file_name"]).parts  # archive, supercategory, category, file
        path = root / image["file_name"]
        if not path.is_file():  # the archives of some mirrors have no folder for the supercategory
            path = root / parts[0] / Path(*parts[2:])
        kind = kinds[int(parts[2])][category]
        if kind not in number:
            raise RunError(f"{split}{year}.json has images of {kind!r}, and train{year}.json has none")
        items.append((str(path), number[kind]))
    return items, list(number)


def build_transform(args: argparse.Namespace, size: int, train: bool) -> Any:
    """Return timm's transform for training or evaluation, with ImageNet's mean and deviation.

    Raises:
        RunError: timm knows no such policy of augmentation.
    """
    if not train or args.no_aug:
        return create_transform(
            size, is_training=False, interpolation="bicubic", crop_pct=args.eval_crop_ratio if not train else 1.0
        )
    policy = "3a" if args.ThreeAugment else None if args.aa == "none" else args.aa
    try:
        create_transform(size, is_training=True, auto_augment=policy)
    except (AssertionError, KeyError, ValueError) as error:
        raise RunError(
            f"--aa {args.aa} is no policy of timm's ({first_line(error)}): expected none, 3a, augmix-..., original, "
            "originalr, rand-..., v0 or v0r, such as rand-m9-mstd0.5-inc1"
        ) from error
    crop, augment, finish = create_transform(
        size,
        is_training=True,
        scale=tuple(args.scale),
        ratio=tuple(args.ratio),
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=None,
        auto_augment=policy,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_num_splits=int(args.resplit),
        separate=True,
    )
    if args.src:
        crop = transforms.Compose(
            [
                transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomCrop(size, padding=4, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(args.hflip),
            ]
        )
    return transforms.Compose([crop, augment, finish])


def check_classes(train: Samples, val: Samples) -> None:
    """Check that both splits have the same classes.

    Raises:
        RunError: They do not; the message names classes of one split alone.
    """
    for one, other, names in (("train", "val", (train, val)), ("val", "train", (val, train))):
        if extra := [name for name in names[0].classes if name not in names[1].classes]:
            raise RunError(
                f"the classes of train and val differ: {', '.join(extra[:3])}{', ...' if extra[3:] else ''} of {one} "
                f"{'is' if len(extra) == 1 else 'are'} not in {other}, so class numbers would not mean the same"
            )


class _StartWorker:
    """Ends a worker with the process that started it."""

    def __init__(self) -> None:
        self.parent = os.getpid()

    def __call__(self, worker: int) -> None:
        torch.set_num_threads(1)
        end_with_parent(self.parent, None, worker)


def build_loader(samples: Samples, batches: Batches, workers: int, pin: bool) -> DataLoader:
    """Return the loader of a split."""
    workers = min(workers, len(batches))
    start = _StartWorker() if workers else None
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, pin_memory=pin, worker_init_fn=start)

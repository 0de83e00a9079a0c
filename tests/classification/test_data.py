"""Order, augmentation and data sets."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from piip.errors import RunError
from piip_cls.data import Batches, build_loader, build_samples, build_transform, check_classes
from piip_cls.options import parse
from piip_cls.processes import Processes


def options(*words: object):
    return parse(["--model", "x", *map(str, words)])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_evaluation_sees_every_image_once(count):
    drawn = [draw for rank in range(count) for batch in Batches(101, 16, Processes(rank, count)) for draw in batch]
    assert sorted(index for _, _, index in drawn) == list(range(101))


def test_processes_share_the_batches_of_one():
    def batches(count: int, rank: int, size: int) -> list[list[tuple[int, int, int]]]:
        given = Batches(50, size, Processes(rank, count), seed=3)
        given.epoch = 2
        return list(given)

    whole = batches(1, 0, 8)
    assert len(whole) == 6
    halves = [sorted(a + b) for a, b in zip(batches(2, 0, 4), batches(2, 1, 4), strict=True)]
    assert halves == [sorted(batch) for batch in whole]
    other = Batches(50, 8, Processes(), seed=3)
    assert list(other) != whole  # another epoch


def test_repeated_augmentation_draws_an_image_several_times_on_different_processes():
    order = [Batches(60, 10, Processes(rank, 3), seed=0, repeated=True) for rank in range(3)]
    drawn = [[index for batch in given for _, _, index in batch] for given in order]
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(set(drawn[0])) == 20


def test_augmentation_depends_on_the_position_alone(images):
    args = options("--data-path", images)
    samples = build_samples(args, 48, "train")
    before = torch.get_rng_state()
    first, label = samples[(0, 5, 3)]
    assert first.shape == (3, 48, 48)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(samples[(0, 5, 3)][0], first)
    assert not torch.equal(samples[(1, 5, 3)][0], first)
    assert not torch.equal(samples[(0, 6, 3)][0], first)
    batches = Batches(len(samples), 8, Processes(), seed=0)
    with_workers = [x for x, _ in build_loader(samples, batches, 2, False)]
    assert all(
        torch.equal(a, b) for (a, _), b in zip(build_loader(samples, batches, 0, False), with_workers, strict=True)
    )
    assert label == samples.items[3][1]


def test_evaluation_resizes_the_shorter_side_and_crops(images):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8))
    args = options("--data-path", images)
    out = build_transform(args, 32, False)(picture)
    resized = picture.resize((72, 32), Image.Resampling.BICUBIC).crop((20, 0, 52, 32))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.from_numpy(np.array(resized)).float() / 255 - mean) / std
    torch.testing.assert_close(out, expected.permute(2, 0, 1), rtol=0, atol=0.02)
    closer = build_transform(options("--data-path", images, "--eval-crop-ratio", "0.8"), 32, False)(picture)
    assert closer.shape == out.shape
    assert not torch.equal(closer, out)


@pytest.mark.parametrize(
    "words", [(), ("--aa", "none"), ("--ThreeAugment",), ("--src", "--ThreeAugment"), ("--no-aug",)]
)
def test_training_transforms(words, images):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 60, 3), dtype=np.uint8))
    transform = build_transform(options("--data-path", images, *words), 48, True)
    outs = [transform(picture) for _ in range(4)]
    assert all(out.shape == (3, 48, 48) for out in outs)
    assert all(torch.equal(out, outs[0]) for out in outs[1:]) == ("--no-aug" in words)


def jitters(transform: object) -> list[transforms.ColorJitter]:
    """Every colour jitter inside a transform."""
    if isinstance(transform, transforms.Compose):
        return [jitter for part in transform.transforms for jitter in jitters(part)]
    return [transform] if isinstance(transform, transforms.ColorJitter) else []


def test_three_augment_jitters_colours_once(images):
    (jitter,) = jitters(
        build_transform(options("--data-path", images, "--ThreeAugment", "--color-jitter", 0.2), 48, True)
    )
    strength = pytest.approx((0.8, 1.2))
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (strength, strength, strength, None)
    assert jitters(build_transform(options("--data-path", images), 48, True)) == []


@pytest.mark.parametrize("policy", ["fast", "rand-q9", "randm9", "rand-m9.5"])
def test_a_policy_that_timm_does_not_know(policy, images):
    with pytest.raises(
        RunError, match=rf"--aa {policy} is no policy of timm's \(.+\): expected none, .* v0r"
    ) as caught:
        build_transform(options("--data-path", images, "--aa", policy), 48, True)
    assert "\n" not in str(caught.value)


def test_inaturalist(tmp_path):
    kinds = [{"genus": "Felis", "name": "a"}, {"genus": "Canis", "name": "b"}, {"genus": "Felis", "name": "c"}]
    (tmp_path / "categories.json").write_text(json.dumps(kinds))
    for split, order in (("train", [2, 1, 0]), ("val", [1, 2])):
        pictures = [{"file_name": f"train_val2018/Mammals/{kind}/{split}.png"} for kind in order]
        notes = [{"category_id": kind} for kind in order]
        (tmp_path / f"{split}2018.json").write_text(json.dumps({"images": pictures, "annotations": notes}))
        for kind in order:
            # One archive with the supercategory's folder, one without.
            folder = tmp_path / "train_val2018" / ("Mammals" if split == "train" else "") / str(kind)
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (kind * 90, 0, 0)).save(folder / f"{split}.png")
    args = options("--data-path", tmp_path, "--data-set", "INAT", "--inat-category", "genus")
    train, val = (build_samples(args, 16, split) for split in ("train", "val"))
    assert train.classes == val.classes == ["Felis", "Canis"]
    assert [label for _, label in train.items] == [0, 1, 0]
    assert [val[(0, 0, i)][1] for i in range(2)] == [1, 0]
    with pytest.raises(RunError, match=r"has no categories.json: expected the files of iNaturalist 2019"):
        build_samples(options("--data-path", tmp_path / "train_val2018", "--data-set", "INAT19"), 16, "train")


def test_cifar(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for split, labels in (("train", [3, 99]), ("test", [7])):
        pixels = np.zeros((len(labels), 3072), np.uint8)
        (folder / split).write_bytes(pickle.dumps({"data": pixels, "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    args = options("--data-path", tmp_path, "--data-set", "CIFAR")
    with pytest.raises(RunError, match="holds no CIFAR-100"):
        build_samples(args, 32, "train")
    monkeypatch.setattr("torchvision.datasets.CIFAR100._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    train, val = (build_samples(args, 32, split) for split in ("train", "val"))
    assert (len(train), len(val), len(train.classes)) == (2, 1, 100)
    assert [label for _, label in train.items] == [3, 99]
    assert val[(0, 0, 0)][0].shape == (3, 32, 32)


def test_data_that_does_not_fit(tmp_path, images):
    with pytest.raises(RunError, match="there is no folder"):
        build_samples(options("--data-path", tmp_path / "nothing"), 32, "train")
    with pytest.raises(RunError, match=r"has no folder val: expected .*val/CLASS/IMAGE"):
        build_samples(options("--data-path", images / "train"), 32, "val")
    (tmp_path / "val").mkdir()
    with pytest.raises(RunError, match="Couldn't find any class folder"):
        build_samples(options("--data-path", tmp_path), 32, "val")
    train = build_samples(options("--data-path", images), 32, "train")
    val = build_samples(options("--data-path", images), 32, "val")
    check_classes(train, val)
    val.classes = [*val.classes[:-1], "class9"]
    with pytest.raises(RunError, match="train and val differ: class2 of train is not in val"):
        check_classes(train, val)
    with pytest.raises(RunError, match="3 images for 4 processes: start 3 at most"):
        Batches(3, 2, Processes(0, 4))
    with pytest.raises(RunError, match=r"hold 24 images, fewer than one batch of 16 on 2 .*--batch-size 12 or less"):
        Batches(24, 16, Processes(0, 2), seed=0)

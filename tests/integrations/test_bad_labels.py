"""Segmentation data and settings that cannot give a good model: one line that names the culprit and the remedy."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg", reason="needs the segmentation extra")

import piip.integrations.mmseg  # noqa: F401  (stands in for mmcv's compiled ops, so it comes before mmseg)

# isort: split
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS

from piip.integrations import cli
from piip.integrations.config import read_config
from piip.integrations.labels import BrokenLabelError, check_labels, check_segmentation
from piip.integrations.preflight import RunError, check_data

ROOT = Path(__file__).resolve().parents[2]
MMSEGMENTATION = ROOT / "mmsegmentation"
MINI = MMSEGMENTATION / "configs" / "piip" / "mini" / "upernet_mini_vit-tsb_192_144_96.py"
LOADERS = ("train_dataloader", "val_dataloader")
SPLITS = ("training", "validation")


def save(values: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A function that returns the mini config with overrides; its data are three pictures per split."""
    monkeypatch.setenv("PIIP_DATA", str(tmp_path))
    root = tmp_path / "mini" / "ade"
    for split in SPLITS:
        for i in range(3):
            save(np.full((20, 30, 3), 90, np.uint8), root / "images" / split / f"{i}.jpg")
            save(np.full((20, 30), 1 + i, np.uint8), root / "annotations" / split / f"{i}.png")

    def read(**overrides):
        cfg = read_config(MINI, overrides)
        init_default_scope("mmseg")
        return cfg

    read.root = root
    return read


def fault(cfg) -> str:
    with pytest.raises(RunError) as error:
        check_segmentation(cfg, LOADERS)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_data_as_they_should_be(digits):
    cfg = digits()
    check_data(cfg, LOADERS)
    check_segmentation(cfg, LOADERS)


@pytest.mark.parametrize("split", SPLITS)
def test_a_value_that_is_no_class(digits, split):
    labels = np.ones((20, 30), np.uint8)
    labels[3, :5] = 12
    labels[4, 0] = 200
    labels[5] = 0  # ignored
    path = digits.root / "annotations" / split / "1.png"
    save(labels, path)
    assert fault(digits()) == (
        f"{path} holds the value 12 at 5 pixels (and 1 more values that are no class), but there are 11 classes, so "
        "values from 1 to 11 (reduce_zero_label is True: 0 is ignored, class k is stored as k + 1), and 255 for what "
        "is ignored; correct the file, metainfo.classes or reduce_zero_label"
    )


def test_values_where_zero_is_a_class(digits):
    for split in SPLITS:
        save(np.zeros((20, 30), np.uint8), digits.root / "annotations" / split / "0.png")
    zero = {f"{loader}.dataset.reduce_zero_label": False for loader in LOADERS}
    check_segmentation(digits(**zero), LOADERS)
    save(np.full((20, 30), 11, np.uint8), digits.root / "annotations/training/0.png")
    message = fault(digits(**zero))
    assert "holds the value 11 at 600 pixels, but there are 11 classes, so values from 0 to 10 " in message


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((20, 30, 3), 3, np.uint8), "holds colours (RGB), not one number per pixel"),
        (np.full((20, 30), 256, np.int32), "holds the value 256: label maps have values from 0 to 255"),
        (np.ones((30, 20), np.uint8), "has 30 x 20 pixels (height x width), and its image {image} has 20 x 30; "),
    ],
    ids=["colours", "16 bits", "size"],
)
def test_a_map_that_is_none(digits, values, said):
    path = digits.root / "annotations/training/2.png"
    save(values, path)
    image = digits.root / "images/training/2.jpg"
    assert fault(digits()).startswith(f"{path} {said.format(image=image)}")


def test_maps_that_are_missing_or_broken(digits):
    path = digits.root / "annotations/validation/0.png"
    path.write_bytes(path.read_bytes()[:30])
    assert fault(digits()) == f"{path} cannot be decoded as a label map"
    path.unlink()
    image = digits.root / "images/validation/0.jpg"
    assert fault(digits()).startswith(f"there is no label map {path} for the image {image}; ")
    assert "no image whose name ends in .tif in " in fault(digits(**{"train_dataloader.dataset.img_suffix": ".tif"}))


IGNORE = ".ignore_index"
META = "train_dataloader.dataset.metainfo"
SETTINGS = [
    (
        {"model.auxiliary_head.num_classes": 150},
        "model.decode_head.num_classes=11, model.auxiliary_head.num_classes=150, but train_dataloader.dataset has 11 ",
    ),
    (
        {META + ".palette": [(0, 0, 0)] * 10},
        "train_dataloader.dataset: metainfo.palette has 10 colours for 11 classes ('background', 'zero', ",
    ),
    ({META + ".palette": [(0, 0, 256)] * 11}, "metainfo.palette has (0, 0, 256) for the class 'background', "),
    (
        {"model.decode_head.ignore_index": 10},
        "model.decode_head.ignore_index is 10, which is the class 'nine' too: its pixels would be left out; ",
    ),
    ({"val_evaluator.ignore_index": 0}, "val_evaluator.ignore_index is 0, which is the class 'background' too"),
    (
        {"model.auxiliary_head.ignore_index": 254},
        "the settings for the label to be ignored differ: model.decode_head.ignore_index=255, "
        "model.auxiliary_head.ignore_index=254, ",
    ),
    (
        {"model.test_cfg": dict(mode="slide", crop_size=(96, 96), stride=(64, 100))},
        "model.test_cfg.stride (64, 100) does not fit model.test_cfg.crop_size (96, 96)",
    ),
    (
        {"train_dataloader.dataset.type": "ADE20KDataset"},
        "ADE20KDataset has no class 'background', it has ('wall', 'building', 'sky', 'floor', 'tree', ... 150 in all)",
    ),
    ({META: None}, "train_dataloader.dataset: the data have no class names; "),
]


@pytest.mark.parametrize(("changes", "said"), SETTINGS)
def test_settings_that_do_not_fit(digits, changes, said):
    assert said in fault(digits(**changes))


def test_a_pipeline_that_reads_zero_otherwise_than_its_data_set(digits):
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "reduce_zero_label": True}]
    cfg = digits(**{"train_dataloader.dataset.pipeline": pipeline})
    check_segmentation(cfg, LOADERS)
    cfg.train_dataloader.dataset.reduce_zero_label = False
    message = "reduce_zero_label is False for the data set of .*/training/0.png and True for the LoadAnnotations of its"
    with pytest.raises(BrokenLabelError, match=message):
        check_segmentation(cfg, LOADERS)


def test_some_of_a_data_sets_own_classes(digits):
    """Its palette is cut to them, and the others are ignored."""
    own = {"type": "ADE20KDataset", "metainfo": dict(classes=("sky", "wall"))}
    for split in SPLITS:
        shutil.rmtree(digits.root / "annotations" / split)
        for i in range(3):
            save(np.full((20, 30), 1 + i, np.uint8), digits.root / "annotations" / split / f"{i}.png")
    cfg = digits(**{"model.decode_head.num_classes": 2, "model.auxiliary_head.num_classes": 2})
    for loader in LOADERS:
        dataset = {k: v for k, v in cfg[loader].dataset.items() if k not in ("reduce_zero_label", "metainfo")}
        cfg[loader].dataset = {**dataset, **own}
    check_segmentation(cfg, LOADERS)


def test_every_file_is_checked_when_it_is_read(digits):
    """Beyond the few that are read before a run, in any wrapper."""
    save(np.full((20, 30), 77, np.uint8), digits.root / "annotations/training/1.png")
    cfg = digits()
    wrapped = {"type": "RepeatDataset", "times": 2, "dataset": cfg.train_dataloader.dataset}
    dataset = DATASETS.build(check_labels(wrapped, cfg.model))
    assert dataset[3]["data_samples"].gt_sem_seg.data.unique().tolist() == [0]
    with pytest.raises(BrokenLabelError, match=r"1\.png holds the value 77 at 600 pixels"):
        dataset[4]


def test_a_worker_reports_it_in_one_line(digits, tmp_path, capsys):
    for i in range(3, 40):  # most are not read before the run
        shutil.copy(digits.root / "images/training/0.jpg", digits.root / f"images/training/{i}.jpg")
        save(np.full((20, 30), 1 + 11 * (i == 21), np.uint8), digits.root / f"annotations/training/{i}.png")
    options = ["model.backbone.pretrained=None", "train_cfg.max_iters=20", "train_dataloader.batch_size=20"]
    args = cli.parse_train([str(MINI), "--work-dir", str(tmp_path / "run"), "--cfg-options", *options])
    assert cli.main(cli.train, args) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"error: \S*/annotations/training/21\.png holds the value 12 at 600 pixels, but there are 11 ", line
    )


def test_windows_larger_than_the_image(digits, capsys):
    slide = dict(mode="slide", crop_size=(192, 192), stride=(128, 128))
    cfg = digits(**{"model.test_cfg": slide})
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        with pytest.raises(RunError) as error:
            model.slide_inference(torch.zeros(1, 3, 191, 400), [{"img_path": "wide.jpg"}])
        assert str(error.value).startswith(
            "wide.jpg has 191 x 400 pixels (height x width) when it reaches the model, less than the slide window of "
            "192 x 192; let the test pipeline enlarge it (ResizeShortestEdge with scale=192), "
        )
        logits = model.slide_inference(torch.rand(1, 3, 192, 250), [{"img_path": "fits.jpg"}])
    assert logits.shape == (1, 11, 192, 250) and torch.isfinite(logits).all()


def test_a_fault_ends_the_command(digits, tmp_path, capsys):
    args = cli.parse_train([
        str(MINI), "--work-dir", str(tmp_path / "run"), "--cfg-options", "model.decode_head.num_classes=150",
    ])  # fmt: skip
    assert cli.main(cli.train, args) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: the model's heads and the data do not match: ")
    assert not (tmp_path / "run").exists()

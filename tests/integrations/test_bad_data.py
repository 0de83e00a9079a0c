"""Data that cannot give a good model: classes that do not match, images that cannot be read, losses that are NaN."""

import importlib
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from piip.integrations import cli, mmcv_ops, preflight
from piip.integrations.finite import NotFiniteError
from piip.integrations.images import BrokenImageError, check_images
from piip.integrations.preflight import RunError, check_classes, check_data
from piip.integrations.resume import SeededDataset

ROOT = Path(__file__).resolve().parents[2]
MMDETECTION = ROOT / "mmdetection"
MINI = MMDETECTION / "configs" / "piip" / "mini" / "mask_rcnn_mini_vit-tsb_192_144_96.py"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LOADERS = ("train_dataloader", "val_dataloader")

# ------------------------------------------------------------------------------------------------- classes


def write_coco(path: Path, names: list[str], used: tuple[int, ...] = (1, 2)) -> None:
    """One image, its annotations of the given category ids; the names are numbered from 1."""
    box = {"image_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0, "segmentation": [[1, 1, 10, 1, 10, 10]]}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 20, "height": 20}],
        "annotations": [{**box, "id": i, "category_id": number} for i, number in enumerate(used)],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(names)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A function that returns the mini config with other annotations and overrides."""
    from mmengine.config import Config

    monkeypatch.setenv("PIIP_DATA", str(tmp_path))

    def read(names=DIGITS, used=(1, 2), **overrides):
        for split in ("train", "val"):
            write_coco(tmp_path / f"mini/coco/annotations/instances_{split}.json", names, used)
        cfg = Config.fromfile(MINI)
        cfg.merge_from_dict(overrides)
        return cfg

    return read


CLASSES = "train_dataloader.dataset.metainfo.classes"
MISMATCHES = [
    ({"names": ["cat", "dog"]}, ["('cat', 'dog'), but metainfo.classes is ('zero', ", "num_classes=2 in the model"]),
    ({"names": DIGITS[::-1]}, ["the order differs", "in the file's order"]),
    ({"names": [*DIGITS, "ten"]}, ["only in the file: ('ten',)", "metainfo.subset=True, to leave the others out"]),
    ({"names": DIGITS[:-1]}, ["missing there: ('nine',)"]),
    ({CLASSES: ["one", "seven", "two"], "train_dataloader.dataset.metainfo.subset": True}, ["the order differs"]),
    ({"used": (1, 90, 12)}, ["annotations in ", "category ids that its categories do not list: (12, 90)"]),
    (
        {"model.roi_head.mask_head.num_classes": 80},
        ["mask_head.num_classes=80, but train_dataloader.dataset has 10 classes", "mask_head.num_classes=10"],
    ),
]


@pytest.mark.parametrize("limit", [4 << 20, 0], ids=["parsed", "scanned"])
@pytest.mark.parametrize(("changes", "said"), MISMATCHES)
def test_mismatch(digits, monkeypatch, changes, said, limit):
    """Both for files that are parsed and for those that are too large for it."""
    monkeypatch.setattr(preflight, "_PARSED_BYTES", limit)
    with pytest.raises(RunError) as error:
        check_classes(digits(**changes), LOADERS)
    message = str(error.value)
    assert "\n" not in message
    for part in said:
        assert part in message


def test_matching_classes(digits):
    check_classes(digits(), LOADERS)
    subset = {"classes": ["one", "two", "seven"], "subset": True}
    heads = {f"model.roi_head.{head}.num_classes": 3 for head in ("bbox_head", "mask_head")}
    datasets = {f"{loader}.dataset.metainfo": subset for loader in LOADERS}
    check_classes(digits(**heads, **datasets), LOADERS)


def test_lists_of_heads_and_wrapped_datasets(digits):
    cfg = digits()
    cfg.model.roi_head.bbox_head = [dict(num_classes=10), dict(num_classes=10), dict(num_classes=9)]
    with pytest.raises(RunError, match=r"model\.roi_head\.bbox_head\.2\.num_classes=9"):
        check_classes(cfg, LOADERS)
    cfg = digits()
    cfg.train_dataloader.dataset.metainfo.classes = ["zero"]
    cfg.train_dataloader.dataset = dict(type="RepeatDataset", times=2, dataset=cfg.train_dataloader.dataset)
    with pytest.raises(RunError, match=r"train_dataloader\.dataset\.dataset: the categories of "):
        check_classes(cfg, LOADERS)


def test_classes_of_coco_itself(tmp_path, monkeypatch):
    """Named by the dataset, not by the config; the word `categories` elsewhere in the file does not matter."""
    mmcv_ops.install()
    from mmdet.datasets import CocoDataset
    from mmengine.config import Config

    write_coco(tmp_path / "data/coco/annotations/instances_train2017.json", list(CocoDataset.METAINFO["classes"]))
    path = tmp_path / "data/coco/annotations/instances_train2017.json"
    path.write_text(path.read_text()[:-1] + ', "info": {"categories": "eighty of them"}}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "_PARSED_BYTES", 0)
    cfg = Config.fromfile(MMDETECTION / "configs/piip/3branch/mask_rcnn_deit_tsb_1120_896_448_fpn_1x_coco_bs16.py")
    check_classes(cfg, ("train_dataloader",))
    assert tuple(cfg.train_dataloader.dataset.metainfo.classes) == CocoDataset.METAINFO["classes"]
    write_coco(path, ["person"], used=(1,))
    with pytest.raises(RunError, match=r"\('person',\), but metainfo.classes is \('person', .* 80 in all\)"):
        check_classes(cfg, ("train_dataloader",))


def test_classes_that_the_config_does_not_name_are_those_of_the_files(digits, tmp_path):
    heads = {f"model.roi_head.{head}.num_classes": 2 for head in ("bbox_head", "mask_head")}

    def nameless(**overrides):
        cfg = digits(["cat", "dog"], **overrides)
        for loader in LOADERS:
            del cfg[loader].dataset["metainfo"]
        return cfg

    cfg = nameless(**heads)
    check_classes(cfg, LOADERS)
    from mmdet.registry import DATASETS

    for loader in LOADERS:
        dataset = DATASETS.build({**cfg[loader].dataset, "pipeline": [], "filter_cfg": None})
        assert dataset.metainfo["classes"] == ("cat", "dog")
        assert [instance["bbox_label"] for instance in dataset[0]["instances"]] == [0, 1]
    with pytest.raises(
        RunError, match=r"num_classes=10, .*but train_dataloader.dataset has 2 classes \('cat', 'dog'\)"
    ):
        check_classes(nameless(), LOADERS)
    cfg = nameless(**heads)
    write_coco(tmp_path / "mini/coco/annotations/instances_val.json", ["dog", "cat"])
    with pytest.raises(RunError, match=r"dataset has \('cat', 'dog'\), val_dataloader.dataset has \('dog', 'cat'\)"):
        check_classes(cfg, LOADERS)


def test_a_mismatch_ends_the_command(digits, tmp_path, capsys):
    digits(names=["cat", "dog"])
    for split in ("train", "val"):
        (tmp_path / "mini/coco" / split).mkdir()
    args = cli.parse_train([str(MINI), "--work-dir", str(tmp_path / "run")])
    assert cli.main(cli.train, args) == 2
    assert capsys.readouterr().err.startswith("error: train_dataloader.dataset: the categories of ")
    assert not (tmp_path / "run").exists()


def test_custom_data_of_the_readme(tmp_path, monkeypatch):
    """The guide's config, as it stands, is right for data as the guide describes them."""
    mmcv_ops.install()
    from mmdet.registry import DATASETS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    readme = (MMDETECTION / "README.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "data/fruit/" in block)
    assert '_base_ = ["./' in code
    (tmp_path / "fruit.py").write_text(code.replace('_base_ = ["./', f'_base_ = ["{MMDETECTION}/configs/'))
    for split in ("train", "val"):
        write_coco(tmp_path / f"data/fruit/{split}.json", ["apple", "pear"])
        (tmp_path / "data/fruit" / split).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / "data/fruit" / split / "a.jpg")
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(tmp_path / "fruit.py")
    cfg.train_dataloader.dataset.filter_cfg = None  # mmdetection leaves out images below 32 pixels
    check_data(cfg, (*LOADERS, "test_dataloader"))
    check_classes(cfg, (*LOADERS, "test_dataloader"))
    init_default_scope("mmdet")
    sample = DATASETS.build(cfg.train_dataloader.dataset)[0]["data_samples"]
    assert sample.gt_instances.labels.tolist() == [0, 1]
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == "data/fruit/val.json"
    shutil.copy(tmp_path / "data/fruit/train.json", tmp_path / "before.json")
    write_coco(tmp_path / "data/fruit/train.json", ["apple", "pear", "plum"])
    with pytest.raises(RunError, match="only in the file"):
        check_classes(cfg, LOADERS)


# ------------------------------------------------------------------------------------------------- images


@pytest.fixture
def faulty_toy(toy):
    """`toy`, with what `toy_faults.py` adds to it."""
    importlib.import_module("toy_faults")
    return toy


@pytest.fixture
def images(faulty_toy, tmp_path):
    """A toy data set of ten image files, of which `3.png` is cut short after a few bytes and `5.png` is missing."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(10):
        Image.fromarray(np.full((2, 2, 3), 20 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[:20])
    (folder / "5.png").unlink()
    listed = [{"img_path": str(folder / f"{i}.png"), "width": 2, "height": 2} for i in range(10)]
    (tmp_path / "list.json").write_text(json.dumps({"metainfo": {}, "data_list": listed}))
    return {
        "type": "ImageFiles",
        "ann_file": str(tmp_path / "list.json"),
        "pipeline": [{"type": "mmcv.LoadImageFromFile"}, {"type": "PackToy"}],
    }


def loader(dataset: dict, workers: int) -> dict:
    return {
        "batch_size": 2,
        "num_workers": workers,
        "sampler": {"type": "DefaultSampler", "shuffle": True},
        "dataset": dataset,
        "collate_fn": {"type": "default_collate"},
    }


def test_a_replacement_depends_on_seed_epoch_and_index_alone(images, tmp_path):
    dataset = SeededDataset(check_images(images, "skip", str(tmp_path / "record")), seed=1)
    drawn = [dataset[epoch, 3]["index"] for epoch in range(20)]
    assert not {3, 5} & set(drawn) and len(set(drawn)) > 3
    np.random.seed(99)
    assert [dataset[epoch, 3]["index"] for epoch in range(20)] == drawn
    assert {Path(line).name for line in (tmp_path / "record").read_text().splitlines()} == {"3.png", "5.png"}


@pytest.mark.parametrize("workers", [0, 1])
def test_training_stops_at_a_broken_image(toy, images, workers):
    runner = toy({"train_dataloader": loader(images, workers)})
    with pytest.raises(BrokenImageError) as error:
        runner.train()
    message = str(error.value)
    assert re.match(r"(\S*3.png cannot be decoded as an image|there is no image \S*5.png); repair the file, ", message)
    assert "\n" not in message and "on_broken_image=skip" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_training_skips_broken_images(toy, images, tmp_path, workers):
    runner = toy({"train_dataloader": loader(images, workers), "on_broken_image": "skip", "train_cfg.max_epochs": 2})
    runner.train()
    drawn = [line["data"] for line in map(json.loads, (tmp_path / "losses.0").read_text().splitlines())]
    assert sum(map(len, drawn)) == 20 and not {3, 5} & set(itertools.chain(*drawn))
    (log,) = Path(runner.log_dir).glob("*.log")
    lines = [line for line in log.read_text().splitlines() if "images skipped so far" in line]
    assert len(lines) == 2  # each is named once, in whichever epoch
    assert "images skipped so far: 1," in lines[0] and "images skipped so far: 2," in lines[1]
    assert any("3.png cannot be decoded" in line for line in lines)
    assert any("there is no image" in line and "5.png" in line for line in lines)


def test_a_folder_of_broken_images_ends_the_run(toy, images):
    images["pipeline"][0] = {"type": "LoadImageFromFile", "backend_args": {"backend": "local"}}
    content = json.loads(Path(images["ann_file"]).read_text())
    for entry in content["data_list"]:
        entry["img_path"] = entry["img_path"].replace("/images/", "/imgs/")
    Path(images["ann_file"]).write_text(json.dumps(content))
    with pytest.raises(BrokenImageError, match="nor could 99 images before it be read; check data_root"):
        toy({"train_dataloader": loader(images, 0), "on_broken_image": "skip"}).train()


def test_evaluation_always_stops(toy, images):
    with pytest.raises(BrokenImageError, match=r"3\.png cannot be decoded|there is no image"):
        toy({"val_dataloader": loader({**images, "test_mode": True}, 0), "on_broken_image": "skip"}).val()


def test_a_wrong_choice_is_refused(toy):
    with pytest.raises(RunError, match="unknown on_broken_image 'ignore'; known: stop, skip"):
        toy({"on_broken_image": "ignore"})


# ------------------------------------------------------------------------------------------------- NaN


@pytest.fixture
def failing(faulty_toy, tmp_path):
    """A function that starts a run whose model fails after two good steps, and returns the error and what is left."""

    def run(what):
        checkpoint = {"type": "CheckpointHook", "by_epoch": False, "interval": 1, "max_keep_ckpts": 1}
        runner = faulty_toy(
            {"default_hooks.checkpoint": checkpoint, "custom_hooks": [{"type": "Poison", "what": what}]}
        )
        with pytest.raises(NotFiniteError) as error:
            runner.train()
        return str(error.value), sorted(path.name for path in (tmp_path / "run").glob("*.pth*"))

    return run


@pytest.mark.parametrize(
    ("what", "said"), [("loss", "not finite: loss nan; "), ("weights", "not finite: weights (layers.0.weight), ")]
)
def test_a_run_stops_at_the_first_number_that_is_not_finite(failing, tmp_path, what, said):
    message, left = failing(what)
    assert message.startswith("training stopped at step 3, " + said)
    assert "\n" not in message and f"{tmp_path / 'run' / 'iter_2.pth'}, is from before it" in message
    assert left == ["iter_2.pth"]
    state = torch.load(tmp_path / "run" / "iter_2.pth", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())
    assert (tmp_path / "run" / "last_checkpoint").read_text().endswith("iter_2.pth")


def test_any_process_reports_what_only_it_met(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    args = cli.parse_train(["c.py"])

    def fail(error):
        def run(_):
            raise error

        return run

    assert cli.main(fail(BrokenImageError("a.jpg is broken")), args) == 2
    assert capsys.readouterr().err == "error: process 1: a.jpg is broken\n"
    assert cli.main(fail(RunError("the same everywhere")), args) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_detector_goes_on_without_a_broken_image(tool, tmp_path):
    """The whole way, through the command line: mmdetection's dataset, a worker, the log."""
    command = (ROOT / "tools/make_mini_data.py", "--out", "data/mini", "--train", "6", "--val", "1")
    made = tool(sys.executable, *command)
    assert made.returncode == 0, made.stderr
    broken = tmp_path / "data/mini/coco/train/000002.jpg"
    broken.write_bytes(broken.read_bytes()[:50])
    train = (sys.executable, MMDETECTION / "tools/train.py", MINI, "--no-validate", "--cfg-options")
    options = ("model.backbone.pretrained=None", "train_cfg.max_epochs=1", "train_dataloader.batch_size=2")
    skipped = tool(*train, *options, "on_broken_image=skip", "work_dir=skip", PIIP_DATA=str(tmp_path / "data"))
    assert skipped.returncode == 0, skipped.stderr
    assert "000002.jpg cannot be decoded as an image: another one is used instead (images skipped so far: 1," in (
        skipped.stdout + skipped.stderr
    )
    stopped = tool(*train, *options, "work_dir=stop", PIIP_DATA=str(tmp_path / "data"))
    assert stopped.returncode == 2
    assert "Traceback" not in stopped.stderr
    assert re.match(
        r"error: \S*000002.jpg cannot be decoded as an image; repair the file,", stopped.stderr.splitlines()[-1]
    )

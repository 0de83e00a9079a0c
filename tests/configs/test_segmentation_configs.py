"""Every segmentation config, held against the original's recipe, parameter lists and layer decay."""

import ast
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg", reason="needs the segmentation extra")

import piip.integrations.mmseg  # noqa: F401, I001  (stands in for mmcv's compiled ops, so it comes before mmseg)
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from mmseg.registry import MODELS

from published import (
    REFERENCE,
    check_branches,
    check_interactions,
    check_layer_decay,
    check_released,
    check_released_backbone,
    recipes,
    shared,
    step,
)

from piip.budget import published
from piip.integrations.config import read_config
from piip.zoo.specs import resolve_spec

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    path.stem: path
    for path in sorted((ROOT / "mmsegmentation/configs/piip").glob("*/*.py"))
    if path.parent.name not in ("mini", "mask2former")  # ours: no published row
}
RELEASED = [name for name in CONFIGS if "internvit" in name]
PAPER = [name for name in CONFIGS if "internvit" not in name]
FULL, LAYER_DECAY = (
    [name for name in RELEASED if (REFERENCE / folder / f"{name}.json.gz").exists()]
    for folder in ("full_manifests", "layer_decay")
)
IMAGENET = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}


@functools.cache
def load(name: str) -> Config:
    return read_config(CONFIGS[name])


@functools.cache
def segmentor(name: str) -> torch.nn.Module:
    """Build a config's whole segmentor without memory for its tensors."""
    config = load(name)
    init_default_scope("mmseg")
    with torch.device("meta"):
        return MODELS.build(config.model)


every_config = pytest.mark.parametrize("name", CONFIGS)
released_config = pytest.mark.parametrize("name", RELEASED)
paper_config = pytest.mark.parametrize("name", PAPER)


def test_every_config_of_the_original_and_of_the_paper_is_there():
    assert set(RELEASED) == {name for name in recipes() if name.startswith("upernet")}
    assert len(RELEASED) == 5
    assert {load(name).model.backbone.spec for name in PAPER} == {
        "augreg-b-640",
        "augreg-l-640",
        "deit3-tsb-896-448-336",
        "deit3-sbl-1120-448-336",
    }


@every_config
def test_config_is_short_and_says_how_to_run_it(name):
    path = CONFIGS[name]
    source = path.read_text(encoding="utf-8")
    docstring = ast.parse(source).body[0]
    text = docstring.value.value
    assert f"sh tools/dist_train.sh {path.relative_to(ROOT / 'mmsegmentation')} 8\n" in text
    assert "8 GPUs x 2 images" in text
    assert "Published: " in text
    assert ("no released weights" in text) is (name in PAPER)
    assert len([line for line in source.splitlines()[docstring.end_lineno :] if line]) <= 15


@released_config
def test_parameters_are_those_of_the_released_file(name):
    check_released_backbone(segmentor(name).backbone, name)


@pytest.mark.parametrize("name", FULL)
def test_whole_segmentors_are_those_of_the_released_file(name):
    check_released(segmentor(name), name)


def test_whole_segmentors_are_compared_for_a_pyramid_and_a_baseline():
    assert FULL == LAYER_DECAY and {Path(CONFIGS[name]).parent.name for name in FULL} == {"baseline", "2branch"}


@pytest.mark.parametrize("name", LAYER_DECAY)
def test_learning_rate_and_weight_decay_of_every_parameter(name):
    check_layer_decay(segmentor(name), load(name).optim_wrapper, name)


@released_config
def test_branches_are_those_of_the_recipe(name):
    spec = resolve_spec(load(name).model.backbone.spec)
    check_branches(spec, load(name).model.backbone.pretrained, recipes()[name]["backbone"], "seg")


@released_config
def test_interactions_are_those_of_the_recipe(name):
    check_interactions(segmentor(name).backbone, recipes()[name]["backbone"])


def as_json(value: Any) -> Any:
    """With lists in place of tuples."""
    return json.loads(json.dumps(value))


@released_config
def test_heads_and_test_settings_are_those_of_the_recipe(name):
    model, original = load(name).model, recipes()[name]
    assert model.type.removeprefix("PIIP") == original["model_type"]
    for head in ("decode_head", "auxiliary_head"):
        assert as_json(shared(model[head], original[head])) == original[head]
        assert model[head].get("ignore_index", 255) == 255
    assert "neck" not in model and original["neck"] is None
    assert as_json(model.test_cfg) == original["test_cfg"]
    assert segmentor(name).backbone.strides == [4, 8, 16, 32]


@every_config
def test_heads_take_what_the_backbone_gives(name):
    model, backbone = load(name).model, segmentor(name).backbone
    assert model.decode_head.in_channels == backbone.out_channels
    assert model.auxiliary_head.in_channels == backbone.out_channels[model.auxiliary_head.in_index]


# What the original does in its pipeline, mmseg 1 does in the data preprocessor.
LATER = ("Normalize", "Pad", "DefaultFormatBundle", "Collect")


@released_config
def test_pictures_are_those_of_the_recipe(name):
    config, data = load(name), recipes()[name]["data"]
    original = [t for t in data["train_pipeline"] if t["type"] not in LATER]
    train = config.train_dataloader.dataset.pipeline
    names = {"Resize": "RandomResize"}
    assert [t["type"] for t in train] == [*(names.get(t["type"], t["type"]) for t in original), "PackSegInputs"]
    for ours, theirs in zip(train[:-1], original, strict=True):
        wanted = {**theirs, "type": names.get(theirs["type"], theirs["type"])}
        if "img_scale" in wanted:
            wanted |= {"scale": tuple(wanted.pop("img_scale")), "ratio_range": tuple(wanted["ratio_range"])}
            assert ours.keep_ratio is True
        if "crop_size" in wanted:
            wanted["crop_size"] = tuple(wanted["crop_size"])
        assert shared(ours, wanted) == wanted
    pad, normalize = step(data["train_pipeline"], "Pad"), step(data["train_pipeline"], "Normalize")
    preprocessor = config.model.data_preprocessor
    assert (list(preprocessor.size), preprocessor.pad_val, preprocessor.seg_pad_val) == (
        pad["size"], pad["pad_val"], pad["seg_pad_val"]
    )  # fmt: skip
    assert {"mean": preprocessor.mean, "std": preprocessor.std} == IMAGENET == {k: normalize[k] for k in IMAGENET}
    assert preprocessor.bgr_to_rgb is normalize["to_rgb"] is True
    assert config.train_dataloader.batch_size == data["samples_per_gpu"]
    assert config.train_dataloader.dataset.type == data["train_type"]


@every_config
@pytest.mark.parametrize("size", [(300, 452), (683, 512), (640, 2900), (301, 300)])
def test_evaluation_scales_the_short_side_to_the_window(name, size):
    """As the original's: also where the long side then exceeds four times the window."""
    config = load(name)
    (window, _), (stride, _) = config.model.test_cfg.crop_size, config.model.test_cfg.stride
    for loader in (config.val_dataloader, config.test_dataloader):
        pipeline = loader.dataset.pipeline
        assert [t["type"] for t in pipeline][2:] == ["LoadAnnotations", "PackSegInputs"]  # labels keep their size
        init_default_scope("mmseg")
        resized = Compose(pipeline[1:2])({"img": np.zeros((*size, 3), np.uint8), "img_shape": size})["img"].shape[:2]
        factor = window / min(size)
        assert resized == tuple(int(side * factor + 0.5) for side in size)
        assert min(resized) == window
    assert stride == int(window * 2 / 3)


@every_config
def test_schedule_is_that_of_the_recipe(name):
    config = load(name)
    iterations = 160_000 if name in PAPER else 80_000
    original = recipes()[name if name in RELEASED else RELEASED[0]]
    wrapper, optimizer = config.optim_wrapper, original["optimizer"]
    keys = ("type", "lr", "weight_decay")
    assert [wrapper.optimizer[key] for key in keys] == [optimizer[key] for key in keys]
    assert list(wrapper.optimizer.betas) == optimizer["betas"]
    assert wrapper.constructor == "LayerDecayOptimWrapperConstructor"
    assert wrapper.paramwise_cfg == {"layer_decay_rate": optimizer["paramwise_cfg"]["layer_decay_rate"]}
    assert "clip_grad" not in wrapper and original["optimizer_config"] == {}
    assert config.train_cfg.type == "IterBasedTrainLoop"
    assert config.train_cfg.max_iters == iterations
    assert name in PAPER or original["runner"]["max_iters"] == iterations
    assert config.train_cfg.val_interval == original["evaluation"]["interval"]
    assert config.val_evaluator.iou_metrics == [original["evaluation"]["metric"]]
    checkpoint, theirs = config.default_hooks.checkpoint, original["checkpoint_config"]
    assert [checkpoint[key] for key in ("by_epoch", "interval", "max_keep_ckpts")] == [
        theirs[key] for key in ("by_epoch", "interval", "max_keep_ckpts")
    ]
    assert config.default_hooks.logger.interval == original["log_config"]["interval"]


@pytest.mark.parametrize("name", [RELEASED[0], PAPER[0]])
def test_learning_rate_at_every_iteration(name):
    """Warm-up on top of polynomial decay from the start, as mmcv 1 computes it."""
    schedule, config = recipes()[RELEASED[0]]["lr_config"], load(name)
    total = config.train_cfg.max_iters
    model = torch.nn.Linear(1, 1)
    optimizer = build_optim_wrapper(model, {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 1.0}})
    schedulers = [PARAM_SCHEDULERS.build(s, default_args={"optimizer": optimizer}) for s in config.param_scheduler]
    for iteration in range(3000):
        warm = 1 - (1 - min(1, iteration / schedule["warmup_iters"])) * (1 - schedule["warmup_ratio"])
        wanted = (1 - iteration / total) ** schedule["power"] * warm
        (rate,) = optimizer.get_lr()["lr"]
        assert rate == pytest.approx(wanted, rel=1e-3, abs=1e-9), iteration
        for scheduler in schedulers:
            scheduler.step()


@paper_config
def test_rows_of_the_paper_as_we_read_them(name):
    """Branches and drop path as in detection; the crop is the second branch's image."""
    spec, config = resolve_spec(load(name).model.backbone.spec), load(name)
    crop = config.model.test_cfg.crop_size
    assert crop == config.model.data_preprocessor.size == config.train_dataloader.dataset.pipeline[3].crop_size
    assert crop == (segmentor(name).backbone.pyramid.input_resolution,) * 2
    assert config.train_dataloader.dataset.pipeline[2].scale == (4 * crop[0], crop[0])
    family, letters = config.model.backbone.spec.split("-")[:2]
    single = len(spec.branches) == 1
    theirs = resolve_spec("augreg-sbl-1568-1120-672" if single else f"{family}-{letters}-1568-1120-672").branches
    for ours, other in zip(spec.branches, theirs["lb".index(letters) :] if single else theirs, strict=False):
        for key in ("arch", "weights", "drop_path", "options"):
            assert getattr(ours, key) == getattr(other, key)
    if single:
        assert (spec.branches[0].window, spec.branches[0].global_every) == (14, 3)
    else:
        assert crop[0] == spec.branches[1].resolution
        assert [branch.window for branch in spec.branches] == [None, 28, 28]
        assert segmentor(name).backbone.pyramid.output_branch == 2


@pytest.mark.parametrize(
    ("spec", "flops"),
    [
        ("augreg-b-640", 159),
        ("augreg-l-640", 545),
        ("deit3-tsb-896-448-336", 118),
        ("deit3-sbl-1120-448-336", 456),
    ],
)
def test_rows_of_the_paper_cost_what_it_says(spec, flops):
    """What the reading of windows and pretraining rests on: other windows or branches give other costs."""
    assert round(published(spec, "classification")["total"].macs / 1e9) == flops


@pytest.mark.parametrize("name", [RELEASED[0], *PAPER[:2]])
def test_training_pictures(name, tmp_path):
    """The pipeline on a picture in ADE20K's form: crops and their labels fit each other."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (300, 700, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    Image.fromarray(rng.integers(0, 151, (300, 700), dtype=np.uint8)).save(tmp_path / "a.png")
    init_default_scope("mmseg")
    pipeline, crop = Compose(load(name).train_dataloader.dataset.pipeline), load(name).model.test_cfg.crop_size[0]
    found = {"img_path": str(tmp_path / "a.jpg"), "seg_map_path": str(tmp_path / "a.png"), "label_map": None}
    np.random.seed(0)
    sizes = set()
    for _ in range(8):
        sample = pipeline({**found, "reduce_zero_label": True, "seg_fields": []})
        size = sample["inputs"].shape[1:]
        assert max(size) <= crop
        sizes.add(tuple(size))
        labels = sample["data_samples"].gt_sem_seg.data
        assert labels.shape[1:] == size
        assert set(labels.unique().tolist()) <= {*range(150), 255}
    assert len(sizes) > 2

"""Every detection config of a published row, held against the original's recipe, parameter lists and layer decay."""

import ast
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet", reason="needs the detection extra")

import piip.integrations.mmengine  # noqa: F401, I001  (stands in for mmcv's compiled ops, so it comes before mmdet)
from mmcv.transforms import Compose
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

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

from piip.zoo.specs import PyramidSpec, resolve_spec

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    path.stem: path
    for path in sorted((ROOT / "mmdetection/configs/piip").glob("*/*.py"))
    if path.parent.name not in ("mini", "cascade")  # no released row
}
CASCADE = sorted((ROOT / "mmdetection/configs/piip/cascade").glob("*.py"))
LAYER_DECAY = [p.name.split(".")[0] for p in sorted((REFERENCE / "layer_decay").iterdir())]
FULL = [p.name.split(".")[0] for p in sorted((REFERENCE / "full_manifests").iterdir())]
DINO_CLIPPING = {"max_norm": 0.1, "norm_type": 2}


@functools.cache
def load(name: str) -> Config:
    return Config.fromfile(CONFIGS[name])


def forms(name: str) -> list[str]:
    """The names under which the reference data lists a config: four-branch models come in two forms."""
    return [f"{name}__as_built", f"{name}__as_intended"] if "tsbl" in name else [name]


@functools.cache
def detector(form: str) -> torch.nn.Module:
    """Build a config's whole detector without memory for its tensors."""
    name, _, variant = form.partition("__")
    config = load(name).model.copy()
    if variant == "as_built":
        config.backbone = {**config.backbone, "spec": f"{config.backbone.spec}-as-built"}
    init_default_scope("mmdet")
    with torch.device("meta"):
        return MODELS.build(config)


every_config = pytest.mark.parametrize("name", CONFIGS)
every_form = pytest.mark.parametrize("form", [form for name in CONFIGS for form in forms(name)])


def in_ours(names: list[str]) -> list[str]:
    """Those of the reference data that belong to a config which is there."""
    return [name for name in names if name.partition("__")[0] in CONFIGS]


def test_every_config_of_the_original_is_there():
    detection = {name for name in recipes() if name.startswith(("mask_rcnn", "dino"))}
    assert len(detection) == 33
    assert set(CONFIGS) == detection


@every_config
def test_config_is_short_and_says_how_to_run_it(name):
    path = CONFIGS[name]
    source = path.read_text(encoding="utf-8")
    docstring = ast.parse(source).body[0]
    text = docstring.value.value
    gpus = 16 if "_bs32" in name else 8
    assert f"sh tools/dist_train.sh {path.relative_to(ROOT / 'mmdetection')} {gpus}\n" in text
    assert f"{gpus} GPUs x 2 images" in text
    assert "Published: " in text
    assert len([line for line in source.splitlines()[docstring.end_lineno :] if line]) <= 15


@pytest.mark.parametrize("path", CASCADE, ids=lambda path: path.stem)
def test_cascade_configs_differ_from_mask_rcnn_in_the_head_alone(path):
    cfg, other = Config.fromfile(path), load("mask_rcnn_deit_sbl_1568_1120_672_fpn_1x_coco_bs16")
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"sh tools/dist_train.sh {path.relative_to(ROOT / 'mmdetection')} 8" in docstring
    assert "no config and no weights" in docstring
    assert cfg.optim_wrapper == other.optim_wrapper
    assert cfg.model.data_preprocessor == other.model.data_preprocessor
    epochs, steps = (36, [27, 33]) if "_3x_" in path.stem else (12, [8, 11])
    assert (cfg.train_cfg.max_epochs, cfg.param_scheduler[1].milestones) == (epochs, steps)
    init_default_scope("mmdet")
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert type(model).__name__ == "CascadeRCNN" and len(model.roi_head.bbox_head) == 3
    spec = resolve_spec(cfg.model.backbone.spec)
    assert [b.resolution for b in spec.branches] == [672, 1344 if "tsb" in path.stem else 1120, 1792]
    assert {b.window for b in spec.branches} == {28}
    assert model.backbone.out_channels == cfg.model.neck.in_channels


def test_three_cascade_configs():
    assert len(CASCADE) == 3


@every_form
def test_parameters_are_those_of_the_released_file(form):
    check_released_backbone(detector(form).backbone, form)


# DINO's names differ beyond the backbone, see test_dino_configs.py.
@pytest.mark.parametrize("form", [form for form in in_ours(FULL) if not form.startswith("dino")])
def test_whole_detectors_are_those_of_the_released_file(form):
    check_released(detector(form), form)


def test_whole_detectors_are_compared_for_a_pyramid_and_a_baseline():
    assert {
        "mask_rcnn_deit_sbl_1568_1120_672_fpn_1x_coco_bs16",
        "mask_rcnn_deit_vit_b_fpn_1x_coco_bs16",
    } <= set(in_ours(FULL))


@pytest.mark.parametrize("form", in_ours(LAYER_DECAY))
def test_learning_rate_and_weight_decay_of_every_parameter(form):
    check_layer_decay(detector(form), load(form.partition("__")[0]).optim_wrapper, form)


def resolved(name: str) -> PyramidSpec:
    return resolve_spec(load(name).model.backbone.spec)


@every_config
def test_branches_are_those_of_the_recipe(name):
    check_branches(resolved(name), load(name).model.backbone.pretrained, recipes()[name]["backbone"], "det")


@every_config
def test_interactions_are_those_of_the_recipe(name):
    check_interactions(detector(forms(name)[-1]).backbone, recipes()[name]["backbone"])


# What the original does in its pipeline, mmdet 3 does in the data preprocessor.
LATER = ("Normalize", "Pad", "DefaultFormatBundle", "Collect")


def in_mmdet_3(transform: dict[str, Any]) -> dict[str, Any]:
    """A transform of the original's training pipeline, as mmdet 3 says it."""
    kind, options = transform["type"], {k: v for k, v in transform.items() if k != "type"}
    if kind == "AutoAugment":
        return {"type": "RandomChoice", "transforms": [[in_mmdet_3(t) for t in p] for p in options["policies"]]}
    if kind == "Resize" and options.get("multiscale_mode") == "value":
        scales = [tuple(scale) for scale in options["img_scale"]]
        return {"type": "RandomChoiceResize", "scales": scales, "keep_ratio": options["keep_ratio"]}
    if kind == "Resize":
        return {"type": kind, "scale": tuple(options["img_scale"]), "keep_ratio": options["keep_ratio"]}
    if kind == "RandomFlip":
        return {"type": kind, "prob": options["flip_ratio"]}
    if kind == "RandomCrop":
        return {**transform, "crop_size": tuple(options["crop_size"])}
    return dict(transform)


@every_config
def test_pictures_are_those_of_the_recipe(name):
    config, data = load(name), recipes()[name]["data"]
    original = data["train_pipeline"]
    train = config.train_dataloader.dataset.pipeline
    wanted = [*(in_mmdet_3(t) for t in original if t["type"] not in LATER), {"type": "PackDetInputs"}]
    assert [t["type"] for t in train] == [t["type"] for t in wanted]
    assert [shared(ours, theirs) for ours, theirs in zip(train, wanted, strict=True)] == wanted
    for loader in (config.val_dataloader, config.test_dataloader):
        resize = step(loader.dataset.pipeline, "Resize")
        assert list(resize["scale"]) == step(data["test_pipeline"], "MultiScaleFlipAug")["img_scale"]
        assert resize["keep_ratio"] is True
        assert "RandomFlip" not in [t["type"] for t in loader.dataset.pipeline]
    preprocessor, normalize = config.model.data_preprocessor, step(original, "Normalize")
    assert preprocessor.pad_size_divisor == step(original, "Pad")["size_divisor"]
    assert preprocessor.mean == normalize["mean"]
    assert preprocessor.std == normalize["std"]
    assert preprocessor.bgr_to_rgb is normalize["to_rgb"] is True
    assert preprocessor.get("pad_mask", False) is train[1].with_mask is not name.startswith("dino")
    assert config.train_dataloader.batch_size == data["samples_per_gpu"]
    assert config.train_dataloader.dataset.type == data["train_type"]


@every_config
def test_schedule_is_that_of_the_recipe(name):
    config, original = load(name), recipes()[name]
    wrapper, optimizer = config.optim_wrapper, original["optimizer"]
    assert {key: wrapper.optimizer[key] for key in ("type", "lr", "weight_decay")} == {
        key: optimizer[key] for key in ("type", "lr", "weight_decay")
    }
    assert list(wrapper.optimizer.betas) == optimizer["betas"]
    if "constructor" in optimizer:
        assert wrapper.constructor == "LayerDecayOptimWrapperConstructor"
        assert wrapper.paramwise_cfg == {"layer_decay_rate": optimizer["paramwise_cfg"]["layer_decay_rate"]}
    else:
        assert wrapper.constructor == "DefaultOptimWrapperConstructor"
        assert wrapper.paramwise_cfg is None
    assert "clip_grad" not in wrapper
    # Written in DINO's configs, and never applied.
    assert original["optimizer_config"]["grad_clip"] == (DINO_CLIPPING if name.startswith("dino") else None)
    warmup, steps = config.param_scheduler
    schedule = original["lr_config"]
    assert (warmup.type, warmup.start_factor, warmup.begin, warmup.end, warmup.by_epoch) == (
        "LinearLR",
        schedule["warmup_ratio"],
        0,
        schedule["warmup_iters"],
        False,
    )
    assert (steps.type, steps.milestones, steps.gamma, steps.by_epoch) == ("MultiStepLR", schedule["step"], 0.1, True)
    assert config.train_cfg.max_epochs == original["runner"]["max_epochs"]
    assert config.train_cfg.val_interval == original["evaluation"]["interval"]
    assert config.val_evaluator.metric == original["evaluation"]["metric"]
    assert config.auto_scale_lr == original["auto_scale_lr"]
    checkpoint = config.default_hooks.checkpoint
    assert (checkpoint.interval, checkpoint.max_keep_ckpts) == (
        original["checkpoint_config"]["interval"],
        original["checkpoint_config"]["max_keep_ckpts"],
    )


@every_config
def test_neck_and_test_settings_are_those_of_the_recipe(name):
    model, original = load(name).model, recipes()[name]
    assert model.type.removeprefix("PIIP") == original["model_type"]
    assert shared(model.neck, original["neck"]) == original["neck"]
    assert model.neck.in_channels == detector(forms(name)[-1]).backbone.out_channels
    assert shared(model.test_cfg, original["test_cfg"]) == original["test_cfg"]
    strides = detector(forms(name)[-1]).backbone.strides
    if name.startswith("dino"):
        assert strides == [8, 16, 32]
        return
    assert model.rpn_head.anchor_generator.strides == [*strides, 64]
    assert model.roi_head.bbox_roi_extractor.featmap_strides == strides


@pytest.mark.parametrize(
    ("name", "crop"),
    [
        ("mask_rcnn_internvit_h6b_1024_512_fpn_1x_coco_bs16_ms", 1024),
        ("mask_rcnn_internvit_lh6b_1536_1024_512_fpn_1x_coco_bs32_ms", 1536),
    ],
)
def test_multi_scale_training_pictures(name, crop, tmp_path):
    Image.new("RGB", (640, 480), "gray").save(tmp_path / "a.png")
    outline = [50, 50, 590, 50, 590, 430, 50, 430]
    instance = {"bbox": [50, 50, 590, 430], "bbox_label": 0, "ignore_flag": 0, "mask": [outline]}
    init_default_scope("mmdet")
    pipeline = Compose(load(name).train_dataloader.dataset.pipeline)
    np.random.seed(0)
    sizes = set()
    for _ in range(12):
        sample = pipeline({"img_path": str(tmp_path / "a.png"), "img_id": 0, "instances": [dict(instance)]})
        height, width = sample["inputs"].shape[1:]
        assert max(height, width) <= crop
        sizes.add((height, width))
        assert sample["data_samples"].gt_instances.masks.masks.shape[1:] == (height, width)
    assert len(sizes) > 6

"""Every detection config of a published row, held against the original's recipe, parameter lists and layer decay."""

import ast
import functools
import gzip
import json
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
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from timm.layers import LayerScale, Mlp, RmsNorm
from translate import BRANCHES, branch_class

from piip.branches import Branch, ViTBranch, create_branch
from piip.checkpoint import released_names, released_shapes, unread_shapes
from piip.zoo.specs import PyramidSpec, build_branch, resolve_spec

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "reference"
CONFIGS = {
    path.stem: path
    for path in sorted((ROOT / "mmdetection/configs/piip").glob("*/*.py"))
    if path.parent.name != "mini"  # mini configs are ours: no published row
}
LAYER_DECAY = [p.name.split(".")[0] for p in sorted((REFERENCE / "layer_decay").iterdir())]
FULL = [p.name.split(".")[0] for p in sorted((REFERENCE / "full_manifests").iterdir())]
DINO_CLIPPING = {"max_norm": 0.1, "norm_type": 2}
# The original's classes, by the spec's attention.
ATTENTION = {"deform": "deformable", "normal": "regular"}


def reference(folder: str, name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((REFERENCE / folder / f"{name}.json.gz").read_bytes()))


@functools.cache
def recipes() -> dict[str, Any]:
    return json.loads(gzip.decompress((REFERENCE / "recipes.json.gz").read_bytes()))


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


@every_form
def test_parameters_are_those_of_the_released_file(form):
    expected = reference("manifests", form)
    shapes = {name: tuple(shape) for name, shape in expected["parameters"].items()}
    shapes |= {name: tuple(shape) for name, (shape, _) in expected["buffers"].items()}
    assert released_shapes(detector(form).backbone) == shapes


# DINO's names differ beyond the backbone, see test_dino_configs.py.
@pytest.mark.parametrize("form", [form for form in in_ours(FULL) if not form.startswith("dino")])
def test_whole_detectors_are_those_of_the_released_file(form):
    expected = {name: tuple(shape) for name, shape in reference("full_manifests", form)["state_dict"].items()}
    model = detector(form)
    shapes = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.startswith("backbone.")
    }
    shapes |= {f"backbone.{name}": shape for name, shape in released_shapes(model.backbone).items()}
    assert shapes == expected


def test_whole_detectors_are_compared_for_a_pyramid_and_a_baseline():
    assert {
        "mask_rcnn_deit_sbl_1568_1120_672_fpn_1x_coco_bs16",
        "mask_rcnn_deit_vit_b_fpn_1x_coco_bs16",
    } <= set(in_ours(FULL))


@pytest.mark.parametrize("form", in_ours(LAYER_DECAY))
def test_learning_rate_and_weight_decay_of_every_parameter(form):
    expected = reference("layer_decay", form)
    model = detector(form)
    optimizer = build_optim_wrapper(model, load(form.partition("__")[0]).optim_wrapper).optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    released = {f"backbone.{ours}": f"backbone.{name}" for ours, name in released_names(model.backbone).items()}
    groups = {
        released.get(names[id(parameter)], names[id(parameter)]): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(groups) == len(names)
    # The list's names outside the backbone are samples, of which some are made up.
    wanted = {
        name: (expected["optimizer"]["lr"] * scale, decay)
        for name, (scale, decay) in expected["params"].items()
        if name.startswith("backbone.")
    }
    unread = {f"backbone.{name}" for name in unread_shapes(model.backbone)}
    assert {name for name in groups if name.startswith("backbone.")} == set(wanted) - unread
    for name, values in wanted.items():
        if name in unread:
            continue
        assert groups[name] == pytest.approx(values, rel=1e-9), name
    for name, (lr, decay) in groups.items():
        if name not in wanted:
            no_decay = "constructor" in expected["optimizer"] and model.get_parameter(name).ndim == 1
            assert (lr, decay) == (expected["optimizer"]["lr"], 0 if no_decay else 0.05), name


def branch_settings(branch: Branch) -> dict[str, Any]:
    """What a branch is, beside its weights and its drop path."""
    settings: dict[str, Any] = {
        "dims": branch.dims,
        "strides": branch.strides,
        "parameters": {name: tuple(parameter.shape) for name, parameter in branch.named_parameters()},
        "layer_scale": {m.init_values for m in branch.modules() if isinstance(m, LayerScale)},
        "norms": {(type(m), m.eps) for m in branch.modules() if isinstance(m, (torch.nn.LayerNorm, RmsNorm))},
        "activations": {type(m.act) for m in branch.modules() if isinstance(m, Mlp)},
    }
    if isinstance(branch, ViTBranch):
        settings |= {key: getattr(branch, key) for key in ("family", "patch_size", "pos_grid", "pos_prefix")}
        attention = [block.attn for block in branch.blocks]
        settings["attention"] = [(a.num_heads, a.window, a.rel_pos) for a in attention]
        settings["window_pad"] = {a.window_pad for a in attention if a.window}
    return settings


def drop_rates(branch: Branch) -> list[float]:
    blocks = branch.blocks if isinstance(branch, ViTBranch) else [b for stage in branch.stages for b in stage.blocks]
    paths = [getattr(block, "drop_path1", None) or block.drop_path for block in blocks]
    return [getattr(path, "drop_prob", 0.0) for path in paths]


def original_drop_rates(kind: str, values: dict[str, Any], depth: int) -> list[float]:
    rate = values.get("drop_path_rate", 0.0)
    return [rate] * depth if kind == "vit_models" else torch.linspace(0, rate, depth, dtype=torch.float64).tolist()


def resolved(name: str) -> PyramidSpec:
    return resolve_spec(load(name).model.backbone.spec)


@every_config
def test_branches_are_those_of_the_recipe(name):
    original = recipes()[name]["backbone"]
    spec, pretrained = resolved(name), load(name).model.backbone.pretrained
    listed = [original[f"branch{i + 1}"] for i in range(9) if f"branch{i + 1}" in original]
    single = not listed
    listed = listed or [original]
    assert len(spec.branches) == len(listed)
    for branch_spec, values in zip(spec.branches, listed, strict=True):
        kind = values["type"] if single else branch_class(values["pretrained"])
        arch, options, _ = BRANCHES[kind]("det", values, {})
        with torch.device("meta"):
            ours, theirs = build_branch(branch_spec), create_branch(arch, **options)
        assert branch_settings(ours) == branch_settings(theirs)
        rates = drop_rates(ours)
        assert rates == pytest.approx(original_drop_rates(kind, values, len(rates)), abs=1e-6)
        if kind.startswith("ConvN"):
            assert branch_spec.weights == f"{values['pretrained'].removeprefix('facebook/')}/pytorch_model.bin"
        else:
            assert f"{pretrained}/{branch_spec.weights}" == values["pretrained"].removeprefix("./")
    cuts = detector(forms(name)[-1]).backbone.pyramid.cuts
    if single:
        return
    assert [b.resolution for b in spec.branches] == [v["real_size"] for v in listed]
    for cut, values in zip(cuts, listed, strict=True):
        assert cut == [(first, last + 1) for first, last in values["interaction_indexes"]]


@every_config
def test_interactions_are_those_of_the_recipe(name):
    original = recipes()[name]["backbone"]
    if "branch1" not in original:
        assert len(resolved(name).branches) == 1
        return
    spec = resolved(name)
    assert {
        "attention": ATTENTION[original["interact_attn_type"]],
        "heads": original["deform_num_heads"],
        "points": original["n_points"],
        "value_ratio": original["deform_ratio"],
        "ffn_ratio": original["cffn_ratio"],
        "drop_path": original["interaction_drop_path_rate"],
        "proj": original.get("interaction_proj", True),
        "norm": original.get("norm_layer", "LayerNorm") != "none",
        "interactions": len(original["branch1"]["interaction_indexes"]),
    } == {
        key: getattr(spec, key)
        for key in (
            "attention",
            "heads",
            "points",
            "value_ratio",
            "ffn_ratio",
            "drop_path",
            "proj",
            "norm",
            "interactions",
        )
    }
    model = detector(forms(name)[-1]).backbone
    assert model.pyramid.output_branch == len(spec.branches) - 1
    assert model.pyramid.input_resolution == spec.branches[-1].resolution


def step(pipeline: list[dict], kind: str) -> dict:
    (found,) = [transform for transform in pipeline if transform["type"] == kind]
    return found


def shared(ours: Any, theirs: Any) -> Any:
    """Ours, cut down to the keys that theirs has."""
    if isinstance(theirs, dict):
        return {key: shared(ours.get(key), value) for key, value in theirs.items()}
    return ours


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

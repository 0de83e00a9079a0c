"""Every detection config of a published row, held against the original's recipe, parameter lists and layer decay."""

import ast
import functools
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason="needs the detection extra")

import piip.integrations.mmengine  # noqa: F401, I001  (stands in for mmcv's compiled ops, so it comes before mmdet)
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from piip.checkpoint import released_names, released_shapes
from piip.zoo.specs import BranchSpec, PyramidSpec, build_branch, resolve_spec

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "reference"
CONFIGS = {
    path.stem: path
    for path in sorted((ROOT / "mmdetection/configs/piip").glob("*/*.py"))
    if path.parent.name != "mini"  # mini configs are ours: no published row
}
LAYER_DECAY = [p.name.split(".")[0] for p in sorted((REFERENCE / "layer_decay").iterdir())]
FULL = [p.name.split(".")[0] for p in sorted((REFERENCE / "full_manifests").iterdir())]
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


def test_the_rows_of_the_coco_table_are_there():
    deit = {name for name in recipes() if name.startswith("mask_rcnn_deit")}
    assert len(deit) == 12
    assert deit <= set(CONFIGS)
    assert set(CONFIGS) <= set(recipes())


@every_config
def test_config_is_short_and_says_how_to_run_it(name):
    path = CONFIGS[name]
    source = path.read_text(encoding="utf-8")
    docstring = ast.parse(source).body[0]
    text = docstring.value.value
    assert f"sh tools/dist_train.sh {path.relative_to(ROOT / 'mmdetection')} 8\n" in text
    assert "8 GPUs x 2 images" in text
    assert "Published: " in text
    assert len([line for line in source.splitlines()[docstring.end_lineno :] if line]) <= 15


@every_form
def test_parameters_are_those_of_the_released_file(form):
    expected = reference("manifests", form)
    shapes = {name: tuple(shape) for name, shape in {**expected["parameters"], **expected["buffers"]}.items()}
    assert released_shapes(detector(form).backbone) == shapes


@pytest.mark.parametrize("form", in_ours(FULL))
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
    assert {name for name in groups if name.startswith("backbone.")} == set(wanted)
    for name, values in wanted.items():
        assert groups[name] == pytest.approx(values, rel=1e-9), name
    for name, (lr, decay) in groups.items():
        if name not in wanted:
            assert (lr, decay) == (1e-4, 0 if name.endswith("bias") else 0.05), name


def branch_settings(spec: BranchSpec, pretrained: str) -> dict[str, Any]:
    """What a branch of ours is, in the original's words."""
    with torch.device("meta"):
        branch = build_branch(spec)
    first, last = branch.blocks[0], branch.blocks[-1]
    rates = {getattr(block.drop_path1, "drop_prob", 0.0) for block in branch.blocks}
    return {
        "patch_size": branch.patch_size,
        "pos_grid": branch.pos_grid,
        "depth": branch.depth,
        "embed_dim": branch.dims[0],
        "num_heads": first.attn.num_heads,
        "mlp_ratio": last.mlp.fc1.out_features / branch.dims[0],
        "qkv_bias": first.attn.qkv.bias is not None,
        "drop_path_rate": rates,
        "init_scale": spec.options.get("layer_scale", 1.0),
        "windows": [block.attn.window for block in branch.blocks],
        "window_pad": first.attn.window_pad,
        "pretrained": f"./{pretrained}/{spec.weights}",
    }


def original_settings(values: dict[str, Any]) -> dict[str, Any]:
    side = values["pretrain_img_size"] // values["patch_size"]
    pairs = zip(values["window_attn"], values["window_size"], strict=True)
    return {
        **{k: values[k] for k in ("patch_size", "depth", "embed_dim", "num_heads", "mlp_ratio", "qkv_bias")},
        "pos_grid": (side, side),
        "drop_path_rate": {values["drop_path_rate"]},
        "init_scale": values["init_scale"],
        "windows": [size if on else None for on, size in pairs],
        "window_pad": "before_qkv" if values["use_flash_attn"] else "after_qkv",
        "pretrained": values["pretrained"],
    }


def resolved(name: str) -> PyramidSpec:
    return resolve_spec(load(name).model.backbone.spec)


@every_config
def test_branches_are_those_of_the_recipe(name):
    original = recipes()[name]["backbone"]
    spec, pretrained = resolved(name), load(name).model.backbone.pretrained
    listed = [original[f"branch{i + 1}"] for i in range(9) if f"branch{i + 1}" in original] or [original]
    assert [branch_settings(b, pretrained) for b in spec.branches] == [original_settings(v) for v in listed]
    if len(listed) == 1:
        return
    assert [b.resolution for b in spec.branches] == [v["real_size"] for v in listed]
    with torch.device("meta"):
        cuts = detector(forms(name)[-1]).backbone.pyramid.cuts
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


@every_config
def test_pictures_are_those_of_the_recipe(name):
    config, data = load(name), recipes()[name]["data"]
    original = data["train_pipeline"]
    train = config.train_dataloader.dataset.pipeline
    assert [t["type"] for t in train] == [
        "LoadImageFromFile",
        "LoadAnnotations",
        "Resize",
        "RandomFlip",
        "PackDetInputs",
    ]
    resize = step(train, "Resize")
    assert list(resize["scale"]) == step(original, "Resize")["img_scale"]
    assert resize["keep_ratio"] is step(original, "Resize")["keep_ratio"] is True
    assert step(train, "RandomFlip")["prob"] == step(original, "RandomFlip")["flip_ratio"]
    assert step(train, "LoadAnnotations")["with_mask"]
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
    assert preprocessor.pad_mask is True
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
    assert wrapper.constructor == "LayerDecayOptimWrapperConstructor"
    assert wrapper.paramwise_cfg == {"layer_decay_rate": optimizer["paramwise_cfg"]["layer_decay_rate"]}
    assert wrapper.get("clip_grad") is original["optimizer_config"]["grad_clip"] is None
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


def shared(ours: Any, theirs: Any) -> Any:
    """Ours, cut down to the keys that theirs has."""
    if isinstance(theirs, dict):
        return {key: shared(ours.get(key), value) for key, value in theirs.items()}
    return ours


@every_config
def test_neck_and_test_settings_are_those_of_the_recipe(name):
    model, original = load(name).model, recipes()[name]
    assert model.type == original["model_type"]
    assert shared(model.neck, original["neck"]) == original["neck"]
    assert model.neck.in_channels == detector(forms(name)[-1]).backbone.out_channels
    assert shared(model.test_cfg, original["test_cfg"]) == original["test_cfg"]
    strides = detector(forms(name)[-1]).backbone.strides
    assert model.rpn_head.anchor_generator.strides == [*strides, 64]
    assert model.roi_head.bbox_roi_extractor.featmap_strides == strides

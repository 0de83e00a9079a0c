"""From a case of the reference data, which speaks the original's options, to our model."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from piip import BranchSpec, Classifier, DensePyramid, PyramidSpec
from piip.branches import Branch, create_branch
from piip.zoo.specs import as_built


class Unsupported(Exception):
    """The case needs a part of the original that is not built yet; the message names it."""


@dataclass
class Translated:
    """A model that takes the case's seeded tensors under the released names."""

    model: nn.Module


# Options that change nothing in evaluation, or that the data holds at one value only.
WITHOUT_EFFECT = {
    "with_cp",
    "unfreeze",
    "use_branch_merging",
    "with_cffn",
    "layerscale_force_fp32",
    "output_dtype",
    "drop_rate",
    "drop_path_rate",
    "interaction_drop_path_rate",
    "pretrained",
    "with_fpn",
    "pretrain_patch_size",
}


class Options:
    """The original's keyword arguments, each of which must be asked for or be without effect."""

    def __init__(self, owner: str, values: Mapping[str, Any], **defaults: Any) -> None:
        self.owner = owner
        self.values = {**defaults, **values}
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self.values[key]

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return self.values.get(key, default)

    def finish(self) -> None:
        if left := set(self.values) - self.asked - WITHOUT_EFFECT:
            raise Unsupported(f"{self.owner}: option(s) {', '.join(sorted(left))}")


def windows(on: bool | list[bool], sizes: int | list[int], depth: int) -> tuple[int | None, ...]:
    on = on if isinstance(on, list) else [on] * depth
    sizes = sizes if isinstance(sizes, list) else [sizes] * depth
    return tuple(size if enabled is True else None for enabled, size in zip(on, sizes, strict=True))


def mlp_activation(block: str) -> str:
    return "gelu_tanh" if block.lower().replace("_", "") == "fusedmlp" else "gelu"


def class_token(task: str, o: Options) -> dict[str, Any]:
    if task != "cls":
        return {}
    o.get("num_classes"), o.get("use_final_norm_and_head")  # for the head
    return {"class_token": o["use_cls_token"], "class_position": False}


def vit_models(task: str, values: Mapping[str, Any], case: Mapping[str, Any]) -> tuple[str, dict[str, Any], Options]:
    """DeiT."""
    if task == "cls":
        values = {"img_size": 224, "use_cls_token": True, **values}
    o = Options(
        f"{task}.vit_models",
        values,
        patch_size=16,
        pretrain_img_size=224,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=False,
        init_scale=1e-4,
        window_attn=False,
        window_size=14,
        use_flash_attn=False,
        Mlp_block="mlp",
    )
    size = o["pretrain_img_size"]
    if task == "cls":
        size = o["img_size"]  # a classifier's table has the working size
    o.get("img_size")  # elsewhere the original builds the table for pretrain_img_size all the same
    side = size // o["patch_size"]
    return (
        "vit",
        {
            **class_token(task, o),
            "family": "deit",
            "layer_scale": o["init_scale"],
            "pos_grid": (side, side),
            "window": windows(o["window_attn"], o["window_size"], o["depth"]),
            "window_pad": "before_qkv" if o["use_flash_attn"] else "after_qkv",
            "act": mlp_activation(o["Mlp_block"]),
            **{key: o[key] for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")},
        },
        o,
    )


# What classification's InternViT6B, AugReg's class, takes by default where the others differ.
AUGREG = {
    "img_size": 224,
    "patch_size": 16,
    "qk_normalization": False,
    "norm_layer_type": "LayerNorm",
    "init_values": None,
    "use_cls_token": True,
}


def intern_vit(task: str, values: Mapping[str, Any], case: Mapping[str, Any]) -> tuple[str, dict[str, Any], Options]:
    """The original's generic ViT: InternViT-6B, MAE, AugReg, DINOv2."""
    if task == "cls":
        values = {**AUGREG, **values}
    o = Options(
        f"{task}.InternViT6B",
        values,
        patch_size=14,
        pretrain_img_size=224,
        embed_dim=3200,
        depth=48,
        num_heads=25,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_normalization=True,
        norm_layer_type="RMSNorm",
        init_values=0.1,
        window_attn=False,
        window_size=14,
        mlp_type="mlp",
    )
    table = o["pretrain_img_size"] if task == "det" else o.get("img_size", o["pretrain_img_size"])
    side = table // o["patch_size"]
    o.get("use_flash_attn")
    return (
        "vit",
        {
            **class_token(task, o),
            "family": "vit",
            "pos_prefix": 1,
            "layer_scale": o["init_values"],
            "pos_grid": (side, side),
            "norm": o["norm_layer_type"].lower(),
            "qk_norm": o["qk_normalization"],
            "window": windows(o["window_attn"], o["window_size"], o["depth"]),
            "act": mlp_activation(o["mlp_type"]),
            **{key: o[key] for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")},
        },
        o,
    )


def beit(task: str, values: Mapping[str, Any], case: Mapping[str, Any]) -> tuple[str, dict[str, Any], Options]:
    """BEiT, BEiTv2. Global blocks take a table of their own window's size."""
    o = Options(
        f"{task}.BEiT",
        values,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=False,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        init_values=None,
        window_attn=False,
        window_size=14,
    )
    o.get("pretrain_img_size"), o.get("img_size")  # no position table depends on it
    if o["use_abs_pos_emb"]:
        raise Unsupported(f"{o.owner}: position table")
    sizes = o["window_size"] if isinstance(o["window_size"], list) else [o["window_size"]]
    on = windows(o["window_attn"], o["window_size"], o["depth"])
    if None in on and len(set(sizes)) > 1:
        raise Unsupported(f"{o.owner}: global blocks, and windows of several sizes")
    return (
        "vit",
        {
            "family": "beit",
            "pos_grid": None,
            "qkv_bias": "q_and_v" if o["qkv_bias"] else False,
            "rel_pos": ("window" if None not in on else sizes[0]) if o["use_rel_pos_bias"] else None,
            "layer_scale": o["init_values"],
            "window": on,
            **{key: o[key] for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")},
        },
        o,
    )


def uniperceiver(task: str, values: Mapping[str, Any], case: Mapping[str, Any]) -> tuple[str, dict[str, Any], Options]:
    """Uni-Perceiver."""
    o = Options(
        f"{task}.UniPerceiver",
        values,
        patch_size=16,
        pretrain_img_size=224,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=True,
        window_attn=False,
        window_size=14,
    )
    side = o["pretrain_img_size"] // o["patch_size"]
    return (
        "vit",
        {
            "family": "uniperceiver",
            "pos_grid": (side, side),
            "time_steps": 8,
            "embed_norm": True,
            "norm_eps": 1e-5,
            "layer_scale": 0.0,
            "window": windows(o["window_attn"], o["window_size"], o["depth"]),
            **{key: o[key] for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")},
        },
        o,
    )


def convnext(task: str, values: Mapping[str, Any], case: Mapping[str, Any]) -> tuple[str, dict[str, Any], Options]:
    """ConvNeXt; its sizes are those of the Hugging Face model, unless the case overrides them."""
    o = Options(f"{task}.ConvNextHFWrapper", values)
    o.get("downsample_ratios")
    o.get("real_size")
    sizes = case.get("convnext_overrides", {}).get(values["pretrained"])
    size = values["pretrained"].split("-")[1]
    options = {} if sizes is None else {"depths": sizes["depths"], "widths": sizes["hidden_sizes"]}
    return f"convnext_{size}", options, o


BRANCHES: dict[str, Callable[..., tuple[str, dict[str, Any], Options]]] = {
    "vit_models": vit_models,
    "InternViT6B": intern_vit,
    "BEiT": beit,
    "UniPerceiver": uniperceiver,
    "ConvNeXt": convnext,
    "ConvNextHFWrapper": convnext,
}


def branch_class(pretrained: str) -> str:
    """The original tells the class from the name of the weights, in this order."""
    for word, name in (
        ("deit", "vit_models"),
        ("beit", "BEiT"),
        ("perceiver", "UniPerceiver"),
        ("convnext", "ConvNeXt"),
    ):
        if word in pretrained:
            return name
    return "InternViT6B"


def pyramid_branch(task: str, values: Mapping[str, Any], case: Mapping[str, Any]) -> BranchSpec:
    if task == "cls":
        kind = {"deit": "vit_models", "augreg": "InternViT6B"}
        name = kind[values.get("model_type", "deit")]
        values = {"real_size": values["img_size"], **{k: v for k, v in values.items() if k != "model_type"}}
    else:
        name = branch_class(values.get("pretrained", ""))
    if name not in BRANCHES:
        raise Unsupported(f"{task}.{name} branch")
    arch, options, o = BRANCHES[name](task, values, case)
    blocks = tuple(last - first + 1 for first, last in o["interaction_indexes"])
    spec = BranchSpec(arch, o["real_size"], blocks=blocks, options=options)
    o.finish()
    return spec


def pyramid(case: Mapping[str, Any], task: str, count: int) -> DensePyramid | Classifier:
    o = Options(
        case["class"],
        case["kwargs"],
        deform_num_heads=6,
        deform_ratio=1.0,
        n_points=4,
        cffn_ratio=0.25,
        interact_attn_type="normal",
        interaction_proj=True,
        norm_layer="LayerNorm",
        is_dino=False,
        with_simple_fpn=True,
    )
    taps = None if o["with_simple_fpn"] else o["out_interaction_indexes"]
    branches = [pyramid_branch(task, o[f"branch{i + 1}"], case) for i in range(count)]
    sizes = [b.resolution for b in branches]
    reference = sizes[1] if (task, count) == ("seg", 3) else sizes[-1]
    if task in ("det", "cls"):
        sizes = [min(size, reference) for size in sizes]  # the original never enlarges
    spec = PyramidSpec(
        branches=tuple(
            BranchSpec(b.arch, size, blocks=b.blocks, options=b.options)
            for b, size in zip(branches, sizes, strict=True)
        ),
        interactions=len(branches[0].blocks),
        attention={"deform": "deformable", "normal": "regular"}[o["interact_attn_type"]],
        heads=o["deform_num_heads"],
        points=o["n_points"],
        value_ratio=o["deform_ratio"],
        ffn_ratio=o["cffn_ratio"],
        proj=o["interaction_proj"],
        norm=o["norm_layer"] != "none",
        input_resolution=reference,
        output_branch=count - 1,
    )
    o.get("out_interaction_indexes")
    scales = (2, 1, 0.5) if o["is_dino"] else (4, 2, 1, 0.5)
    if task == "cls":
        head = "merged" if o.get("use_cls_head", True) else "map"
        head = "branches" if o.get("separate_head", False) else head
        # With a head per branch, the original counts the classes that each branch says.
        classes = (o["branch1"] if head == "branches" else case["kwargs"]).get("num_classes", 1000)
        o.get("num_classes")
        o.finish()
        return Classifier(spec, num_classes=classes, head=head, readout="first_patch" if head == "branches" else None)
    o.finish()
    return DensePyramid(as_built(spec) if count == 4 and "branch4" not in case else spec, scales=scales, taps=taps)


def single(case: Mapping[str, Any], task: str, name: str) -> DensePyramid | Classifier:
    arch, options, o = BRANCHES[name](task, case["kwargs"], case)
    if task == "cls":
        return single_classifier(arch, options, o)
    if name == "ConvNextHFWrapper":
        if o.get("with_simple_fpn", True) or not o.get("single_branch", False):
            raise Unsupported(f"{case['class']}: simple FPN")
        o.finish()
        branch = create_branch(arch, **options)
        ends = [i + 1 for i in range(branch.depth) if i + 1 == branch.depth or branch.dims[i] != branch.dims[i + 1]]
        blocks = tuple(stop - start for start, stop in pairwise([0, *ends]))
        return DensePyramid(PyramidSpec((BranchSpec(arch, 1024, blocks=blocks, options=options),)), taps=(0, 1, 2))
    last = o.get("out_indices", [options["depth"] - 1])[-1]
    if last != options["depth"] - 1:
        raise Unsupported(f"{case['class']}: output before the last block")
    if not o.get("use_simple_fpn", True) or o.get("with_final_norm", False):
        raise Unsupported(f"{case['class']}: one map per level, or a final norm")
    o.finish()
    return DensePyramid(PyramidSpec((BranchSpec(arch, 1024, options=options),)))


def single_classifier(arch: str, options: dict[str, Any], o: Options) -> Classifier:
    options["class_position"] = options["family"] == "vit"
    classes = o.get("num_classes", 1000) if o.get("use_final_norm_and_head", True) else 0
    spec = PyramidSpec((BranchSpec(arch, o["img_size"], options=options),))
    o.finish()
    return Classifier(spec, num_classes=classes, readout="cls_token" if options["class_token"] else "mean")


def pretrained_branch(case: Mapping[str, Any]) -> Branch:
    """The branch that a pretrained file of a `ckpt_*` case is loaded into."""
    task, name = task_and_class(case["class"])
    if task not in TASKS or name not in BRANCHES:
        raise Unsupported(f"{case['class']} (pretrained file)")
    arch, options, o = BRANCHES[name](task, case["kwargs"], case)
    o.finish()
    return create_branch(arch, **options)


TASKS = ("det", "seg", "cls")


def task_and_class(name: str) -> tuple[str, str]:
    """Classification's classes are named without their task."""
    task, _, rest = name.rpartition(".")
    return task or "cls", rest


DINO = "ChannelMapper neck + DINOHead (mmdet fork)"


def dino(case: Mapping[str, Any]) -> nn.Module:
    """The detector of a case of DINO's neck and head; its backbone hands on the feature maps it is given."""
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    import piip.integrations.mmdet_dino  # noqa: F401

    init_default_scope("mmdet")  # a runner of another test may have left its own
    neck, head = (case["kwargs"][part] for part in ("neck", "bbox_head"))
    transformer, noise = head["transformer"], head["dn_cfg"]["noise_scale"]
    coders = {}
    for part, attentions in (("encoder", ("self_attn_cfg",)), ("decoder", ("self_attn_cfg", "cross_attn_cfg"))):
        layers = transformer[part]["transformerlayers"]
        given = layers["attn_cfgs"] if isinstance(layers["attn_cfgs"], list) else [layers["attn_cfgs"]]
        options = [{k: v for k, v in attention.items() if k != "type"} for attention in given]
        ffn = {k: v for k, v in layers["ffn_cfgs"].items() if k != "type"}
        layer = {**dict(zip(attentions, options, strict=True)), "ffn_cfg": ffn}
        coders[part] = {"num_layers": transformer[part]["num_layers"], "layer_cfg": layer}
    assigner = case["kwargs"]["train_cfg"]["assigner"]
    costs = [assigner[cost] for cost in ("cls_cost", "reg_cost", "iou_cost")]
    dims = neck["out_channels"]
    model = {
        "type": "PIIPDINO",
        "num_queries": head["num_query"],
        "with_box_refine": head["with_box_refine"],
        "as_two_stage": head["as_two_stage"],
        "backbone": {"type": nn.Identity},
        "neck": neck,
        "encoder": coders["encoder"],
        "decoder": {**coders["decoder"], "return_intermediate": True, "post_norm_cfg": None},
        "positional_encoding": {k: v for k, v in head["positional_encoding"].items() if k != "type"},
        "bbox_head": {
            "type": "PIIPDINOHead",
            "embed_dims": dims,
            **{k: head[k] for k in ("num_classes", "sync_cls_avg_factor", "loss_cls", "loss_bbox", "loss_iou")},
        },
        "dn_cfg": {
            "label_noise_scale": noise["label"],
            "box_noise_scale": noise["box"],
            "group_cfg": head["dn_cfg"]["group_cfg"],
        },
        "train_cfg": {"assigner": {"type": assigner["type"], "match_costs": costs}},
        "test_cfg": case["kwargs"]["test_cfg"],
    }
    return MODELS.build(copy.deepcopy(model))


def translate(case: Mapping[str, Any]) -> Translated:
    """Build our model for a case.

    Args:
        case: The whole json of a case.

    Raises:
        Unsupported: The case needs what is not built yet.
    """
    if "class" not in case:
        raise Unsupported(f"case without a class: {case.get('case')}")
    task, name = task_and_class(case["class"])
    count = {"PIIPTwoBranch": 2, "PIIPThreeBranch": 3, "PIIPFourBranch": 4}.get(name)
    if task not in TASKS or not (count or name in BRANCHES):
        raise Unsupported(case["class"])
    return Translated(pyramid(case, task, count) if count else single(case, task, name))

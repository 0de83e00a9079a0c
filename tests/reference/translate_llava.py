"""From a LLaVA case of the reference data to our configuration."""

from collections.abc import Mapping
from typing import Any

from translate import Options, Unsupported

from piip_llava import PiipLlavaConfig

PYRAMID, PLAIN, FULL = "PIIPVisionTower + TwoBranchMLP", "CLIPVisionTower + projector", "LlavaLlamaForCausalLM"


def clip(values: Mapping[str, Any], case: Mapping[str, Any]) -> dict[str, Any]:
    """A CLIP branch; its position table is that of the pretrained grid, its patches may be other ones."""
    o = Options("clip_hf", values, patch_size=16, pretrain_patch_size=16, use_cls_token=True)
    sizes = case["clip_configs"][o["pretrained"]]
    # The original resizes the pretrained kernel and leaves its step as it was.
    step = None if o["pretrain_patch_size"] == o["patch_size"] else o["pretrain_patch_size"]
    return branch(
        o,
        "clip_base",
        {
            "embed_dim": sizes["hidden_size"],
            "depth": sizes["num_hidden_layers"],
            "num_heads": sizes["num_attention_heads"],
            "mlp_ratio": sizes["intermediate_size"] / sizes["hidden_size"],
            "patch_size": o["patch_size"],
            "patch_stride": step,
            "pos_grid": (sizes["image_size"] // sizes["patch_size"],) * 2,
            "class_token": o["use_cls_token"],
        },
    )


def convnext(values: Mapping[str, Any], case: Mapping[str, Any]) -> dict[str, Any]:
    o = Options("convnext_timm", values)
    o.get("downsample_ratios")
    sizes = case["convnext_configs"][o["pretrained"]]
    return branch(o, "convnext", {"depths": sizes["depths"], "widths": sizes["dims"]})


def branch(o: Options, arch: str, options: dict[str, Any]) -> dict[str, Any]:
    blocks = [last - first + 1 for first, last in o["interaction_indexes"]]
    result = {"arch": arch, "resolution": o["img_size"], "blocks": blocks, "options": options}
    o.get("model_type"), o.get("pretrained")
    o.finish()
    return result


BRANCHES = {"clip_hf": clip, "convnext_timm": convnext}


def tower(case: Mapping[str, Any]) -> dict[str, Any]:
    o = Options(
        "PIIPVisionTower",
        case["model_config"]["backbone"],
        deform_num_heads=6,
        deform_ratio=1.0,
        n_points=4,
        cffn_ratio=0.25,
        interact_attn_type="normal",
        interaction_proj=True,
        norm_layer="LayerNorm",
    )
    o.get("model_cls")
    branches = []
    for i in (1, 2):
        values = o[f"branch{i}"]
        if values["model_type"] not in BRANCHES:
            raise Unsupported(f"llava branch {values['model_type']}")
        branches.append(BRANCHES[values["model_type"]](values, case))
    spec = {
        "branches": branches,
        "interactions": len(branches[0]["blocks"]),
        "attention": {"deform": "deformable", "normal": "regular"}[o["interact_attn_type"]],
        "heads": o["deform_num_heads"],
        "points": o["n_points"],
        "value_ratio": o["deform_ratio"],
        "ffn_ratio": o["cffn_ratio"],
        "proj": o["interaction_proj"],
        "norm": o["norm_layer"] != "none",
        "input_resolution": branches[1]["resolution"],
    }
    o.finish()
    return {"type": "pyramid", "spec": spec}


def separate(case: Mapping[str, Any]) -> dict[str, Any]:
    o = Options("TwoBranchMLP", case["model_config"]["projector"], norm="gn", out_shape=None)
    o.get("dim1"), o.get("dim2")
    if o["type"] != "separate_2branch_v1":
        raise Unsupported(f"projector {o['type']}")
    size = o["out_shape"]
    size = size[0] if isinstance(size, (list, tuple)) else size
    options = {"type": "separate", "norm": {"gn": "group", "ln": "layer"}[o["norm"]], "out_size": size}
    o.finish()
    return options


def plain_tower(case: Mapping[str, Any]) -> dict[str, Any]:
    (sizes,) = case["clip_configs"].values()
    options = {
        "embed_dim": sizes["hidden_size"],
        "depth": sizes["num_hidden_layers"],
        "num_heads": sizes["num_attention_heads"],
        "mlp_ratio": sizes["intermediate_size"] / sizes["hidden_size"],
        "patch_size": sizes["patch_size"],
        "pos_grid": (sizes["image_size"] // sizes["patch_size"],) * 2,
    }
    return {
        "type": "plain",
        "spec": {"branches": [{"arch": "clip_base", "resolution": sizes["image_size"], "options": options}]},
        "select_layer": case["fields"]["mm_vision_select_layer"],
        "select_feature": case["fields"]["mm_vision_select_feature"],
    }


def mlp(name: str) -> dict[str, Any]:
    depths = {"linear": 1, "identity": 0}
    if name not in depths and not (name.startswith("mlp") and name.endswith("x_gelu")):
        raise Unsupported(f"projector {name}")
    return {"type": "mlp", "depth": depths[name] if name in depths else int(name[3:-6])}


def llava_config(case: Mapping[str, Any]) -> PiipLlavaConfig:
    """Return our configuration for a case; a case without a language model gets one that is never run."""
    width = case.get("llm_hidden_size", case.get("fields", {}).get("hidden_size", 64))
    text = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "vocab_size": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    options: dict[str, Any] = {}
    if case["class"] == FULL:
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        keys += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
        tokens = {key: case["config"][key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
        text = {key: case["config"][key] for key in keys} | tokens
        options = {"sequence_length": case["config"]["tokenizer_model_max_length"], **tokens}
    built = (
        {"tower": plain_tower(case), "projector": mlp(case["fields"]["mm_projector_type"])}
        if case["class"] == PLAIN
        else {"tower": tower(case), "projector": separate(case)}
    )
    return PiipLlavaConfig(text_config=text, image_token_id=case.get("image_token_index", -200), **built, **options)

"""Layer-wise learning-rate decay against depths worked out by hand."""

import pytest
import torch

from piip import DensePyramid
from piip.optim import ParamGroup, layer_decay, layer_id, param_groups

SBL = (24, 12, 12)


@pytest.mark.parametrize(
    ("name", "depths", "expected"),
    [
        ("branch1.pos_embed", SBL, 0),
        ("branch2.patch_embed.proj.weight", SBL, 0),
        ("branch3.cls_token", SBL, 0),
        ("branch1.blocks.0.gamma_1", SBL, 1),
        ("branch1.blocks.23.mlp.fc1.weight", SBL, 24),
        ("branch2.blocks.0.attn.qkv.weight", SBL, 2),
        ("branch3.blocks.11.norm1.bias", SBL, 24),
        # A shallower branch counts in steps of the first's: 48 / 32 = 1.5, rounded down.
        ("branch2.blocks.0.norm1.weight", (48, 32), 1),
        ("branch2.blocks.1.norm1.weight", (48, 32), 3),
        ("branch2.blocks.31.norm1.weight", (48, 32), 48),
        ("w1", SBL, 25),
        ("merge_branch2.0.weight", SBL, 25),
        ("fpn1.0.weight", SBL, 25),
        ("interactions.3.interaction_units_12.branch2to1_injector.ca_gamma", SBL, 25),
        # Uni-Perceiver's names.
        ("branch1.visual_embed.embeddings_norm.weight", SBL, 0),
        ("branch2.layers.3.linear1.weight", SBL, 8),
        # Single branches carry no prefix, and their FPN is called up1 to up4.
        ("pos_embed", (12,), 0),
        ("blocks.11.mlp.fc2.bias", (12,), 12),
        ("up1.0.weight", (12,), 13),
        # ConvNeXt takes no part, first or not.
        ("branch2.blocks.3.norm1.weight", (0, 12, 12), 4),
        ("branch1.convnext_model.encoder.stages.0.layers.0.dwconv.weight", (0, 12, 12), 13),
        ("branch2.convnext_model.encoder.stages.0.layers.0.dwconv.weight", (12, 0, 12), 13),
        ("branch3.blocks.0.norm1.weight", (12, 0, 12), 1),
    ],
)
def test_layer_ids(name, depths, expected):
    assert layer_id(name, depths) == expected


def tiny() -> DensePyramid:
    shape = {"num_heads": 2, "patch_size": 8, "pos_grid": (2, 2)}
    branches = [
        {"arch": "vit", "resolution": 32, "options": {"embed_dim": 32, "depth": 4, **shape}},
        {"arch": "vit", "resolution": 64, "options": {"embed_dim": 16, "depth": 2, **shape}},
    ]
    return DensePyramid({"branches": branches, "interactions": 2, "heads": 2})


class Detector(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny()
        self.head = torch.nn.Linear(32, 3)


def test_scales_and_weight_decay():
    groups = layer_decay(tiny(), 0.5, prefix="")
    assert groups["pyramid.branches.0.pos_embed"] == ParamGroup(0.5**5, True)
    assert groups["pyramid.branches.0.patch_embed.proj.bias"] == ParamGroup(0.5**5, False)
    assert groups["pyramid.branches.0.blocks.3.attn.qkv.weight"] == ParamGroup(0.5, True)
    assert groups["pyramid.branches.1.blocks.0.norm1.weight"] == ParamGroup(0.5**3, False)
    assert groups["pyramid.stages.0.units.0.to_low.ca_gamma"] == ParamGroup(1, False)
    # The released recipes decay the scalar weights of the merging.
    assert groups["merge.weights.0"] == ParamGroup(1, True)


def test_names_are_those_of_the_whole_model():
    model = Detector()
    groups = layer_decay(model, 0.5)
    assert list(groups) == [name for name, _ in model.named_parameters()]
    assert groups["head.weight"] == ParamGroup(1, True)
    assert groups["head.bias"] == ParamGroup(1, False)
    alone = layer_decay(model.backbone, 0.5, prefix="")
    assert {f"backbone.{name}": group for name, group in alone.items()}.items() <= groups.items()


def test_frozen_parameters_are_left_out():
    model = Detector()
    model.backbone.pyramid.branches[0].requires_grad_(False)
    groups = layer_decay(model, 0.5)
    assert not [name for name in groups if name.startswith("backbone.pyramid.branches.0")]
    assert "backbone.pyramid.branches.1.pos_embed" in groups


def test_parameter_groups_gather_what_is_trained_alike():
    model = Detector()
    groups = layer_decay(model, 0.5)
    gathered = param_groups(model.named_parameters(), groups, lr=0.1, weight_decay=0.05)
    assert sum(len(group["params"]) for group in gathered) == len(groups)
    assert len({(group["lr"], group["weight_decay"]) for group in gathered}) == len(gathered)
    by_name = {name: group for group in gathered for name in group["names"]}
    for name, (scale, decay) in groups.items():
        assert by_name[name]["lr"] == pytest.approx(0.1 * scale)
        assert by_name[name]["weight_decay"] == (0.05 if decay else 0)
        place = by_name[name]["names"].index(name)
        assert by_name[name]["params"][place] is model.get_parameter(name)
    torch.optim.AdamW(gathered)


def test_no_decay_of_rates():
    groups = layer_decay(tiny(), 1.0, prefix="")
    assert {group.lr_scale for group in groups.values()} == {1.0}

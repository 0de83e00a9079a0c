"""Pyramids as data: names, mappings, overrides, and errors that list what is known."""

import pytest
import torch

from piip import BranchSpec, DensePyramid, PyramidSpec, create_model, list_models
from piip.errors import SpecError
from piip.zoo.specs import SPECS, as_built, build_branch, build_pyramid, resolve_spec

SBL = "deit3-sbl-1568-1120-672"
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "pos_grid": (4, 4)}
TINY = {
    "branches": [
        {"arch": "vit", "resolution": 32, "options": SMALL},
        {"arch": "vit", "resolution": 64, "options": SMALL},
    ],
    "interactions": 1,
    "heads": 2,
}


def test_a_name_a_spec_and_a_mapping_mean_the_same():
    spec = resolve_spec(SBL)
    assert spec is SPECS[SBL]
    assert resolve_spec(spec) is spec
    assert resolve_spec({"base": SBL}) == spec
    assert resolve_spec({"base": spec}) == spec
    assert list_models() == list(SPECS)
    built = resolve_spec(TINY)
    assert built == PyramidSpec(
        (BranchSpec("vit", 32, options=SMALL), BranchSpec("vit", 64, options=SMALL)), 1, heads=2
    )


def test_a_row_says_what_the_paper_s_table_says():
    spec = resolve_spec(SBL)
    assert [b.arch for b in spec.branches] == ["deit_large", "deit_base", "deit_small"]
    assert [b.resolution for b in spec.branches] == [672, 1120, 1568]
    assert [b.window for b in spec.branches] == [28] * 3
    assert (spec.interactions, spec.heads, spec.points, spec.value_ratio, spec.ffn_ratio) == (12, 16, 4, 0.5, 0.25)


def test_overrides_of_a_row():
    spec = resolve_spec({"base": SBL, "resolutions": (672, 896, 1344), "interactions": 4, "proj": False})
    base = resolve_spec(SBL)
    assert [b.resolution for b in spec.branches] == [672, 896, 1344]
    assert [b.weights for b in spec.branches] == [b.weights for b in base.branches]
    assert (spec.interactions, spec.proj, spec.norm) == (4, False, True)
    assert base.interactions == 12, "a named row is never changed"
    branches = [{"arch": "deit_tiny", "resolution": 1}, {"arch": "vit_small", "resolution": 2}]
    other = resolve_spec({"base": SBL, "branches": branches, "resolutions": [224, 448]})
    assert [(b.arch, b.resolution) for b in other.branches] == [("deit_tiny", 224), ("vit_small", 448)]
    assert resolve_spec({"base": {"base": SBL, "points": 2}, "interactions": 6}).points == 2


def test_lists_become_tuples_so_that_specs_can_be_compared_and_hashed_by_value():
    branch = {"arch": "vit", "resolution": 64, "window": [7, None], "blocks": [1, 1], "options": SMALL}
    spec = resolve_spec({"branches": [branch], "interactions": 0})
    assert spec.branches[0].window == (7, None)
    assert spec.branches[0].blocks == (1, 1)
    assert build_pyramid(spec).cuts == [[(0, 1), (1, 2)]]


def test_the_given_mapping_is_left_alone():
    given = {"base": SBL, "resolutions": (672, 896, 1344)}
    before = dict(given)
    resolve_spec(given)
    assert given == before


@pytest.mark.parametrize(
    ("spec", "says", "known"),
    [
        ("deit3-sbl-1568-1120-673", "unknown spec .*did you mean deit3-sbl-1568-1120-672", list_models()),
        ({"base": "swin"}, "unknown spec 'swin'", list_models()),
        ({**TINY, "interaction": 3}, "unknown spec option 'interaction'", ["interactions", "attention", "heads"]),
        ({"base": SBL, "resolution": 3}, "unknown spec option 'resolution'", ["input_resolution", "branches"]),
        (
            {"branches": [{"arch": "vit", "resolution": 3, "windows": 7}]},
            "unknown branch option 'windows' .did you mean window",
            ["arch", "drop_path", "options"],
        ),
        ({"interactions": 3}, "a spec needs 'branches', or a 'base' row", []),
        ({"branches": [{"arch": "vit"}]}, "a branch needs 'resolution', got only arch", []),
        ({"branches": [{}]}, "a branch needs 'arch', got only nothing", []),
        ({"base": SBL, "resolutions": (1, 2)}, "2 resolutions for 3 branches: give one per branch", []),
    ],
)
def test_what_is_unknown_is_named_beside_what_is_known(spec, says, known):
    with pytest.raises(SpecError, match=says) as error:
        resolve_spec(spec)
    assert "\n" not in str(error.value)
    assert all(name in str(error.value) for name in known)


@pytest.mark.parametrize(
    ("branch", "says"),
    [
        ({"arch": "vit_smal"}, "unknown branch type 'vit_smal' .did you mean vit_small"),
        ({"arch": "vit", "options": {"heads": 3}}, "unknown option of branch type 'vit' 'heads'.*num_heads"),
        ({"arch": "vit"}, r"branch type 'vit' needs the option.s. embed_dim, depth, num_heads"),
        ({"arch": "convnext_tiny", "window": 7}, "unknown option of branch type 'convnext_tiny' 'window'"),
    ],
)
def test_branches_that_cannot_be_built(branch, says):
    with pytest.raises(SpecError, match=says):
        DensePyramid({**TINY, "branches": [{"resolution": 64, **branch}]})


def test_blocks_are_split_evenly_short_groups_first():
    deep = {**SMALL, "depth": 32}
    branches = [{"arch": "vit", "resolution": 32, "options": deep}, {"arch": "vit", "resolution": 64, "options": deep}]
    with torch.device("meta"):
        model = build_pyramid(resolve_spec({**TINY, "branches": branches, "interactions": 12}))
    assert [stop - start for start, stop in model.cuts[0]] == [2] * 4 + [3] * 8


def test_branch_settings_reach_the_branch():
    branch = build_branch(BranchSpec("vit", 64, window=3, global_every=2, drop_path=0.5, options={**SMALL, "depth": 4}))
    assert [block.attn.window for block in branch.blocks] == [3, None, 3, None]
    assert branch.blocks[-1].drop_path1.drop_prob == 0.5


def test_interaction_settings_reach_the_interactions():
    options = {"attention": "regular", "ffn_ratio": 0.5, "drop_path": 0.25, "proj": False, "norm": False}
    injector = build_pyramid(resolve_spec({**TINY, **options})).stages[0].units[0].to_low
    assert type(injector.attn).__name__ == "CrossAttention"
    assert injector.ffn.fc1.out_features == 16
    assert injector.drop_path.drop_prob == 0.25
    assert isinstance(injector.proj, torch.nn.Identity)
    assert isinstance(injector.ffn_norm, torch.nn.Identity)
    deformable = build_pyramid(resolve_spec({**TINY, "points": 3, "value_ratio": 1.0})).stages[0].units[0].to_high.attn
    assert (deformable.points, deformable.value_proj.out_features) == (3, 32)


def test_four_branches_as_built_repeat_the_third():
    name = "deit3-tsbl-1792-1568-1120-448"
    intended, built = resolve_spec(name), resolve_spec(f"{name}-as-built")
    assert built == as_built(intended)
    assert [b.arch for b in intended.branches] == ["deit_large", "deit_base", "deit_small", "deit_tiny"]
    assert [b.arch for b in built.branches] == ["deit_large", "deit_base", "deit_small", "deit_small"]
    assert [b.resolution for b in built.branches] == [448, 1120, 1568, 1792]
    assert [b.drop_path for b in built.branches] == [0.4, 0.15, 0.05, 0.05]


def test_create_model_starts_from_the_spec():
    model = create_model(TINY, scales=(2, 1, 0.5), grad_checkpointing=True)
    assert model.scales == (2, 1, 0.5)
    assert model.pyramid.branches[0].grad_checkpointing

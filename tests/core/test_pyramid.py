"""The pyramid by its behaviour: image scales, stages, interactions, taps, merging grid."""

import gzip
import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from piip import PIIP, DensePyramid, Tokens
from piip.branches import Branch, create_branch
from piip.errors import SpecError
from piip.interaction import ConvFFN, Injector, InteractionStage, InteractionUnit
from piip.pyramid import cut_blocks

REFERENCE = Path(__file__).parents[1] / "reference"


def vit(dim: int = 32, depth: int = 2, **options) -> Branch:
    return create_branch(
        "vit", embed_dim=dim, depth=depth, num_heads=2, patch_size=8, pos_grid=(4, 4), layer_scale=1.0, **options
    )


def pyramid(dims=(32, 24, 16), resolutions=(32, 48, 64), interactions=2, **options) -> PIIP:
    return PIIP([vit(dim) for dim in dims], resolutions, interactions, num_heads=2, **options)


def open_gates(module: nn.Module) -> None:
    """Let interactions act: their gates start at zero."""
    for name, parameter in module.named_parameters():
        if name.endswith(("ca_gamma", "cffn_gamma")):
            nn.init.constant_(parameter, 0.5)


def dense(resolutions=(32, 48, 64), dims=(32, 24, 16), interactions=2, build=None, **options) -> DensePyramid:
    branches = [
        {
            "arch": "vit",
            "resolution": resolution,
            "options": {"embed_dim": dim, "depth": 2, "num_heads": 2, "patch_size": 8, "pos_grid": (4, 4)},
        }
        for dim, resolution in zip(dims, resolutions, strict=True)
    ]
    return DensePyramid({"branches": branches, "interactions": interactions, "heads": 2, **options}, **build or {})


def alone(model: PIIP, images: torch.Tensor) -> list[Tokens]:
    """The branches of a pyramid, each on its own resized copy of the images."""
    states = []
    for branch, resolution in zip(model.branches, model.resolutions, strict=True):
        size = [side * resolution // model.input_resolution for side in images.shape[-2:]]
        small = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        states.append(branch.run(branch.embed(small), 0, branch.depth))
    return states


@pytest.mark.parametrize("attention", ["deformable", "regular"])
@pytest.mark.parametrize("extra", [{}, {"proj": False, "norm": False}])
def test_a_fresh_pyramid_equals_its_branches_alone(attention, extra):
    model = pyramid(attention=attention, **extra).eval()
    images = torch.randn(2, 3, 64, 128)
    (states,) = model(images)
    for state, expected in zip(states, alone(model, images), strict=True):
        assert state.grid == expected.grid
        torch.testing.assert_close(state.x, expected.x, rtol=1e-5, atol=1e-5)
    open_gates(model)
    (states,) = model(images)
    assert not torch.allclose(states[0].x, alone(model, images)[0].x, rtol=1e-4, atol=1e-4)


def test_a_fresh_pyramid_s_maps_are_those_of_its_branches_alone():
    model = dense().eval()
    images = torch.randn(1, 3, 64, 64)
    merged = model.merge(alone(model.pyramid, images))
    for level, expected in zip(model(images), model.fpn(merged), strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_any_number_of_branches(count):
    dims = (32, 24, 16, 16, 8)[:count]
    model = dense(resolutions=(16, 24, 32, 48, 64)[:count], dims=dims)
    open_gates(model.pyramid.stages)
    side = (16, 24, 32, 48, 64)[count - 1]
    images = torch.randn(2, 3, side, side, requires_grad=True)
    levels = model(images)
    assert [tuple(level.shape) for level in levels] == [
        (2, 32, int(side // 8 * scale), int(side // 8 * scale)) for scale in (4, 2, 1, 0.5)
    ]
    assert model.out_channels == [32] * 4
    assert model.strides == [2, 4, 8, 16]
    sum(level.sin().sum() for level in levels).backward()
    assert images.grad.any()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert len(model.pyramid.stages) == (0 if count == 1 else 2)
    assert all(len(stage.units) == count - 1 for stage in model.pyramid.stages)


def test_checkpointing_covers_interactions_and_changes_nothing():
    images = torch.randn(2, 3, 64, 64)
    model = dense()
    open_gates(model.pyramid.stages)
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    model.pyramid.stages[0].units[0].to_low.proj.register_forward_hook(count)
    results = []
    for enable in (False, True):
        model.pyramid.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)  # drop path
        levels = model(images)
        sum(level.sin().sum() for level in levels).backward()
        results.append((levels, [p.grad.clone() for p in model.parameters()]))
    assert calls == 3
    for plain, recomputed in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert DensePyramid(model.spec, grad_checkpointing=True).pyramid.stages[1].grad_checkpointing


@pytest.mark.parametrize(
    ("resolutions", "output"),
    [((32, 48, 64), 2), ((64, 48, 32), 0), ((48, 48, 48), 2), ((32, 64, 48), 1), ((64, 64, 32), 1)],
)
def test_the_largest_image_gives_the_output_grid(resolutions, output):
    model = dense(resolutions=resolutions)
    assert model.pyramid.output_branch == output
    assert model.pyramid.input_resolution == max(resolutions)
    (states,) = model.pyramid(torch.randn(1, 3, 96, 96))
    assert [state.grid[0] for state in states] == [96 * r // max(resolutions) // 8 for r in resolutions]
    side = max(resolutions)
    assert [level.shape[-1] for level in model(torch.randn(1, 3, side, side))] == [
        side // 2,
        side // 4,
        side // 8,
        side // 16,
    ]
    assert model.strides == [2, 4, 8, 16]


def test_input_resolution_and_output_branch():
    model = dense(resolutions=(32, 48, 64), input_resolution=48, output_branch=1)
    images = torch.randn(1, 3, 48, 96)
    (states,) = model.pyramid(images)
    assert [state.grid for state in states] == [(4, 8), (6, 12), (8, 16)]
    assert model(images)[2].shape[-2:] == (6, 12)
    assert model.pyramid.strides() == [12, 8, 6]
    assert model.strides == [2, 4, 8, 16]
    assert dense(output_branch=-3).pyramid.output_branch == 0


def test_taps():
    model = PIIP([vit(32, 4), vit(24, 4)], [32, 64], 4, num_heads=2)
    open_gates(model.stages)
    images = torch.randn(1, 3, 64, 64)
    kept = model.eval()(images, taps=(-1, 0, 2, 3))
    assert torch.equal(kept[0][0].x, kept[3][0].x)
    assert not torch.equal(kept[1][0].x, kept[2][0].x)
    (again,) = model(images, taps=[0])
    assert torch.equal(again[1].x, kept[1][1].x)
    with pytest.raises(IndexError):
        model(images, taps=[4])


def test_regular_fpn_merges_at_the_taps():
    model = dense(dims=(32, 24), resolutions=(32, 64), build={"taps": [0]})
    assert model.out_channels == [32, 32]
    assert model.strides == [4, 8]
    levels = model(torch.randn(1, 3, 64, 64))
    assert [tuple(level.shape) for level in levels] == [(1, 32, 16, 16), (1, 32, 8, 8)]


@pytest.mark.parametrize("blocks", [None, [[1, 1], [1, 1]]])
def test_without_interactions(blocks):
    model = PIIP([vit(32), vit(24)], [32, 64], 0, blocks=blocks).eval()
    assert model.depth == (2 if blocks else 1)
    assert len(model.stages) == 0
    images = torch.randn(1, 3, 64, 64)
    (states,) = model(images)
    for state, expected in zip(states, alone(model, images), strict=True):
        torch.testing.assert_close(state.x, expected.x, rtol=1e-5, atol=1e-5)


def states_of(dims: list[int]) -> list[Tokens]:
    return [Tokens(torch.randn(1, (i + 2) ** 2, dim), (i + 2, i + 2)) for i, dim in enumerate(dims)]


def moved_by(stage: InteractionStage, states: list[Tokens], index: int) -> list[bool]:
    """Which outputs of a stage change with one input."""
    changed = list(states)
    changed[index] = states[index]._replace(x=torch.randn_like(states[index].x))
    pairs = zip(stage(states), stage(changed), strict=True)
    return [not torch.equal(a.x, b.x) for a, b in pairs]


def test_units_run_from_the_finest_pair_to_the_coarsest():
    stage = InteractionStage([16, 16, 16], num_heads=2)
    states = states_of([16, 16, 16])
    assert moved_by(stage, states, 2) == [False, False, True]
    open_gates(stage)
    # News from the finest branch reach the coarsest within one stage, and not the other way round.
    assert moved_by(stage, states, 2) == [True, True, True]
    assert moved_by(stage, states, 0) == [True, True, False]
    # Without the unit of the finest pair, its branch is on its own.
    for gate in (g for name, g in stage.units[1].named_parameters() if name.endswith("gamma")):
        nn.init.zeros_(gate)
    assert moved_by(stage, states, 2) == [False, False, True]
    assert moved_by(stage, states, 0) == [True, True, False]


def test_both_directions_of_a_unit_read_what_came_in():
    unit = InteractionUnit(16, 24, num_heads=2)
    low, high = states_of([16, 24])
    open_gates(unit)
    new_low, new_high = unit(low, high)
    assert torch.equal(new_low.x, unit.to_low(low, high).x)
    assert torch.equal(new_high.x, unit.to_high(high, low).x)
    for gate in (unit.to_low.ca_gamma, unit.to_low.cffn_gamma):
        nn.init.zeros_(gate)
    assert torch.equal(unit(low, high)[0].x, low.x)
    assert torch.equal(unit(low, high)[1].x, new_high.x)


def test_a_stage_leaves_the_given_list_alone():
    stage = InteractionStage([16, 16], num_heads=2)
    open_gates(stage)
    states = states_of([16, 16])
    before = [state.x.clone() for state in states]
    given = list(states)
    stage(given)
    assert all(a is b for a, b in zip(given, states, strict=True))
    assert all(torch.equal(state.x, x) for state, x in zip(states, before, strict=True))


def test_class_tokens_pass_an_interaction_untouched():
    stage = InteractionStage([16, 16], num_heads=2)
    open_gates(stage)
    low, high = states_of([16, 16])
    prefix = torch.randn(1, 1, 16)
    assert stage([low._replace(prefix=prefix), high])[0].prefix is prefix


def test_conv_ffn_is_a_depthwise_convolution_between_two_linear_layers():
    ffn = ConvFFN(8, ratio=0.5)
    x = torch.randn(2, 12, 8)
    hidden = (x @ ffn.fc1.weight.T + ffn.fc1.bias).transpose(1, 2).reshape(2, 4, 3, 4)
    hidden = F.conv2d(hidden, ffn.dwconv.weight, ffn.dwconv.bias, padding=1, groups=4).flatten(2).transpose(1, 2)
    expected = F.gelu(hidden) @ ffn.fc2.weight.T + ffn.fc2.bias
    torch.testing.assert_close(ffn(x, (3, 4)), expected)


def test_drop_path_leaves_the_attention_alone():
    injector = Injector(16, 16, num_heads=2, drop_path=0.999999).train()
    open_gates(injector)
    low, high = states_of([16, 16])
    nn.init.zeros_(injector.cffn_gamma)
    expected = injector(low, high).x
    nn.init.ones_(injector.cffn_gamma)
    assert torch.equal(injector(low, high).x, expected)
    assert not torch.equal(expected, low.x)
    assert not torch.equal(injector.eval()(low, high).x, expected)


def test_without_ffn():
    injector = Injector(16, 24, num_heads=2, ffn_ratio=0)
    low, high = states_of([16, 24])
    assert {name.partition(".")[0] for name, _ in injector.named_parameters()} == {
        "proj",
        "query_norm",
        "feat_norm",
        "ca_gamma",
        "attn",
    }
    assert torch.equal(injector(low, high).x, low.x)


# --- Image scales --------------------------------------------------------------------------------------------------


class Probe(Branch):
    """Keeps the size of the image that it is given."""

    dims = (32,)
    strides = (1,)

    def embed(self, images):
        self.size = tuple(images.shape[-2:])
        return Tokens(images.flatten(2).transpose(1, 2), self.size)

    def run(self, tokens, start, stop):
        return tokens


def sizes_given(resolutions: list[int], reference: int, height: int, width: int, device: str = "meta") -> list[tuple]:
    model = PIIP([Probe() for _ in resolutions], resolutions, 0, input_resolution=reference)
    model(torch.empty(1, 3, height, width, device=device))
    return [branch.size for branch in model.branches]


def test_image_sizes_of_the_released_configs():
    configs = json.loads(gzip.decompress((REFERENCE / "resize_rounding.json.gz").read_bytes()))
    assert len(configs) == 33
    checked = set()
    for config in configs.values():
        for branch in config["branches"]:
            resolution, largest = branch["real_size"], config["largest"]
            assert branch["sizes_where_float_rounding_loses_a_pixel"] == []
            listed = dict(map(tuple, branch["sizes_not_multiple_of_16"]))
            sizes = [config["pad_divisor"] * (i + 1) for i in range(branch["n_sizes"])]
            assert set(listed) <= set(sizes)
            for size in sizes:
                expected = listed.get(size, resolution * size // largest)
                assert (expected % 16 != 0) == (size in listed)
                if (resolution, largest, size) not in checked:
                    assert sizes_given([resolution], largest, size, largest) == [(expected, resolution)]
                    checked.add((resolution, largest, size))
    assert len(checked) > 100


def test_image_sizes_are_rounded_down_exactly():
    for reference in (3, 10, 49, 103, 1568):
        for resolution in range(1, reference, max(1, reference // 20)):
            ratio = Fraction(resolution, reference)
            for height in (reference, 3 * reference, 5 * reference - 1):
                expected = (height * ratio.numerator // ratio.denominator, resolution)
                assert sizes_given([resolution], reference, height, reference) == [expected], (resolution, reference)
    # 49 * (1 / 49) is 0.99... in floating point.
    assert sizes_given([1, 49], 49, 49, 98, device="cpu") == [(1, 2), (49, 98)]


def test_resizing_is_bilinear_without_antialiasing():
    images = torch.randn(1, 3, 70, 84)
    model = PIIP([Probe(), Probe()], [40, 70], 0)
    ((small, full),) = model(images)
    assert full.to_map().equal(images)
    expected = F.interpolate(images, scale_factor=40 / 70, mode="bilinear", align_corners=False)
    torch.testing.assert_close(small.to_map(), expected, rtol=1e-4, atol=1e-4)


# --- What cannot be built, or run ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"branches": 0, "resolutions": []}, "0 branches and 0 resolutions"),
        ({"resolutions": [32]}, "2 branches and 1 resolutions: give one resolution per branch"),
        ({"resolutions": [32, 0]}, "resolutions are positive whole numbers of pixels, got 0"),
        ({"resolutions": [32, -64]}, "got -64"),
        ({"resolutions": [32, 64.5]}, "got 64.5"),
        ({"input_resolution": -1}, "got -1"),
        ({"resolutions": [7, 64]}, "branch 1: a resolution of 7 pixels leaves no token, it has one per 8 pixels"),
        ({"interactions": 3}, "branch 1 has 2 blocks, too few for 3 interactions: use at most 2"),
        ({"blocks": [[1, 1], [2]]}, "branch 2 is cut into 1 groups of blocks, the pyramid has 2 stages"),
        ({"blocks": [[1, 1], [1, 2]]}, r"branch 2: groups of \[1, 2\] blocks cover 3 blocks, the branch has 2"),
        ({"blocks": [[2, 0], [1, 1]]}, "every group needs at least one"),
        ({"num_heads": 5}, "cannot be split into 5 heads"),
        ({"attention": "linear"}, "unknown attention 'linear'; known: deformable, regular"),
        ({"kernel": "cuda"}, "unknown kernel 'cuda'; known kernels: auto, torch"),
        ({"attention": "regular", "num_heads": 5}, "query channels 32 are not a multiple of the 5 attention heads"),
    ],
)
def test_what_cannot_be_built(arguments, says):
    values = {"branches": 2, "resolutions": [32, 64], "interactions": 2, "num_heads": 2, **arguments}
    branches = [vit() for _ in range(values.pop("branches"))]
    with pytest.raises(ValueError, match=says):
        PIIP(branches, values.pop("resolutions"), values.pop("interactions"), **values)


def test_an_image_that_leaves_a_branch_without_a_token():
    model = pyramid()
    says = "branch 1 gets an image of 7 x 32 pixels from an input of 15 x 64 and needs at least 8 x 8 for one token"
    with pytest.raises(ValueError, match=f"{says}: give inputs of at least 16 pixels per side"):
        model(torch.zeros(1, 3, 15, 64))
    model(torch.zeros(1, 3, 16, 64))


def test_even_split_puts_short_groups_first():
    def sizes(depth: int, stages: int) -> list[int]:
        return [stop - start for start, stop in cut_blocks(depth, stages, None, "branch")]

    assert sizes(32, 12) == [2] * 4 + [3] * 8
    assert sizes(24, 12) == [2] * 12
    assert sizes(5, 2) == [2, 3]
    assert cut_blocks(5, 2, [4, 1], "branch") == [(0, 4), (4, 5)]
    with pytest.raises(SpecError):
        cut_blocks(5, 6, None, "branch")

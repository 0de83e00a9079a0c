"""Merging and FPNs: shapes, sums, initial values, and what cannot be built."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from piip import Tokens
from piip.errors import SpecError
from piip.fpn import RegularFPN, SimpleFPN, resample
from piip.merge import BranchMerge


def states() -> list[Tokens]:
    return [Tokens(torch.randn(2, 6, 32), (2, 3)), Tokens(torch.randn(2, 24, 16), (4, 6))]


@pytest.mark.parametrize("style", ["two_convolutions", "one_convolution"])
@pytest.mark.parametrize(("output", "grid"), [(1, (4, 6)), (0, (2, 3))])
def test_merged_map_is_a_weighted_sum_on_the_output_grid(style, output, grid):
    merge = BranchMerge([32, 16], output, style)
    assert [w.shape for w in merge.weights] == [(), ()]
    assert [w.item() for w in merge.weights] == [1, 1]
    with torch.no_grad():
        merge.weights[0].fill_(0.25)
        merge.weights[1].fill_(-2)
    given = states()
    expected = 0
    for state, projection, weight in zip(given, merge.projections, (0.25, -2), strict=True):
        maps = projection(state.x.transpose(1, 2).reshape(2, -1, *state.grid))
        expected = expected + weight * F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)
    merged = merge(given)
    assert merged.shape == (2, 32, *grid)
    torch.testing.assert_close(merged, expected)


def layers(module: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in module]


def test_styles():
    two = BranchMerge([64, 16], 1).projections
    assert [layers(p) for p in two] == [["Conv2d", "GroupNorm", "ReLU"] * 2] * 2
    assert [p[0].weight.shape for p in two] == [(64, 64, 3, 3), (64, 16, 3, 3)]
    assert all(p[0].bias is None and p[3].bias is None for p in two)
    one = BranchMerge([64, 16], 1, "one_convolution").projections
    assert [layers(p) for p in one] == [["GroupNorm", "ReLU"], ["Conv2d", "GroupNorm", "ReLU"]]
    first, second = BranchMerge([64, 32], 1, "linear").projections
    assert isinstance(first, nn.GroupNorm)
    x = torch.randn(2, 32, 3, 5)
    across = F.linear(F.group_norm(x, 32).movedim(1, -1), second[2].weight, second[2].bias).movedim(-1, 1)
    torch.testing.assert_close(second(x), F.group_norm(across, 32))


def test_merging_that_cannot_be_built():
    with pytest.raises(SpecError, match=r"unknown merging style 'cubic'.*two_convolutions, one_convolution, linear"):
        BranchMerge([32, 16], 1, "cubic")
    with pytest.raises(SpecError, match="merging 24 channels: group norm needs a multiple of 32"):
        BranchMerge([24, 32], 1)
    with pytest.raises(SpecError, match="merging 16 channels: group norm needs a multiple of 32"):
        BranchMerge([32, 16], 1, "linear")


def test_merging_in_bfloat16_stays_in_it():
    merge = BranchMerge([32, 16], 1).bfloat16()
    given = [state._replace(x=state.x.bfloat16()) for state in states()]
    assert merge(given).dtype == torch.bfloat16


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_simple_fpn(norm):
    fpn = SimpleFPN(32, norm=norm)
    x = torch.randn(2, 32, 6, 10)
    up4, up2, same, down2 = fpn(x)
    assert [tuple(level.shape[2:]) for level in (up4, up2, same, down2)] == [(24, 40), (12, 20), (6, 10), (3, 5)]
    assert torch.equal(same, x)
    assert torch.equal(down2, F.max_pool2d(x, 2))
    first, between, act, last = fpn.levels["up4"]
    assert isinstance(act, nn.GELU)
    doubled = first(x)
    if norm == "group":
        assert between.num_groups == 32
        normed = F.group_norm(doubled, 32, between.weight, between.bias, 1e-5)
    else:
        normed = F.layer_norm(doubled.permute(0, 2, 3, 1), (32,), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(up4, last(F.gelu(normed)), rtol=1e-4, atol=1e-5)


def test_dino_levels_keep_their_names():
    fpn = SimpleFPN(32, scales=(2, 1, 0.5))
    assert {name.split(".")[1] for name, _ in fpn.named_parameters()} == {"up2"}
    assert [level.shape[-1] for level in fpn(torch.randn(1, 32, 4, 4))] == [8, 4, 2]


def test_regular_fpn_brings_each_map_to_its_stride():
    fpn = RegularFPN([32, 64, 32], [4, 1, 0.5])
    maps = [torch.randn(1, 32, 4, 4), torch.randn(1, 64, 4, 4), torch.randn(1, 32, 4, 4)]
    assert [tuple(level.shape[1:]) for level in fpn(maps)] == [(32, 16, 16), (64, 4, 4), (32, 2, 2)]


def test_fpn_that_cannot_be_built():
    with pytest.raises(SpecError, match=r"unknown FPN scale 8.*4, 2, 1, 0.5"):
        SimpleFPN(32, scales=(8, 4))
    with pytest.raises(SpecError, match=r"unknown FPN norm 'batch'.*group, layer"):
        resample(32, 4, norm="batch")


def test_initial_values():
    for layer, fan_out in (
        (BranchMerge([64, 64], 1).projections[0][0], 3 * 3 * 64),
        (resample(64, 2)[0], 2 * 2 * 64),
    ):
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
        assert layer.bias is None or not layer.bias.any()


def test_maps_stay_channels_last():
    """From tokens of one image to every level, no layer changes the layout."""
    merged = BranchMerge([32, 16], 1)([state._replace(x=state.x[:1]) for state in states()])
    for level in (merged, *SimpleFPN(32)(merged)):
        assert level.is_contiguous(memory_format=torch.channels_last)


def test_separable_merging():
    merge = BranchMerge([64, 16], 1, "separable")
    assert [layers(p) for p in merge.projections] == [["Conv2d", "Conv2d", "GroupNorm", "ReLU"]] * 2
    assert [p[0].weight.shape for p in merge.projections] == [(64, 64, 1, 1), (64, 16, 1, 1)]
    assert [p[1].weight.shape for p in merge.projections] == [(64, 1, 3, 3)] * 2

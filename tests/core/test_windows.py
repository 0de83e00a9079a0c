"""Windowed self-attention against attention computed window by window."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from piip.attention import CrossAttention, SelfAttention, merge_windows, partition_windows
from piip.branches.vit import ViTBranch


def attention(window=None, **options) -> SelfAttention:
    module = SelfAttention(16, 2, window=window, **options)
    nn.init.normal_(module.qkv.weight, std=0.5)
    if module.qkv.bias is not None:
        nn.init.normal_(module.qkv.bias)
    return module


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Plain attention over `(L, C)`, head by head."""
    parts = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        parts.append((a @ b.T / a.shape[-1] ** 0.5).softmax(-1) @ c)
    return torch.cat(parts, dim=-1)


def window_by_window(module: SelfAttention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Every window on its own, padded cells included, in the order the option says."""
    h, w = grid
    side = module.window
    maps = x.view(h, w, -1)
    pad = (0, 0, 0, -w % side, 0, -h % side)
    qkv = module.qkv(F.pad(maps, pad)) if module.window_pad == "before_qkv" else F.pad(module.qkv(maps), pad)
    out = torch.zeros(*qkv.shape[:2], 16)
    for top in range(0, qkv.shape[0], side):
        for left in range(0, qkv.shape[1], side):
            cell = qkv[top : top + side, left : left + side].reshape(side * side, -1)
            q, k, v = cell.chunk(3, dim=-1)
            done = attend(module.q_norm(q), module.k_norm(k), v, module.num_heads)
            out[top : top + side, left : left + side] = done.view(side, side, -1)
    return module.proj(out[:h, :w].reshape(h * w, -1))


@pytest.mark.parametrize(("grid", "window"), [((4, 6), 2), ((3, 3), 3), ((6, 2), 1)])
def test_partition_and_merge_are_inverse(grid, window):
    x = torch.randn(2, *grid, 5)
    windows = partition_windows(x, window)
    assert windows.shape == (2 * grid[0] * grid[1] // window**2, window**2, 5)
    assert torch.equal(merge_windows(windows, window, grid), x)


def test_partition_by_hand():
    x = torch.arange(8).view(1, 2, 4, 1)
    assert partition_windows(x, 2).flatten(1).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize("pad", ["before_qkv", "after_qkv"])
@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (2, 1), (4, 3)])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "qk_norm": nn.LayerNorm}])
def test_windows_equal_attention_window_by_window(pad, grid, options):
    module = attention(3, window_pad=pad, **options)
    x = torch.randn(2, grid[0] * grid[1], 16)
    expected = torch.stack([window_by_window(module, one, grid) for one in x])
    torch.testing.assert_close(module(x, grid), expected, rtol=1e-4, atol=1e-5)


def test_where_windows_pad_changes_numbers_only_where_they_pad():
    before, after = attention(3), attention(3, window_pad="after_qkv")
    after.load_state_dict(before.state_dict())
    full, ragged = torch.randn(1, 36, 16), torch.randn(1, 20, 16)
    torch.testing.assert_close(before(full, (6, 6)), after(full, (6, 6)))
    assert not torch.allclose(before(ragged, (4, 5)), after(ragged, (4, 5)), atol=1e-3)


def test_one_window_over_the_grid_is_global_attention():
    windowed, everywhere = attention(4), attention()
    everywhere.load_state_dict(windowed.state_dict())
    x = torch.randn(2, 16, 16)
    torch.testing.assert_close(windowed(x, (4, 4)), everywhere(x, (4, 4)))
    # A window larger than the grid pads it: the padded cells take part.
    wide = attention(5)
    wide.load_state_dict(windowed.state_dict())
    assert not torch.allclose(wide(x, (4, 4)), everywhere(x, (4, 4)), atol=1e-3)


def test_windows_do_not_see_each_other():
    module = attention(2)
    x = torch.randn(1, 16, 16)
    moved = x.clone()
    moved[:, 0] += torch.randn(16)
    changed = (module(x, (4, 4)) != module(moved, (4, 4))).any(-1).view(4, 4)
    assert changed.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_cross_attention():
    module = CrossAttention(16, 12, 4)
    query, feat = torch.randn(2, 6, 16), torch.randn(2, 9, 12)
    projected = [(module.wq(a), module.wk(b), module.wv(b)) for a, b in zip(query, feat, strict=True)]
    expected = module.proj(torch.stack([attend(*qkv, heads=4) for qkv in projected]))
    torch.testing.assert_close(module(query, feat, (2, 3), (3, 3)), expected, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in module.named_parameters() if "bias" in name] == ["proj.bias"]


def test_a_grid_of_one_window_s_width_is_cut_without_a_copy():
    x = torch.randn(2, 24, 5)
    windows = partition_windows(x.unflatten(1, (12, 2)), 2)
    assert windows.data_ptr() == x.data_ptr()
    assert merge_windows(windows, 2, (12, 2)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("size", [(48, 64), (40, 64)])
@pytest.mark.parametrize("training", [False, True])
def test_blocks_of_equal_windows_run_like_one_after_the_other(size, training):
    """The first size fills its windows; drop path goes by image, in whatever order the windows are."""
    shape = {"embed_dim": 16, "depth": 5, "num_heads": 2, "patch_size": 8, "pos_grid": (4, 4)}
    branch = ViTBranch(window=(2, 2, None, 2, 3), drop_path=0.5, **shape).train(training)
    tokens = branch.embed(torch.randn(4, 3, *size))
    x = tokens.x
    torch.manual_seed(1)
    for block in branch.blocks:
        x = block(x, tokens.grid)
    torch.manual_seed(1)
    torch.testing.assert_close(branch.run(tokens, 0, 5).x, x, rtol=1e-5, atol=1e-6)

"""Attention without sampling: windowed or global self-attention of a ViT branch, and plain cross-attention."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WindowPad = Literal["before_qkv", "after_qkv"]
QkvBias = bool | Literal["q_and_v"]


def partition_windows(x: Tensor, window: int) -> Tensor:
    """Cut `(B, H, W, C)` into `(B * H/window * W/window, window * window, C)`; H and W are multiples of `window`."""
    b, h, w, c = x.shape
    x = x.view(b, h // window, window, w // window, window, c)
    return x.transpose(2, 3).reshape(-1, window * window, c)


def merge_windows(x: Tensor, window: int, size: tuple[int, int]) -> Tensor:
    """Undo `partition_windows`: back to `(B, H, W, C)` for `size` = (H, W)."""
    h, w = size
    x = x.view(-1, h // window, w // window, window, window, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, h, w, x.shape[-1])


def _padded_windows(x: Tensor, grid: tuple[int, int], window: int, pad_h: int, pad_w: int) -> Tensor:
    x = x.unflatten(1, grid)
    if pad_h or pad_w:
        x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    return partition_windows(x, window)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Reshape `(B, L, C)` to `(B, heads, L, C / heads)`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def relative_position_index(side: int, device: torch.device | None = None) -> Tensor:
    """Return which row of a relative position table belongs to each pair of tokens in a square window.

    Args:
        side: Window side in tokens; its table has `(2 * side - 1) ** 2` rows, one per offset, row by row.
        device: Device of the result.

    Returns:
        `(side * side, side * side)`, query by key, int64.
    """
    position = torch.arange(side, device=device)
    row, column = position.repeat_interleave(side), position.repeat(side)
    down, right = row[:, None] - row + side - 1, column[:, None] - column + side - 1
    return down * (2 * side - 1) + right


class SelfAttention(nn.Module):
    """Multi-head self-attention over a token grid, global or in non-overlapping windows (timm's parameter names).

    Windows pad the grid at its right and bottom to a multiple of the window, without a mask. `window_pad` says where:
    `before_qkv` pads the normalised input with zeros, so that padded keys and values equal the projection's bias (the
    released models were trained this way); `after_qkv` makes them exactly zero.

    Args:
        dim: Channels.
        num_heads: Heads; must divide `dim`.
        qkv_bias: Whether the joint q/k/v projection has a bias; `q_and_v` gives q and v one, and k none (BEiT).
        qk_norm: Norm layer class applied to q and k over all channels, before the split into heads; None for none.
        window: Window side in tokens, None for global attention.
        window_pad: Where windowed attention pads.
        rel_pos: Side in tokens of the window that a relative position bias is learned for, None for no such bias.
            Windowed attention needs `window` to be the same; global attention a grid of just that size.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, or `rel_pos` is another side than `window`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: QkvBias = True,
        qk_norm: type[nn.Module] | None = None,
        window: int | None = None,
        window_pad: WindowPad = "before_qkv",
        rel_pos: int | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not a multiple of num_heads {num_heads}")
        if rel_pos is not None and window not in (None, rel_pos):
            raise ValueError(f"a relative position table for windows of {rel_pos} tokens does not fit window {window}")
        self.num_heads = num_heads
        self.window = window
        self.window_pad = window_pad
        self.rel_pos = rel_pos
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias is True)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "q_and_v" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "q_and_v" else None
        self.q_norm = qk_norm(dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(dim, eps=1e-6) if qk_norm else nn.Identity()
        offsets = (2 * rel_pos - 1) ** 2 if rel_pos else 0
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads)) if rel_pos else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attend within `x (B, L, C)`; windowed attention needs L == H * W of `grid`. Returns `(B, L, C)`.

        Raises:
            ValueError: Global attention has a relative position table for another grid.
        """
        if self.window is None:
            if self.rel_pos and grid != (self.rel_pos, self.rel_pos):
                raise ValueError(
                    f"a relative position table for {self.rel_pos} x {self.rel_pos} tokens does not fit a global "
                    f"block on {grid[0]} x {grid[1]} tokens: give the block a window"
                )
            return self.proj(self._attend(self._qkv(x)))
        h, w = grid
        pad_h, pad_w = -h % self.window, -w % self.window
        if self.window_pad == "before_qkv":
            qkv = self._qkv(_padded_windows(x, grid, self.window, pad_h, pad_w))
        else:
            qkv = _padded_windows(self._qkv(x), grid, self.window, pad_h, pad_w)
        x = merge_windows(self._attend(qkv), self.window, (h + pad_h, w + pad_w))
        # The bounds of an unpadded grid are not sliced: a slice of a full dimension still costs a copy below.
        x = x[:, :h, :w] if pad_h or pad_w else x
        return self.proj(x.flatten(1, 2))

    def _qkv(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if self.q_bias is None or self.v_bias is None:
            return qkv
        return qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(qkv.dtype)

    def _position_bias(self, like: Tensor) -> Tensor | None:
        """Return what is added to the logits: `(1, heads, L, L)` in the type of `like`."""
        if self.relative_position_bias_table is None or self.rel_pos is None:
            return None
        index = relative_position_index(self.rel_pos, like.device)
        return self.relative_position_bias_table[index].permute(2, 0, 1).unsqueeze(0).to(like.dtype)

    def _attend(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, dim=-1)
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q_norm(q), self.k_norm(k), v))
        bias = self._position_bias(q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Global multi-head cross-attention between two branches ("regular attention", arXiv 2406.04330, Table 9).

    Args:
        dim: Channels of the query and of the result.
        feat_dim: Channels of the features attended to.
        num_heads: Heads; must divide `dim`.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(self, dim: int, feat_dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"query channels {dim} are not a multiple of the {num_heads} attention heads")
        self.num_heads = num_heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(feat_dim, dim, bias=False)
        self.wv = nn.Linear(feat_dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, feat: Tensor, query_grid: tuple[int, int], feat_grid: tuple[int, int]) -> Tensor:
        """Attend from `query (B, Lq, dim)` to `feat (B, Lf, feat_dim)`; the grids are not needed here."""
        q, k, v = (split_heads(t, self.num_heads) for t in (self.wq(query), self.wk(feat), self.wv(feat)))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

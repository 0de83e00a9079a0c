"""Attention without sampling: windowed or global self-attention of a ViT branch, and plain cross-attention."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

WindowPad = Literal["before_qkv", "after_qkv"]


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


class SelfAttention(nn.Module):
    """Multi-head self-attention over a token grid, global or in non-overlapping windows (timm's parameter names).

    Windows pad the grid at its right and bottom to a multiple of the window, without a mask. `window_pad` says where:
    `before_qkv` pads the normalised input with zeros, so that padded keys and values equal the projection's bias (the
    released models were trained this way); `after_qkv` makes them exactly zero.

    Args:
        dim: Channels.
        num_heads: Heads; must divide `dim`.
        qkv_bias: Whether the joint q/k/v projection has a bias.
        qk_norm: Norm layer class applied to q and k over all channels, before the split into heads; None for none.
        window: Window side in tokens, None for global attention.
        window_pad: Where windowed attention pads.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_norm: type[nn.Module] | None = None,
        window: int | None = None,
        window_pad: WindowPad = "before_qkv",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.window = window
        self.window_pad = window_pad
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = qk_norm(dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(dim, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attend within `x (B, L, C)`; windowed attention needs L == H * W of `grid`. Returns `(B, L, C)`."""
        if self.window is None:
            return self.proj(self._attend(self.qkv(x)))
        h, w = grid
        pad_h, pad_w = -h % self.window, -w % self.window
        if self.window_pad == "before_qkv":
            qkv = self.qkv(_padded_windows(x, grid, self.window, pad_h, pad_w))
        else:
            qkv = _padded_windows(self.qkv(x), grid, self.window, pad_h, pad_w)
        x = merge_windows(self._attend(qkv), self.window, (h + pad_h, w + pad_w))
        # The bounds of an unpadded grid are not sliced: a slice of a full dimension still costs a copy below.
        x = x[:, :h, :w] if pad_h or pad_w else x
        return self.proj(x.flatten(1, 2))

    def _attend(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, dim=-1)
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q_norm(q), self.k_norm(k), v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


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

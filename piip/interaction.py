"""Interactions between neighbouring branches (arXiv 2406.04330, section 3.2, equations 1 and 2)."""

from itertools import pairwise
from typing import Any, Literal

import torch
import torch.utils.checkpoint
from timm.layers import DropPath
from torch import Tensor, nn

from piip.attention import CrossAttention
from piip.deformable import DeformableCrossAttention
from piip.init import init_layer
from piip.tokens import Tokens, map_to_tokens, tokens_to_map

Attention = Literal["deformable", "regular"]


class ConvFFN(nn.Module):
    """Feed-forward network with a depthwise 3x3 convolution over the grid between its two linear layers.

    Args:
        dim: Channels.
        ratio: Hidden channels, as a share of `dim`.
    """

    def __init__(self, dim: int, ratio: float = 0.25) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map `(B, H*W, dim)` on `grid` = (H, W) to the same shape."""
        maps = self.dwconv(tokens_to_map(self.fc1(x), grid))
        return self.fc2(self.act(map_to_tokens(maps)))


class Injector(nn.Module):
    """Add what one branch knows to the tokens of another, through gates that start at zero.

    `query + ca_gamma * attn(norm(query), norm(proj(feat)))` (equation 1), then, unless `ffn_ratio` is 0,
    `query + cffn_gamma * ffn(norm(query))` (equation 2). Both gates are vectors over the channels.

    Args:
        dim: Channels of the query.
        feat_dim: Channels of the features.
        attention: `deformable`, or `regular` for global cross-attention.
        num_heads: Attention heads.
        points: Sampling points per head (deformable).
        value_ratio: Width of the values as a share of `dim` (deformable).
        ffn_ratio: Hidden width of the ConvFFN as a share of `dim`; 0 leaves it out.
        drop_path: Drop path rate of the ConvFFN residual; the attention residual is never dropped.
        proj: Whether the features are projected to `dim` first.
        norm: Whether query, features and ConvFFN input are normalised.
        kernel: Sampling kernel (deformable).

    Raises:
        ValueError: Unknown `attention` or `kernel`, or heads that do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        feat_dim: int,
        *,
        attention: Attention = "deformable",
        num_heads: int = 16,
        points: int = 4,
        value_ratio: float = 0.5,
        ffn_ratio: float = 0.25,
        drop_path: float = 0.0,
        proj: bool = True,
        norm: bool = True,
        kernel: str = "auto",
    ) -> None:
        super().__init__()

        def norm_layer(channels: int) -> nn.Module:
            return nn.LayerNorm(channels, eps=1e-6) if norm else nn.Identity()

        attn_dim = dim if proj else feat_dim
        self.proj = nn.Linear(feat_dim, dim) if proj else nn.Identity()
        self.query_norm = norm_layer(dim)
        self.feat_norm = norm_layer(attn_dim)
        self.ca_gamma = nn.Parameter(torch.zeros(dim))
        self.ffn: ConvFFN | None = None
        if ffn_ratio:
            self.ffn_norm = norm_layer(dim)
            self.ffn = ConvFFN(dim, ffn_ratio)
            self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
            self.cffn_gamma = nn.Parameter(torch.zeros(dim))
        self.apply(init_layer)
        # Built last: deformable attention brings its own initialisation, which `init_layer` must not undo.
        if attention == "deformable":
            self.attn: nn.Module = DeformableCrossAttention(dim, attn_dim, num_heads, points, value_ratio, kernel)
        elif attention == "regular":
            self.attn = CrossAttention(dim, attn_dim, num_heads)
            self.attn.apply(init_layer)
        else:
            raise ValueError(f"unknown attention {attention!r}; known: deformable, regular")

    def forward(self, query: Tokens, feat: Tokens) -> Tokens:
        """Return `query` enriched by `feat`; shapes, grid and class tokens of `query` are kept."""
        x = query.x
        feat_x = self.feat_norm(self.proj(feat.x))
        x = x + self.ca_gamma * self.attn(self.query_norm(x), feat_x, query.grid, feat.grid)
        if self.ffn is not None:
            x = x + self.cffn_gamma * self.drop_path(self.ffn(self.ffn_norm(x), query.grid))
        return query._replace(x=x)


class InteractionUnit(nn.Module):
    """Exchange features between two neighbouring branches, both directions from the features that came in.

    Args:
        low_dim: Channels of the branch with the larger model (the smaller image).
        high_dim: Channels of the branch with the smaller model (the larger image).
        **options: Options of `Injector`.
    """

    def __init__(self, low_dim: int, high_dim: int, **options: Any) -> None:
        super().__init__()
        self.to_low = Injector(low_dim, high_dim, **options)
        self.to_high = Injector(high_dim, low_dim, **options)

    def forward(self, low: Tokens, high: Tokens) -> tuple[Tokens, Tokens]:
        """Return the updated `(low, high)`."""
        return self.to_low(low, high), self.to_high(high, low)


class InteractionStage(nn.Module):
    """One interaction: a unit per pair of neighbours, from the finest pair to the coarsest, one after the other.

    Args:
        dims: Channels of every branch at this depth.
        **options: Options of `Injector`.
    """

    def __init__(self, dims: list[int], **options: Any) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.units = nn.ModuleList(InteractionUnit(low, high, **options) for low, high in pairwise(dims))

    def forward(self, states: list[Tokens]) -> list[Tokens]:
        """Return the updated state of every branch; the given list is left as it is."""
        states = list(states)
        for i in reversed(range(len(self.units))):
            unit, pair = self.units[i], states[i : i + 2]
            if self.grad_checkpointing and torch.is_grad_enabled():
                states[i : i + 2] = torch.utils.checkpoint.checkpoint(unit, *pair, use_reentrant=False)
            else:
                states[i : i + 2] = unit(*pair)
        return states

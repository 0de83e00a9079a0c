"""One plain vision transformer for every pretrained family.

DeiT, DeiT III, AugReg, MAE, DINOv2, BEiT(v2), Uni-Perceiver, InternViT-6B, CLIP.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Literal, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, PatchEmbed, RmsNorm, get_act_layer, trunc_normal_
from torch import Tensor, nn

from piip.attention import QkvBias, SelfAttention, WindowPad, merge_windows, partition_windows
from piip.branches.base import Branch, register_branch
from piip.errors import SpecError, unknown
from piip.tokens import Tokens, map_to_tokens

NORMS: dict[str, type[nn.Module]] = {"layernorm": nn.LayerNorm, "rmsnorm": RmsNorm}
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
Windows = int | Sequence[int | None] | None


class ViTBlock(nn.Module):
    """A pre-norm transformer block with optional layer scale (timm's parameter names).

    Args:
        dim: Channels.
        attn: The self-attention.
        norm: Norm layer class.
        norm_eps: Its epsilon.
        mlp_ratio: Hidden channels of the MLP as a multiple of `dim`.
        act: Activation of the MLP: `gelu` (exact), `gelu_tanh` or `quick_gelu`.
        layer_scale: Initial value of the layer scale, None for none.
        drop_path: Drop path rate of both residuals.
    """

    def __init__(
        self,
        dim: int,
        attn: SelfAttention,
        *,
        norm: type[nn.Module] = nn.LayerNorm,
        norm_eps: float = 1e-6,
        mlp_ratio: float = 4.0,
        act: str = "gelu",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()

        def residual_scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(dim, init_values=layer_scale)

        self.norm1 = norm(dim, eps=norm_eps)
        self.attn = attn
        self.ls1 = residual_scale()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=get_act_layer(act))
        self.ls2 = residual_scale()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map tokens `(B, L, C)` to the same shape."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), grid)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ViTBranch(Branch):
    """A plain ViT as a branch, with timm's parameter names.

    There is no final norm: the pyramid reads block outputs. Without a class token, a table row that belongs to one
    (`pos_prefix`) is kept as a parameter but not read, as in the released models.

    Args:
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Attention heads.
        patch_size: Side of a patch in pixels.
        mlp_ratio: Hidden channels of the MLP as a multiple of `embed_dim`.
        qkv_bias: Whether the q/k/v projection has a bias; `q_and_v` gives q and v one, and k none (BEiT).
        qk_norm: Whether q and k are normalised over all channels (with `norm`'s class).
        norm: `layernorm` or `rmsnorm`.
        norm_eps: Epsilon of the norms.
        layer_scale: Initial value of the layer scale, None for none.
        act: `gelu` (exact), `gelu_tanh` or `quick_gelu`.
        pos_grid: `(H, W)` of the position table, resized (bicubic) to the grid of the image; None for no table.
        pos_prefix: Rows of the position table in front of the grid (one for a class token).
        time_steps: Rows of a table of time steps (Uni-Perceiver, which is trained on videos too); an image is step 0.
            0 for no table.
        embed_norm: Whether embedded tokens are normalised before the first block (Uni-Perceiver, CLIP).
        patch_stride: Pixels from one patch to the next where that is not the patch size (LLaVA's original, after
            resizing the kernel of a network with other patches).
        patch_bias: Whether the patch embedding has a bias.
        rel_pos: Relative position bias of every block: `window` learns it for the block's window, a number of tokens
            for windows of that side; None for none.
        class_token: Whether a class token travels along (as `Tokens.prefix`).
        class_position: Whether the class token gets the row that the position table has for it; the released pyramids
            gave theirs none.
        window: Window side in tokens for every block; or one entry per block, None for global; or None: all global.
        global_every: With one window side: every n-th block attends globally (3: blocks 3, 6, ...); 0 for none.
        window_pad: Where windowed attention pads, see `SelfAttention`.
        drop_path: Drop path rate.
        drop_path_rule: `linear` from 0 to the rate over the blocks, or `constant`.
        family: Whose parameter names the released files use for this branch, see `piip.checkpoint`.

    Raises:
        SpecError: An option has an unknown value or does not fit the depth.
    """

    layer_decay = True

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        *,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: QkvBias = True,
        qk_norm: bool = False,
        norm: str = "layernorm",
        norm_eps: float = 1e-6,
        layer_scale: float | None = None,
        act: str = "gelu",
        pos_grid: tuple[int, int] | None = (14, 14),
        pos_prefix: int = 0,
        time_steps: int = 0,
        embed_norm: bool = False,
        patch_stride: int | None = None,
        patch_bias: bool = True,
        rel_pos: int | Literal["window"] | None = None,
        class_token: bool = False,
        class_position: bool = True,
        window: Windows = None,
        global_every: int = 0,
        window_pad: WindowPad = "before_qkv",
        drop_path: float = 0.0,
        drop_path_rule: Literal["linear", "constant"] = "linear",
        family: str = "vit",
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise SpecError(unknown("norm", norm, NORMS))
        if act not in ACTIVATIONS:
            raise SpecError(unknown("activation", act, ACTIVATIONS))
        if window_pad not in ("before_qkv", "after_qkv"):
            raise SpecError(unknown("window_pad", window_pad, ("before_qkv", "after_qkv")))
        if drop_path_rule not in ("linear", "constant"):
            raise SpecError(unknown("drop_path_rule", drop_path_rule, ("linear", "constant")))
        windows = windows_per_block(window, depth, global_every)
        tables = tables_per_block(rel_pos, windows)
        if qkv_bias not in (True, False, "q_and_v"):
            raise SpecError(unknown("qkv_bias", qkv_bias, ("True", "False", "q_and_v")))
        if pos_grid is None and pos_prefix:
            raise SpecError("pos_prefix counts rows of a position table: leave it out, or give pos_grid")
        if class_token and rel_pos:
            raise SpecError("a relative position bias has no rows for a class token: leave out rel_pos or class_token")
        if class_token and any(windows):
            raise SpecError("a branch with a class token attends globally: leave out window or class_token")
        self.dims = (embed_dim,) * depth
        self.strides = (patch_stride or patch_size,) * depth
        self.patch_size = patch_size
        self.pos_grid = None if pos_grid is None else (pos_grid[0], pos_grid[1])
        self.pos_prefix = pos_prefix
        self.class_position = class_position
        self.family = family
        norm_layer = NORMS[norm]
        self._norm = partial(norm_layer, embed_dim, eps=norm_eps)
        self.patch_embed = PatchEmbed(None, patch_size, embed_dim=embed_dim, flatten=False, bias=patch_bias)
        if patch_stride is not None:
            self.patch_embed.proj.stride = (patch_stride, patch_stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        rows = pos_prefix + math.prod(pos_grid) if pos_grid else 0
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, embed_dim)) if rows else None
        self.time_embed = nn.Parameter(torch.zeros(time_steps, embed_dim)) if time_steps else None
        self.embed_norm = norm_layer(embed_dim, eps=norm_eps) if embed_norm else nn.Identity()
        rates = [drop_path if drop_path_rule == "constant" else drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            ViTBlock(
                embed_dim,
                SelfAttention(
                    embed_dim,
                    num_heads,
                    qkv_bias=qkv_bias,
                    qk_norm=norm_layer if qk_norm else None,
                    window=side,
                    window_pad=window_pad,
                    rel_pos=table,
                ),
                norm=norm_layer,
                norm_eps=norm_eps,
                mlp_ratio=mlp_ratio,
                act=act,
                layer_scale=layer_scale,
                drop_path=rate,
            )
            for side, table, rate in zip(windows, tables, rates, strict=True)
        )
        self._init_weights()

    def _init_weights(self) -> None:
        for table in (self.pos_embed, self.time_embed):
            if table is not None:
                trunc_normal_(table, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def build_norm(self) -> nn.Module:
        """Return a new final norm, as the classifiers of this kind of network have it."""
        return self._norm()

    def drop_class_position(self) -> None:
        """Give the class token no position, as the released pyramids do; DeiT's table then has no row for it."""
        self.class_position = False
        if self.family == "deit" and self.pos_embed is not None and self.pos_prefix:
            self.pos_embed = nn.Parameter(self.pos_embed.detach()[:, self.pos_prefix :].clone())
            self.pos_prefix = 0

    def embed(self, images: Tensor) -> Tokens:
        """Embed images `(B, 3, H, W)`; a remainder that fills no patch is dropped.

        Raises:
            ValueError: The images are smaller than one patch.
        """
        height, width = images.shape[-2:]
        if min(height, width) < self.patch_size:
            raise ValueError(f"an image of {height} x {width} pixels holds no patch of {self.patch_size} pixels")
        maps = self.patch_embed(images)
        grid = (maps.shape[-2], maps.shape[-1])
        x = map_to_tokens(maps)
        if self.pos_embed is not None and self.pos_grid is not None:
            positions = self.pos_embed[:, self.pos_prefix :]
            x = x + resize_positions(positions, self.pos_grid, grid).to(maps.dtype)
        if self.time_embed is not None:
            x = x + self.time_embed[0].to(maps.dtype)
        x = self.embed_norm(x)
        if self.cls_token is None:
            return Tokens(x, grid)
        prefix = self.cls_token.to(maps.dtype)
        if self.pos_embed is not None and self.pos_prefix and self.class_position:
            prefix = prefix + self.pos_embed[:, :1].to(maps.dtype)
        return Tokens(x, grid, self.embed_norm(prefix).expand(x.shape[0], -1, -1))

    def run(self, tokens: Tokens, start: int, stop: int) -> Tokens:
        """Run blocks `start` to `stop - 1`; class tokens take part in the attention."""
        x, grid, prefix = tokens
        if prefix is not None:
            x = torch.cat([prefix, x], dim=1)
        chosen = [cast(ViTBlock, self.blocks[i]) for i in range(start, stop)]
        for side, blocks in groupby(chosen, key=lambda block: block.attn.window):
            x = self._run_equal(list(blocks), x, grid, side)
        if prefix is not None:
            prefix, x = x.split([prefix.shape[1], x.shape[1] - prefix.shape[1]], dim=1)
        return Tokens(x, grid, prefix)

    def _run_equal(self, blocks: list[ViTBlock], x: Tensor, grid: tuple[int, int], side: int | None) -> Tensor:
        """Run blocks of one window side, in the order of the windows where that saves copies."""
        h, w = grid
        if side is None or len(blocks) == 1 or h % side or w % side:
            for block in blocks:
                x = self.call_block(block, x, grid)
            return x
        # One window below the other is a grid of a window's width, which each block cuts without a copy.
        x = partition_windows(x.unflatten(1, grid), side).view(x.shape)
        for block in blocks:
            x = self.call_block(block, x, (h * w // side, side))
        return merge_windows(x, side, grid).flatten(1, 2)


def windows_per_block(window: Windows, depth: int, global_every: int = 0) -> list[int | None]:
    """Spread the window options over the blocks of a branch.

    Raises:
        SpecError: A list of another length than the depth, a list and `global_every`, or a window below one token.
    """
    if window is None or isinstance(window, int):
        windows = [None if global_every and (i + 1) % global_every == 0 else window for i in range(depth)]
    elif global_every:
        raise SpecError("global_every goes with one window side, not with a list of windows")
    else:
        windows = list(window)
    if len(windows) != depth:
        raise SpecError(f"window lists {len(windows)} blocks, the branch has {depth}")
    if any(w is not None and w < 1 for w in windows):
        raise SpecError(f"window {window!r}: a window is at least one token; use None for global attention")
    return windows


def tables_per_block(rel_pos: int | str | None, windows: Sequence[int | None]) -> list[int | None]:
    """Return the side of every block's relative position table in tokens, None for no table.

    Args:
        rel_pos: See `ViTBranch`.
        windows: Window side of every block, None for global.

    Raises:
        SpecError: A table does not fit the window of its block, or a global block leaves its size open.
    """
    if rel_pos is None:
        return [None] * len(windows)
    if rel_pos == "window":
        if None in windows:
            raise SpecError(
                f"block {windows.index(None) + 1} attends globally and has no window to take the size of its relative "
                "position table from: give every block a window, or rel_pos the size in tokens"
            )
        return list(windows)
    if not isinstance(rel_pos, int) or rel_pos < 1:
        raise SpecError(f"rel_pos is 'window' or a number of tokens, got {rel_pos!r}")
    if wrong := [side for side in windows if side not in (None, rel_pos)]:
        raise SpecError(
            f"window {wrong[0]} does not fit a relative position table for windows of {rel_pos} tokens: "
            "use the same number for both"
        )
    return [rel_pos] * len(windows)


def resize_positions(table: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Resize a position table `(1, H*W, C)` from grid `source` to grid `target`: bicubic, in float32."""
    if source == target:
        return table
    maps = table.float().transpose(1, 2).unflatten(2, source)
    maps = F.interpolate(maps, size=target, mode="bicubic", align_corners=False)
    return maps.flatten(2).transpose(1, 2)


# DeiT and DeiT III; the released DeiT branches always carry layer scale and use one drop path rate for all blocks.
_DEIT = {"family": "deit", "layer_scale": 1.0, "drop_path_rule": "constant"}
# AugReg, MAE, DINOv2: a table row for the class token that no branch of a pyramid reads.
_PLAIN = {"family": "vit", "layer_scale": 1.0, "pos_prefix": 1}
_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}

# BEiT and BEiTv2: no position table, but a relative position bias learned for the window.
_BEIT = {"family": "beit", "layer_scale": 1e-6, "pos_grid": None, "rel_pos": "window", "qkv_bias": "q_and_v"}
_UNIPERCEIVER = {"family": "uniperceiver", "layer_scale": 0.0, "time_steps": 8, "embed_norm": True, "norm_eps": 1e-5}
# CLIP's image tower; its class token has a row of the position table, and travels along.
_CLIP = {
    "family": "clip",
    "act": "quick_gelu",
    "norm_eps": 1e-5,
    "embed_norm": True,
    "patch_bias": False,
    "pos_prefix": 1,
    "class_token": True,
}

register_branch("vit")(ViTBranch)
for _size, (_dim, _depth, _heads) in {**_SIZES, "huge": (1280, 32, 16)}.items():
    _shape = {"embed_dim": _dim, "depth": _depth, "num_heads": _heads}
    register_branch(f"vit_{_size}", **_shape, **_PLAIN)(ViTBranch)
    if _size in _SIZES:
        register_branch(f"deit_{_size}", **_shape, **_DEIT)(ViTBranch)
    if _size in ("base", "large"):
        register_branch(f"beit_{_size}", **_shape, **_BEIT)(ViTBranch)
        register_branch(f"uniperceiver_{_size}", **_shape, **_UNIPERCEIVER)(ViTBranch)
        register_branch(f"clip_{_size}", **_shape, **_CLIP)(ViTBranch)
register_branch(
    "internvit_6b",
    embed_dim=3200,
    depth=48,
    num_heads=25,
    qkv_bias=False,
    qk_norm=True,
    norm="rmsnorm",
    layer_scale=0.1,
    pos_prefix=1,
)(ViTBranch)

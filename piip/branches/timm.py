"""Any timm ViT or ConvNeXt as a branch, by timm's name for it.

A plain ViT without class tokens becomes a `ViTBranch`, with windows and all its other options; a ConvNeXt becomes a
`ConvNeXtBranch`. What those do not know (rotary positions, gated MLPs, norms per head, class and register tokens) runs
in timm's own blocks: `TimmBranch`.
"""

from typing import Any

import timm
import torch
from timm.layers import LayerScale, Mlp, PatchEmbed
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from piip.branches.base import Branch
from piip.branches.convnext import ConvNeXtBranch
from piip.branches.pretrained import check_vit, convert_vit
from piip.branches.vit import ViTBranch
from piip.errors import CheckpointError, SpecError
from piip.tokens import Tokens

SUPPORTED = (
    "plain ViTs (DeiT, DeiT III, AugReg, MAE, DINOv2, SigLIP, CLIP, ...), BEiT, ViTs with rotary positions (DINOv3, "
    "EVA-02, ...) and ConvNeXts (V2 too)"
)


def is_timm_model(name: str) -> bool:
    """Return whether timm has a model of this name, with or without a tag (`deit3_base_patch16_224.fb_in1k`)."""
    return timm.is_model(name)


def timm_branch(
    name: str, *, pretrained: bool = False, class_token: bool = False, drop_path: float = 0.0, **options: Any
) -> Branch:
    """Build a branch from a timm model.

    Args:
        name: timm's name.
        pretrained: Whether to load timm's weights; the tag in the name says which.
        class_token: Whether class and register tokens travel along, as in the pretraining. Pyramids of the paper leave
            them out, and windows need that.
        drop_path: Drop path rate.
        **options: Options of `ViTBranch` over what the model has: `window`, `global_every`, `patch_size`, `pos_grid`,
            ...; ConvNeXts and models in timm's own blocks take none.

    Raises:
        SpecError: timm has no such model, or it cannot be a branch, or not with these options.
        CheckpointError: Its weights cannot be had.
    """
    network = _network(name, pretrained, drop_path)
    if isinstance(network, ConvNeXt):
        if options or class_token:
            raise SpecError(f"{name} is a ConvNeXt, which has no {', '.join(options) or 'class_token'}")
        return ConvNeXtBranch.of(network)
    if not isinstance(network, VisionTransformer | Eva | Beit) or type(network.patch_embed) is not PatchEmbed:
        kind = type(network).__name__
        raise SpecError(
            f"timm's {name} ({kind}) cannot be a branch: of timm's models, {SUPPORTED} can; a network of another kind "
            "joins as a branch type of its own (piip.branches.register_branch)"
        )
    plain = None if class_token else _plain(network)
    if plain is not None:
        if network.patch_embed.proj.weight.is_meta:
            return ViTBranch(**{**plain, "drop_path": drop_path, **options})
        branch = ViTBranch(**{**plain, "drop_path": drop_path, **options})
        state = _without_tokens(network)
        check_vit(state, branch)
        branch.load_state_dict({**branch.state_dict(), **convert_vit(state, branch)})
        return branch
    if options or isinstance(network, Beit):
        reason = f"class tokens ({class_token=})" if class_token else "parts that ViTBranch does not have"
        what = ", ".join(options) or "class_token"
        raise SpecError(f"timm's {name} has {reason}: its blocks run as they are, globally, without {what}")
    return TimmBranch(network)


def _network(name: str, pretrained: bool, drop_path: float) -> Any:  # a model of timm's: its parts are known by name
    settings: dict[str, Any] = {"num_classes": 0, "drop_path_rate": drop_path}
    kinds = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    if kinds in ("vision_transformer", "deit", "eva"):
        settings["dynamic_img_size"] = True  # images of any size
    # On the meta device there is nothing to load into: a checkpoint of the whole model follows.
    pretrained = pretrained and torch.get_default_device().type != "meta"
    try:
        return timm.create_model(name, pretrained=pretrained, **settings)
    except TypeError as error:
        raise SpecError(f"timm's {name} cannot be a branch: of timm's models, {SUPPORTED} can") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise CheckpointError(
            f"timm's weights of {name} cannot be had: {str(error).splitlines()[0]}; leave out pretrained=True and "
            "name a file as the branch's weights, or fill timm's cache where there is a network"
        ) from error


def _without_tokens(network: Any) -> dict[str, Tensor]:
    """Return the state of a timm ViT without class and register tokens and their positions, by ViTBranch's names."""
    state = {name.replace("norm_pre.", "embed_norm."): tensor for name, tensor in network.state_dict().items()}
    prefix = 0 if getattr(network, "no_embed_class", False) else network.num_prefix_tokens
    if "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"][:, prefix:]
    return state


def _plain(network: Any) -> dict[str, Any] | None:
    """Return the options of the `ViTBranch` that equals a timm ViT without class tokens; None if there is none."""
    block, patches = network.blocks[0], network.patch_embed
    if isinstance(network, Beit):
        swiglu = type(block.mlp) is not Mlp or not isinstance(block.mlp.norm, nn.Identity)
        table = block.attn.relative_position_bias_table
        if swiglu or (table is None and network.rel_pos_bias is None) or network.pos_embed is not None:
            return None
        own = {
            "family": "beit", "qkv_bias": "q_and_v", "pos_grid": None, "rel_pos": "window",
            "layer_scale": None if block.gamma_1 is None else 1e-6, "window": patches.grid_size[0],
        }  # fmt: skip
        return {**_shape(network), **own}
    attention_is_plain = (
        isinstance(network, VisionTransformer)
        and type(block) is Block
        and type(block.attn) is Attention
        and all(isinstance(getattr(block.attn, part), nn.Identity) for part in ("q_norm", "k_norm", "norm"))
        and block.attn.proj.bias is not None
    )
    act = _activation(block.mlp) if attention_is_plain and type(block.mlp) is Mlp else None
    norms = (nn.LayerNorm, nn.Identity)
    if act is None or not isinstance(block.norm1, nn.LayerNorm) or not isinstance(network.norm_pre, norms):
        return None
    if not isinstance(patches.norm, nn.Identity) or not isinstance(block.mlp.norm, nn.Identity):
        return None
    scale = block.ls1
    return {
        **_shape(network),
        "act": act,
        "qkv_bias": block.attn.qkv.bias is not None,
        "layer_scale": scale.init_values if isinstance(scale, LayerScale) else None,
        "pos_grid": None if network.pos_embed is None else patches.grid_size,
        "embed_norm": isinstance(network.norm_pre, nn.LayerNorm),
        "patch_bias": patches.proj.bias is not None,
    }


def _shape(network: Any) -> dict[str, Any]:
    block = network.blocks[0]
    return {
        "embed_dim": network.embed_dim,
        "depth": len(network.blocks),
        "num_heads": block.attn.num_heads,
        "patch_size": network.patch_embed.patch_size[0],
        "mlp_ratio": block.mlp.fc1.out_features / network.embed_dim,
        "norm_eps": block.norm1.eps,
    }


def _activation(mlp: Any) -> str | None:
    """Return ViTBranch's name of an MLP's activation, by what it computes."""
    act = mlp.act
    if isinstance(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}.get(type(act).__name__)


class TimmBranch(Branch):
    """A timm ViT in its own blocks, attending globally; class and register tokens travel as `Tokens.prefix`.

    Args:
        network: A `VisionTransformer` or `Eva` with `dynamic_img_size`, without its head.

    Raises:
        SpecError: Positions are not those of a plain grid of patches.
    """

    family = "timm"
    layer_decay = True
    network: Any

    def __init__(self, network: VisionTransformer | Eva) -> None:
        super().__init__()
        self.network = network
        for part in ("norm", "fc_norm", "head", "attn_pool"):  # behind the last block
            if isinstance(getattr(network, part, None), nn.Module):
                setattr(network, part, nn.Identity())
        self.patch_size: int = self.network.patch_embed.patch_size[0]
        self.dims = (network.embed_dim,) * len(self.network.blocks)
        self.strides = (self.patch_size,) * len(self.network.blocks)

    def embed(self, images: Tensor) -> Tokens:
        """Embed images `(B, 3, H, W)`; a remainder that fills no patch is dropped.

        Raises:
            ValueError: The images are smaller than one patch.
        """
        height, width = (size // self.patch_size for size in images.shape[-2:])
        if not height or not width:
            raise ValueError(
                f"an image of {tuple(images.shape[-2:])} pixels holds no patch of {self.patch_size} pixels"
            )
        maps = self.network.patch_embed(images[..., : height * self.patch_size, : width * self.patch_size])
        x = self.network._pos_embed(maps)
        x = x[0] if isinstance(x, tuple) else x  # Eva returns its rotary positions too
        x = self.network.norm_pre(x)
        count = self.network.num_prefix_tokens
        return Tokens(x[:, count:], (height, width), x[:, :count] if count else None)

    def run(self, tokens: Tokens, start: int, stop: int) -> Tokens:
        """Run blocks `start` to `stop - 1`; class tokens take part in the attention."""
        x, grid, prefix = tokens
        count = 0 if prefix is None else prefix.shape[1]
        if prefix is not None:
            x = torch.cat([prefix, x], dim=1)
        positions = self._positions(grid)
        for i in range(start, stop):
            rope = positions[i] if self._mixed else positions
            x = self.call_block(self.network.blocks[i], x, *([] if rope is None else [rope]))
        return Tokens(x[:, count:], grid, x[:, :count] if count else None)

    @property
    def _mixed(self) -> bool:
        """Whether every block has rotary positions of its own."""
        return getattr(self.network, "rope_mixed", False)

    def _positions(self, grid: tuple[int, int]) -> Any:
        rope = getattr(self.network, "rope", None)
        return None if rope is None else rope.get_embed(shape=grid)

"""ConvNeXt as a branch (arXiv 2201.03545), block by block; a down-sampling layer is a block too."""

from collections.abc import Sequence
from typing import cast

from timm.models.convnext import ConvNeXt, ConvNeXtStage
from torch import Tensor

from piip.branches.base import Branch, register_branch
from piip.errors import SpecError, unknown
from piip.tokens import Tokens, map_to_tokens

STEMS = ("patch", "overlap", "overlap_act")


class ConvNeXtBranch(Branch):
    """timm's ConvNeXt without its final norm and head, with timm's parameter names.

    Blocks are numbered through the stages: the blocks of the first stage, the second's down-sampling layer, its
    blocks, and so on.

    Args:
        depths: Blocks of each stage, without the down-sampling layers.
        widths: Channels of each stage.
        stem: A stem type of timm's: `patch` embeds cells of 4 x 4 pixels (the released models); `overlap` and
            `overlap_act` take two 3 x 3 convolutions, the latter with an activation between them.
        layer_scale: Initial value of the layer scale.
        drop_path: Drop path rate of the last block; it rises linearly from 0 over all blocks.

    Raises:
        SpecError: `depths` and `widths` are not those of four stages, or the stem is unknown.
    """

    family = "convnext"

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        stem: str = "patch",
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if len(depths) != 4 or len(widths) != 4:
            raise SpecError(f"ConvNeXt has 4 stages, got depths {tuple(depths)} and widths {tuple(widths)}")
        if stem not in STEMS:
            raise SpecError(unknown("stem", stem, STEMS))
        self._take(
            ConvNeXt(
                depths=tuple(depths),
                dims=tuple(widths),
                stem_type=stem,
                ls_init_value=layer_scale,
                drop_path_rate=drop_path,
                num_classes=0,
            )
        )

    @classmethod
    def of(cls, network: ConvNeXt) -> "ConvNeXtBranch":
        """Return a branch of a network that is there already; it gives up its stem and stages."""
        branch = cls.__new__(cls)
        Branch.__init__(branch)
        branch._take(network)
        return branch

    def _take(self, network: ConvNeXt) -> None:
        self.stem = network.stem
        self.stages = network.stages
        stages = [cast(ConvNeXtStage, stage) for stage in network.stages]
        blocks = [(i, b) for i, stage in enumerate(stages) for b in range(-1 if i else 0, len(stage.blocks))]
        info = cast(list[dict[str, int]], network.feature_info)
        self.dims = tuple(info[i]["num_chs"] for i, _ in blocks)
        self.strides = tuple(info[i]["reduction"] for i, _ in blocks)
        self._order = blocks  # (stage, block in it); -1 is the stage's down-sampling layer

    def embed(self, images: Tensor) -> Tokens:
        """Embed images `(B, 3, H, W)` at the stem's stride (4); a remainder that fills no cell is dropped."""
        # Overlapping stems would pad it instead.
        stride = self.strides[0]
        height, width = (side - side % stride for side in images.shape[-2:])
        images = images[..., :height, :width]
        return _to_tokens(self.stem(images))

    def run(self, tokens: Tokens, start: int, stop: int) -> Tokens:
        """Run blocks `start` to `stop - 1`."""
        maps = tokens.to_map()
        for i, block in self._order[start:stop]:
            stage = cast(ConvNeXtStage, self.stages[i])
            maps = self.call_block(stage.downsample if block < 0 else stage.blocks[block], maps)
        return _to_tokens(maps)


def _to_tokens(maps: Tensor) -> Tokens:
    return Tokens(map_to_tokens(maps), (maps.shape[-2], maps.shape[-1]))


register_branch("convnext")(ConvNeXtBranch)
register_branch("convnext_tiny", depths=(3, 3, 9, 3), widths=(96, 192, 384, 768))(ConvNeXtBranch)
register_branch("convnext_small", depths=(3, 3, 27, 3), widths=(96, 192, 384, 768))(ConvNeXtBranch)
register_branch("convnext_base", depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024))(ConvNeXtBranch)
register_branch("convnext_large", depths=(3, 3, 27, 3), widths=(192, 384, 768, 1536))(ConvNeXtBranch)

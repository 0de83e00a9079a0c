"""Whole backbones, as the tasks consume them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from piip.checkpoint import load_checkpoint, register_released_loading
from piip.fpn import RegularFPN, SimpleFPN
from piip.merge import BranchMerge
from piip.zoo.specs import PyramidSpec, build_pyramid, resolve_spec


class DensePyramid(nn.Module):
    """A pyramid, its merging and an FPN: the backbone of a detector or segmentor.

    With a simple FPN all levels come from the last merged map. With `taps` there is a regular FPN: the branches are
    merged after those stages too, and each merged map becomes one level. A single branch (the baselines of the
    paper's tables) has nothing to merge and feeds the FPN directly.

    Args:
        spec: Name of a row of the zoo, a `PyramidSpec`, or a mapping (see `piip.zoo.specs.resolve_spec`).
        scales: Simple FPN: scales of the levels relative to the merged map; (2, 1, 0.5) for DINO heads.
        taps: Regular FPN: stages after which the branches are merged, beside the last; their levels and the last
            one's have the strides 4, 8, 16, ...
        grad_checkpointing: Recompute activations in the backward pass, of blocks and interactions alike.
        kernel: Sampling kernel of the deformable attention, see `piip.deformable.KERNELS`.

    Attributes:
        out_channels: Channels of each level.
        strides: Input pixels per cell of each level.
        unread: Tensors of a released file that nothing reads, by name; there once such a file was loaded.

    Raises:
        SpecError: The spec cannot be built.
    """

    unread: dict[str, Tensor]

    def __init__(
        self,
        spec: str | PyramidSpec | Mapping[str, Any],
        *,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        taps: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        self.spec = resolve_spec(spec)
        self.pyramid = pyramid = build_pyramid(self.spec, kernel=kernel)
        pyramid.set_grad_checkpointing(grad_checkpointing)
        self.scales = tuple(scales) if taps is None else ()
        self.taps = [] if taps is None else [range(pyramid.depth)[tap] for tap in taps]
        single = len(pyramid.branches) == 1
        style = "two_convolutions" if taps is None else "one_convolution"
        # By stage, in the order of the levels; the last one's names are those of a pyramid without taps.
        self.tap_merges = nn.ModuleDict({str(k): self._build_merge(k, style) for k in self.taps if not single})
        self.merge = None if single else self._build_merge(-1, style)
        stages = [*self.taps, pyramid.depth - 1]
        dims = [pyramid.dims(k)[0] for k in stages]
        strides = [pyramid.strides(k)[pyramid.output_branch] for k in stages]
        if taps is None:
            self.out_channels = dims * len(scales)
            self.strides = [strides[0] / scale for scale in scales]
            self.fpn: nn.Module = SimpleFPN(dims[0], scales, norm="layer" if single else "group")
        else:
            self.out_channels = dims
            self.strides = [4.0 * 2**i for i in range(len(dims))]
            self.fpn = RegularFPN(dims, [own / target for own, target in zip(strides, self.strides, strict=True)])
        register_released_loading(self)

    def _build_merge(self, stage: int, style: str) -> BranchMerge:
        return BranchMerge(self.pyramid.dims(stage), self.pyramid.output_branch, style)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images `(B, 3, H, W)` to one map `(B, C, h, w)` per FPN level.

        Raises:
            ValueError: The images leave a branch without a token.
        """
        kept = self.pyramid(images, taps=[*self.taps, -1])
        merges = [self.merge] * len(kept) if self.merge is None else [*self.tap_merges.values(), self.merge]
        pairs = zip(merges, kept, strict=True)
        maps = [states[0].to_map() if merge is None else merge(states) for merge, states in pairs]
        return self.fpn(maps if self.taps else maps[0])


def create_model(
    spec: str | PyramidSpec | Mapping[str, Any], *, checkpoint: str | Path | None = None, **options: Any
) -> DensePyramid:
    """Build a dense backbone, with the weights of a checkpoint where one is given.

    Args:
        spec: Name of a row of the zoo (see `piip.list_models`), a `PyramidSpec`, or a mapping.
        checkpoint: A released file, or one of ours; of the backbone, or of a whole detector.
        **options: Options of `DensePyramid`.

    Raises:
        SpecError: The spec cannot be built.
        CheckpointError: The file cannot be read, or holds another model.
    """
    if checkpoint is None:
        return DensePyramid(spec, **options)
    # Nothing is initialised only to be overwritten: the file's tensors become the parameters.
    with torch.device("meta"):
        model = DensePyramid(spec, **options)
    model.to_empty(device="cpu")
    load_checkpoint(model, checkpoint)
    return model

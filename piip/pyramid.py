"""The pyramid: resize, embed, then blocks and interactions in turn (arXiv 2406.04330, section 3)."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from piip.branches.base import Branch
from piip.errors import SpecError
from piip.interaction import InteractionStage
from piip.runtime import run_in_parallel
from piip.tokens import Tokens


class PIIP(nn.Module):
    """A parameter-inverted image pyramid of N >= 1 branches.

    Branches are listed from the largest model (the smallest image) to the smallest; any other order of resolutions
    works too. Every branch is cut into the same number of groups of blocks, one per stage; after each stage
    neighbouring branches interact. One branch, or `interactions=0`, runs without interactions.

    Args:
        branches: The branches.
        resolutions: Nominal image side of each branch in pixels; only their ratios to `input_resolution` matter.
        interactions: Number of interactions, which is the number of stages; without interactions, `blocks` says how
            many stages there are (one by default).
        blocks: Blocks per stage of each branch; None (also per branch) splits its depth evenly, short groups first.
        input_resolution: Nominal side of the images given to the pyramid; the largest resolution by default.
        output_branch: Index of the branch whose grid a merged map takes; the one with the largest image by default.
        **interaction_options: Options of `piip.interaction.Injector`.

    Attributes:
        parallel_streams: Whether the branches of a stage run on CUDA streams of their own. Small branches leave most of
            a large GPU idle; without CUDA graphs, though, the Python thread that starts all kernels is the limit.

    Raises:
        SpecError: The description cannot be built.
    """

    def __init__(
        self,
        branches: Sequence[Branch],
        resolutions: Sequence[int],
        interactions: int = 12,
        *,
        blocks: Sequence[Sequence[int] | None] | None = None,
        input_resolution: int | None = None,
        output_branch: int | None = None,
        **interaction_options: Any,
    ) -> None:
        super().__init__()
        count = len(branches)
        if not count or len(resolutions) != count:
            raise SpecError(f"{count} branches and {len(resolutions)} resolutions: give one resolution per branch")
        if bad := [r for r in (*resolutions, input_resolution or 1) if not isinstance(r, int) or r < 1]:
            raise SpecError(f"resolutions are positive whole numbers of pixels, got {bad[0]!r}")
        for i, (branch, resolution) in enumerate(zip(branches, resolutions, strict=True)):
            if resolution < max(branch.strides):
                raise SpecError(
                    f"branch {i + 1}: a resolution of {resolution} pixels leaves no token, "
                    f"it has one per {max(branch.strides)} pixels"
                )
        # Both lists are typed by what they hold: nn.ModuleList does not say.
        self.branches = cast(Sequence[Branch], nn.ModuleList(branches))
        self.resolutions = tuple(resolutions)
        self.input_resolution = input_resolution or max(resolutions)
        # On equal sizes the later branch gives the grid: it is the finer one where branches differ in stride.
        finest = max(range(count), key=lambda i: (resolutions[i], i))
        self.output_branch = finest if output_branch is None else range(count)[output_branch]
        interactions = 0 if count == 1 else interactions
        blocks = blocks or [None] * count
        stages = interactions or len(blocks[0] or (1,))
        self.parallel_streams = False
        self.cuts = [
            cut_blocks(branch.depth, stages, per_stage, f"branch {i + 1}")
            for i, (branch, per_stage) in enumerate(zip(branches, blocks, strict=True))
        ]
        exchanges = (InteractionStage(self.dims(k), **interaction_options) for k in range(interactions))
        self.stages = cast(Sequence[InteractionStage], nn.ModuleList(exchanges))

    @property
    def depth(self) -> int:
        """Number of stages."""
        return len(self.cuts[0])

    def dims(self, stage: int = -1) -> list[int]:
        """Return the channels of every branch after a stage."""
        return [branch.dims[cut[stage][1] - 1] for branch, cut in zip(self.branches, self.cuts, strict=True)]

    def strides(self, stage: int = -1) -> list[float]:
        """Return the pixels of the pyramid's input per token, for every branch after a stage."""
        return [
            branch.strides[cut[stage][1] - 1] * self.input_resolution / resolution
            for branch, cut, resolution in zip(self.branches, self.cuts, self.resolutions, strict=True)
        ]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: recompute the activations of blocks and interactions alike."""
        modules: list[Branch | InteractionStage] = [*self.branches, *self.stages]
        for module in modules:
            module.grad_checkpointing = enable

    def forward(self, images: Tensor, taps: Sequence[int] = (-1,)) -> list[list[Tokens]]:
        """Run the pyramid.

        Args:
            images: `(B, 3, H, W)`, normalised.
            taps: Stages after which the states are kept; negative ones count from the end.

        Returns:
            For each tap, in the order asked for, the tokens of every branch.

        Raises:
            ValueError: The images leave a branch without a token.
            IndexError: There is no such stage.
        """
        wanted = [range(self.depth)[tap] for tap in taps]
        states = [branch.embed(self._resize(images, i)) for i, branch in enumerate(self.branches)]
        kept = {}
        for k in range(max(wanted, default=-1) + 1):
            states = self._run_branches(states, k)
            if self.stages:
                states = self.stages[k](states)
            if k in wanted:
                kept[k] = states
        return [kept[k] for k in wanted]

    def _run_branches(self, states: list[Tokens], stage: int) -> list[Tokens]:
        calls = [
            partial(branch.run, tokens, *cut[stage])
            for branch, tokens, cut in zip(self.branches, states, self.cuts, strict=True)
        ]
        if self.parallel_streams and states[0].x.is_cuda:
            return run_in_parallel(calls, states[0].x.device)
        return [call() for call in calls]

    def _resize(self, images: Tensor, index: int) -> Tensor:
        resolution, reference = self.resolutions[index], self.input_resolution
        height, width = (side * resolution // reference for side in images.shape[-2:])
        stride = max(self.branches[index].strides)
        if min(height, width) < stride:
            raise ValueError(
                f"branch {index + 1} gets an image of {height} x {width} pixels from an input of {images.shape[-2]} x "
                f"{images.shape[-1]} and needs at least {stride} x {stride} for one token: give inputs of at least "
                f"{-(-stride * reference // resolution)} pixels per side"
            )
        if resolution == reference:
            return images
        # One step above the exact ratio: size * scale then never falls below a whole number of pixels by rounding.
        scale = math.nextafter(resolution / reference, math.inf)
        return F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)


def cut_blocks(depth: int, stages: int, per_stage: Sequence[int] | None, name: str) -> list[tuple[int, int]]:
    """Cut the blocks of a branch into one group per stage.

    Args:
        depth: Blocks of the branch.
        stages: Number of groups.
        per_stage: Blocks per group; None splits evenly, short groups first.
        name: The branch, for error messages.

    Returns:
        `(start, stop)` of every group.

    Raises:
        SpecError: The groups do not cover the branch, or are not one per stage.
    """
    if per_stage is None:
        if depth < stages:
            raise SpecError(f"{name} has {depth} blocks, too few for {stages} interactions: use at most {depth}")
        per_stage = [depth // stages + (k >= stages - depth % stages) for k in range(stages)]
    if len(per_stage) != stages:
        raise SpecError(f"{name} is cut into {len(per_stage)} groups of blocks, the pyramid has {stages} stages")
    if min(per_stage) < 1 or sum(per_stage) != depth:
        raise SpecError(
            f"{name}: groups of {list(per_stage)} blocks cover {sum(per_stage)} blocks, the branch has {depth}; "
            "every group needs at least one"
        )
    return list(pairwise(accumulate(per_stage, initial=0)))

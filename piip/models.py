"""Whole models, as the tasks consume them."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from typing_extensions import Self

from piip.branches.pretrained import find_weights, load_pretrained, read_pretrained
from piip.branches.vit import ViTBranch
from piip.checkpoint import load_checkpoint, register_released_loading
from piip.errors import CheckpointError, SpecError, unknown
from piip.fpn import RegularFPN, SimpleFPN
from piip.init import init_layer
from piip.merge import BranchMerge
from piip.tokens import Tokens
from piip.zoo.specs import PyramidSpec, build_pyramid, resolve_spec

logger = logging.getLogger(__name__)

Spec = str | PyramidSpec | Mapping[str, Any]
Readout = Literal["cls_token", "first_patch", "mean"]
READOUTS = ("cls_token", "first_patch", "mean")
HEADS = ("branches", "merged", "map")


class PyramidModel(nn.Module):
    """A pyramid, and what a task needs behind it; its `load_state_dict` takes released names as well as ours.

    Args:
        spec: Name of a row of the zoo, a `PyramidSpec`, or a mapping (see `piip.zoo.specs.resolve_spec`).
        grad_checkpointing: Recompute activations in the backward pass, of blocks and interactions alike.
        kernel: Sampling kernel of the deformable attention, see `piip.deformable.KERNELS`.

    Attributes:
        unread: Tensors of a released file that nothing reads, by name; there once such a file was loaded.

    Raises:
        SpecError: The spec cannot be built.
    """

    unread: dict[str, Tensor]

    def __init__(self, spec: Spec, *, grad_checkpointing: bool = False, kernel: str = "auto") -> None:
        super().__init__()
        self.spec = resolve_spec(spec)
        self.pyramid = build_pyramid(self.spec, kernel=kernel)
        self.set_grad_checkpointing(grad_checkpointing)
        register_released_loading(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training, see `piip.pyramid.PIIP`."""
        self.pyramid.set_grad_checkpointing(enable)

    @property
    def released_form(self) -> bool:
        """Whether the model computes what a released model of its kind does."""
        return True

    def use_released_form(self) -> None:
        """Compute what the released models of this kind do; called before a released file is loaded."""

    def describe(self) -> dict[str, Any]:
        """Return the options of the class, beside the spec, that decide which weights the model has, ready for JSON."""
        return {}

    def save_pretrained(self, folder: str | Path, **about: Any) -> Path:
        """Write the model as a directory for the Hugging Face hub, see `piip.integrations.hub.save_pretrained`."""
        from piip.integrations.hub import save_pretrained  # the hub's client is slow to import

        return save_pretrained(self, folder, **about)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """Build a model from such a directory, or from the hub, see `piip.integrations.hub.from_pretrained`.

        Raises:
            CheckpointError: It holds no model, or one of another class.
            DownloadError: The repository cannot be fetched.
        """
        from piip.integrations.hub import from_pretrained

        model = from_pretrained(source, **options)
        if not isinstance(model, cls):
            raise CheckpointError(f"{source} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    def _build_merge(self, stage: int, style: str) -> BranchMerge:
        return BranchMerge(self.pyramid.dims(stage), self.pyramid.output_branch, style)


class DensePyramid(PyramidModel):
    """A pyramid, its merging and an FPN: the backbone of a detector or segmentor.

    With a simple FPN all levels come from the last merged map. With `taps` there is a regular FPN: the branches are
    merged after those stages too, and each merged map becomes one level. A single branch (the baselines of the
    paper's tables) has nothing to merge and feeds the FPN directly.

    Args:
        spec: See `PyramidModel`.
        scales: Simple FPN: scales of the levels relative to the merged map; (2, 1, 0.5) for DINO heads.
        taps: Regular FPN: stages after which the branches are merged, beside the last; their levels and the last
            one's have the strides 4, 8, 16, ...
        merge: How branches are projected for merging, a key of `piip.merge.STYLES`; the papers' by default, which is
            two convolutions with a simple FPN and one with a regular FPN. `separable` costs a fraction.
        **options: Further options of `PyramidModel`.

    Attributes:
        out_channels: Channels of each level.
        strides: Input pixels per cell of each level.

    Raises:
        SpecError: The spec cannot be built.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        taps: Sequence[int] | None = None,
        merge: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(spec, **options)
        pyramid = self.pyramid
        self.scales = tuple(scales) if taps is None else ()
        self.taps = [] if taps is None else [range(pyramid.depth)[tap] for tap in taps]
        single = len(pyramid.branches) == 1
        style = merge or ("two_convolutions" if taps is None else "one_convolution")
        self.merge_style = merge
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

    def describe(self) -> dict[str, Any]:
        """See `PyramidModel.describe`."""
        levels = {"taps": list(self.taps)} if self.taps else {"scales": list(self.scales)}
        return levels if self.merge_style is None else {**levels, "merge": self.merge_style}

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


class Classifier(PyramidModel):
    """A pyramid as an image classifier (arXiv 2406.04330, sections 3.3 and 4.4), with timm's methods.

    Either each branch keeps a head of its own and the logits are averaged, or the branches are merged into one map
    with one head on its mean.

    The released classifiers read the first (top-left) patch token where the class token was meant, and give class
    tokens no position. Loading a released file switches the model to that form and says so; new training reads class
    tokens. The last interaction changes patch tokens only, so nothing can be learned in it when class tokens are
    read: it then keeps its closed gates and takes no gradient.

    Args:
        spec: See `PyramidModel`; any row of the zoo can be a classifier.
        num_classes: Number of classes; 0 for none: `forward` then returns the features in front of the head.
        head: `branches`, `merged`, or `map` for the merged map alone; the spec's by default, and for a row that is
            meant for dense tasks `merged`, or `branches` where there is only one.
        readout: What a branch's head reads: `cls_token`, `first_patch`, or the `mean` of the patch tokens. By default
            class tokens where every branch has one, else the mean.
        **options: Further options of `PyramidModel`.

    Attributes:
        num_features: Channels of the features in front of the head.
        merge: The merging, None with a head per branch.

    Raises:
        SpecError: The spec cannot be built, or does not go with the head or readout.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        num_classes: int = 1000,
        head: str | None = None,
        readout: Readout | None = None,
        **options: Any,
    ) -> None:
        super().__init__(spec, **options)
        branches = self.pyramid.branches
        if head is None:
            head = self.spec.head if self.spec.head != "dense" else "merged" if len(branches) > 1 else "branches"
        if head not in HEADS:
            raise SpecError(unknown("head", head, HEADS))
        if head != "branches" and len(branches) == 1:
            raise SpecError("one branch has nothing to merge: use head='branches', with readout='mean' for the mean")
        if head != "branches" and readout is not None:
            raise SpecError(f"readout says what a head per branch reads, and head={head!r} has none: leave it out")
        self.head_style = head
        self.merge = None if head == "branches" else self._build_merge(-1, "linear")
        dims = self.pyramid.dims()
        self.num_features = self.head_hidden_size = sum(dims) if head == "branches" else dims[0]
        self.norm: nn.Module = nn.Identity()
        if head == "branches":
            self.norm = nn.ModuleList(branch.build_norm() for branch in branches)
        elif head == "merged":
            self.norm = nn.LayerNorm(dims[0], eps=1e-6)
        self.reset_classifier(num_classes, readout or self._default_readout())
        side = self.pyramid.input_resolution
        self.pretrained_cfg = self.default_cfg = {  # what timm's data and training code asks a model
            "architecture": "piip",
            "num_classes": num_classes,
            "input_size": (3, side, side),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "fixed_input_size": False,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": tuple(f"pyramid.branches.{i}.patch_embed.proj" for i in range(len(branches))),
            "classifier": tuple(f"head.{i}" for i in range(len(branches))) if head == "branches" else "head",
        }

    def describe(self) -> dict[str, Any]:
        """See `PyramidModel.describe`."""
        readout = {"readout": self.readout} if self.merge is None else {}
        return {"num_classes": self.num_classes, "head": self.head_style, **readout}

    def _default_readout(self) -> Readout:
        return "cls_token" if all(_has_class_token(branch) for branch in self.pyramid.branches) else "mean"

    def get_classifier(self) -> nn.Module:
        """Return the last layer, or the list of last layers, one per branch."""
        return self.head

    def reset_classifier(self, num_classes: int, readout: Readout | None = None) -> None:
        """Put a new head in place.

        Args:
            num_classes: Number of classes, 0 for none.
            readout: Another readout, see the class; None keeps it.

        Raises:
            SpecError: Unknown readout, or class tokens are to be read that a branch does not have.
        """
        if num_classes < 0:
            raise SpecError(f"num_classes is {num_classes}: give the number of classes, or 0 for no head")
        if readout is not None:
            self._set_readout(readout)
        self.num_classes = num_classes

        def layer(dim: int) -> nn.Module:
            return nn.Linear(dim, num_classes) if num_classes and self.head_style != "map" else nn.Identity()

        dims = self.pyramid.dims()
        self.head: nn.Module = nn.ModuleList(map(layer, dims)) if self.merge is None else layer(dims[0])
        # On the device of the rest, where the model was moved already.
        self.head.apply(init_layer).to(next(self.pyramid.parameters()).device)

    def _set_readout(self, readout: str) -> None:
        if readout not in READOUTS:
            raise SpecError(unknown("readout", readout, READOUTS))
        without = [i + 1 for i, branch in enumerate(self.pyramid.branches) if not _has_class_token(branch)]
        if readout == "cls_token" and without and self.merge is None:
            raise SpecError(
                f"branch {without[0]} has no class token to read: give it one (options class_token=True), or use "
                "readout='mean'"
            )
        self.readout = readout
        if readout == "first_patch":
            self._drop_class_positions()
        if self.pyramid.stages:
            self.pyramid.stages[-1].requires_grad_(self.merge is not None or readout != "cls_token")

    def _drop_class_positions(self) -> None:
        for branch in self.pyramid.branches:
            # A single plain ViT (AugReg) is released with its class token's position.
            if isinstance(branch, ViTBranch) and (len(self.pyramid.branches) > 1 or branch.family == "deit"):
                branch.drop_class_position()

    @property
    def released_form(self) -> bool:
        """Whether the model computes what a released classifier does: see the class."""
        branches = self.pyramid.branches
        with_tokens = [b for b in branches if isinstance(b, ViTBranch) and b.cls_token is not None]
        if len(branches) == 1:
            return not with_tokens or with_tokens[0].family != "deit" or not with_tokens[0].class_position
        return not any(b.class_position for b in with_tokens) and (
            self.merge is not None or self.readout == "first_patch"
        )

    def use_released_form(self) -> None:
        """Read the first patch token and give class tokens no position, as the released classifiers do."""
        if self.released_form:
            return
        self._drop_class_positions()
        if len(self.pyramid.branches) == 1:
            return
        if self.merge is None:
            self._set_readout("first_patch")
        logger.warning(
            "a released classifier: its class tokens get no position%s, since its weights were trained this way",
            " and its heads read the first patch token" if self.merge is None else "",
        )

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that timm's optimizers leave without weight decay, beside biases."""
        return {name for name, _ in self.named_parameters() if name.endswith(("pos_embed", "cls_token"))}

    def load_pretrained(self, folder: str | Path) -> None:
        """Load the pretrained weights that the spec names, each branch's head included where its classes fit.

        Args:
            folder: Where the files are; `$PIIP_PRETRAINED` replaces it.

        Raises:
            CheckpointError: A file is missing, cannot be read or does not fit its branch.
        """
        paths = find_weights([branch.weights for branch in self.spec.branches], folder)
        for i, path in enumerate(paths):
            if path is None:
                continue
            state = read_pretrained(path)
            load_pretrained(self.pyramid.branches[i], path, state)
            if self.merge is not None:
                continue
            parts = {"norm": cast(nn.ModuleList, self.norm)[i], "head": cast(nn.ModuleList, self.head)[i]}
            for name, part in parts.items():
                own = part.state_dict()
                given = {leaf: state[f"{name}.{leaf}"] for leaf in own if f"{name}.{leaf}" in state}
                if own and {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in own.items()}:
                    part.load_state_dict(given)
                elif own:
                    logger.warning("branch %d starts with a new %s: %s has no such one", i + 1, name, path.name)

    def forward_features(self, images: Tensor) -> list[Tokens]:
        """Return the tokens of every branch after the last stage, for images `(B, 3, H, W)`."""
        return self.pyramid(images)[0]

    def forward_head(self, states: Sequence[Tokens], pre_logits: bool = False) -> Tensor:
        """Map what `forward_features` returns to logits `(B, num_classes)`.

        Args:
            states: Tokens of every branch.
            pre_logits: Return the features in front of the head, `(B, num_features)`, those of the branches side by
                side.
        """
        if self.merge is not None:
            maps = self.merge(states)
            if self.head_style == "map":
                return maps
            pooled = self.norm(maps.flatten(2).transpose(1, 2)).mean(dim=1)
            return pooled if pre_logits else self.head(pooled)
        norms, heads = cast(nn.ModuleList, self.norm), cast(nn.ModuleList, self.head)
        read = [self._read(norm, tokens) for norm, tokens in zip(norms, states, strict=True)]
        if pre_logits or not self.num_classes:
            return torch.cat(read, dim=-1)
        return torch.stack([head(x) for head, x in zip(heads, read, strict=True)]).mean(dim=0)

    def _read(self, norm: nn.Module, tokens: Tokens) -> Tensor:
        if self.readout == "mean":
            return norm(tokens.x).mean(dim=1)
        if self.readout == "first_patch":
            return norm(tokens.x[:, 0])
        return norm(cast(Tensor, tokens.prefix)[:, 0])

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(B, 3, H, W)` to logits `(B, num_classes)`; with `head="map"` to the map `(B, C, h, w)`.

        Raises:
            ValueError: The images leave a branch without a token.
        """
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        branch: int | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return a branch's feature maps after chosen stages, as timm's models do after chosen blocks.

        Args:
            images: `(B, 3, H, W)`.
            indices: Stages, negative ones from the end; a number for as many last ones; None for all.
            branch: Index of the branch; the one with the finest grid (`pyramid.output_branch`) by default.
            norm: Apply the branch's final norm; needs a head per branch.
            stop_early: Run no stage behind the last chosen one; only with `intermediates_only`.
            output_fmt: `NCHW` for maps `(B, C, h, w)`, `NLC` for tokens `(B, h*w, C)`.
            intermediates_only: Leave out the final features.

        Returns:
            The list of maps; or a pair of what `forward_features` returns, and that list.

        Raises:
            ValueError: Unknown format, or `norm` without norms.
            IndexError: There is no such stage or branch.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(unknown("output_fmt", output_fmt, ("NCHW", "NLC")))
        if norm and self.merge is not None:
            raise ValueError("norm=True needs a norm per branch, and this model has one for the merged map")
        stages = range(self.pyramid.depth)
        if indices is None or isinstance(indices, int):
            chosen = list(stages if indices is None else stages[-indices:])
        else:
            chosen = [stages[i] for i in indices]
        which = self.pyramid.output_branch if branch is None else range(len(self.pyramid.branches))[branch]
        last = [] if stop_early and intermediates_only else [stages[-1]]
        kept = self.pyramid(images, taps=[*chosen, *last])
        tokens = [states[which] for states in kept[: len(chosen)]]
        if norm:
            tokens = [t._replace(x=cast(nn.ModuleList, self.norm)[which](t.x)) for t in tokens]
        maps = [t.to_map() if output_fmt == "NCHW" else t.x for t in tokens]
        return maps if intermediates_only else (kept[-1], maps)


def _has_class_token(branch: nn.Module) -> bool:
    return getattr(branch, "cls_token", None) is not None


MODELS: dict[str, type[PyramidModel]] = {"dense": DensePyramid, "classifier": Classifier}
"""What a spec can become."""
AS_BUILT = "-as-built"
"""What follows the name of a row in the form that the original code builds, see `piip.zoo.specs.as_built`."""


def create_model(
    spec: Spec,
    *,
    pretrained: bool | str | Path = False,
    checkpoint: str | Path | None = None,
    drop_head: bool = False,
    **options: Any,
) -> PyramidModel:
    """Build a classifier or a dense backbone, with released weights or those of a checkpoint where asked for.

    A row that is meant for classification, and any row with `num_classes`, gives a `Classifier`, others a
    `DensePyramid`. A row of the published tables brings its options along (the levels of its FPN). LLaVA's vision
    towers are built by `piip_llava.tower.build_tower`; here their rows need `num_classes`, `scales` or `taps`.

    Args:
        spec: Name of a row of the zoo (see `piip.list_models`) or of a config of the published tables, also with
            `-as-built` behind it, a `PyramidSpec`, or a mapping.
        pretrained: True for the released weights of a published row: they are fetched once, into torch's hub folder
            (`$TORCH_HOME/hub/piip`; `$HF_ENDPOINT` names a mirror). A path is a checkpoint.
        checkpoint: A released file, or one of ours; of the model, or of a whole detector.
        drop_head: Leave the file's classification head out, for another number of classes.
        **options: Options of the model's class.

    Raises:
        SpecError: The spec cannot be built, is a vision tower's, or has no released weights.
        CheckpointError: The file cannot be read, or holds another model.
        DownloadError: The released weights cannot be fetched.
    """
    from piip.zoo.released import PUBLISHED, TABLES  # it reads specs itself

    # One file was released for both forms of a row.
    form = AS_BUILT if isinstance(spec, str) and spec.endswith(AS_BUILT) else ""
    row = PUBLISHED.get(spec.removesuffix(form)) if isinstance(spec, str) else None
    resolved = resolve_spec(row.spec + form if row else spec)
    kind = Classifier if resolved.head != "dense" or "num_classes" in options else DensePyramid
    if row and kind is DensePyramid and not options.keys() & {"scales", "taps"}:
        if TABLES[row.table].model == "tower":
            raise SpecError(_tower_instead(row.spec, resolved))
        options.update(row.options)
    twin = ""
    if pretrained is True:
        from piip.zoo.download import download_weights

        pretrained = download_weights(row)
        twin = row.spec if row and form else row.spec + AS_BUILT if row else ""
    checkpoint = pretrained or checkpoint
    if checkpoint is None:
        return kind(resolved, **options)
    # Nothing is initialised only to be overwritten: the file's tensors become the parameters.
    with torch.device("cpu" if drop_head else "meta"):
        model = kind(resolved, **options)
    try:
        load_checkpoint(model, checkpoint, drop_head=drop_head)
    except CheckpointError as error:
        if twin and f"'{AS_BUILT}'" in str(error):
            raise CheckpointError(f"{error}; create_model({twin!r}, pretrained=True) takes this file") from None
        raise
    return model


def _tower_instead(name: str, spec: PyramidSpec) -> str:
    tower = "plain" if len(spec.branches) == 1 else "pyramid"
    return (
        f"{name} is a vision tower of LLaVA: piip_llava.tower.build_tower({{'type': {tower!r}, 'spec': {name!r}}}) "
        "builds it; with num_classes it is a classifier here, with scales or taps a dense backbone"
    )

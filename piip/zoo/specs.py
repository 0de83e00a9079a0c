"""Pyramids as data: what a row of the paper's tables consists of, and the rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from piip.branches import Branch, create_branch
from piip.errors import SpecError, unknown
from piip.interaction import Attention
from piip.pyramid import PIIP

Head = Literal["dense", "branches", "merged"]


@dataclass(frozen=True)
class BranchSpec:
    """One branch.

    Attributes:
        arch: Branch type, a name from `piip.branches.list_branches`.
        resolution: Nominal side of its image in pixels.
        weights: File name of the pretrained weights it starts from, None for random.
        window: Window side in tokens, or one entry per block with None for global attention, or None: all global.
        global_every: With one window side: every n-th block attends globally; 0 for none.
        drop_path: Drop path rate.
        blocks: Blocks per stage; None for an even split, short groups first.
        options: Further options of the branch type.
    """

    arch: str
    resolution: int
    weights: str | None = None
    window: int | tuple[int | None, ...] | None = None
    global_every: int = 0
    drop_path: float = 0.0
    blocks: tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PyramidSpec:
    """A pyramid.

    Attributes:
        branches: The branches, the largest model (the smallest image) first.
        interactions: Number of interactions; a single branch has none.
        attention: `deformable` or `regular`.
        heads: Heads of the interactions' attention.
        points: Sampling points per head.
        value_ratio: Width of the attention's values, as a share of the query's.
        ffn_ratio: Hidden width of the interactions' FFN, as a share of the channels; 0 for no FFN.
        drop_path: Drop path rate of the interactions' FFN.
        proj: Whether features are projected to the width of the branch that receives them.
        norm: Whether interactions normalise.
        input_resolution: Nominal side of the pyramid's input; None for the largest branch's.
        output_branch: Index of the branch whose grid the merged map takes; None for the largest image's.
        head: What the pyramid is for: `dense` feature maps, or a classifier with a head per `branches` or on the
            `merged` map.
    """

    branches: tuple[BranchSpec, ...]
    interactions: int = 12
    attention: Attention = "deformable"
    heads: int = 16
    points: int = 4
    value_ratio: float = 0.5
    ffn_ratio: float = 0.25
    drop_path: float = 0.4
    proj: bool = True
    norm: bool = True
    input_resolution: int | None = None
    output_branch: int | None = None
    head: Head = "dense"


def _from_mapping(cls: type, values: Mapping[str, Any], what: str) -> Any:
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise SpecError(unknown(f"{what} option", key, known))
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _branch(value: BranchSpec | Mapping[str, Any]) -> BranchSpec:
    if isinstance(value, BranchSpec):
        return value
    for key in ("arch", "resolution"):
        if key not in value:
            raise SpecError(f"a branch needs {key!r}, got only {', '.join(value) or 'nothing'}")
    return _from_mapping(BranchSpec, value, "branch")


def resolve_spec(spec: str | PyramidSpec | Mapping[str, Any]) -> PyramidSpec:
    """Turn what a config holds into a spec.

    Args:
        spec: The name of a row; or a spec; or a mapping with the fields of `PyramidSpec`, whose branches are
            mappings with the fields of `BranchSpec`. A mapping with a `base` overrides a named row; there
            `resolutions` sets the resolution of every branch, in the order of the branches, and `window` the window.

    Returns:
        The spec.

    Raises:
        SpecError: Unknown row, unknown or missing field.
    """
    if isinstance(spec, PyramidSpec):
        return spec
    if isinstance(spec, str):
        if spec not in SPECS:
            raise SpecError(unknown("spec", spec, SPECS))
        return SPECS[spec]
    values = dict(spec)
    base = resolve_spec(values.pop("base")) if "base" in values else None
    if "branches" in values:
        values["branches"] = tuple(_branch(b) for b in values["branches"])
    elif base is None:
        raise SpecError("a spec needs 'branches', or a 'base' row to start from")
    if base is None:
        return _from_mapping(PyramidSpec, values, "spec")
    if "resolutions" in values:
        branches = values.get("branches", base.branches)
        values["branches"] = _with_resolutions(branches, values.pop("resolutions"))
    if "window" in values:
        branches, window = values.get("branches", base.branches), values.pop("window")
        values["branches"] = tuple(replace(b, window=window) for b in branches)
    merged = {f.name: getattr(base, f.name) for f in fields(PyramidSpec)}
    return _from_mapping(PyramidSpec, {**merged, **values}, "spec")


def _with_resolutions(branches: Sequence[BranchSpec], resolutions: Sequence[int]) -> tuple[BranchSpec, ...]:
    if len(resolutions) != len(branches):
        raise SpecError(f"{len(resolutions)} resolutions for {len(branches)} branches: give one per branch")
    return tuple(replace(b, resolution=r) for b, r in zip(branches, resolutions, strict=True))


def build_pyramid(spec: PyramidSpec, kernel: str = "auto") -> PIIP:
    """Build the pyramid that a spec describes, with random weights.

    Args:
        spec: The spec.
        kernel: Sampling kernel of the deformable attention.

    Raises:
        SpecError: The spec cannot be built.
    """
    branches = [build_branch(b) for b in spec.branches]
    return PIIP(
        branches,
        [b.resolution for b in spec.branches],
        spec.interactions,
        blocks=[b.blocks for b in spec.branches],
        input_resolution=spec.input_resolution,
        output_branch=spec.output_branch,
        attention=spec.attention,
        num_heads=spec.heads,
        points=spec.points,
        value_ratio=spec.value_ratio,
        ffn_ratio=spec.ffn_ratio,
        drop_path=spec.drop_path,
        proj=spec.proj,
        norm=spec.norm,
        kernel=kernel,
    )


def build_branch(branch: BranchSpec) -> Branch:
    """Build the branch that a spec describes, with random weights.

    Raises:
        SpecError: The spec cannot be built.
    """
    # Passed on only when set: a branch type need not know windows or drop path.
    options = {"window": branch.window, "global_every": branch.global_every, "drop_path": branch.drop_path}
    return create_branch(branch.arch, **{k: v for k, v in options.items() if v}, **branch.options)


def as_built(spec: PyramidSpec) -> PyramidSpec:
    """Return a four-branch spec the way the original code built it: its last branch repeats the third's settings.

    The original reads the third branch's settings twice and never the fourth's, except for the resolution. Which of
    the two forms a released four-branch file holds is told by its shapes. New training uses the form as intended.
    """
    third, last = spec.branches[-2:]
    return replace(spec, branches=(*spec.branches[:-1], replace(third, resolution=last.resolution)))


# The branches of every family, by the paper's letter for their size.
_DEIT = {
    "t": BranchSpec("deit_tiny", 0, weights="deit_tiny_patch16_224-a1311bcf.pth", drop_path=0.05),
    "s": BranchSpec("deit_small", 0, weights="deit_3_small_224_21k.pth", drop_path=0.05),
    "b": BranchSpec("deit_base", 0, weights="deit_3_base_224_21k.pth", drop_path=0.15),
    "l": BranchSpec("deit_large", 0, weights="deit_3_large_224_21k.pth", drop_path=0.4),
}
_GRID_384 = {"pos_grid": (24, 24)}
_DEIT_384 = {
    "s": replace(_DEIT["s"], weights="deit_3_small_384_21k.pth", options=_GRID_384),
    "b": replace(_DEIT["b"], weights="deit_3_base_384_21k.pth", options=_GRID_384),
    "l": replace(_DEIT["l"], weights="deit_3_large_384_21k.pth", options=_GRID_384),
}
_AUGREG_S = "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384.pth"
_AUGREG_B = "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384.pth"
_AUGREG_L = "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_384.pth"
_AUGREG = {
    "s": BranchSpec("vit_small", 0, weights=_AUGREG_S, drop_path=0.2, options=_GRID_384),
    "b": BranchSpec("vit_base", 0, weights=_AUGREG_B, drop_path=0.3, options=_GRID_384),
    "l": BranchSpec("vit_large", 0, weights=_AUGREG_L, drop_path=0.4, options=_GRID_384),
}
_GRID_512 = {"pos_grid": (32, 32)}
_DINOV2 = {
    "s": BranchSpec("vit_small", 0, weights="dinov2_vits14_pretrain.pth", drop_path=0.2, options=_GRID_512),
    "b": BranchSpec("vit_base", 0, weights="dinov2_vitb14_pretrain.pth", drop_path=0.3, options=_GRID_512),
    "l": BranchSpec("vit_large", 0, weights="dinov2_vitl14_pretrain.pth", drop_path=0.4, options=_GRID_512),
}
_MAE = {
    "s": _DEIT["s"],
    "b": BranchSpec("vit_base", 0, weights="mae_pretrain_vit_base.pth", drop_path=0.15),
    "l": BranchSpec("vit_large", 0, weights="mae_pretrain_vit_large.pth", drop_path=0.4),
}
_BEITV2 = {
    "s": _DEIT["s"],
    "b": BranchSpec("beit_base", 0, weights="beitv2_base_patch16_224_pt1k_ft21k.pth", drop_path=0.15),
    "l": BranchSpec("beit_large", 0, weights="beitv2_large_patch16_224_pt1k_ft21k.pth", drop_path=0.4),
}
_UNI_B = "uni-perceiver-base-L12-H768-224size-torch-pretrained_converted.pth"
_UNI_L = "uni-perceiver-large-L24-H1024-224size-pretrained_converted.pth"
_UNIPERCEIVER = {
    "s": _DEIT["s"],
    "b": BranchSpec("uniperceiver_base", 0, weights=_UNI_B, drop_path=0.15),
    "l": BranchSpec("uniperceiver_large", 0, weights=_UNI_L, drop_path=0.4),
}
# InternViT-6B (6), MAE (h) and DeiT III (l).
_INTERNVIT = {
    "6": BranchSpec("internvit_6b", 0, weights="intern_vit_6b_224px.pth", drop_path=0.4),
    "h": BranchSpec("vit_huge", 0, weights="mae_pretrain_vit_huge.pth", drop_path=0.4),
    "l": _DEIT_384["l"],
}
# LLaVA's towers: CLIP (l, b), and ConvNeXt (cb, cl) pretrained by CLIP.
_CLIP = {
    "l": BranchSpec("clip_large", 0, weights="clip-vit-large-patch14to16-224/pytorch_model.bin", drop_path=0.4),
    "b": BranchSpec("clip_base", 0, weights="clip-vit-base-patch16/pytorch_model.bin", drop_path=0.4),
    "cb": BranchSpec(
        "convnext_base", 0, weights="convnext_base.clip_laiona_augreg_320/open_clip_pytorch_model.bin", drop_path=0.4
    ),
    "cl": BranchSpec(
        "convnext_large", 0, weights="convnext_large_mlp.clip_laion2b_ft_320/open_clip_pytorch_model.bin", drop_path=0.4
    ),
}
_CLIP_336 = {
    **_CLIP,
    "l": replace(
        _CLIP["l"],
        weights="clip-vit-large-patch14to16-336/pytorch_model.bin",
        options={"pos_grid": (21, 21)},
    ),
}
# The one that LLaVA-1.5 uses, as a single branch with patches of 14 pixels.
_CLIP_L14_336 = BranchSpec(
    "clip_large",
    336,
    weights="clip-vit-large-patch14-336/pytorch_model.bin",
    options={"patch_size": 14, "pos_grid": (24, 24)},
)
# ConvNeXt's blocks per stage for 12 interactions, down-sampling layers included: one group for each of the first,
# second and last resolution, nine for the third.
CONVNEXT_21 = (3, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1, 4)
CONVNEXT_39 = (3, 4, 4, 3, 3, 3, 3, 3, 3, 3, 3, 4)
# For 24 and for 2 interactions (LLaVA's towers).
CONVNEXT_39_BY_24 = (2, 1, 2, 2, 3, 1, *(2, 1) * 8, 2, 2)
CONVNEXT_39_BY_2 = (20, 19)
# As Hugging Face's repositories name it, one folder per model.
_HF_FILE = "convnext-{}-224/pytorch_model.bin"
_HYBRID = {
    "vt": replace(_DEIT["t"], window=14),
    "vs": replace(_DEIT["s"], window=14),
    "vb": replace(_DEIT["b"], window=14),
    "ct": BranchSpec("convnext_tiny", 0, weights=_HF_FILE.format("tiny"), drop_path=0.3, blocks=CONVNEXT_21),
    "cs": BranchSpec("convnext_small", 0, weights=_HF_FILE.format("small"), drop_path=0.3, blocks=CONVNEXT_39),
    "cb": BranchSpec("convnext_base", 0, weights=_HF_FILE.format("base"), drop_path=0.4, blocks=CONVNEXT_39),
}
# Classification. New training keeps the row that pretrained position tables have for the class token.
_CLASS_TOKEN = {"class_token": True, "pos_prefix": 1}
_DEIT1 = {
    "t": BranchSpec("deit_tiny", 0, "deit_tiny_patch16_224-a1311bcf.pth", drop_path=0.05, options=_CLASS_TOKEN),
    "s": BranchSpec("deit_small", 0, "deit_small_patch16_224-cd65a155.pth", drop_path=0.05, options=_CLASS_TOKEN),
    "b": BranchSpec("deit_base", 0, "deit_base_patch16_224-b5f2ef4d.pth", drop_path=0.2, options=_CLASS_TOKEN),
}
_NO_SCALE = {**_CLASS_TOKEN, "layer_scale": None, "drop_path_rule": "constant"}
_AUGREG_224 = {
    "s": BranchSpec("vit_small", 0, _AUGREG_S.replace("384.pth", "224.npz"), drop_path=0.05, options=_NO_SCALE),
    "b": BranchSpec("vit_base", 0, _AUGREG_B.replace("384.pth", "224.npz"), drop_path=0.2, options=_NO_SCALE),
    "l": BranchSpec("vit_large", 0, _AUGREG_L.replace("384.pth", "224.npz"), drop_path=0.4, options=_NO_SCALE),
}
# Table 13 (appendix A.3): from scratch, about equal costs per branch.
_SCRATCH = {
    letter: BranchSpec("vit", 0, drop_path=0.1, options={"embed_dim": dim, "depth": 12, "num_heads": heads})
    for letter, dim, heads in (("1", 640, 8), ("2", 320, 4), ("3", 160, 2))
}
# As a baseline: one group per resolution.
_CONVNEXT_B = BranchSpec("convnext_base", 1024, weights=_HF_FILE.format("base"), blocks=(3, 4, 28, 4))


def _row(
    family: Mapping[str, BranchSpec],
    letters: Iterable[str],
    *resolutions: int,
    window: int | None = None,
    global_every: int = 0,
    **options: Any,
) -> PyramidSpec:
    """A pyramid of a family; letters and resolutions in the paper's order, the largest image first."""
    settings: dict[str, Any] = {"global_every": global_every, **({"window": window} if window else {})}
    pairs = zip(letters, resolutions, strict=True)
    branches = [replace(family[letter], resolution=resolution, **settings) for letter, resolution in pairs]
    return PyramidSpec(tuple(reversed(branches)), **options)


def _classifier(family: Mapping[str, BranchSpec], letters: str, *resolutions: int, **options: Any) -> PyramidSpec:
    """A classifier of a family: its position tables have the size that the branches work at."""
    spec = _row(family, letters, *resolutions, **{"head": "branches", **options})
    branches = [
        replace(b, options={**b.options, "pos_grid": (b.resolution // 16, b.resolution // 16)}) for b in spec.branches
    ]
    return replace(spec, branches=tuple(branches))


def _speedup(spec: PyramidSpec) -> PyramidSpec:
    """The paper's faster form: interactions without projections and norms, MLPs with the tanh form of GELU."""
    branches = tuple(replace(b, options={**b.options, "act": "gelu_tanh"}) for b in spec.branches)
    return replace(spec, branches=branches, proj=False, norm=False)


def _segmentor(letters: str, *resolutions: int) -> PyramidSpec:
    """A pyramid with InternViT-6B in the form of the released segmentors: position tables are as large as each
    branch's image, whatever the pretrained file holds.
    """
    spec = _speedup(_row(_INTERNVIT, letters, *resolutions))
    grids = ((b.resolution // 16, b.resolution // 16) for b in spec.branches)
    branches = (
        replace(b, options={**b.options, "pos_grid": grid}) for b, grid in zip(spec.branches, grids, strict=True)
    )
    return replace(spec, branches=tuple(branches))


def _tower(letters: Iterable[str], *resolutions: int, clip_grid: int, interactions: int) -> PyramidSpec:
    """A vision tower of LLaVA, the largest image first."""
    family = _CLIP if clip_grid == 14 else _CLIP_336
    schedule = {12: CONVNEXT_39, 24: CONVNEXT_39_BY_24, 2: CONVNEXT_39_BY_2}[interactions]
    branches = {k: replace(b, blocks=schedule) if b.arch.startswith("convnext") else b for k, b in family.items()}
    return _row(branches, letters, *resolutions, interactions=interactions)


def _enlarging(letters: str, *resolutions: int) -> PyramidSpec:
    """A pyramid whose middle branch gets the image itself, and the first, the largest, an enlarged one.

    Windows are those that the published costs count: none on the smallest image, which is smaller than a window.
    """
    spec = _row(_DEIT, letters, *resolutions, window=28, input_resolution=resolutions[1])
    return replace(spec, branches=(replace(spec.branches[0], window=None), *spec.branches[1:]))


SPECS: dict[str, PyramidSpec] = {
    # COCO, Mask R-CNN 1x: ViTDet baselines with every third block global, pyramids windowed throughout
    "deit3-b-1024": _row(_DEIT, "b", 1024, window=14, global_every=3),
    "deit3-l-1024": _row(_DEIT, "l", 1024, window=14, global_every=3),
    "deit3-tsb-1120-896-448": _row(_DEIT, "tsb", 1120, 896, 448, window=14),
    "deit3-tsb-1568-896-448": _row(_DEIT, "tsb", 1568, 896, 448, window=14),
    "deit3-tsb-1568-1120-672": _row(_DEIT, "tsb", 1568, 1120, 672, window=14),
    "deit3-sbl-1120-672-448": _row(_DEIT, "sbl", 1120, 672, 448, window=28),
    "deit3-sbl-1344-896-448": _row(_DEIT, "sbl", 1344, 896, 448, window=28),
    "deit3-sbl-1568-896-672": _row(_DEIT, "sbl", 1568, 896, 672, window=28),
    "deit3-sbl-1568-1120-672": _row(_DEIT, "sbl", 1568, 1120, 672, window=28),
    "deit3-tsbl-1344-896-672-448": _row(_DEIT, "tsbl", 1344, 896, 672, 448, window=28),
    "deit3-tsbl-1568-1120-672-448": _row(_DEIT, "tsbl", 1568, 1120, 672, 448, window=28),
    "deit3-tsbl-1792-1568-1120-448": _row(_DEIT, "tsbl", 1792, 1568, 1120, 448, window=28),
    # other pretraining; MAE, BEiTv2 and Uni-Perceiver have no small model, its place takes DeiT III's
    "augreg-sbl-1568-1120-672": _row(_AUGREG, "sbl", 1568, 1120, 672, window=28),
    "mae-sbl-1568-1120-672": _row(_MAE, "sbl", 1568, 1120, 672, window=28),
    "dinov2-sbl-1568-1120-672": _row(_DINOV2, "sbl", 1568, 1120, 672, window=28),
    "beitv2-sbl-1568-1120-672": _row(_BEITV2, "sbl", 1568, 1120, 672, window=28),
    "uniperceiver-sbl-1568-1120-672": _row(_UNIPERCEIVER, "sbl", 1568, 1120, 672, window=28),
    # six billion parameters, all attention global
    "internvit-6b-1024": _row(_INTERNVIT, "6", 1024),
    "internvit-h6b-1024-512": _row(_INTERNVIT, "h6", 1024, 512),
    "internvit-lh6b-1536-1024-512": _speedup(_row(_INTERNVIT, "lh6", 1536, 1024, 512, interactions=4)),
    # COCO, DINO
    "deit3-384-sbl-1792-1120-672": _row(_DEIT_384, "sbl", 1792, 1120, 672, window=24, global_every=3),
    "internvit-h6b-1024-768": _row(_INTERNVIT, "h6", 1024, 768),
    # COCO, Mask R-CNN 1x: ConvNeXt (c) and DeiT (v), with a regular FPN
    "convnext-b-1024": PyramidSpec((_CONVNEXT_B,)),
    "ct-cs-cb-1024-672-448": _row(_HYBRID, ("ct", "cs", "cb"), 1024, 672, 448),
    "ct-vs-vb-1024-672-448": _row(_HYBRID, ("ct", "vs", "vb"), 1024, 672, 448),
    "ct-cs-vb-1024-672-448": _row(_HYBRID, ("ct", "cs", "vb"), 1024, 672, 448),
    "ct-vs-cb-1024-672-448": _row(_HYBRID, ("ct", "vs", "cb"), 1024, 672, 448),
    "vt-cs-vb-1024-672-448": _row(_HYBRID, ("vt", "cs", "vb"), 1024, 672, 448),
    "vt-cs-cb-1024-672-448": _row(_HYBRID, ("vt", "cs", "cb"), 1024, 672, 448),
    "vt-vs-cb-1024-672-448": _row(_HYBRID, ("vt", "vs", "cb"), 1024, 672, 448),
    # ADE20K, UperNet, 80k: released, all attention global
    "internvit-6b-512": _segmentor("6", 512),
    "internvit-h6b-512-192": _segmentor("h6", 512, 192),
    "internvit-h6b-512-256": _segmentor("h6", 512, 256),
    "internvit-h6b-512-384": _segmentor("h6", 512, 384),
    "internvit-h6b-512-512": _segmentor("h6", 512, 512),
    # ADE20K, UperNet, 160k: of the paper alone, see mmsegmentation/README.md for what is our reading
    "augreg-b-640": _row(_AUGREG, "b", 640, window=14, global_every=3),
    "augreg-l-640": _row(_AUGREG, "l", 640, window=14, global_every=3),
    "deit3-tsb-896-448-336": _enlarging("tsb", 896, 448, 336),
    "deit3-sbl-1120-448-336": _enlarging("sbl", 1120, 448, 336),
    # ImageNet-1K classification: DeiT (the first), AugReg, and from scratch
    "cls-deit1-tsb-368-192-128": _classifier(_DEIT1, "tsb", 368, 192, 128),
    "cls-augreg-sbl-320-160-96": _classifier(_AUGREG_224, "sbl", 320, 160, 96),
    "cls-augreg-sbl-384-192-128": _classifier(_AUGREG_224, "sbl", 384, 192, 128),
    "cls-scratch-b-512-256-128": _classifier(_SCRATCH, "321", 512, 256, 128, head="merged"),
    # LLaVA: one map per branch. The 13B rows with ConvNeXt have 24 interactions, the 7B rows 12.
    "clip-l-336": PyramidSpec((_CLIP_L14_336,)),
    "clip-bl-512-256": _tower("bl", 512, 256, clip_grid=14, interactions=2),
    "clip-bl-512-448": _tower("bl", 512, 448, clip_grid=21, interactions=12),
    "convnext-b-clip-l-640-224": _tower(("cb", "l"), 640, 224, clip_grid=14, interactions=2),
    "convnext-b-clip-l-1024-336": _tower(("cb", "l"), 1024, 336, clip_grid=21, interactions=12),
    "convnext-b-clip-l-1024-336-24": _tower(("cb", "l"), 1024, 336, clip_grid=21, interactions=24),
    "convnext-l-clip-l-1024-336": _tower(("cl", "l"), 1024, 336, clip_grid=21, interactions=12),
    "convnext-l-clip-l-1024-336-24": _tower(("cl", "l"), 1024, 336, clip_grid=21, interactions=24),
}
for _name in ("augreg-sbl-1568-1120-672", "internvit-h6b-1024-512"):
    SPECS[f"{_name}-speedup"] = _speedup(SPECS[_name])
SPECS.update({f"{name}-as-built": as_built(spec) for name, spec in list(SPECS.items()) if len(spec.branches) == 4})


def list_models() -> list[str]:
    """Return the names of the zoo's rows."""
    return list(SPECS)

"""Pyramids as data: what a row of the paper's tables consists of, and the rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from piip.branches import Branch, create_branch
from piip.errors import SpecError, unknown
from piip.interaction import Attention
from piip.pyramid import PIIP


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
            `resolutions` sets the resolution of every branch, in the order of the branches.

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


_DEIT = {
    "t": BranchSpec("deit_tiny", 0, weights="deit_tiny_patch16_224-a1311bcf.pth", drop_path=0.05),
    "s": BranchSpec("deit_small", 0, weights="deit_3_small_224_21k.pth", drop_path=0.05),
    "b": BranchSpec("deit_base", 0, weights="deit_3_base_224_21k.pth", drop_path=0.15),
    "l": BranchSpec("deit_large", 0, weights="deit_3_large_224_21k.pth", drop_path=0.4),
}


def _deit(letters: str, *resolutions: int, window: int, global_every: int = 0) -> PyramidSpec:
    """A pyramid of DeiT branches; letters and resolutions in the paper's order, the largest image first."""
    branches = [
        replace(_DEIT[letter], resolution=resolution, window=window, global_every=global_every)
        for letter, resolution in zip(letters, resolutions, strict=True)
    ]
    return PyramidSpec(tuple(reversed(branches)))


SPECS: dict[str, PyramidSpec] = {
    # COCO, Mask R-CNN 1x: ViTDet baselines with every third block global, pyramids windowed throughout
    "deit3-b-1024": _deit("b", 1024, window=14, global_every=3),
    "deit3-l-1024": _deit("l", 1024, window=14, global_every=3),
    "deit3-tsb-1120-896-448": _deit("tsb", 1120, 896, 448, window=14),
    "deit3-tsb-1568-896-448": _deit("tsb", 1568, 896, 448, window=14),
    "deit3-tsb-1568-1120-672": _deit("tsb", 1568, 1120, 672, window=14),
    "deit3-sbl-1120-672-448": _deit("sbl", 1120, 672, 448, window=28),
    "deit3-sbl-1344-896-448": _deit("sbl", 1344, 896, 448, window=28),
    "deit3-sbl-1568-896-672": _deit("sbl", 1568, 896, 672, window=28),
    "deit3-sbl-1568-1120-672": _deit("sbl", 1568, 1120, 672, window=28),
    "deit3-tsbl-1344-896-672-448": _deit("tsbl", 1344, 896, 672, 448, window=28),
    "deit3-tsbl-1568-1120-672-448": _deit("tsbl", 1568, 1120, 672, 448, window=28),
    "deit3-tsbl-1792-1568-1120-448": _deit("tsbl", 1792, 1568, 1120, 448, window=28),
}
SPECS.update({f"{name}-as-built": as_built(spec) for name, spec in list(SPECS.items()) if len(spec.branches) == 4})


def list_models() -> list[str]:
    """Return the names of the zoo's rows."""
    return list(SPECS)

"""What a model costs, against the figures measured on the original."""

import csv
import functools
import importlib.util
import json
from math import prod
from pathlib import Path

import pytest
import torch

from piip import DensePyramid
from piip.attention import SelfAttention
from piip.budget import as_run, published
from piip.errors import RunError, SpecError
from piip.zoo.released import ROWS, TABLES, Row, find_row, row_of

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = ROOT / "tests" / "reference" / "budgets.csv"
TSB = "mask_rcnn_deit_tsb_1120_896_448_fpn_1x_coco_bs16"
TSBL = "mask_rcnn_deit_tsbl_1344_896_672_448_fpn_1x_coco_bs16"
PARTS = {"interactions": "interactions", "merging": "merge", "fpn": "fpn"}
# One row of every kind; the others are slow.
KINDS = {
    "mask_rcnn_deit_vit_b_fpn_1x_coco_bs16",
    TSBL,
    "mask_rcnn_vit-t_convnext-s_vit-b_1024_672_448_regular-fpn",
    "piip_3branch_tsb_368-192-128_cls_token_deit1",
}


@functools.cache
def budgets() -> list[dict[str, str]]:
    with BUDGETS.open() as file:
        return list(csv.DictReader(file))


def every_row(rows=ROWS):
    slow = pytest.mark.slow
    return [pytest.param(row, id=row.name, marks=() if row.name in KINDS else slow) for row in rows]


def reference_of(row: Row, convention: str, variant: str = "") -> dict[str, str] | None:
    """The figures of the original; for a fused MLP, which its counter misses, with the MLP counted."""
    name = "clip-vit-large-patch14-336" if row.spec == "clip-l-336" else row.name
    found = [r for r in budgets() if r["config"] == name and convention in r["convention"].split("+")]
    wanted = [r for r in found if r["variant"] in (variant, "mlp_counted")]
    return wanted[-1] if wanted else None


@pytest.mark.parametrize("row", every_row())
def test_published_convention(row):
    """Within the rounding of the reference's figures; the table's own are within one percent, or explained."""
    total = published(row.spec, TABLES[row.table].convention, model=TABLES[row.table].model, **row.options)["total"]
    expected = reference_of(row, "published")
    if expected is not None:
        assert total.params / 1e6 == pytest.approx(float(expected["params_M"]), rel=1e-5, abs=0.06)
        assert total.macs / 1e9 == pytest.approx(float(expected["flops_G"]), rel=1e-4, abs=0.06)
    if row.params is not None:
        assert total.params / 1e6 == pytest.approx(row.params, rel=0.005)
    if row.flops is not None:
        near = total.macs / 1e9 == pytest.approx(row.flops, rel=0.005)
        assert near != bool(row.note), f"{total.macs / 1e9:.1f}G counted, {row.flops}G published, note {row.note!r}"


def attention_macs(spec, options) -> dict[str, float]:
    """Padded self-attention of every branch in closed form."""
    with torch.device("meta"):
        pyramid = DensePyramid(spec, **options).pyramid
    found = {}
    for i, branch in enumerate(pyramid.branches):
        side = pyramid.resolutions[i] // branch.strides[0]
        macs = 0
        for module in branch.modules():
            if isinstance(module, SelfAttention):
                window = module.window or side
                padded = -(-side // window) * window
                macs += 2 * padded**2 * window**2 * module.qkv.in_features
        found[f"branch{i + 1}"] = macs / 1e9
    return found


@pytest.mark.parametrize("row", every_row([row for row in ROWS if row.table not in ("imagenet", "llava")]))
def test_as_run_agrees_part_by_part(row):
    """With what hooks saw in the original's classes: all but attention and the FPN, window padding included."""
    four = row.spec.startswith("deit3-tsbl")
    expected = reference_of(row, "as_run", "as_intended" if four else "")
    hooked = {k: float(v) for k, v in (part.split("=") for part in expected["flops_G_hooked_parts"].split(";"))}
    if "trunk" in hooked:
        hooked["branch1"] = hooked.pop("trunk")
    costs = as_run(row.spec, **row.options)
    attention = attention_macs(row.spec, row.options)
    beit = "beitv2" in row.spec
    for part, cost in costs.items():
        if part in ("fpn", "total") or (beit and part in ("branch1", "branch2")):
            continue
        name = PARTS.get(part, part)
        if name not in hooked:
            assert cost.macs == 0
            continue
        macs = cost.macs / 1e9 - attention.get(part, 0)
        assert macs == pytest.approx(hooked[name], rel=0.02, abs=0.01), part
    if beit:  # the original's qkv goes unseen by its counter; ours is that of the same network without the bias tables
        mae = as_run("mae-sbl-1568-1120-672")
        assert [costs[part].macs for part in costs] == [mae[part].macs for part in mae]


def measured(config: str, column: str, variant: str = "") -> dict[str, float]:
    rows = [r for r in budgets() if (r["config"], r["convention"]) == (config, "as_run")]
    (row,) = [r for r in rows if r["variant"] == variant]
    return {name: float(value) for name, value in (part.split("=") for part in row[column].split(";"))}


@pytest.mark.parametrize(
    ("spec", "config", "variant"),
    [
        ("deit3-tsb-1120-896-448", TSB, ""),
        ("deit3-tsbl-1344-896-672-448", TSBL, "as_intended"),
        ("deit3-tsbl-1344-896-672-448-as-built", TSBL, "as_built"),
    ],
)
def test_parameters_of_every_part(spec, config, variant):
    costs = as_run(spec)
    for part, cost in costs.items():
        if part != "total":
            expected = measured(config, "params_M_parts", variant)[PARTS.get(part, part)]
            assert cost.params / 1e6 == pytest.approx(expected, abs=6e-4), part
    assert costs["total"].params == sum(cost.params for part, cost in costs.items() if part != "total")


def test_multiply_adds_of_every_part():
    """A row whose grids fill their windows: there the original's analytic attention counts what really runs."""
    costs = as_run("deit3-tsb-1120-896-448")
    expected = measured(TSB, "flops_G_hooked_parts")
    attention = measured(TSB, "flops_G_self_attention")
    for i in (1, 2, 3):
        both = expected[f"branch{i}"] + attention[f"b{i}"]
        assert costs[f"branch{i}"].macs / 1e9 == pytest.approx(both, rel=0.02)
    assert costs["interactions"].macs / 1e9 == pytest.approx(expected["interactions"], rel=0.02)
    assert costs["merging"].macs / 1e9 == pytest.approx(expected["merge"], rel=0.02)
    # Scale 4: two transposed convolutions of 2 x 2, the second on four times the cells; scale 2: one.
    cells, dim = (1120 // 16) ** 2, 768
    assert costs["fpn"].macs == 4 * dim * dim * cells * (1 + 4 + 1)
    assert costs["total"].macs == sum(cost.macs for part, cost in costs.items() if part != "total")


def test_other_sizes_cost_in_proportion():
    whole, half = (as_run("deit3-tsb-1120-896-448", size) for size in ((1120, 1120), (560, 1120)))
    assert half["total"].macs == pytest.approx(whole["total"].macs / 2, rel=0.05)
    assert half["total"].params == whole["total"].params


def test_fvcore_counts_the_same_on_real_tensors():
    """On the CPU with real tensors, by another counter; what it does not know is told to it or left out of both."""
    fvcore = pytest.importorskip("fvcore.nn")
    branches = [
        {"arch": "deit_tiny", "resolution": 112, "window": 4},
        {"arch": "convnext_tiny", "resolution": 160},
    ]
    spec = {"branches": branches, "interactions": 3}
    counts = as_run(spec)

    def attention(inputs, outputs):
        query, key = (value.type().sizes() for value in inputs[:2])
        return 2 * prod(query) * key[-2]

    def sampling(inputs, outputs):
        return 4 * prod(outputs[0].type().sizes())

    model = DensePyramid(spec).eval()
    analysis = fvcore.FlopCountAnalysis(model, torch.randn(1, 3, 160, 160))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention)
    analysis.set_op_handle("aten::grid_sampler", sampling)
    for op in ("layer_norm", "group_norm", "upsample_bilinear2d", "upsample_bicubic2d"):
        analysis.set_op_handle(f"aten::{op}", lambda inputs, outputs: 0)
    assert analysis.total() == pytest.approx(counts["total"].macs, rel=1e-6)
    by_module = analysis.by_module()
    assert by_module["pyramid.stages"] == pytest.approx(counts["interactions"].macs, rel=1e-6)
    assert by_module["merge"] == pytest.approx(counts["merging"].macs, rel=1e-6)
    assert sum(p.numel() for p in model.parameters()) == counts["total"].params


def test_rows_are_those_of_the_published_tables():
    assert len(ROWS) == 50
    assert len({row.name for row in ROWS}) == 50
    assert sum(row.table not in ("imagenet", "llava", "ade20k") for row in ROWS) == 31
    assert find_row("deit3-sbl-1120-672-448").flops == 727
    with pytest.raises(SpecError, match=r"unknown row 'mask_rcnn_deit_sbl'.*did you mean mask_rcnn_deit_"):
        find_row("mask_rcnn_deit_sbl")


def test_a_size_that_leaves_no_token_is_refused():
    with pytest.raises(ValueError, match=r"branch 1 gets an image of 5 x 5 pixels .*at least 40 pixels per side"):
        published("deit3-tsb-1120-896-448", "classification", (14, 14))


@pytest.fixture(scope="module")
def get_flops():
    spec = importlib.util.spec_from_file_location("get_flops", ROOT / "tools" / "get_flops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tool_prints_one_line_per_row(get_flops, capsys):
    get_flops.main(["--format", "csv", "deit3-tsb-1120-896-448", "--size", "224", "448"])
    header, line = capsys.readouterr().out.splitlines()
    assert header == (
        "config,resolution,params_M,published_params_M,flops_G,published_flops_G,as_run_params_M,as_run_flops_G,note"
    )
    config, resolution, *_ = line.split(",")
    assert (config, resolution) == (f"mmdetection/configs/piip/3branch/{TSB}.py", "224x448")
    get_flops.main([str(ROOT / config), "--format", "json", "--parts"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["flops_G"] == pytest.approx(243, rel=0.005)
    assert set(row["parts"]["as run"]) == {"branch1", "branch2", "branch3", "interactions", "merging", "fpn", "total"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "one or more configs, or --all"),
        (["x", "--all"], "or --all"),
        (["x", "--size", "0", "3"], "--size is a he"),
    ],
)
def test_the_tool_refuses(get_flops, arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        get_flops.main(arguments)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_the_tool_names_the_nearest_rows(get_flops):
    with pytest.raises(SpecError, match=r"unknown row 'deit3-sbl'.*did you mean"):
        get_flops.main(["deit3-sbl"])


def test_an_error_of_the_spec_is_not_one_of_the_size(get_flops, tmp_path):
    pytest.importorskip("mmengine", reason="configs need it")
    (tmp_path / "model.py").write_text("model = dict(spec='deit3-tsb-1120-896-448', scales=(3,))\n")
    with pytest.raises(SpecError, match=r"^unknown FPN scale 3"):
        get_flops.main([str(tmp_path / "model.py")])
    with pytest.raises(RunError, match=r"^--size: branch 1 gets an image of 5 x 5 pixels"):
        get_flops.main(["deit3-tsb-1120-896-448", "--size", "14", "14"])


@pytest.mark.parametrize(
    ("text", "table", "options"),
    [
        ("merge='separable', scales=(2, 1)", "variants", {"merge": "separable", "scales": (2, 1)}),
        ("taps=[0, 1]", "convnext", {"taps": [0, 1]}),
        ("num_classes=7", "imagenet", {"num_classes": 7}),
        ("head='branches', readout='mean'", "imagenet", {"head": "branches", "readout": "mean"}),
    ],
)
def test_rows_of_configs_have_their_options(tmp_path, text, table, options):
    pytest.importorskip("mmengine", reason="configs need it")
    path = tmp_path / "model.py"
    path.write_text(f"model = dict(type='PIIP', spec='deit3-tsb-1120-896-448', drop_path=0.1, {text})\n")
    row = row_of(str(path))
    assert (row.table, dict(row.options)) == (table, options)
    assert as_run(row.spec, (560, 560), model=TABLES[row.table].model, **row.options)["total"].macs > 0


def test_a_classifier_with_options_of_a_backbone_is_refused(tmp_path):
    pytest.importorskip("mmengine", reason="configs need it")
    path = tmp_path / "model.py"
    path.write_text("model = dict(spec='deit3-tsb-1120-896-448', num_classes=7, merge='separable')\n")
    with pytest.raises(SpecError, match=r"model\.py describes a classifier, and merge is an option of dense backbones"):
        row_of(str(path))


@pytest.mark.slow
def test_llava_15_leaves_its_last_block_unread():
    (row, _) = [row for row in ROWS if row.spec == "clip-l-336"]
    table, run = (
        published(row.spec, "llava", model="tower", **row.options),
        as_run(row.spec, model="tower", **row.options),
    )
    assert run["total"].macs == pytest.approx(table["total"].macs * 23 / 24, rel=0.002)
    assert run["total"].params == pytest.approx(table["total"].params, rel=1e-4)

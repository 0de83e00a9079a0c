"""What a backbone costs, against the parts measured on the original."""

import csv
from pathlib import Path

import pytest

from piip.budget import as_run

BUDGETS = Path(__file__).resolve().parents[1] / "reference" / "budgets.csv"
TSB = "mask_rcnn_deit_tsb_1120_896_448_fpn_1x_coco_bs16"
TSBL = "mask_rcnn_deit_tsbl_1344_896_672_448_fpn_1x_coco_bs16"
PARTS = {"interactions": "interactions", "merging": "merge", "fpn": "fpn"}


def measured(config: str, column: str, variant: str = "") -> dict[str, float]:
    with BUDGETS.open() as file:
        rows = [r for r in csv.DictReader(file) if (r["config"], r["convention"]) == (config, "as_run")]
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

"""Costs in closed form, and the combinations of resolutions that are worth trying."""

import importlib.util
from itertools import product
from pathlib import Path

import pytest
import torch

from piip.branches import Branch, register_branch
from piip.budget import as_run
from piip.errors import SpecError
from piip.plan import ClosedForm, combinations, pareto, with_resolutions
from piip.zoo.released import ROWS

VIT = {"embed_dim": 32, "depth": 4, "num_heads": 2, "pos_grid": (4, 4)}
TOKENS = {"arch": "vit", "resolution": 112, "options": {**VIT, "class_token": True}}
CONVNEXT = {"depths": (1, 1, 1, 1), "widths": (32, 32, 64, 64)}
LOW = {"arch": "vit", "resolution": 112, "options": VIT, "window": 3, "global_every": 2}
HIGH = {"arch": "convnext", "resolution": 160, "options": CONVNEXT, "blocks": [1, 2, 4]}
SPEC = {"branches": [LOW, HIGH], "interactions": 3, "heads": 4}


def by_part(costs) -> dict[str, int]:
    branches = sum(cost.macs for part, cost in costs.items() if part.startswith("branch"))
    return {"branches": branches, **{p: costs[p].macs for p in ("interactions", "merging", "fpn", "total")}}


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({}, {}),
        ({"attention": "regular"}, {"scales": (2, 1)}),
        ({"branches": [LOW, {**HIGH, "options": {**CONVNEXT, "stem": "overlap"}}]}, {}),
        ({"proj": False, "norm": False, "ffn_ratio": 0}, {"taps": [0, 1]}),
        ({"branches": [{**LOW, "options": {**VIT, "class_token": True}, "window": None, "global_every": 0}, HIGH]}, {}),
        ({"branches": [{**LOW, "options": {**VIT, "window_pad": "after_qkv"}}], "interactions": 0}, {}),
        ({"output_branch": 0, "input_resolution": 224}, {"merge": "separable"}),
    ],
)
def test_formulas_and_counting_agree(change, options):
    """Also where the larger model gets the larger image, whose grid the merged map then takes, or the same."""
    form = ClosedForm({**SPEC, **change}, **options)
    sides = [branch.resolution for branch in form.spec.branches]
    for chosen in (sides, [side + 48 for side in sides], sides[::-1], [max(sides)] * len(sides)):
        counted = as_run(with_resolutions(form.spec, chosen), **options)
        for part, macs in form(chosen).items():
            # One within a hundred is asked for; where padding comes after qkv, the counter sees what is padded.
            assert macs == pytest.approx(by_part(counted)[part], rel=0.01), part
        assert sum(form.params(chosen).values()) == counted["total"].params


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name) for row in ROWS if row.table not in ("imagenet", "llava")]
)
def test_formulas_agree_on_every_published_backbone(row):
    form = ClosedForm(row.spec, **row.options)
    macs = form([branch.resolution for branch in form.spec.branches])
    counted = by_part(as_run(row.spec, **row.options))
    assert macs == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(
    ("model", "change", "options"),
    [
        ("classifier", {"branches": [TOKENS, {**TOKENS, "resolution": 160}], "head": "branches"}, {}),
        ("classifier", {"head": "branches"}, {"num_classes": 7, "readout": "mean"}),
        ("classifier", {}, {"head": "map"}),
        ("tower", {}, {}),
        ("tower", {"branches": [LOW], "interactions": 0}, {"unread_blocks": 1}),
    ],
)
def test_formulas_agree_on_classifiers_and_towers(model, change, options):
    form = ClosedForm({**SPEC, **change}, model, **options)
    sides = [branch.resolution for branch in form.spec.branches]
    for chosen in (sides, sides[::-1]):
        counted = as_run(with_resolutions(form.spec, chosen), model=model, **options)
        for part, macs in form(chosen).items():
            branches = [counted[name].macs for name in counted if name.startswith("branch")]
            own = sum(branches) if part == "branches" else counted[part].macs if part in counted else 0
            assert macs == pytest.approx(own, rel=0.01), part
        assert sum(form.params(chosen).values()) == counted["total"].params


def test_no_fpn_from_such_a_branch_is_an_error():
    patches = {**LOW, "options": {**VIT, "patch_size": 14}}
    form = ClosedForm({**SPEC, "branches": [patches, HIGH]}, taps=[0, 1])
    with pytest.raises(SpecError, match=r"unknown FPN scale .*known: 4, 2, 1, 0.5"):
        form([160, 112])


def test_pareto_keeps_what_nothing_exceeds():
    candidates = [chosen for chosen in product((1, 2, 3, 4), repeat=3) if sum(chosen) <= 7]
    kept = pareto(candidates)
    for chosen in candidates:
        exceeded = any(
            other != chosen and all(a <= b for a, b in zip(chosen, other, strict=True)) for other in candidates
        )
        assert (chosen in kept) != exceeded, chosen
    assert len(kept) == len(set(kept))


def test_combinations_give_the_larger_model_the_smaller_image():
    assert list(combinations(2, (1, 2))) == [(1, 1), (1, 2), (2, 2)]
    assert len(list(combinations(3, (1, 2), any_order=True))) == 8


def test_unknown_branch_types_have_no_formula():
    if "plan_test" not in __import__("piip.branches.base", fromlist=["list_branches"]).list_branches():

        @register_branch("plan_test")
        class Other(Branch):
            def __init__(self):
                super().__init__()
                self.dims, self.strides = (32,), (16,)
                self.layer = torch.nn.Linear(3, 32)

            def embed(self, images): ...

            def run(self, tokens, start, stop): ...

    with pytest.raises(SpecError, match="branch 1 is a Other: there are formulas for ViT and ConvNeXt"):
        ClosedForm({"branches": [{"arch": "plan_test", "resolution": 64}], "interactions": 0})


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).resolve().parents[2] / "tools" / "plan.py"
    spec = importlib.util.spec_from_file_location("plan_tool", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_tool_stays_within_the_budget(tool, capsys):
    tool.main(["deit3-tsb-1568-1120-672", "--macs", "300", "--params", "200", "--top", "3"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[-5:] == ["branches", "interactions", "merging", "fpn", "total"]
    totals = [float(line.split()[-1].rstrip("G")) for line in lines[:3]]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] <= 300
    with pytest.raises(SpecError, match="nothing fits the budget"):
        tool.main(["deit3-sbl-1568-1120-672", "--params", "200"])
    with pytest.raises(SystemExit):
        tool.main(["deit3-sbl-1568-1120-672"])
    assert "give a budget: --macs, --params or --latency" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("clip-l-336", ["branches", "interactions", "total"]),
        ("cls-deit1-tsb-368-192-128", ["branches", "interactions", "merging", "head", "total"]),
    ],
)
def test_the_tool_plans_classifiers_and_towers(tool, capsys, name, parts):
    tool.main([name, "--macs", "60", "--sides", "112", "224", "--any-order", "--top", "1", "--check"])
    header, line, *_ = capsys.readouterr().out.splitlines()
    assert header.split("params")[1].split() == parts
    assert "(+0.00%)" in line


def test_the_tool_measures_the_model_of_the_config(tool, capsys, tmp_path):
    pytest.importorskip("mmengine", reason="configs need it")
    (tmp_path / "model.py").write_text(f"model = dict(spec={SPEC!r}, merge='separable', taps=[0, 1])\n")
    tool.main([str(tmp_path / "model.py"), "--latency", "60000", "--sides", "112", "--check"])
    assert "(+0.0" in capsys.readouterr().out.splitlines()[1]


def test_the_tool_measures_latency(tool, capsys, monkeypatch):
    """With a machine that takes a second per 1e12 multiply-adds, the budget in time is one in multiply-adds."""
    monkeypatch.setattr(tool, "seconds_of", lambda form, chosen: form(chosen)["total"] / 1e12)
    tool.main(["deit3-tsb-1568-1120-672", "--latency", "300", "--sides", "224", "448", "672"])
    measured = capsys.readouterr().out.splitlines()[1:]
    tool.main(["deit3-tsb-1568-1120-672", "--macs", "300", "--sides", "224", "448", "672"])
    planned = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[1] for line in measured] == [line.split()[1] for line in planned]
    assert all(line.endswith(" ms") for line in measured)

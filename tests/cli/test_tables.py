"""The tables of the READMEs and their source; configs and published rows say the same."""

import csv
import importlib.util
import re
from pathlib import Path

import pytest

from piip.zoo.released import ROWS, TABLES, find_source
from piip.zoo.specs import SPECS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "tools" / "make_tables.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_tables_are_as_their_source_says(tool, capsys):
    tool.main(["--check"])
    assert "all tables are as their source says" in capsys.readouterr().out


def test_drift_is_noticed(tool, monkeypatch, tmp_path):
    text = (ROOT / "README.md").read_text()
    assert text.count("| 50.0 |") >= 1
    (tmp_path / "README.md").write_text(text.replace("| 50.0 |", "| 50.1 |"))
    monkeypatch.setattr(tool, "documents", lambda: [tmp_path / "README.md"])
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="tables are not what their source says in README"):
        tool.main(["--check"])
    tool.main([])
    assert (tmp_path / "README.md").read_text() == text


def test_the_readme_has_every_published_row_with_its_files():
    text = (ROOT / "README.md").read_text()
    for row in ROWS:
        assert all(link in text for link in (row.config, row.weights_url, row.log_url) if link), row.name
        assert (ROOT / row.config).is_file(), row.config
    assert "not been measured" in " ".join(text.split())


def test_every_figure_is_of_a_row(tool):
    costs = tool.read_costs()
    assert list(costs) == [row.config for row in ROWS]
    with (ROOT / "tests" / "reference" / "budgets.csv").open() as file:
        known = {line["config"] for line in csv.DictReader(file)}
    for row in ROWS:
        cost = costs[row.config]
        assert (ROOT / "tests" / "reference" / "cases" / f"{row.case}.json").is_file(), row.case
        assert cost["published_flops_G"] == ("" if row.flops is None else str(row.flops))
        if row.flops is not None and not row.note:
            assert float(cost["flops_G"]) == pytest.approx(row.flops, rel=0.005)
        assert row.flops is None or row.name in known or row.spec == "clip-l-336"


@pytest.mark.slow
def test_costs_are_what_get_flops_counts(tool):
    tool.main(["--costs", "--check"])


def test_specs_of_the_configs_are_those_of_the_rows():
    for row in ROWS:
        path = ROOT / row.config
        if row.table == "llava":
            continue  # its configs name a row of piip_llava, see tests/core/test_llava_towers.py
        assert re.search(rf'spec="{re.escape(row.spec)}"', path.read_text()), row.config
        assert row.spec in SPECS


@pytest.mark.slow  # reads 31 configs
def test_levels_of_the_configs_are_those_of_the_rows():
    pytest.importorskip("mmdet", reason="needs the detection extra")
    from piip.integrations.config import read_config

    for row in ROWS:
        if TABLES[row.table].task != "mmdetection":
            continue
        backbone = read_config(ROOT / row.config).model.backbone
        given = {key: tuple(backbone[key]) for key in ("scales", "taps") if key in backbone}
        assert given == dict(row.options), row.config


def test_licences_are_stated():
    licences = {
        find_source(branch.weights)[0].licence for spec in SPECS.values() for branch in spec.branches if branch.weights
    }
    assert licences <= {"MIT", "Apache-2.0", "CC-BY-NC-4.0", "not stated"}

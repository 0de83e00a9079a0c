#!/usr/bin/env python3
"""Write the tables of the READMEs from one source: the published rows, and the costs counted here.

    python tools/make_tables.py             # rewrite the tables
    python tools/make_tables.py --costs     # count all costs anew first (minutes)
    python tools/make_tables.py --check     # change nothing; fails where a table differs

A table stands between `<!-- begin table NAME ... -->` and `<!-- end table -->`; NAME is a table of `piip.zoo.released`,
several may follow each other, or `branches` for the pretrained files that the rows of a task's folder start from,
or `versions` for the pinned packages.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from piip.zoo.released import ROWS, SOURCES, TABLES, Row, branch_weights, find_source

ROOT = Path(__file__).resolve().parents[1]
COSTS = ROOT / "piip" / "zoo" / "costs.csv"
REFERENCE = ROOT / "tests" / "reference"
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "onedl-mmengine",
    "onedl-mmcv",
    "onedl-mmdetection",
    "onedl-mmsegmentation",
    "transformers",
    "deepspeed",
    "accelerate",
    "peft",
    "gradio",
    "onnx",
    "onnxruntime",
    "huggingface_hub",
    "safetensors",
)
BLOCK = re.compile(r"(<!-- begin table (?P<names>[\w ]+) -->\n).*?(<!-- end table -->)", re.DOTALL)


def read_costs() -> dict[str, dict[str, str]]:
    """Return the counted costs, by the config's path or the row's name."""
    with COSTS.open(encoding="utf-8", newline="") as file:
        return {line["config"]: line for line in csv.DictReader(file)}


def short(figure: float | str | None, unit: str) -> str:
    """Write a cost with as many digits as the published tables."""
    if figure is None:
        return "-"
    value = float(figure)
    return f"{value:.0f}{unit}" if value >= 100 or (unit == "M" and value == int(value)) else f"{value:.1f}{unit}"


def pair(published: float | None, counted: str, unit: str) -> str:
    """Write a published figure beside the one counted here in the same convention."""
    return f"{short(published, unit)} / {short(counted, unit)}"


def checks(row: Row) -> str:
    """Say what of a row the tests compare with the original."""
    forms = [row.name, f"{row.name}__as_intended"]
    found = [
        ("names", any((REFERENCE / "manifests" / f"{form}.json.gz").is_file() for form in forms)),
        ("numerics", (REFERENCE / "cases" / f"{row.case}.json").is_file()),
        ("decay", any((REFERENCE / "layer_decay" / f"{form}.json.gz").is_file() for form in forms)),
        ("cost", row.flops is not None and not row.note),
    ]
    return ", ".join(name for name, there in found if there)


def files(row: Row, folder: str) -> str:
    """Link a row's config, weights and log, from a README in `folder`."""
    links = [
        ("config", row.config and os.path.relpath(row.config, folder or ".")),
        ("weights", row.weights_url),
        ("log", row.log_url),
    ]
    return " ".join(f"[{name}]({target})" for name, target in links if target)


def line(row: Row, cost: Mapping[str, str], folder: str) -> dict[str, str]:
    """Return the cells of a row by column; columns that no row of a table fills are left out."""
    table = TABLES[row.table]
    metrics = dict(zip(table.metrics, row.metrics, strict=True))
    return {
        "model": row.backbone,
        "head": row.head,
        "language model": row.language_model,
        "pretraining": "" if row.table == "llava" else row.pretraining,
        "resolution": row.resolution,
        "schedule": row.schedule,
        **{name: "-" if value is None else f"{value:.{table.digits}f}" for name, value in metrics.items()},
        "#Param": "" if row.params is None and row.table == "llava" else pair(row.params, cost["params_M"], "M"),
        "#FLOPs": pair(row.flops, cost["flops_G"], "G") + (" ¹" if row.note else ""),
        "as run": f"{short(cost['as_run_params_M'], 'M')}, {short(cost['as_run_flops_G'], 'G')}",
        "checked": checks(row),
        "files": files(row, folder),
    }


def markdown(lines: Sequence[Mapping[str, str]]) -> str:
    """Return a table."""
    columns = [name for name in lines[0] if any(cells[name] for cells in lines)]
    rows = [columns, ["---"] * len(columns), *([cells[name] or "-" for name in columns] for cells in lines)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def published_table(name: str, folder: str) -> str:
    """Return a published table with its heading and notes."""
    rows = [row for row in ROWS if row.table == name]
    costs = read_costs()
    lines = [line(row, costs[row.config or row.name], folder) for row in rows]
    notes = "".join(
        f"\n¹ {note[0].upper()}{note[1:]}.\n" for note in dict.fromkeys(row.note for row in rows if row.note)
    )
    return f"**{TABLES[name].title}** ({TABLES[name].origin})\n\n{markdown(lines)}{notes}"


def branch_table(task: str) -> str:
    """Return the table of the pretrained files that a task's rows start from."""
    used = dict.fromkeys(
        weights for row in ROWS if TABLES[row.table].task == task for weights in branch_weights(row.spec)
    )
    found: dict[str, list[str]] = {source.family: [] for source in SOURCES}
    for weights in used:
        source, url = find_source(weights)
        found[source.family].append(f"[{weights}]({url})")
    return markdown(
        [
            {"family": source.family, "licence": source.licence, "files": "<br>".join(found[source.family])}
            for source in SOURCES
            if found[source.family]
        ]
    )


def version_table() -> str:
    """Return the pinned versions of the packages that matter, by version of Python."""
    pythons = ("3.10", "3.11", "3.12")
    pins: dict[str, dict[str, str]] = {name: {} for name in PACKAGES}
    for text in (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not text or text.startswith("#"):
            continue
        requirement = Requirement(text)
        for python in pythons:
            marker = {"python_version": python, "sys_platform": "linux", "platform_system": "Linux"}
            if requirement.name in pins and (requirement.marker is None or requirement.marker.evaluate(marker)):
                pins[requirement.name][python] = str(requirement.specifier).removeprefix("==")
    return markdown([{"package": name, **{f"Python {p}": pins[name].get(p, "") for p in pythons}} for name in PACKAGES])


def render(path: Path) -> str:
    """Return the text of a file with its tables written anew."""
    folder = path.parent.relative_to(ROOT).as_posix().removeprefix(".")

    def table(match: re.Match[str]) -> str:
        names = match["names"].split()
        others = {"branches": lambda: branch_table(folder), "versions": version_table}
        made = [others[name]() if name in others else published_table(name, folder) for name in names]
        return match[1] + "\n" + "\n".join(made) + "\n" + match[3]

    return BLOCK.sub(table, path.read_text(encoding="utf-8"))


def documents() -> list[Path]:
    """Return the files that may hold tables."""
    return [path for path in sorted({*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")})]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", action="store_true", help="count all costs anew first")
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a table differs")
    args = parser.parse_args(arguments)
    if args.costs:
        command = [sys.executable, str(ROOT / "tools" / "get_flops.py"), "--all", "--format", "csv"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        if args.check and text != COSTS.read_text(encoding="utf-8"):
            sys.exit(f"{COSTS.relative_to(ROOT)} is not what get_flops.py counts: run make tables")
        COSTS.write_text(text, encoding="utf-8")
    different = [path for path in documents() if render(path) != path.read_text(encoding="utf-8")]
    names = ", ".join(str(path.relative_to(ROOT)) for path in different)
    if args.check and different:
        sys.exit(f"tables are not what their source says in {names}: run make tables")
    for path in different:
        path.write_text(render(path), encoding="utf-8")
    print(f"rewritten: {names}" if different else "all tables are as their source says")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Count parameters and multiply-adds, as the published tables do and as the models really run.

    python tools/get_flops.py --all                              # every row of the published tables
    python tools/get_flops.py deit3-sbl-1568-1120-672 --parts    # one row, part by part
    python tools/get_flops.py mmdetection/configs/piip/3branch/NAME.py --size 800 1216

One multiply-add counts as one. "Published" is the convention of the papers' tables: branches and interactions, on a
square image, without window padding. "As run" is what a detector's backbone, a classifier or LLaVA's tower computes:
windows padded, merging, FPN or head included. Nothing is allocated: models live on the meta device.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

from piip.budget import Costs, as_run, published
from piip.errors import RunError, SpecError
from piip.integrations import command
from piip.zoo.released import ROWS, TABLES, Row, row_of

COLUMNS = (
    "config", "resolution", "params_M", "published_params_M", "flops_G", "published_flops_G", "as_run_params_M",
    "as_run_flops_G", "note",
)  # fmt: skip


def count(row: Row, size: tuple[int, int] | None = None) -> dict[str, Costs]:
    """Return the costs of a row in both conventions."""
    table = TABLES[row.table]
    return {
        "published": published(row.spec, table.convention, size, model=table.model, **row.options),
        "as run": as_run(row.spec, size, model=table.model, **row.options),
    }


def figures(row: Row, costs: dict[str, Costs], size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return the columns of one row."""
    total, run = costs["published"]["total"], costs["as run"]["total"]
    digits = 4 if total.macs < 1e11 else 1
    return {
        "config": row.config or row.name,
        "resolution": "x".join(map(str, size)) if size else row.resolution,
        "params_M": round(total.params / 1e6, digits),
        "published_params_M": row.params,
        "flops_G": round(total.macs / 1e9, digits),
        "published_flops_G": row.flops,
        "as_run_params_M": round(run.params / 1e6, digits),
        "as_run_flops_G": round(run.macs / 1e9, digits),
        "note": row.note,
    }


def _difference(counted: float, published_figure: float | None) -> str:
    return "" if published_figure is None else f"{counted / published_figure - 1:+.2%}"


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows for a person: counted, published, relative difference."""
    width = max(len(row["config"].rpartition("/")[2]) for row in rows)
    print(f"{'':{width}}  {'published convention':^49}  {'as run':^19}")
    print(
        f"{'config':{width}}  {'#Param':>9} {'published':>8} {'':>7} {'#FLOPs':>9} {'published':>9} {'':>7}  "
        f"{'params':>9} {'MACs':>9}"
    )
    for row in rows:
        known = {
            key: "-" if row[key] is None else f"{row[key]:g}" for key in ("published_params_M", "published_flops_G")
        }
        print(
            f"{row['config'].rpartition('/')[2]:{width}}  {row['params_M']:>8.1f}M {known['published_params_M']:>8} "
            f"{_difference(row['params_M'], row['published_params_M']):>7} {row['flops_G']:>8.1f}G "
            f"{known['published_flops_G']:>9} {_difference(row['flops_G'], row['published_flops_G']):>7}  "
            f"{row['as_run_params_M']:>8.1f}M {row['as_run_flops_G']:>8.1f}G"
        )
        if row["note"]:
            print(f"{'':{width}}  note: {row['note']}")


def print_parts(costs: dict[str, Costs]) -> None:
    """Print the costs of one row, part by part."""
    for convention, parts in costs.items():
        print(f"    {convention}")
        for part, cost in parts.items():
            print(f"        {part:14} {cost.params / 1e6:>10.3f}M {cost.macs / 1e9:>12.3f}G")


def _parts(costs: dict[str, Costs]) -> dict[str, Any]:
    return {
        name: {part: {"params_M": cost.params / 1e6, "flops_G": cost.macs / 1e9} for part, cost in parts.items()}
        for name, parts in costs.items()
    }


def count_all(rows: Sequence[Row], size: tuple[int, int] | None, jobs: int) -> list[dict[str, Costs]]:
    """Count rows, in several processes where there are several rows and cores."""
    if min(jobs, len(rows)) < 2:
        return [count(row, size) for row in rows]
    with ProcessPoolExecutor(min(jobs, len(rows))) as pool:
        return list(pool.map(partial(count, size=size), rows))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", metavar="CONFIG", help="path or name of a config, or a spec of the zoo")
    parser.add_argument("--all", action="store_true", help="all rows of the published tables")
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    parser.add_argument("--parts", action="store_true", help="the cost of every part too (table and json)")
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="input; the config's by default")
    parser.add_argument(
        "--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="processes (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    if args.all == bool(args.config):
        parser.error("give one or more configs, or --all")
    if args.parts and args.format == "csv":
        parser.error("--parts goes with --format table or json")
    if args.size and min(args.size) < 1:
        parser.error(f"--size is a height and a width in pixels, got {args.size[0]} {args.size[1]}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parse(arguments)
    size = tuple(args.size) if args.size else None
    rows = ROWS if args.all else [row_of(name) for name in args.config]
    try:
        costs = count_all(rows, size, args.jobs)
    except SpecError:  # a ValueError too, and none of the size's
        raise
    except ValueError as error:  # an input size that leaves a branch without a token
        raise RunError(f"--size: {error}") from None
    table = [figures(row, cost, size) for row, cost in zip(rows, costs, strict=True)]
    if args.format == "csv":
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    elif args.format == "json":
        parts = [{"parts": _parts(cost)} if args.parts else {} for cost in costs]
        print(json.dumps([row | more for row, more in zip(table, parts, strict=True)], indent=1))
    elif args.parts:
        for row, cost in zip(table, costs, strict=True):
            print_table([row])
            print_parts(cost)
    else:
        print_table(table)


if __name__ == "__main__":
    sys.exit(command.main(lambda _: main(), argparse.Namespace()))

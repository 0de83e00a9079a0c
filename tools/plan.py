#!/usr/bin/env python3
"""Find image resolutions for a budget: the combinations that no other one within the budget exceeds.

    python tools/plan.py deit3-tsb-1568-1120-672 --macs 400
    python tools/plan.py deit3-tsb-1568-1120-672 deit3-sbl-1568-1120-672 --macs 900 --params 300
    python tools/plan.py deit3-tsb-1120-896-448 --latency 900 --sides 224 448 672 896

Branches come from specs of the zoo (or configs); their own resolutions do not matter. Costs are those of the model that
they name as it runs (windows padded; merging and FPN, or head, included), in 1e9 multiply-adds, for a square image as
large as the largest branch's; they follow from formulas, and `--check` counts the printed ones anew by running them
without data. With --latency, milliseconds per image on this machine, the combinations are measured.

Which of the printed combinations is best no formula says. The paper's advice (section 4.5): raise the largest image
first, and give the largest model no more than the single network that you compare with.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from piip.budget import MODELS, as_run
from piip.errors import SpecError
from piip.integrations import command
from piip.plan import ClosedForm, combinations, pareto, with_resolutions
from piip.zoo.released import TABLES, row_of
from piip.zoo.specs import resolve_spec

PARTS = ("branches", "interactions", "merging", "fpn", "head", "total")


class Choice(NamedTuple):
    """A combination and its cost."""

    spec: str
    resolutions: tuple[int, ...]
    macs: dict[str, int]
    params: int
    seconds: float | None = None


def choices(name: str, args: argparse.Namespace) -> list[Choice]:
    """Return the combinations of one spec within the budget that no other one exceeds."""
    row = row_of(name)
    form = ClosedForm(row.spec, TABLES[row.table].model, **row.options)
    smallest = [max(branch.strides) for branch in form.model.pyramid.branches]
    sides = combinations(len(smallest), sorted(set(args.sides)), args.any_order)
    fitting = [c for c in sides if all(side >= stride for side, stride in zip(c, smallest, strict=True))]
    if args.params is not None:
        fitting = [chosen for chosen in fitting if params_of(form, chosen) <= args.params * 1e6]
    costs = {chosen: form(chosen) for chosen in fitting}
    if args.macs is not None:
        costs = {chosen: cost for chosen, cost in costs.items() if cost["total"] <= args.macs * 1e9}
    if args.latency is not None:
        return measured(form, costs, name, args.latency / 1e3)
    return [Choice(name, chosen, costs[chosen], params_of(form, chosen)) for chosen in pareto(list(costs))]


def params_of(form: ClosedForm, resolutions: tuple[int, ...]) -> int:
    """Return the number of parameters of the whole model."""
    return sum(form.params(resolutions).values())


def seconds_of(form: ClosedForm, resolutions: tuple[int, ...]) -> float:
    """Measure one image on this machine: the median of three runs after a first one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MODELS[form.kind](with_resolutions(form.spec, resolutions), **form.options).eval().to(device)
    images = torch.randn(1, 3, max(resolutions), max(resolutions), device=device)
    times = []
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            model(images)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return sorted(times[1:])[1]


def measured(form: ClosedForm, costs: dict[tuple[int, ...], dict[str, int]], name: str, limit: float) -> list[Choice]:
    """Return the combinations that run within a time and that no other one exceeds.

    Combinations are tried from the cheapest limit upwards: those above twice the multiply-adds that the time allowed so
    far are never run, and what took too long rules out everything that exceeds it in every branch.
    """
    rate, timed = 0.0, {}
    slow: list[tuple[int, ...]] = []
    for chosen in sorted(costs, key=lambda chosen: costs[chosen]["total"]):
        exceeds = [all(a >= b for a, b in zip(chosen, other, strict=True)) for other in slow]
        if any(exceeds) or (rate and costs[chosen]["total"] > 2 * limit * rate):
            continue
        seconds = seconds_of(form, chosen)
        rate = max(rate, costs[chosen]["total"] / seconds)
        if seconds <= limit:
            timed[chosen] = seconds
        else:
            slow.append(chosen)
    return [
        Choice(name, chosen, costs[chosen], params_of(form, chosen), timed[chosen]) for chosen in pareto(list(timed))
    ]


def show(found: Sequence[Choice], check: bool) -> None:
    """Print combinations, the dearest first."""
    width = max(len(choice.spec) for choice in found)
    parts = [part for part in PARTS if any(part in choice.macs for choice in found)]
    print(f"{'branches of':{width}}  {'resolutions':>22} {'params':>8} " + " ".join(f"{part:>12}" for part in parts))
    for choice in found:
        sides = "/".join(str(side) for side in reversed(choice.resolutions))
        cells = " ".join(f"{choice.macs.get(part, 0) / 1e9:>11.1f}G" for part in parts)
        latency = "" if choice.seconds is None else f" {choice.seconds * 1e3:>8.0f} ms"
        print(f"{choice.spec:{width}}  {sides:>22} {choice.params / 1e6:>7.1f}M {cells}{latency}", end="")
        if check:
            row = row_of(choice.spec)
            spec = with_resolutions(resolve_spec(row.spec), choice.resolutions)
            counted = as_run(spec, model=TABLES[row.table].model, **row.options)["total"].macs
            print(f"  counted {counted / 1e9:.1f}G ({choice.macs['total'] / counted - 1:+.2%})", end="")
        print()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", nargs="+", help="spec or config whose branches are to be used")
    parser.add_argument("--macs", type=float, help="at most so many 1e9 multiply-adds")
    parser.add_argument("--params", type=float, help="at most so many million parameters")
    parser.add_argument("--latency", type=float, help="at most so many milliseconds per image, measured here")
    parser.add_argument(
        "--sides", nargs="+", type=int, default=list(range(224, 1793, 224)), help="sides to choose from"
    )
    parser.add_argument("--any-order", action="store_true", help="also larger images for larger models")
    parser.add_argument("--top", type=int, default=10, help="print so many of the dearest (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="count the printed ones anew (a second each)")
    args = parser.parse_args(arguments)
    if args.macs is None and args.params is None and args.latency is None:
        parser.error("give a budget: --macs, --params or --latency")
    if min(args.sides) < 1 or args.top < 1:
        parser.error("--sides and --top are positive numbers")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parse(arguments)
    found = [choice for name in args.spec for choice in choices(name, args)]
    if not found:
        raise SpecError(
            f"nothing fits the budget with sides from {min(args.sides)} to {max(args.sides)}: raise it, give smaller "
            "--sides, or smaller branches"
        )
    found.sort(key=lambda choice: -choice.macs["total"])
    show(found[: args.top], args.check)
    if len(found) > args.top:
        print(f"... and {len(found) - args.top} cheaper ones (--top {len(found)} prints all)")


if __name__ == "__main__":
    sys.exit(command.main(lambda _: main(), argparse.Namespace()))

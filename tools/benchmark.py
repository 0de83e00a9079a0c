#!/usr/bin/env python3
"""Measure latency, memory and the share of the machine's matrix-multiply peak, several models in one run.

    python tools/benchmark.py deit3-tsb-1120-896-448 deit3-b-1024
    python tools/benchmark.py deit3-tsb-1120-896-448 --vary dtype=fp32,bf16 compile=off,on --csv out.csv
    python tools/benchmark.py mmdetection/configs/piip/3branch/NAME.py --mode forward train --size 800 1216 --parts
    python tools/benchmark.py deit3-tsb-1120-896-448 --vary scale=0.5,1 batch=1,2      # how cost grows

Models and variants take turns, round by round, so that a disturbance hits all of them alike; figures are medians, and
the spread is the distance between the quartiles. The peak is that of a square matrix multiplication in the same process
and type, measured in every round. Multiply-adds are those that really run (`piip.budget.as_run`), a backward pass
counting twice its forward pass. Weights are random: they do not change the time.
"""

import argparse
import csv
import gc
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from get_flops import row_of
from torch import Tensor, nn

from piip.budget import MODELS, as_run, parts_of
from piip.deformable import KERNELS
from piip.errors import SpecError, unknown
from piip.integrations import command
from piip.measure import CLOCKS, MatmulPeak, PeakMemory, seconds, timed_parts
from piip.merge import STYLES
from piip.runtime import CudaGraph
from piip.zoo.released import TABLES
from piip.zoo.specs import resolve_spec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SWITCH = ("off", "on")
# What --vary knows: the values to choose from, or the type of a number; the first one is the default.
VARIATIONS: dict[str, tuple[str, ...] | type] = {
    "kernel": ("auto", *KERNELS),
    "dtype": tuple(DTYPES),
    "compile": (*SWITCH, "aot_eager"),
    "graph": SWITCH,
    "streams": SWITCH,
    "checkpointing": SWITCH,
    "merge": tuple(STYLES),
    "batch": int,
    "scale": float,
}
PICTURES = (".png", ".svg", ".pdf")
FIELDS = (
    "spec", "variant", "dtype", "mode", "batch", "height", "width", "median_s", "spread_s", "macs", "peak_fraction",
    "peak_memory_bytes", "ratio_to_first",
)  # fmt: skip


@dataclass
class Case:
    """One model in one variant and mode.

    Attributes:
        spec: The name that was given.
        settings: What was varied, and to what.
        dtype: Type of weights and images, a key of `DTYPES`.
        mode: `forward` (inference), or `train` (forward and backward pass).
        images: `(B, 3, H, W)`.
        step: Runs once.
        model: The model, as it is without compilation.
        macs: Multiply-adds of one image's forward pass.
        taken: Seconds of every round.
        memory: Largest sum of live tensors in bytes; on CUDA what was allocated. The case's own alone.
        parts: Seconds of every part of a forward pass.
    """

    spec: str
    settings: dict[str, str]
    dtype: str
    mode: str
    images: Tensor
    step: Callable[[], Any]
    model: Any
    macs: int
    taken: list[float] = field(default_factory=list)
    memory: int = 0
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        """What was varied, in one word."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items()) or "default"

    @property
    def step_macs(self) -> int:
        """Multiply-adds of a whole step; a backward pass computes twice what its forward pass does."""
        return self.macs * len(self.images) * (3 if self.mode == "train" else 1)

    def record(self, first: "Case", peak: float) -> dict[str, Any]:
        """Return the figures, see `FIELDS`; `peak` in multiply-adds per second."""
        middle = median(self.taken)
        low, _, high = quantiles(self.taken, n=4) if len(self.taken) > 1 else (middle, middle, middle)
        return {
            "spec": self.spec,
            "variant": self.variant,
            "dtype": self.dtype,
            "mode": self.mode,
            "batch": self.images.shape[0],
            "height": self.images.shape[2],
            "width": self.images.shape[3],
            "median_s": middle,
            "spread_s": high - low,
            "macs": self.macs,
            "peak_fraction": self.step_macs / middle / peak,
            "peak_memory_bytes": self.memory,
            "ratio_to_first": middle / median(first.taken),
        }


def build_case(name: str, mode: str, settings: dict[str, str], args: argparse.Namespace) -> Case:
    """Build one case; settings are those of `VARIATIONS`.

    Raises:
        SpecError: There is no such model, or it merges nothing and `merge` is set.
    """
    chosen = {
        "kernel": "auto",
        "dtype": "fp32",
        "compile": "off",
        "graph": "off",
        "streams": "off",
        "checkpointing": "off",
        "batch": str(args.batch),
        "scale": "1",
        **settings,
    }
    row = row_of(name)
    kind = TABLES[row.table].model
    options: dict[str, Any] = dict(row.options)
    if "merge" in chosen:
        if kind != "dense":
            raise SpecError(f"--vary merge is for dense backbones, and {name} is a {kind}: leave one of the two out")
        options["merge"] = chosen["merge"]
    side = resolve_spec(row.spec).input_resolution or max(b.resolution for b in resolve_spec(row.spec).branches)
    size = tuple(round(s * float(chosen["scale"])) for s in args.size or (side, side))
    device, dtype = torch.device(args.device), DTYPES[chosen["dtype"]]
    model = MODELS[kind](row.spec, kernel=chosen["kernel"], **options).to(device, dtype)
    model.pyramid.set_grad_checkpointing(chosen["checkpointing"] == "on")
    model.pyramid.parallel_streams = chosen["streams"] == "on"
    model.train(mode == "train")
    images = torch.randn(int(chosen["batch"]), 3, *size, device=device, dtype=dtype)
    call: Callable[..., Any] = model
    if chosen["compile"] != "off":
        call = torch.compile(model, backend="inductor" if chosen["compile"] == "on" else chosen["compile"])
    if chosen["graph"] == "on":
        call = CudaGraph(call, images)
    step = _train_step(call, model, images) if mode == "train" else _forward(call, images)
    macs = as_run(row.spec, size, model=kind, **options)["total"].macs
    return Case(name, settings, chosen["dtype"], mode, images, step, model, macs)


def _forward(call: Callable[..., Any], images: Tensor) -> Callable[[], Any]:
    def step() -> Any:
        with torch.inference_mode():
            return call(images)

    return step


def _train_step(call: Callable[..., Any], model: nn.Module, images: Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        out = call(images)
        sum(level.float().sum() for level in (out if isinstance(out, list) else [out])).backward()

    return step


def measure_memory(case: Case) -> int:
    """Return the peak of one step in bytes: allocated on CUDA, live tensors elsewhere. Other cases do not count."""
    case.model.zero_grad(set_to_none=True)
    held = [case.images, *case.model.parameters(), *case.model.buffers()]
    if case.images.is_cuda:
        device = case.images.device
        # Everything of every case, and the matrices of the peak, is allocated by now: what counts is the growth.
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        case.step()
        return torch.cuda.max_memory_allocated(device) - before + PeakMemory(held).live
    with PeakMemory(held) as memory:
        case.step()
    return memory.peak


def measure(cases: Sequence[Case], args: argparse.Namespace) -> dict[str, MatmulPeak]:
    """Fill in what was measured; return the matrix-multiply peak of every type."""
    device = torch.device(args.device)
    peaks = {
        dtype: MatmulPeak(DTYPES[dtype], device, clock=args.clock)
        for dtype in dict.fromkeys(case.dtype for case in cases)
    }
    for case in cases:
        for _ in range(args.warmup):
            case.step()
    gc.disable()  # a collection would hit one case
    for number in range(args.repeat):
        for case in cases:
            case.taken.append(seconds(case.step, device, args.clock))
            peaks[case.dtype].measure()
        gc.collect()
        print(f"round {number + 1} of {args.repeat}", file=sys.stderr, flush=True)
    gc.enable()
    for case in cases:
        # Neither hooks nor counters see into compiled code, and a graph's memory was taken when it was captured.
        if all(case.settings.get(key, "off") == "off" for key in ("compile", "graph")):
            case.memory = measure_memory(case)
        case.model.zero_grad(set_to_none=True)
        if args.parts:
            with timed_parts(case.model, parts_of(case.model), args.clock) as case.parts, torch.inference_mode():
                case.model(case.images)
    return peaks


def print_table(records: Sequence[dict[str, Any]], peaks: dict[str, MatmulPeak]) -> None:
    """Print the figures for a person."""
    for dtype, peak in peaks.items():
        print(f"matrix-multiply peak, {dtype}: {peak.rate / 1e9:.1f} G multiply-adds per second")
    names = [f"{r['spec'].rpartition('/')[2]} {'' if r['variant'] == 'default' else r['variant']}" for r in records]
    width = max(map(len, names))
    print(
        f"{'':{width}} {'mode':>8} {'images':>14} {'median':>9} {'spread':>8} {'images/s':>9} {'MACs':>9} "
        f"{'of peak':>8} {'memory':>9} {'ratio':>7}"
    )
    for name, r in zip(names, records, strict=True):
        shape = f"{r['batch']} x {r['height']}x{r['width']}"
        memory = f"{r['peak_memory_bytes'] / 2**30:.2f} GiB" if r["peak_memory_bytes"] else "-"
        print(
            f"{name:{width}} {r['mode']:>8} {shape:>14} {r['median_s']:>8.3f}s {r['spread_s']:>7.3f}s "
            f"{r['batch'] / r['median_s']:>9.3f} {r['macs'] / 1e9:>8.1f}G {r['peak_fraction']:>8.1%} {memory:>9} "
            f"{r['ratio_to_first']:>7.3f}"
        )


def print_parts(cases: Iterable[Case]) -> None:
    """Print where a forward pass spends its time: the parts, then the kinds of work inside them."""
    for case in cases:
        print(f"\n{case.spec} {case.variant} ({case.mode}): seconds of one forward pass, timed call by call")
        inside = [name for name in case.parts if name not in parts_of(case.model)]
        for name in parts_of(case.model):
            print(f"    {name:20} {case.parts.get(name, 0):>8.3f}")
        for name in sorted(inside):
            print(f"    of it {name:14} {case.parts[name]:>8.3f}")


def draw(records: Sequence[dict[str, Any]], peaks: dict[str, MatmulPeak], path: Path) -> None:
    """Draw time against multiply-adds, one point per record, the peak as a line per type."""
    from matplotlib.figure import Figure  # of use only where a picture is asked for

    figure = Figure(figsize=(7, 4.5), dpi=110)
    axes = figure.add_subplot()
    factors = [r["batch"] * (3 if r["mode"] == "train" else 1) for r in records]
    macs = [r["macs"] * factor / 1e9 for r, factor in zip(records, factors, strict=True)]
    limit = max(macs) * 1.3  # room for the last label
    for dtype, peak in peaks.items():
        axes.plot([0, limit], [0, limit * 1e9 / peak.rate], "--", linewidth=1, label=f"matrix-multiply peak, {dtype}")
    for x, record in zip(macs, records, strict=True):
        label = record["spec"].rpartition("/")[2]
        text = label if record["variant"] == "default" else f"{label} {record['variant']}"
        axes.plot(x, record["median_s"], "o")
        axes.annotate(text, (x, record["median_s"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="multiply-adds that run, 1e9", ylabel="median seconds", xlim=(0, limit), ylim=(0, None))
    axes.legend(loc="upper left", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def parse_variations(texts: Sequence[str]) -> list[dict[str, str]]:
    """Turn `key=a,b` into one mapping per combination.

    Raises:
        ValueError: Unknown key or value.
    """
    choices: dict[str, list[str]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        if key not in VARIATIONS:
            raise ValueError(unknown("variation", key, VARIATIONS))
        known = VARIATIONS[key]
        choices[key] = [value for value in values.split(",") if value]
        if not choices[key]:
            raise ValueError(f"--vary {text}: give {key} values, such as {key}=a,b")
        for value in choices[key]:
            if isinstance(known, tuple):
                if value not in known:
                    raise ValueError(unknown(f"value of {key}", value, known))
            elif not value.replace(".", "", 1).isdigit() or known(value) <= 0:
                raise ValueError(f"--vary {key}={value}: give a positive number")
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.Parser("benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", nargs="+", metavar="SPEC", help="a spec of the zoo, or name or path of a config")
    parser.add_argument("--mode", nargs="+", choices=("forward", "train"), default=["forward"])
    parser.add_argument("--vary", nargs="+", default=[], metavar="KEY=A,B", help=f"keys: {', '.join(VARIATIONS)}")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: the spec's, square")
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--warmup", type=int, default=1, help="runs before the first round")
    parser.add_argument("--threads", type=int, help="threads of CPU operators")
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu: what the process computes, all threads together; with --threads 1 for a machine that others use too",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--parts", action="store_true", help="time the parts of a forward pass as well")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="time against multiply-adds, as PNG, SVG or PDF")
    args = parser.parse_args(arguments)
    try:
        args.variations = parse_variations(args.vary)
    except ValueError as error:
        parser.error(str(error))
    if min(args.batch, args.repeat, *(args.size or (1,))) < 1 or args.warmup < 0:
        parser.error("--batch, --repeat and --size are at least 1, --warmup at least 0")
    try:
        torch.device(args.device)
    except RuntimeError as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no CUDA device")
    if torch.device(args.device).type == "cuda" and args.clock == "cpu":
        parser.error("--clock cpu does not see what a CUDA device does")
    if "train" in args.mode and any(v.get("graph") == "on" for v in args.variations):
        parser.error("--vary graph=on captures inference only: leave it out, or give --mode forward")
    needs_cuda = [key for key in ("graph", "streams") if any(v.get(key) == "on" for v in args.variations)]
    if needs_cuda and torch.device(args.device).type != "cuda":
        parser.error(f"--vary {needs_cuda[0]}=on needs --device cuda")
    if args.picture and args.picture.suffix.lower() not in PICTURES:
        parser.error(f"--picture {args.picture}: give a file ending in {', '.join(PICTURES)}")
    if args.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install matplotlib")
    for option in ("csv", "json", "picture"):
        prepare(parser, option, getattr(args, option))
    return args


def prepare(parser: argparse.ArgumentParser, option: str, path: Path | None) -> None:
    """Make the folder of a file that a run is to write, so that a path of no use is refused before the run."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--{option} {path}: its folder cannot be made ({error.strerror}): give another path")
    if path.is_dir():
        parser.error(f"--{option} {path} is a folder: give the path of a file")
    if not os.access(path.parent, os.W_OK):
        parser.error(f"--{option} {path}: its folder is read-only: give another path")


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(text)
    os.replace(draft, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        cases = [
            build_case(name, mode, settings, args)
            for mode, name, settings in product(args.mode, args.spec, args.variations)
        ]
    except (SpecError, ValueError) as error:
        print(f"benchmark.py: error: {error}", file=sys.stderr)
        return 2
    peaks = measure(cases, args)
    # A ratio compares like with like: each mode with its own first case.
    firsts = {case.mode: case for case in reversed(cases)}
    records = [case.record(firsts[case.mode], peaks[case.dtype].rate) for case in cases]
    print_table(records, peaks)
    if args.parts:
        print_parts(cases)
    if args.json:
        write(args.json, json.dumps(records, indent=2) + "\n")
    if args.csv:
        lines = [FIELDS, *([record[name] for name in FIELDS] for record in records)]
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows(lines)
    if args.picture:
        draw(records, peaks, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())

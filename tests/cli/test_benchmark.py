"""tools/benchmark.py on small models, and what it measures with."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from piip import DensePyramid
from piip.budget import as_run, parts_of
from piip.measure import MatmulPeak, PeakMemory, timed_parts
from piip.zoo.specs import SPECS, resolve_spec

ROOT = Path(__file__).resolve().parents[2]
FIELDS = [
    *("spec", "variant", "dtype", "mode", "batch", "height", "width", "median_s", "spread_s", "macs"),
    *("peak_fraction", "peak_memory_bytes", "ratio_to_first"),
]
SHAPE = {"depth": 2, "num_heads": 2, "patch_size": 8, "pos_grid": (4, 4)}
TINY = resolve_spec(
    {
        "branches": [
            {"arch": "vit", "resolution": 32, "options": {"embed_dim": 32, "window": 2, **SHAPE}},
            {"arch": "vit", "resolution": 64, "options": {"embed_dim": 16, **SHAPE}},
        ],
        "interactions": 1,
        "heads": 2,
    }
)


@pytest.fixture
def benchmark(monkeypatch):
    """The tool as a module, with two small models known by name."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setitem(SPECS, "tiny", TINY)
    monkeypatch.setitem(SPECS, "tiny-96", resolve_spec({"base": TINY, "resolutions": (48, 96)}))
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "tools" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "MatmulPeak", lambda *what, **how: MatmulPeak(*what, side=64, **how))
    return module


def test_models_and_variants_take_turns_and_are_written_down(benchmark, tmp_path, capsys, monkeypatch):
    order = []
    measured = benchmark.seconds
    monkeypatch.setattr(benchmark, "seconds", lambda step, *how: order.append(step) or measured(step, *how))
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")}
    arguments = ["tiny", "tiny-96", "--mode", "forward", "train", "--vary", "dtype=fp32,bf16", "batch=1,2"]
    arguments += ["--repeat", "3", "--parts", "--json", files["json"], "--csv", files["csv"], "--picture", files["png"]]
    assert benchmark.main([str(a) for a in arguments]) == 0
    assert len(order) == 3 * 16
    assert order[:16] == order[16:32] == order[32:]  # round by round, not case by case
    assert len(set(order)) == 16

    records = json.loads(files["json"].read_text())
    assert [list(record) for record in records] == [FIELDS] * 16
    seen = [(r["mode"], r["spec"], r["variant"], r["dtype"], r["batch"]) for r in records]
    assert seen[:5] == [
        ("forward", "tiny", "dtype=fp32 batch=1", "fp32", 1),
        ("forward", "tiny", "dtype=fp32 batch=2", "fp32", 2),
        ("forward", "tiny", "dtype=bf16 batch=1", "bf16", 1),
        ("forward", "tiny", "dtype=bf16 batch=2", "bf16", 2),
        ("forward", "tiny-96", "dtype=fp32 batch=1", "fp32", 1),
    ]
    assert [r["mode"] for r in records] == ["forward"] * 8 + ["train"] * 8
    for r in records:
        assert r["height"] == r["width"] == (96 if "96" in r["spec"] else 64)
        assert r["macs"] == as_run(SPECS[r["spec"]])["total"].macs
        assert r["median_s"] > 0
        assert r["spread_s"] >= 0
        first = records[0] if r["mode"] == "forward" else records[8]
        assert r["ratio_to_first"] == pytest.approx(r["median_s"] / first["median_s"])
    # What a share of the peak means: useful multiply-adds of the whole step by time, against the peak of the type.
    for a, b in ((records[0], records[9]), (records[1], records[0])):
        work = [r["macs"] * r["batch"] * (3 if r["mode"] == "train" else 1) / r["median_s"] for r in (a, b)]
        assert a["peak_fraction"] / b["peak_fraction"] == pytest.approx(work[0] / work[1])
    memory = {(r["mode"], r["spec"], r["dtype"], r["batch"]): r["peak_memory_bytes"] for r in records}
    assert memory["train", "tiny", "fp32", 1] > memory["forward", "tiny", "fp32", 1]
    assert memory["train", "tiny", "fp32", 2] > memory["train", "tiny", "bf16", 2]

    with files["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [FIELDS] * 16
    assert [float(row["median_s"]) for row in rows] == [r["median_s"] for r in records]
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "matrix-multiply peak, bf16" in out
    for part in ("branch1", "branch2", "interactions", "merging", "fpn", "sampling", "norms", "self-attention"):
        assert part in out


def test_a_config_by_its_path(benchmark, tmp_path):
    pytest.importorskip("mmengine", reason="needs the detection extra")
    config = ROOT / "mmdetection/configs/piip/mini/mask_rcnn_mini_convnext-tsb_192_144_96_regular-fpn.py"
    out = tmp_path / "out.json"
    arguments = [str(config), "--size", "96", "128", "--repeat", "1", "--warmup", "0", "--json", str(out)]
    assert benchmark.main([*arguments, "--vary", "merge=one_convolution,separable"]) == 0
    light = json.loads(out.read_text())
    assert [(r["height"], r["width"]) for r in light] == [(96, 128)] * 2
    assert light[1]["macs"] < light[0]["macs"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tiny", "--vary", "kernels=torch"], "unknown variation 'kernels' (did you mean kernel?)"),
        (["tiny", "--vary", "dtype=fp32,fp8"], "unknown value of dtype 'fp8'"),
        (["tiny", "--vary", "batch=0"], "--vary batch=0: give a positive number"),
        (["tiny", "--vary", "dtype"], "--vary dtype: give dtype values"),
        (["tiny", "--vary", "graph=on"], "--vary graph=on needs --device cuda"),
        (["tiny", "--mode", "train", "--vary", "graph=off,on"], "--vary graph=on captures inference only"),
        (["cls-deit1-tsb-368-192-128", "--vary", "merge=linear"], "--vary merge is for dense backbones, and cls-deit1"),
        (["clip-l-336", "--vary", "merge=linear"], "and clip-l-336 is a tower: leave one of the two out"),
        (["tiny", "--picture", "out.jpeg2"], "--picture out.jpeg2: give a file ending in .png, .svg, .pdf"),
        (["tiny", "--csv", "{file}/out.csv"], "its folder cannot be made"),
        (["tiny", "--json", "{folder}"], "is a folder: give the path of a file"),
        (["tiny", "--repeat", "0"], "at least 1"),
        (["tiny", "--device", "tpu"], "--device tpu"),
        (["tinny"], "unknown row 'tinny'"),
    ],
)
def test_what_it_refuses_in_one_line(benchmark, capsys, tmp_path, arguments, says):
    (tmp_path / "file").touch()
    try:
        code = benchmark.main([a.format(folder=tmp_path, file=tmp_path / "file") for a in arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_picture_without_matplotlib_is_refused_at_the_start(benchmark, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        benchmark.main(["tiny", "--picture", str(tmp_path / "out.png")])
    assert "--picture needs matplotlib: pip install matplotlib" in capsys.readouterr().err


def test_folders_of_the_output_are_made(benchmark, tmp_path):
    files = [tmp_path / "missing" / kind / f"out.{kind}" for kind in ("csv", "json", "svg")]
    options = [
        text for name, file in zip(("csv", "json", "picture"), files, strict=True) for text in (f"--{name}", file)
    ]
    assert benchmark.main(["tiny", "--repeat", "1", "--warmup", "0", *map(str, options)]) == 0
    assert all(file.stat().st_size for file in files)


class OnCuda(torch.Tensor):
    """Says that it is on a CUDA device."""

    is_cuda = True


def test_memory_on_cuda_is_that_of_the_case_alone(benchmark, monkeypatch):
    """An allocator that holds other cases' 1 MB, and had a peak before; the step takes 3000 bytes for a while."""
    state = {"now": 1_000_000, "peak": 9_000_000}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: state.update(peak=state["now"]))
    images = torch.zeros(1, 3, 4, 4).as_subclass(OnCuda)
    model = torch.nn.Linear(10, 10, bias=False)
    step = lambda: state.update(peak=max(state["peak"], state["now"] + 3000))  # noqa: E731
    case = benchmark.Case("tiny", {}, "fp32", "forward", images, step, model, 1)
    assert benchmark.measure_memory(case) == 3000 + 4 * (3 * 4 * 4 + 10 * 10)


def test_memory_of_live_tensors():
    held = torch.zeros(100)
    with PeakMemory([held]) as memory:
        a = torch.zeros(1000)
        b = a.view(10, 100)[0]  # the same memory
        del a
        c = b + 1
        del b
        d = torch.zeros(500)
        assert memory.live == 4 * (100 + 100 + 500)
        del c, d
    assert memory.live == 400
    assert memory.peak == 4 * (100 + 1000 + 100)


def test_memory_on_fake_tensors_is_that_of_real_ones():
    def peak(checkpointing: bool) -> int:
        model = DensePyramid(TINY, grad_checkpointing=checkpointing)
        images = torch.randn(2, 3, 64, 64)
        with PeakMemory([images, *model.parameters(), *model.buffers()]) as memory:
            sum(level.sum() for level in model(images)).backward()
        return memory.peak

    real = [peak(False), peak(True)]
    with FakeTensorMode():
        fake = [peak(False), peak(True)]
    assert fake == pytest.approx(real, rel=0.02)
    assert real[1] < real[0]


def test_timing_parts_leaves_the_model_as_it_was():
    model = DensePyramid(TINY).eval()
    own = {name: set(vars(module)) for name, module in model.named_modules()}
    kernel = model.pyramid.stages[0].units[0].to_low.attn.sample
    with timed_parts(model, parts_of(model)) as spent, torch.inference_mode():
        model(torch.randn(1, 3, 64, 64))
    kinds = {"self-attention", "cross-attention", "norms", "sampling"}
    assert set(spent) == {"branch1", "branch2", "interactions", "merging", "fpn"} | kinds
    assert all(value > 0 for value in spent.values())
    assert spent["sampling"] < spent["cross-attention"] < spent["interactions"]
    assert {name: set(vars(module)) for name, module in model.named_modules()} == own
    assert model.pyramid.stages[0].units[0].to_low.attn.sample is kernel


def test_the_peak_is_the_best_rate_seen(monkeypatch):
    taken = iter([2.0, 1.0, 4.0])
    monkeypatch.setattr("piip.measure.seconds", lambda *what: next(taken))
    peak = MatmulPeak(torch.float32, torch.device("cpu"), side=10)
    assert peak.rate == 500
    assert [peak.measure(), peak.measure()] == [1000, 1000]

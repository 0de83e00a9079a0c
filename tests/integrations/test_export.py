"""Exported programs compute what the model does: torch.export, ONNX, and whole graphs for torch.compile."""

import importlib.util
import resource
from pathlib import Path

import pytest
import torch

from piip import Classifier, DensePyramid
from piip.errors import ExportError, SpecError
from piip.integrations.export import (
    export_onnx,
    export_program,
    largest_difference,
    run_onnx,
    run_program,
    save_program,
)
from piip.integrations.hub import save_pretrained

pytestmark = pytest.mark.slow  # tracing takes seconds however small the model

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "pos_grid": (4, 4)}
TOKEN = {**SMALL, "class_token": True, "pos_prefix": 1}
CONVNEXT = {"depths": (1, 1, 1, 1), "widths": (32, 32, 64, 64)}


def build(kind: str):
    options = TOKEN if kind == "classifier" else SMALL
    window = {} if kind == "classifier" else {"window": 3}
    low = {"arch": "vit", "resolution": 48, "options": options, **window}
    high = {"arch": "convnext", "resolution": 64, "options": CONVNEXT}
    if kind == "classifier":
        high = {**low, "resolution": 64}
    spec = {"branches": [low, high], "interactions": 2, "heads": 4}
    model = DensePyramid(spec) if kind == "backbone" else Classifier(spec, num_classes=5, head="branches")
    with torch.no_grad():
        for parameter in model.parameters():  # gates open, so that the interactions count
            parameter.add_(torch.randn_like(parameter) / 10)
    return model.eval()


@pytest.mark.parametrize("kind", ["backbone", "classifier"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_export(kind, dynamic, tmp_path):
    model = build(kind)
    program = export_program(model, torch.randn(2, 3, 64, 64), dynamic=dynamic)
    torch.export.save(program, tmp_path / "model.pt2")
    run = run_program(torch.export.load(tmp_path / "model.pt2"))
    assert largest_difference(model, run, torch.randn(2 + dynamic, 3, 64, 64)) < 1e-6


@pytest.mark.parametrize("kind", ["backbone", "classifier"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx(kind, dynamic, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the export extra")
    model = build(kind)
    file = export_onnx(model, torch.randn(2, 3, 64, 64), tmp_path / "deep" / "model.onnx", dynamic=dynamic)
    assert largest_difference(model, run_onnx(file), torch.randn(2 + dynamic, 3, 64, 64)) < 1e-5
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("kind", ["backbone", "classifier"])
def test_the_whole_model_is_one_graph(kind):
    """Compiled without a break; the numbers and the gradients stay."""
    torch.compiler.reset()
    model = build(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 64, 64)

    def run(network):
        model.zero_grad()
        outputs = network(images)
        outputs = [outputs] if torch.is_tensor(outputs) else outputs
        sum(out.square().mean() for out in outputs).backward()
        return [out.detach() for out in outputs], [p.grad for p in model.parameters() if p.grad is not None]

    (outputs, gradients), (eager, expected) = run(compiled), run(model)
    torch.testing.assert_close(outputs, eager, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


def test_what_cannot_be_exported():
    model = build("backbone")
    with pytest.raises(ExportError, match="an open batch is exported with two or more images"):
        export_program(model, torch.randn(1, 3, 64, 64), dynamic=True)
    with pytest.raises(ExportError, match="images of 16 x 64 pixels do not fit: branch 1 gets an image of 12 x 48"):
        export_program(model, torch.randn(1, 3, 16, 64))
    with pytest.raises(ExportError, match=r"outputs are .*, the model's"):
        largest_difference(model, lambda images: [images], torch.randn(1, 3, 64, 64))


def test_weights_above_the_limit_lie_beside_the_onnx_file(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs the export extra")
    monkeypatch.setattr("piip.integrations.export.EXTERNAL", 1000)
    model, images = build("classifier"), torch.randn(2, 3, 64, 64)
    (tmp_path / "model.onnx.part").mkdir()  # of an export that was killed
    for _ in range(2):  # the second replaces the first
        file = export_onnx(model, images, tmp_path / "model.onnx")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).rename(moved / name)
    assert largest_difference(model, run_onnx(moved / file.name), images) < 1e-5


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_a_full_disk_leaves_nothing_behind(suffix, tmp_path):
    """A limit on the size of files in place of a full disk: torch's own file would end the process."""
    if suffix == "onnx":
        pytest.importorskip("onnxruntime", reason="needs the export extra")
    model, images = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 1024)), torch.randn(2, 3, 16, 16)
    program = export_program(model, images)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(ExportError, match=rf"^cannot write .*model\.{suffix}: .*File too large$"):
            if suffix == "pt2":
                save_program(program, tmp_path / "model.pt2")
            else:
                export_onnx(model, images, tmp_path / "model.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location(
        "export_tool", Path(__file__).resolve().parents[2] / "tools" / "export.py"
    )
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_what_the_tool_refuses(tool, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path), "--out", "model.onnx", "--checkpoint", "a.pth"])
    assert f"--checkpoint goes with a row, config or spec: the directory {tmp_path} has" in capsys.readouterr().err
    with pytest.raises(SpecError, match="clip-l-336 is a vision tower of LLaVA"):
        tool.main(["clip-l-336", "--out", "model.onnx"])


def test_the_tool_prints_the_difference(tool, tmp_path, capsys):
    save_pretrained(build("classifier"), tmp_path / "model")
    tool.main([str(tmp_path / "model"), "--out", str(tmp_path / "out.pt2"), "--dynamic"])
    assert "input any x 3 x 64 x 64; largest relative difference" in capsys.readouterr().out
    assert (tmp_path / "out.pt2").is_file()
    with pytest.raises(SystemExit):
        tool.main(["x", "--out", "model.bin"])
    assert "--out is NAME.onnx or NAME.pt2, got model.bin" in capsys.readouterr().err

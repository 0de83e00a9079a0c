"""tools/memory.py: what it computes is what a real training step holds."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from piip import DensePyramid
from piip.measure import PeakMemory
from piip.zoo.specs import SPECS, resolve_spec

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "pos_grid": (4, 4)}
TINY = resolve_spec({"branches": [{"arch": "vit", "resolution": 64, "options": SHAPE}]})


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setitem(SPECS, "tiny", TINY)
    spec = importlib.util.spec_from_file_location("memory", ROOT / "tools" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def real_peak(batch: int, checkpointing: bool) -> int:
    model = DensePyramid(TINY, grad_checkpointing=checkpointing)
    images = torch.randn(batch, 3, 64, 64)
    with PeakMemory([images, *model.parameters(), *model.buffers()]) as memory:
        out = model(images)  # heads need the maps in their backward pass: they live through the backbone's
        sum(level.sum() for level in out).backward()
    return memory.peak


def test_images_that_fit(memory, tmp_path, capsys):
    out = tmp_path / "out.json"
    sizes = ["0.0005", "0.01"]
    assert memory.main(["tiny", "--dtype", "fp32", "--reserve", "0", "--gigabytes", *sizes, "--json", str(out)]) == 0
    (found,) = json.loads(out.read_text())
    parameters = sum(p.numel() for p in DensePyramid(TINY).parameters())
    for key, checkpointing in (("plain", False), ("checkpointing", True)):
        one, two = (real_peak(batch, checkpointing) for batch in (1, 2))
        need = found[key]
        assert need["image_bytes"] == pytest.approx(two - one, rel=0.01)
        # Weights and their gradients, and AdamW's two moments.
        assert need["fixed_bytes"] == pytest.approx(one - (two - one) + 8 * parameters, rel=0.01)
        fits = int((0.01e9 - need["fixed_bytes"]) // need["image_bytes"])
        assert list(need["images"].values()) == [0, fits]
        assert fits > 0
    assert found["checkpointing"]["image_bytes"] < found["plain"]["image_bytes"]
    assert torch.get_default_dtype() == torch.float32
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_what_it_refuses(memory, capsys):
    assert memory.main(["tinny"]) == 2
    assert "unknown row 'tinny'" in capsys.readouterr().err

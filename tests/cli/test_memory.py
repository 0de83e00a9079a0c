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
    """The real peaks of the largest batch that fits, and of one image more, lie on either side of the limit."""
    out = tmp_path / "made" / "out.json"
    sizes = ["0.0005", "0.005", "0.02"]
    assert memory.main(["tiny", "--dtype", "fp32", "--reserve", "0.5", "--gigabytes", *sizes, "--json", str(out)]) == 0
    (found,) = json.loads(out.read_text())
    model = DensePyramid(TINY)
    parameters = sum(p.numel() for p in model.parameters())
    for key, checkpointing in (("plain", False), ("checkpointing", True)):
        need = found[key]
        none, *fits = need["images"].values()
        assert none == 0
        for size, batch in zip(sizes[1:], fits, strict=True):
            assert batch > 2
            # AdamW's two moments are held beside what a step holds.
            below, above = (real_peak(number, checkpointing) + 8 * parameters for number in (batch, batch + 1))
            assert below <= float(size) * 1e9 / 2 < above
        assert need["fixed_bytes"] == 12 * parameters + sum(b.nbytes for b in model.buffers())
        assert need["image_bytes"] == pytest.approx(above - below, rel=0.01)
    assert found["checkpointing"]["image_bytes"] < found["plain"]["image_bytes"]
    assert torch.get_default_dtype() == torch.float32
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_batches_are_found_where_the_peak_bends(memory):
    """With few images the peak lies elsewhere than with many, so that no line through the first two tells the rest."""
    asked = []

    def peak(batch: int) -> int:
        asked.append(batch)
        return max(1000 + 10 * batch, 700 + 25 * batch, 100 + 40 * batch)

    known = {batch: peak(batch) for batch in (1, 2)}
    for limit in (5000, 1100, 1301, 1000, 100_099):
        wanted = max((batch for batch in range(1, 3000) if peak(batch) <= limit), default=0)
        asked.clear()
        assert memory.largest_batch(peak, limit, known) == wanted
        assert len(asked) < 9


def test_what_it_refuses(memory, capsys):
    assert memory.main(["tinny"]) == 2
    assert "unknown row 'tinny'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--size", "-5", "5"], "--size is a height and a width in pixels, got -5 5"),
        (["--gigabytes", "0"], "--gigabytes are positive numbers"),
        (["--reserve", "1"], "--reserve is a share from 0 to below 1"),
        (["--json", "{}/file/out.json"], "its folder cannot be made (File exists): give another path"),
    ],
)
def test_options_it_refuses_at_the_start(memory, capsys, tmp_path, arguments, says):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        memory.main(["tiny", *(text.format(tmp_path) for text in arguments)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line

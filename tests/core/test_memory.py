"""Large models are built without memory and filled from their file: the weights are in memory once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from piip.checkpoint import read_file
from piip.models import DensePyramid, create_model

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "mmdetection" / "configs" / "piip" / "mini" / "mask_rcnn_mini_vit-tsb_192_144_96.py"

SPEC = """
def spec(dim, depth):
    vit = dict(arch="vit", resolution=64, options=dict(embed_dim=dim, depth=depth, num_heads=8, pos_grid=(4, 4)))
    return dict(branches=[vit, {**vit, "resolution": 128, "options": {**vit["options"], "embed_dim": 64}}],
                interactions=2, heads=4)
"""
WRITE = (
    SPEC
    + """
import sys, torch
from safetensors.torch import save_file
from piip.models import DensePyramid
path = sys.argv[1]
torch.manual_seed(0)
state = DensePyramid(spec(1024, 20), scales=(2, 1, 0.5)).state_dict()
save_file(state, path) if path.endswith("safetensors") else torch.save({"state_dict": state}, path)
"""
)
# The peak of the process before and after, in bytes; every weight is read, as a forward pass does.
LOAD = (
    SPEC
    + """
import resource, sys, torch
from piip.models import create_model
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
create_model(spec(64, 2))
before = peak()
model = create_model(spec(1024, 20), scales=(2, 1, 0.5), checkpoint=sys.argv[1])
total = sum(float(p.detach().double().sum()) for p in model.parameters())
assert not any(t.is_meta for t in model.state_dict().values())
print(peak() - before)
"""
)
DETECT = (
    SPEC
    + f"""
import resource, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from piip.integrations import mmcv_ops
mmcv_ops.install()
from piip.integrations.inference import load_detector
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def config(dim, depth):
    options = {{"model.backbone.spec": spec(dim, depth), "model.neck.in_channels": [dim] * 3}}
    cfg = Config.fromfile({str(MINI)!r})
    cfg.merge_from_dict(options)
    cfg.model.backbone.spec = spec(dim, depth)
    return cfg
cfg = config(1024, 20)
cfg.dump(sys.argv[1] + ".py")
if sys.argv[2] == "write":
    init_default_scope("mmdet")
    torch.save({{"state_dict": MODELS.build(cfg.model).state_dict()}}, sys.argv[1])
else:
    before = peak()
    model = load_detector(sys.argv[1] + ".py", sys.argv[1], device="cpu").model
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    print(peak() - before)
"""
)


def child(code: str, *arguments: str | Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pth", "safetensors", "detector"])
def test_a_large_file_is_in_memory_once(tmp_path, kind):
    path = tmp_path / f"large.{'pth' if kind == 'detector' else kind}"
    if kind == "detector":
        pytest.importorskip("mmdet")
        child(DETECT, path, "write")
        growth = float(child(DETECT, path, "load").split()[-1])
    else:
        child(WRITE, path)
        growth = float(child(LOAD, path))
    size = path.stat().st_size
    path.unlink()
    print(f"{kind}: {size / 1e9:.2f} GB, peak growth {growth / size:.2f} times that")
    assert size > 0.9e9
    assert growth < 1.3 * size


def tiny() -> dict:
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "pos_grid": (4, 4)}
    return {"branches": [{"arch": "vit", "resolution": 64, "options": options}], "interactions": 0}


def test_weights_from_a_file_can_be_trained_and_leave_it_alone(tmp_path):
    source = DensePyramid(tiny())
    for path, write in ((tmp_path / "a.pth", torch.save), (tmp_path / "a.safetensors", save_file)):
        write(source.state_dict(), path)
        content = path.read_bytes()
        model = create_model(tiny(), checkpoint=path)
        sum(maps.sum() for maps in model(torch.randn(1, 3, 64, 64))).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.requires_grad and parameter.grad is not None
                parameter.add_(1.0)
        assert path.read_bytes() == content


def test_half_precision_files_fill_a_float32_model(tmp_path):
    source = DensePyramid(tiny())
    torch.save({name: tensor.half() for name, tensor in source.state_dict().items()}, tmp_path / "half.pth")
    model = create_model(tiny(), checkpoint=tmp_path / "half.pth")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, source.get_parameter(name).half().float())


def test_buffers_that_no_file_holds_are_computed(tmp_path):
    """timm's rotary positions (DINOv3) are such buffers: on the meta device, they have no values."""
    spec = {"branches": [{"arch": "vit_small_patch16_dinov3", "resolution": 32}], "interactions": 0}
    source = DensePyramid(spec).eval()
    torch.save(source.state_dict(), tmp_path / "dinov3.pth")
    model = create_model(spec, checkpoint=tmp_path / "dinov3.pth").eval()
    images = torch.randn(1, 3, 32, 48)
    for one, other in zip(source(images), model(images), strict=True):
        assert torch.equal(one, other)


def test_a_legacy_file_says_that_it_cannot_be_mapped(tmp_path):
    torch.save({"weight": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.warns(UserWarning, match=r"old.pth is in torch's legacy format and cannot be memory-mapped"):
        assert torch.equal(read_file(tmp_path / "old.pth")["weight"], torch.ones(3))

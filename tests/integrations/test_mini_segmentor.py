"""The mini segmentors of `mmsegmentation/configs/piip/mini` through the command line, on mini data."""

import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensors import relative_difference

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "mmsegmentation" / "tools"
MINI = ROOT / "mmsegmentation" / "configs" / "piip" / "mini"
VIT = MINI / "upernet_mini_vit-tsb_192_144_96.py"
CONVNEXT = MINI / "upernet_mini_convnext-tsb_192_144_96.py"
MASK2FORMER = MINI / "mask2former_mini_vit-tsb_192_144_96.py"


@pytest.fixture
def config(tmp_path: Path, mini_data: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that writes a config based on a mini one; the mini data is where it looks for it."""
    monkeypatch.setenv("PIIP_DATA", str(mini_data.parent))

    def write(base: Path, text: str) -> Path:
        path = tmp_path / "config.py"
        path.write_text(f"_base_ = [{str(base)!r}]\n{text}\n")
        return path

    return write


RECORDED = """
custom_imports = dict(imports=["piip.integrations.mmseg", "toy_task"], allow_failed_imports=False)
model = dict(backbone=dict(pretrained=None))
custom_hooks = [dict(type="mmengine.RecordLosses", path="losses"), dict(type="mmengine.RecordEnd", path="end")]
train_dataloader = dict(batch_size=2)
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(checkpoint=dict(interval=2))
"""


def test_trains_and_evaluates(config, tool, losses, tmp_path):
    path = config(VIT, RECORDED)
    run = tool(sys.executable, TOOLS / "train.py", path, "--work-dir", "run")
    assert run.returncode == 0, run.stderr
    recorded = losses()
    assert len(recorded) == 4
    names = {"decode.loss_ce", "aux.loss_ce"}
    assert all(names <= line.keys() and float.fromhex(line["loss"]) > 0 for line in recorded.values())
    drawn = ("--eval", "mIoU", "--show-dir", "drawn", "--out", "predictions.pkl")
    run = tool(sys.executable, TOOLS / "test.py", path, "run/iter_4.pth", *drawn)
    assert run.returncode == 0, run.stderr
    assert re.search(r"mIoU: \d", run.stdout) and "|    nine    |" in run.stdout
    assert (tmp_path / "predictions.pkl").exists()
    assert len([*Path(tmp_path, "drawn").rglob("*.png")]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("base", [CONVNEXT, MASK2FORMER], ids=["convnext", "mask2former"])
def test_other_branches_and_other_heads_train(base, config, tool, losses, tmp_path):
    """Losses fall on two images seen again and again, and evaluation works on the result."""
    path = config(base, RECORDED + 'train_dataloader["dataset"] = dict(indices=2)\nparam_scheduler = None\n')
    options = ("train_cfg.max_iters=12", "train_cfg.val_interval=12", "train_dataloader.num_workers=0")
    run = tool(sys.executable, TOOLS / "train.py", path, "--work-dir", "run", "--cfg-options", *options)
    assert run.returncode == 0, run.stderr
    total = [float.fromhex(line["loss"]) for line in losses().values()]
    assert len(total) == 12 and np.isfinite(total).all()
    assert np.mean(total[-3:]) < 0.9 * np.mean(total[:3])
    assert re.search(r"Iter\(val\).*mIoU: \d", run.stdout)
    if base is MASK2FORMER:
        assert {"decode.loss_cls", "decode.loss_mask", "decode.loss_dice", "decode.d1.loss_mask"} <= losses()[0].keys()


def test_resumes_exactly_after_sigkill(config, tool, losses, tmp_path):
    """The segmentor, its augmentations in a worker, its batch norm: all of it continues to the last bit."""
    kill = 'custom_hooks = [dict(type="mmengine.RecordLosses", path="losses"), dict(type="mmengine.KillAt")]\n'
    path = config(VIT, RECORDED + kill)
    train = (sys.executable, TOOLS / "train.py", path, "--no-validate")
    whole = tool(*train, "--work-dir", "whole", "--cfg-options", "custom_hooks.0.path=whole")
    assert whole.returncode == 0, whole.stderr
    killed = tool(*train, "--work-dir", "run", "--cfg-options", "custom_hooks.1.iteration=3")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    Path(tmp_path, "losses.0").unlink()
    resumed = tool(*train, "--work-dir", "run", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    expected = losses("whole.0")
    assert losses() == {number: expected[number] for number in (2, 3)}


FIXED = """
custom_imports = dict(imports=["piip.integrations.mmseg", "toy_task"], allow_failed_imports=False)
norm = dict(type="GN", num_groups=8)
# Without class weights, the loss is an average over images.
head = dict(norm_cfg=norm, loss_decode=dict(class_weight=None))
model = dict(backbone=dict(pretrained=None), decode_head=head, auxiliary_head=head)
pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
train_dataloader = dict(sampler=dict(shuffle=False), num_workers=0, dataset=dict(pipeline=pipeline))
optim_wrapper = dict(_delete_=True, type="OptimWrapper", optimizer=dict(type="SGD", lr=0.05))
custom_hooks = [dict(type="mmengine.RecordEnd", path="end"), dict(type="mmengine.RecordFirstGradients", path="first")]
param_scheduler = None
train_cfg = dict(max_iters=20, val_interval=20)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one_with_twice_the_batch(config, tool, tmp_path):
    """First-step gradients to 1e-5, 20 steps of SGD to 1e-4, the whole segmentor with both heads."""
    path = config(VIT, FIXED)
    train = ("--no-validate", "--cfg-options")
    one = tool(
        sys.executable, TOOLS / "train.py", path, "--work-dir", "one", *train, "train_dataloader.batch_size=2",
        "custom_hooks.0.path=one.end", "custom_hooks.1.path=one.gradients",
    )  # fmt: skip
    assert one.returncode == 0, one.stderr
    two = tool(
        "sh", TOOLS / "dist_train.sh", path, "2", "--work-dir", "two", *train, "train_dataloader.batch_size=1",
        "custom_hooks.0.path=two.end", "custom_hooks.1.path=two.gradients",
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    gradients = [torch.load(tmp_path / f"{name}.gradients.0") for name in ("one", "two")]
    assert len(gradients[0]) > 200 and gradients[0].keys() == gradients[1].keys()
    first = relative_difference([*gradients[0].values()], [*gradients[1].values()])
    ends = [torch.load(tmp_path / f"{name}.end.0") for name in ("one", "two")]
    last = relative_difference([*ends[0].values()], [*ends[1].values()])
    print(f"first gradients {first:.1e}, after 20 steps {last:.1e}")
    assert first < 1e-5 and last < 1e-4


@pytest.mark.slow
@pytest.mark.distributed
def test_without_cuda_batch_norm_is_not_synchronised_and_the_log_says_so(config, tool, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("SyncBN works where there is CUDA")
    path = config(VIT, RECORDED)
    run = tool("sh", TOOLS / "dist_train.sh", path, "2", "--no-validate", "--work-dir", "run")
    assert run.returncode == 0, run.stderr
    assert "SyncBN has no CPU kernel: every process normalises its own batch instead" in run.stdout + run.stderr
    ends = [torch.load(tmp_path / f"end.{rank}") for rank in range(2)]
    assert len(ends[0]) > 200
    for name, parameter in ends[0].items():
        assert torch.equal(parameter, ends[1][name]), name


def test_heads_stay_in_float32_beside_a_backbone_in_bfloat16(mini_data, monkeypatch):
    from mmengine.registry import init_default_scope
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    import piip.integrations.mmseg  # noqa: F401
    from piip.integrations.config import read_config
    from piip.integrations.precision import bfloat16_backbone

    cfg = read_config(VIT)
    init_default_scope("mmseg")
    model = MODELS.build(cfg.model)
    seen = {}
    model.backbone.merge.register_forward_hook(lambda *args: seen.update(merge=args[2].dtype))
    model.decode_head.conv_seg.register_forward_hook(lambda *args: seen.update(head=args[2].dtype))
    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.zeros(1, 192, 192, dtype=torch.long)))
    images = torch.rand(2, 3, 192, 192)
    with bfloat16_backbone(model):
        losses = model.loss(images, [sample, sample])
    assert seen == {"merge": torch.bfloat16, "head": torch.float32}
    assert all(value.dtype == torch.float32 for name, value in losses.items() if "loss" in name)


def test_predicted_maps_are_stored_as_the_labels_are(tmp_path):
    """What the demo relies on: files count from 1, as ADE20K's."""
    from mmseg.evaluation import IoUMetric

    import piip.integrations.mmseg  # noqa: F401

    metric = IoUMetric(output_dir=str(tmp_path))
    metric.dataset_meta = {"classes": ("a", "b")}
    labels = torch.tensor([[[0, 1], [1, 0]]])
    metric.process(
        {},
        [
            {
                "pred_sem_seg": {"data": labels},
                "gt_sem_seg": {"data": labels},
                "img_path": "x/y.jpg",
                "reduce_zero_label": True,
            }
        ],
    )
    assert np.asarray(Image.open(tmp_path / "y.png")).tolist() == [[1, 2], [2, 1]]

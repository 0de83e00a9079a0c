"""The stand-in for mmcv's compiled extension: numbers, errors, and who finds it in which process."""

import importlib.util
import math
import os
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from piip.integrations import mmcv_ops

pytest.importorskip("mmcv", reason="needs onedl-mmcv")
mmcv_ops.install()

from mmcv import ops  # noqa: E402
from mmcv.ops import multi_scale_deform_attn as msda  # noqa: E402

ROOT = Path(mmcv_ops.__file__).resolve().parents[2]
REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "ops" / "mmcv_ops.npz"
USERS = ("nms", "roi_align", "multi_scale_deform_attn", "focal_loss")


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    """The stand-in module, whether or not a compiled mmcv is installed here."""
    spec = mmcv_ops.ExtensionFinder().find_spec("mmcv._ext")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def _mmcv_calls_the_stand_in(extension: ModuleType) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in USERS:
            patch.setattr(sys.modules[f"mmcv.ops.{name}"], "ext_module", extension)
        yield


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    with np.load(REFERENCE, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def seeded(name: str, *shape: int) -> Tensor:
    """The input that the reference file calls `name`: standard normal, from the checksum of the name."""
    generator = np.random.Generator(np.random.PCG64([zlib.crc32(f"input:ops:{name}".encode()), 0]))
    return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.detach().double() - expected.double()).norm() / expected.double().norm()
    assert actual.shape == expected.shape
    assert error <= tolerance, f"relative L2 error {error:.2e} exceeds {tolerance:.0e}"


# --- NMS ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_keeps_what_compiled_mmcv_keeps(reference: dict[str, Tensor], offset: int) -> None:
    dets, keep = ops.nms(reference["boxes"], reference["scores"], 0.5, offset=offset)
    assert torch.equal(keep, reference[f"nms_keep_offset{offset}"])
    assert torch.equal(dets, reference[f"nms_dets_offset{offset}"])


def test_nms_with_score_threshold_and_limit(reference: dict[str, Tensor]) -> None:
    _, keep = ops.nms(reference["boxes"], reference["scores"], 0.5, score_threshold=0.3, max_num=20)
    assert torch.equal(keep, reference["nms_keep_thr_max"])


def test_batched_nms(reference: dict[str, Tensor]) -> None:
    inputs = reference["boxes"], reference["scores"], reference["class_ids"]
    _, keep = ops.batched_nms(*inputs, {"type": "nms", "iou_threshold": 0.5})
    assert torch.equal(keep, reference["batched_nms_keep"])
    dets, _ = ops.batched_nms(*inputs, {"type": "soft_nms", "iou_threshold": 0.5})
    assert_close(dets, reference["batched_soft_nms_dets"], 1e-6)


# The second box is the upper half of the first (IoU exactly 1/2), the third lies apart.
HALVES = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 30, 30]], dtype=torch.float32)
HALF_SCORES = torch.tensor([0.9, 0.8, 0.6])


@pytest.mark.parametrize(("threshold", "kept"), [(0.5, [0, 1, 2]), (0.49, [0, 2])])
def test_nms_keeps_an_overlap_equal_to_the_threshold(threshold: float, kept: list[int]) -> None:
    assert ops.nms(HALVES, HALF_SCORES, threshold)[1].tolist() == kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("rows", range(1, 10))
def test_nms_boundary_holds_for_thresholds_that_float32_cannot_represent(rows: int, offset: int) -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, rows]], dtype=torch.float32)
    boxes[:, 2:] -= offset
    scores = torch.tensor([0.9, 0.8])
    assert ops.nms(boxes, scores, rows / 10, offset=offset)[1].tolist() == [0, 1]
    assert ops.nms(boxes, scores, rows / 10 - 1e-6, offset=offset)[1].tolist() == [0]


def test_nms_offset_counts_the_last_pixel() -> None:
    boxes = torch.tensor([[0, 0, 9, 9], [0, 0, 9, 4]], dtype=torch.float32)  # IoU 36/81, or 50/100 with the offset
    scores = torch.tensor([0.3, 0.7])
    assert ops.nms(boxes, scores, 0.47, offset=0)[1].tolist() == [1, 0]
    assert ops.nms(boxes, scores, 0.47, offset=1)[1].tolist() == [1]
    # Where float32 has no room for the pixel beyond the last: widths 10 and 5, not 9 and 5.
    far = torch.tensor([[2**24 - 9, 0, 2**24, 9], [2**24 - 9, 0, 2**24 - 5, 9]], dtype=torch.float32)
    assert ops.nms(far, scores, 0.52, offset=1)[1].tolist() == [1, 0]


def test_nms_breaks_ties_by_position_and_accepts_nothing() -> None:
    assert ops.nms(HALVES[[2, 0, 0]], torch.tensor([0.5, 0.5, 0.5]), 0.5)[1].tolist() == [0, 1]
    dets, keep = ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5)
    assert keep.shape == (0,)


def test_nms_takes_half_precision_scores() -> None:
    assert ops.nms(HALVES.half(), HALF_SCORES.half(), 0.49)[1].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("method", "options", "order", "scores"),
    [
        ("naive", {"iou_threshold": 0.5}, [0, 2], [0.9, 0.6]),
        ("naive", {"iou_threshold": 0.51}, [0, 1, 2], [0.9, 0.8, 0.6]),
        ("linear", {"iou_threshold": 0.5}, [0, 2, 1], [0.9, 0.6, 0.4]),
        ("linear", {"iou_threshold": 0.5, "min_score": 0.45}, [0, 2], [0.9, 0.6]),
        ("gaussian", {"sigma": 0.5}, [0, 2, 1], [0.9, 0.6, 0.8 * math.exp(-0.5)]),
    ],
)
def test_soft_nms_by_hand(method: str, options: dict[str, float], order: list[int], scores: list[float]) -> None:
    dets, index = ops.soft_nms(HALVES, HALF_SCORES, method=method, **options)
    assert index.tolist() == order
    torch.testing.assert_close(dets, torch.cat([HALVES[order], torch.tensor(scores)[:, None]], dim=1))


def test_soft_nms_offset_counts_the_last_pixel() -> None:
    boxes = torch.tensor([[0, 0, 9, 9], [0, 0, 9, 4]], dtype=torch.float32)
    scores = torch.tensor([0.9, 0.8])
    for offset, overlap in ((0, 36 / 81), (1, 0.5)):
        dets, _ = ops.soft_nms(boxes, scores, iou_threshold=0.3, offset=offset)
        assert dets[1, 4].item() == pytest.approx(0.8 * (1 - overlap))


def test_soft_nms_of_empty_boxes_keeps_their_scores() -> None:
    boxes = torch.ones(2, 4)
    dets, index = ops.soft_nms(boxes, torch.tensor([0.4, 0.5]), method="gaussian")
    assert index.tolist() == [1, 0]
    assert dets[:, 4].tolist() == pytest.approx([0.5, 0.4])


# --- RoIAlign ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [0, 1])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_agrees_with_compiled_mmcv(reference: dict[str, Tensor], aligned: int, ratio: int) -> None:
    features = seeded("feat", 2, 4, 20, 24).requires_grad_()
    pooled = ops.roi_align(features, reference["rois"], (7, 5), 0.25, ratio, "avg", bool(aligned))
    assert_close(pooled, reference[f"roi_align_aligned{aligned}_sr{ratio}"], 1e-6)
    pooled.backward(seeded("roi_grad", *pooled.shape))
    assert_close(features.grad, reference[f"roi_align_grad_aligned{aligned}_sr{ratio}"], 1e-6)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 3])
def test_roi_align_of_a_ramp_is_its_value_at_the_bin_centre(aligned: bool, ratio: int) -> None:
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(20.0), indexing="ij")
    ramp = (2 * x + 3 * y)[None, None]
    # In pixels of the map: x from 4 to 12, y from 3 to 9; bins of 2 x 3.
    pooled = ops.roi_align(ramp, torch.tensor([[0.0, 8, 6, 24, 18]]), (2, 4), 0.5, ratio, "avg", aligned)
    centre_x = torch.tensor([5.0, 7, 9, 11]) - 0.5 * aligned
    centre_y = torch.tensor([4.5, 7.5]) - 0.5 * aligned
    torch.testing.assert_close(pooled[0, 0], 2 * centre_x[None] + 3 * centre_y[:, None])


def test_roi_align_gradient_in_double() -> None:
    features = seeded("gradcheck", 2, 2, 5, 6).double().requires_grad_()
    rois = torch.tensor([[0, 1.3, 0.7, 9.1, 7.9], [1, 2.2, 3.1, 4.0, 9.9]], dtype=torch.float64)
    for aligned in (False, True):
        assert torch.autograd.gradcheck(lambda f, a=aligned: ops.roi_align(f, rois, (2, 3), 0.5, 0, "avg", a), features)


def test_roi_align_without_regions_gives_a_zero_gradient() -> None:
    features = torch.ones(1, 3, 4, 4, requires_grad=True)
    pooled = ops.roi_align(features, torch.zeros(0, 5), (2, 2), 1.0, 0, "avg", True)
    assert pooled.shape == (0, 3, 2, 2)
    pooled.sum().backward()
    assert torch.equal(features.grad, torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roi_align_in_reduced_precision_rounds_once(dtype: torch.dtype) -> None:
    features = seeded("feat", 2, 4, 20, 24).to(dtype).requires_grad_()
    rois = torch.tensor([[0, 4, 8, 60, 40], [1, 10, 12, 30, 72]], dtype=dtype)
    pooled = ops.roi_align(features, rois, (7, 5), 0.25, 2, "avg", True)
    wide = ops.roi_align(features.detach().float(), rois.float(), (7, 5), 0.25, 2, "avg", True)
    assert pooled.dtype == dtype
    assert torch.equal(pooled, wide.to(dtype))
    pooled.sum().backward()
    assert features.grad.dtype == dtype


def test_roi_align_with_max_pooling_is_refused() -> None:
    with pytest.raises(mmcv_ops.MissingOpError, match="pool_mode='max'"):
        ops.roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), (2, 2), 1.0, 0, "max", True)


# --- Multi-scale deformable attention ----------------------------------------------------------------------------

SHAPES = torch.tensor([[6, 8], [3, 4]])
STARTS = torch.tensor([0, 48])


def test_deformable_attention_agrees_with_compiled_mmcv(reference: dict[str, Tensor]) -> None:
    value = seeded("value", 2, 60, 4, 8).requires_grad_()
    locations, weights = reference["ms_loc"].requires_grad_(), reference["ms_aw"].requires_grad_()
    output = msda.MultiScaleDeformableAttnFunction.apply(value, SHAPES, STARTS, locations, weights, 64)
    assert_close(output, reference["ms_out"], 1e-6)
    output.backward(seeded("ms_grad", *output.shape))
    for tensor, name in ((value, "value"), (locations, "loc"), (weights, "aw")):
        assert_close(tensor.grad, reference[f"ms_grad_{name}"], 1e-6)


def test_deformable_attention_agrees_with_the_formula_of_mmcv() -> None:
    value = seeded("wide value", 2, 60, 4, 8)
    # Half of the locations lie outside the maps.
    locations = 0.5 + seeded("wide loc", 2, 9, 4, 2, 3, 2)
    weights = seeded("wide aw", 2, 9, 4, 2, 3)
    expected = msda.multi_scale_deformable_attn_pytorch(value, SHAPES, locations, weights)
    output = msda.MultiScaleDeformableAttnFunction.apply(value, SHAPES, STARTS, locations, weights, 64)
    assert_close(output, expected, 1e-6)


def test_deformable_attention_by_hand() -> None:
    # Two levels stored in reverse order: a 1 x 1 map holding 7, then a 1 x 2 map holding 1 and 3.
    value = torch.tensor([7.0, 1, 3]).view(1, 3, 1, 1)
    shapes, starts = torch.tensor([[1, 2], [1, 1]]), torch.tensor([1, 0])
    x = torch.tensor([0.25, 0.5, 1.0, 9.0])  # first centre, between both, right edge (half outside), far outside
    locations = torch.stack([x, torch.full_like(x, 0.5)], dim=-1).view(1, 4, 1, 1, 1, 2).repeat(1, 1, 1, 2, 1, 1)
    weights = torch.tensor([1.0, 10.0]).view(1, 1, 1, 2, 1).repeat(1, 4, 1, 1, 1)
    output = msda.MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)
    # The 1 x 1 map gives 7 at its centre, less by linear decay to 0 one pixel away.
    one_pixel = torch.tensor([0.75, 1.0, 0.5, 0.0]) * 7
    torch.testing.assert_close(output.flatten(), torch.tensor([1.0, 2.0, 1.5, 0.0]) + 10 * one_pixel)


def test_deformable_attention_gradients_in_double() -> None:
    shapes, starts = torch.tensor([[3, 4], [2, 2]]), torch.tensor([0, 12])
    value = seeded("gc value", 1, 16, 2, 3).double().requires_grad_()
    locations = (0.5 + 0.3 * seeded("gc loc", 1, 3, 2, 2, 2, 2).double()).requires_grad_()
    weights = seeded("gc aw", 1, 3, 2, 2, 2).double().requires_grad_()
    call = msda.MultiScaleDeformableAttnFunction.apply
    assert torch.autograd.gradcheck(lambda v, p, w: call(v, shapes, starts, p, w, 64), (value, locations, weights))


def test_deformable_attention_in_half_precision() -> None:
    value = seeded("value", 2, 60, 4, 8).half().requires_grad_()
    locations, weights = torch.rand(2, 5, 4, 2, 4, 2), torch.rand(2, 5, 4, 2, 4)
    output = msda.MultiScaleDeformableAttnFunction.apply(value, SHAPES, STARTS, locations, weights, 64)
    exact = msda.multi_scale_deformable_attn_pytorch(value.detach().float(), SHAPES, locations, weights)
    assert output.dtype == torch.float16
    assert_close(output, exact, 5e-3)
    output.sum().backward()
    assert value.grad.dtype == torch.float16


# --- Sigmoid focal loss ------------------------------------------------------------------------------------------


def test_focal_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])  # probabilities 1/2, 3/4; 1/2, 1/2
    target = torch.tensor([1, 2])  # the second row is background
    loss = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    half = 0.75 * 0.5**2 * math.log(2)
    expected = torch.tensor([[half, 0.25 * 0.25**2 * math.log(4 / 3)], [half, half]])
    torch.testing.assert_close(loss, expected)
    for reduction, value in (("sum", expected.sum()), ("mean", expected.sum() / 2)):
        torch.testing.assert_close(ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, reduction), value)


def test_focal_loss_weights_rows_by_their_class() -> None:
    logits, target = seeded("logits", 3, 2), torch.tensor([0, 1, 2])
    plain = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    weighted = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, torch.tensor([3.0, 5.0]), "none")
    torch.testing.assert_close(weighted, plain * torch.tensor([[3.0], [5.0], [1.0]]))


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)])
@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.0, 0.5), (1.5, 0.1)])
def test_focal_loss_gradient_in_double(gamma: float, alpha: float, weight: Tensor | None) -> None:
    logits = (3 * seeded("gc logits", 5, 3)).double().requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 1])
    for reduction in ("sum", "mean"):

        def loss(x: Tensor, reduction: str = reduction) -> Tensor:
            return ops.sigmoid_focal_loss(x, target, gamma, alpha, weight, reduction)

        assert torch.autograd.gradcheck(loss, logits)


def test_focal_loss_agrees_with_binary_cross_entropy_at_the_extremes() -> None:
    logits = torch.tensor([[-200.0, -40, 40, 200]], requires_grad=True)
    target = torch.tensor([0])
    loss = ops.sigmoid_focal_loss(logits, target, 0.0, 0.5, None, "none")
    hot = F.one_hot(target, 4).float()
    torch.testing.assert_close(loss, 0.5 * F.binary_cross_entropy_with_logits(logits, hot, reduction="none"))
    ops.sigmoid_focal_loss(logits, target, 0.0, 0.5, None, "sum").backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.5, 0.0, 0.5, 0.5]]), atol=1e-12, rtol=1e-6)


# --- CUDA --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_operations_agree_between_devices(reference: dict[str, Tensor]) -> None:
    def run(device: str) -> list[Tensor]:
        boxes, scores = reference["boxes"].to(device), reference["scores"].to(device)
        results = [ops.nms(boxes, scores, 0.5, offset=offset)[1] for offset in (0, 1)]
        results.append(ops.soft_nms(boxes, scores, 0.5)[0])
        features = seeded("feat", 2, 4, 20, 24).to(device).requires_grad_()
        results.append(ops.roi_align(features, reference["rois"].to(device), (7, 5), 0.25, 0, "avg", True))
        value = seeded("value", 2, 60, 4, 8).to(device).requires_grad_()
        locations, weights = reference["ms_loc"].to(device), reference["ms_aw"].to(device)
        call = msda.MultiScaleDeformableAttnFunction.apply
        results.append(call(value, SHAPES.to(device), STARTS.to(device), locations, weights, 64))
        logits = seeded("logits", 50, 6).to(device).requires_grad_()
        results.append(ops.sigmoid_focal_loss(logits, torch.arange(50, device=device) % 7, 2.0, 0.25, None, "none"))
        sum(result.square().sum() for result in results[3:]).backward()
        return [tensor.detach().cpu() for tensor in (*results, features.grad, value.grad, logits.grad)]

    for cuda, cpu in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-5)


# --- The module and its finder -----------------------------------------------------------------------------------


def test_an_operation_without_replacement_exists_and_names_the_remedy_when_called(extension: ModuleType) -> None:
    with pytest.raises(
        mmcv_ops.MissingOpError, match=r"nms_match .*setuptools>=77,<81.*--no-build-isolation"
    ) as caught:
        ops.nms_match(torch.tensor([[0.0, 0, 1, 1, 0.5]]), 0.5)
    assert "\n" not in str(caught.value)
    assert extension.deform_conv_forward.__name__ == "deform_conv_forward"
    assert not hasattr(extension, "__path__")


def test_mmcv_reports_its_environment() -> None:
    from mmcv.utils.env import collect_env

    assert collect_env()["MMCV"]


def run_script(directory: Path, script: str, **packages: str) -> list[str]:
    """Run `script` as a program of its own, beside stand-in files (slashes as `__`), and return its output's lines."""
    for name, text in packages.items():
        path = directory / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        for parent in path.relative_to(directory).parents[:-1]:
            (directory / parent / "__init__.py").touch()
    main = directory / "main.py"
    main.write_text(textwrap.dedent(script))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(directory), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(main)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def test_a_compiled_extension_wins(tmp_path: Path) -> None:
    script = """
        import sys
        from piip.integrations import mmcv_ops
        before = list(sys.meta_path)
        print(mmcv_ops.install(), sys.meta_path == before)
        sys.meta_path.append(mmcv_ops.ExtensionFinder())  # as if it were compiled after install()
        import mmcv._ext
        print(mmcv._ext.COMPILED, mmcv_ops.install())
    """
    assert run_script(tmp_path, script, mmcv___ext="COMPILED = True") == ["False True", "True False"]


def test_install_adds_one_finder_at_the_end(tmp_path: Path) -> None:
    script = """
        import importlib.util
        import sys
        from piip.integrations import mmcv_ops
        before = list(sys.meta_path)
        print(mmcv_ops.install(), mmcv_ops.install(), "mmcv" in sys.modules)
        print(sys.meta_path[:-1] == before, type(sys.meta_path[-1]).__name__)
        spec = importlib.util.find_spec("mmcv._ext")
        import mmcv._ext
        print(spec.name, mmcv._ext.__spec__.name, mmcv._ext.__spec__.parent)
        print(mmcv_ops.install(), len(sys.meta_path) - len(before))
    """
    assert run_script(tmp_path, script, mmcv__ops="") == [
        "True True False",
        "True ExtensionFinder",
        "mmcv._ext mmcv._ext mmcv",
        "True 1",
    ]


def test_install_has_nothing_to_do_without_mmcv(tmp_path: Path) -> None:
    script = """
        import sys
        from piip.integrations import mmcv_ops
        sys.path[:] = [entry for entry in sys.path if "site-packages" not in entry]
        sys.path_importer_cache.clear()
        before = list(sys.meta_path)
        print(mmcv_ops.install(), sys.meta_path == before)
    """
    assert run_script(tmp_path, script) == ["False True"]


MMDET_BINDS_ONCE = """
    try:
        from mmcv.ops import roi_align
    except ImportError:
        roi_align = None
"""
MMCV_OPS = """
    from mmcv import _ext
    roi_align = _ext.roi_align_forward
"""


def test_install_after_mmdet_is_an_error_that_names_the_module(tmp_path: Path) -> None:
    script = """
        import sys
        import mmdet.registry
        import mmdet.structures.mask.structures as masks
        from piip.integrations import mmcv_ops
        assert masks.roi_align is None
        before = list(sys.meta_path)
        try:
            mmcv_ops.install()
        except mmcv_ops.StandInTooLateError as error:
            print(error)
        print(sys.meta_path == before)
    """
    files = {"mmcv__ops": MMCV_OPS, "mmdet__registry": "", "mmdet__structures__mask__structures": MMDET_BINDS_ONCE}
    message, unchanged = run_script(tmp_path, script, **files)
    assert message.startswith("mmdet.structures.mask was imported before")
    assert "install() before the first import of mmdet" in message
    assert unchanged == "True"


def test_the_modules_that_bind_once_exist_in_the_installed_frameworks() -> None:
    pytest.importorskip("mmdet", reason="needs onedl-mmdetection")
    for name in mmcv_ops._BINDS_ONCE:
        package = name.partition(".")[0]
        if importlib.util.find_spec(package):
            base = Path(importlib.util.find_spec(package).origin).parent.joinpath(*name.split(".")[1:])
            assert base.is_dir() or base.with_suffix(".py").is_file(), f"{name} has moved"


def test_data_loader_workers_have_the_operations(tmp_path: Path) -> None:
    script = """
        from piip.integrations import mmcv_ops
        mmcv_ops.install()
        from torch.utils.data import DataLoader
        from points import Points
        if __name__ == "__main__":
            for method in ("fork", "spawn", "forkserver"):
                loader = DataLoader(Points(), num_workers=1, batch_size=None, multiprocessing_context=method)
                print(method, *loader)
    """
    dataset = """
        from mmdet.structures.mask import structures
        class Points:
            def __len__(self):
                return 2
            def __getitem__(self, index):
                return structures.roi_align.__name__
    """
    files = {"mmcv__ops": MMCV_OPS, "mmdet__structures__mask__structures": MMDET_BINDS_ONCE, "points": dataset}
    seen = "roi_align_forward roi_align_forward"
    assert run_script(tmp_path, script, **files) == [f"fork {seen}", f"spawn {seen}", f"forkserver {seen}"]


# --- mmdet -------------------------------------------------------------------------------------------------------


def test_mask_rcnn_trains_and_predicts(tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason="needs onedl-mmdetection")
    import mmdet.models  # noqa: F401  (registers)
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmengine.structures import InstanceData

    init_default_scope("mmdet")  # a runner of another test may have left its own
    config = tmp_path / "tiny.py"
    config.write_text(
        textwrap.dedent(
            """
            _base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py"]
            model = dict(
                backbone=dict(depth=18, base_channels=8, init_cfg=None),
                neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
                rpn_head=dict(in_channels=16, feat_channels=16),
                roi_head=dict(
                    bbox_roi_extractor=dict(out_channels=16),
                    bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=3),
                    mask_roi_extractor=dict(out_channels=16),
                    mask_head=dict(num_convs=1, in_channels=16, conv_out_channels=16, num_classes=3),
                ),
                test_cfg=dict(rcnn=dict(score_thr=0.0)),
            )
            """
        )
    )
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(config).model)
    model.init_weights()
    samples = []
    for corner in (8, 20):
        masks = np.zeros((2, 64, 96), dtype=np.uint8)
        masks[0, corner : corner + 24, 10:40] = 1
        masks[1, 4:30, 50:90] = 1
        boxes = torch.tensor([[10, corner, 40, corner + 24], [50, 4, 90, 30]], dtype=torch.float32)
        sample = DetDataSample(
            metainfo={"img_shape": (64, 96), "ori_shape": (64, 96), "scale_factor": (1.0, 1.0), "pad_shape": (64, 96)}
        )
        sample.gt_instances = InstanceData(
            bboxes=boxes, labels=torch.tensor([0, 2]), masks=BitmapMasks(masks, height=64, width=96)
        )
        samples.append(sample)
    batch = {
        "inputs": [torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8) for _ in samples],
        "data_samples": samples,
    }

    model.train()
    losses = model(**model.data_preprocessor(batch, training=True), mode="loss")
    total, logged = model.parse_losses(losses)
    assert {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"} <= set(logged)
    assert torch.isfinite(total)
    total.backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert all(name.startswith("backbone.") for name in silent), f"no gradient: {silent}"

    model.eval()
    with torch.no_grad():
        predictions = model(**model.data_preprocessor(batch), mode="predict")
    for prediction in predictions:
        instances = prediction.pred_instances
        assert 0 < len(instances) <= 100
        assert instances.masks.shape == (len(instances), 64, 96)
        assert instances.scores.sort(descending=True).values.equal(instances.scores)

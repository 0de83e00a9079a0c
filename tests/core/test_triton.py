"""The Triton sampling kernel, through Triton's interpreter: against the torch kernel in float64, and as an operator."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import piip.deformable
from piip.deformable import DeformableCrossAttention, sample_torch

pytest.importorskip("triton", reason="needs Triton")


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """The module, decorated while the interpreter is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        sys.modules.pop("piip.triton_sampling", None)
        from piip import triton_sampling
    assert triton_sampling.INTERPRETED
    return triton_sampling


def random_inputs(batch=2, grid=(3, 5), queries=35, heads=2, width=6, points=3, dtype=torch.float32):
    """Values, locations on and around the map, and weights; more queries than one program takes, an odd width."""
    value = torch.randn(batch, grid[0] * grid[1], heads, width).to(dtype)
    locations = torch.rand(batch, queries, heads, points, 2) * 1.6 - 0.3
    weights = torch.randn(batch, queries, heads, points).softmax(-1)
    return value, grid, locations, weights


def run(kernel, value, grid, locations, weights) -> list[Tensor]:
    inputs = [t.clone().requires_grad_() for t in (value, locations, weights)]
    out = kernel(inputs[0], grid, inputs[1], inputs[2])
    return [out, *torch.autograd.grad(out, inputs, incoming(out))]


def incoming(out: Tensor) -> Tensor:
    """A gradient of the output that bf16 holds exactly."""
    return ((torch.arange(out.numel(), device=out.device) % 9 - 4) / 4).view_as(out).to(out.dtype)


@pytest.mark.parametrize("grid", [(3, 5), (1, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_outputs_and_gradients_equal_the_torch_kernel_in_float64(interpreted, grid, dtype, tolerance):
    value, grid, locations, weights = random_inputs(grid=grid, dtype=dtype)
    locations[0, 0] = 7.5  # far outside
    locations[0, 1] = torch.tensor([0.5 / grid[1], 0.5 / grid[0]])  # on a cell's centre
    locations[0, 2] = 1.0  # on the edge
    actual = run(interpreted.sample_triton, value, grid, locations, weights)
    expected = run(sample_torch, value.double(), grid, locations.double(), weights.double())
    assert [t.dtype for t in actual] == [dtype, dtype, torch.float32, torch.float32]
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a.double() - e).norm() <= tolerance * e.norm()
    assert not actual[0][0, 0].any()
    # Only what is stored in bf16 is rounded; sums are float32, as these gradients show.
    torch.testing.assert_close(actual[3].double(), expected[3], rtol=1e-4, atol=1e-5)


def test_operator_checks(interpreted):
    value, grid, locations, weights = random_inputs(batch=1, queries=3, points=2)
    inputs = [t.requires_grad_() for t in (value, locations, weights)]
    torch.library.opcheck(interpreted.deformable_sampling, (inputs[0], *grid, inputs[1], inputs[2]))


def small_attention(kernel: str) -> DeformableCrossAttention:
    torch.manual_seed(0)
    attention = DeformableCrossAttention(16, 12, num_heads=4, points=2, kernel=kernel)
    torch.nn.init.normal_(attention.sampling_offsets.weight, std=0.3)
    return attention


@pytest.mark.parametrize("way", ["eager", "compile", "export"])
def test_attention_with_the_kernel_equals_torch_s(interpreted, way):
    query, feat = torch.randn(1, 6, 16), torch.randn(1, 12, 12)
    grids = (2, 3), (3, 4)
    expected = small_attention("torch")(query, feat, *grids)
    attention = small_attention("triton")
    if way == "compile":
        attention = torch.compile(attention, fullgraph=True, backend="aot_eager")
    elif way == "export":
        program = torch.export.export(attention, (query, feat, *grids), strict=False)
        assert any("piip.deformable_sampling" in part.code for part in program.graph_module.modules())
        attention = program.module()
    torch.testing.assert_close(attention(query, feat, *grids), expected, rtol=1e-5, atol=1e-5)


def test_multiply_adds_are_counted(interpreted):
    value, grid, locations, weights = random_inputs(batch=1, queries=3, points=2)
    with FlopCounterMode(display=False) as counter:
        interpreted.sample_triton(value, grid, locations, weights)
    assert counter.get_total_flops() == 2 * 4 * 2 * 3 * 2 * 6  # neighbours, points, queries, heads, channels


def test_where_it_does_not_run(interpreted, monkeypatch):
    value, grid, locations, weights = random_inputs(dtype=torch.float64)
    with pytest.raises(ValueError, match="kernel='triton' computes in float32"):
        interpreted.sample_triton(value, grid, locations, weights)
    monkeypatch.setattr(interpreted, "INTERPRETED", False)
    with pytest.raises(ValueError, match="kernel='triton' runs on CUDA devices: use kernel='torch' or 'auto'"):
        interpreted.sample_triton(value, grid, locations, weights)


def test_auto_takes_the_kernel_only_where_it_agrees(interpreted, monkeypatch, caplog):
    cpu = torch.device("cpu")
    assert piip.deformable._compare_with_triton(cpu)
    kernel = interpreted.sample_triton
    monkeypatch.setattr(interpreted, "sample_triton", lambda *inputs: 1.1 * kernel(*inputs))
    assert not piip.deformable._compare_with_triton(cpu)
    assert "not used on cpu: its results differ" in caplog.text

    def broken(*inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(interpreted, "sample_triton", broken)
    assert not piip.deformable._compare_with_triton(cpu)
    assert "RuntimeError: no compiler" in caplog.text


@pytest.mark.gpu
def test_cuda_equals_torch_in_float64():
    """In a process of its own: there the kernel is compiled."""
    if importlib.util.find_spec("piip.triton_sampling") is None:
        pytest.skip("needs Triton")
    sys.modules.pop("piip.triton_sampling", None)
    from piip.triton_sampling import sample_triton

    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        value, grid, locations, weights = random_inputs(grid=(30, 20), queries=500, width=24, dtype=dtype)
        expected = run(sample_torch, value.double(), grid, locations.double(), weights.double())
        value, locations, weights = (t.cuda() for t in (value, locations, weights))
        inputs = [t.requires_grad_() for t in (value, locations, weights)]
        out = sample_triton(inputs[0], grid, *inputs[1:])
        actual = [out, *torch.autograd.grad(out, inputs, incoming(out))]
        for a, e in zip(actual, expected, strict=True):
            assert (a.cpu().double() - e).norm() <= tolerance * e.norm()

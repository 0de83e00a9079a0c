"""Deformable cross-attention: the sampling kernel, its module, precision, memory, compiling and exporting."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from piip import DensePyramid
from piip.deformable import DeformableCrossAttention, Float32Linear, cell_centres, choose_kernel, sample_torch
from piip.runtime import CudaGraph


def random_inputs(batch=2, grid=(3, 5), queries=7, heads=2, width=4, points=3, dtype=torch.float32):
    """Values, locations on and around the map, and weights."""
    value = torch.randn(batch, grid[0] * grid[1], heads, width, dtype=dtype)
    locations = torch.rand(batch, queries, heads, points, 2, dtype=dtype) * 1.6 - 0.3
    weights = torch.randn(batch, queries, heads, points, dtype=dtype).softmax(-1)
    return value, grid, locations, weights


def sample_naive(value: np.ndarray, grid: tuple[int, int], locations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One sample at a time, cell by cell: cell (i, j) has its centre at ((j + 0.5) / W, (i + 0.5) / H)."""
    batch, _, heads, width = value.shape
    height, wide = grid
    out = np.zeros((batch, locations.shape[1], heads, width))
    for b, q, h, p in np.ndindex(weights.shape):
        x = locations[b, q, h, p, 0] * wide - 0.5
        y = locations[b, q, h, p, 1] * height - 0.5
        for i in range(height):
            for j in range(wide):
                share = max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j))
                out[b, q, h] += weights[b, q, h, p] * share * value[b, i * wide + j, h]
    return out.reshape(batch, locations.shape[1], heads * width)


@pytest.mark.parametrize("grid", [(3, 5), (1, 4), (1, 1)])
def test_kernel_equals_a_naive_loop(grid):
    value, grid, locations, weights = random_inputs(grid=grid, dtype=torch.float64)
    expected = sample_naive(value.numpy(), grid, locations.numpy(), weights.numpy())
    np.testing.assert_allclose(sample_torch(value, grid, locations, weights).numpy(), expected, atol=1e-12)


def test_kernel_equals_the_formula_of_mmcv():
    mmcv = pytest.importorskip("piip.integrations.mmcv_ops", reason="needs mmcv")
    mmcv.install()
    formula = pytest.importorskip("mmcv.ops.multi_scale_deform_attn").multi_scale_deformable_attn_pytorch
    value, grid, locations, weights = random_inputs(dtype=torch.float64)
    levels = formula(value, torch.tensor([grid]), locations[:, :, :, None], weights[:, :, :, None])
    torch.testing.assert_close(sample_torch(value, grid, locations, weights), levels, rtol=0, atol=1e-12)


def test_kernel_gradients():
    value, grid, locations, weights = random_inputs(batch=1, queries=3, width=2, points=2, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, lo, w: sample_torch(v, grid, lo, w), inputs)


def test_points_outside_the_map_are_zero():
    value, grid, locations, weights = random_inputs()
    # Half a cell beyond an edge is a whole cell from the nearest centre.
    for outside in ([-0.1001, 0.5], [1.1001, 0.5], [0.5, -0.16668], [0.5, 1.16668], [40.0, -40.0]):
        locations[:] = torch.tensor(outside)
        assert not sample_torch(value, grid, locations, weights).any(), outside
    locations[:] = torch.tensor([0.0, 0.5])  # on the left edge: half of the leftmost cell of the middle row
    expected = 0.5 * value[:, 5, None].expand(2, 7, 2, 4).flatten(2)
    torch.testing.assert_close(sample_torch(value, grid, locations, weights), expected)


def test_cell_centres():
    x, y = cell_centres((2, 4), like=torch.zeros((), dtype=torch.float64))
    assert x.tolist() == [0.125, 0.375, 0.625, 0.875] * 2
    assert y.tolist() == [0.25] * 4 + [0.75] * 4


def test_initial_values():
    attention = DeformableCrossAttention(16, 12, num_heads=8, points=2, value_ratio=0.5)
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any()
    for layer in (attention.attention_weights, attention.value_proj, attention.output_proj):
        assert not layer.bias.any()
    compass = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    expected = torch.tensor([[[x, y], [2 * x, 2 * y]] for x, y in compass], dtype=torch.float32)
    torch.testing.assert_close(attention.sampling_offsets.bias.view(8, 2, 2), expected, rtol=1e-5, atol=1e-5)
    for layer, bound in ((attention.value_proj, math.sqrt(6 / (12 + 8))), (attention.output_proj, math.sqrt(6 / 24))):
        assert layer.weight.abs().max() <= bound
        assert layer.weight.abs().max() > 0.8 * bound


def test_by_hand():
    # One head, one point that looks one cell to the right, identity projections.
    attention = DeformableCrossAttention(1, 1, num_heads=1, points=1, value_ratio=1.0)
    with torch.no_grad():
        attention.value_proj.weight.fill_(1)
        attention.output_proj.weight.fill_(1)
    feat = torch.arange(1.0, 7).view(1, 6, 1)
    same = attention(torch.zeros(1, 6, 1), feat, (2, 3), (2, 3))
    assert same.flatten().tolist() == pytest.approx([2, 3, 0, 5, 6, 0], abs=1e-5)
    # A coarser query grid: one row and column, its centre is the map's; to the right of it lies 3, to the left 1.
    coarse = attention(torch.zeros(1, 1, 1), feat, (1, 1), (2, 3))
    assert coarse.item() == pytest.approx((3 + 6) / 2)
    # Offsets count cells of the sampled map: y by its height.
    with torch.no_grad():
        attention.sampling_offsets.bias.copy_(torch.tensor([0.0, 1.0]))
    below = attention(torch.zeros(1, 6, 1), feat, (2, 3), (2, 3))
    assert below.flatten().tolist() == pytest.approx([4, 5, 6, 0, 0, 0], abs=1e-5)


def trained_like(dim=32, feat_dim=24) -> DeformableCrossAttention:
    """An attention whose sampling depends on its query."""
    attention = DeformableCrossAttention(dim, feat_dim, num_heads=4)
    nn.init.normal_(attention.sampling_offsets.weight, std=0.3)
    nn.init.normal_(attention.attention_weights.weight, std=0.3)
    return attention


@pytest.mark.parametrize("case", ["bf16 inputs", "bf16 module", "autocast", "fp16 inputs"])
def test_low_precision_keeps_float32_sampling(case):
    attention = trained_like()
    query, feat = torch.randn(2, 24, 32), torch.randn(2, 60, 24)
    grids = ((4, 6), (6, 10))
    dtype = torch.float16 if case.startswith("fp16") else torch.bfloat16
    if case == "bf16 module":
        attention = attention.bfloat16()
        exact = DeformableCrossAttention(32, 24, num_heads=4)
        exact.load_state_dict({name: tensor.float() for name, tensor in attention.state_dict().items()})
    else:
        exact = attention
    if case != "autocast":
        query, feat = query.to(dtype), feat.to(dtype)
    seen = []
    sample = attention.sample
    attention.sample = lambda *inputs: seen.append(inputs) or sample(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
        out = attention(query, feat, *grids)
    attention.sample = sample
    ((value, _, locations, weights),) = seen
    assert value.dtype == locations.dtype == weights.dtype == torch.float32
    expected = exact(query.float(), feat.float(), *grids)
    assert out.dtype == query.dtype
    torch.testing.assert_close(out, expected.to(query.dtype), rtol=0, atol=0 if case != "autocast" else 1e-6)


def test_float64_stays_float64():
    attention = trained_like().double()
    out = attention(torch.randn(1, 4, 32).double(), torch.randn(1, 4, 24).double(), (2, 2), (2, 2))
    assert out.dtype == torch.float64


def test_parameters_keep_their_dtype_and_get_gradients_in_it():
    attention = trained_like().bfloat16()
    before = dict(attention.named_parameters())
    query = torch.randn(1, 6, 32, dtype=torch.bfloat16, requires_grad=True)
    attention(query, torch.randn(1, 4, 24, dtype=torch.bfloat16), (2, 3), (2, 2)).sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter is before[name]
        assert parameter.dtype == parameter.grad.dtype == torch.bfloat16
    assert query.grad.dtype == torch.bfloat16
    assert isinstance(attention.value_proj, Float32Linear)


def test_what_is_kept_for_backward_is_one_sampled_tensor():
    value, grid, locations, weights = random_inputs(grid=(16, 16), queries=400, heads=4, width=32, points=4)
    inputs = [t.requires_grad_() for t in (value, locations, weights)]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sample_torch(value, grid, locations, weights)
    sampled = 2 * 400 * 4 * 4 * 32 * 4  # batch, queries, heads, points, channels, bytes
    assert sum(kept.values()) <= sampled + sum(t.nbytes for t in inputs)


def test_kernel_names():
    assert choose_kernel("torch") is sample_torch
    inputs = random_inputs()
    assert torch.equal(choose_kernel("auto")(*inputs), sample_torch(*inputs))
    with pytest.raises(ValueError, match="unknown kernel 'cuda'; known kernels: auto, torch, triton"):
        choose_kernel("cuda")
    with pytest.raises(ValueError, match=r"value width 8 .= 16 channels x value_ratio 0.5. cannot be split into 3"):
        DeformableCrossAttention(16, 16, num_heads=3)


def test_compiles_as_one_graph_and_equals_eager():
    attention = trained_like()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    query, feat = torch.randn(2, 24, 32), torch.randn(2, 60, 24)
    results = []
    for module in (attention, compiled):
        attention.zero_grad()
        inputs = [t.clone().requires_grad_() for t in (query, feat)]
        out = module(*inputs, (4, 6), (6, 10))
        out.sin().sum().backward()
        results.append([out.detach(), *(t.grad for t in inputs), *(p.grad.clone() for p in attention.parameters())])
    for eager, one_graph in zip(*results, strict=True):
        torch.testing.assert_close(one_graph, eager, rtol=1e-5, atol=1e-5)


def tiny_pyramid() -> DensePyramid:
    """A pyramid with windows, and with interactions that act."""
    shape = {"depth": 2, "num_heads": 2, "patch_size": 8, "pos_grid": (4, 4)}
    spec = {
        "branches": [
            {"arch": "vit", "resolution": 32, "options": {"embed_dim": 32, "window": 3, **shape}},
            {"arch": "vit", "resolution": 64, "options": {"embed_dim": 16, **shape}},
        ],
        "interactions": 1,
        "heads": 2,
    }
    model = DensePyramid(spec).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    return model


@pytest.mark.parametrize("way", ["export", "compile"])
def test_a_pyramid_exports_and_compiles_as_one_graph(way):
    model = tiny_pyramid()
    images = torch.randn(1, 3, 64, 64)
    if way == "export":
        graph = torch.export.export(model, (images,), strict=False).module()
    else:
        graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    other = torch.randn(1, 3, 64, 64)
    for level, expected in zip(graph(other), model(other), strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-5, atol=1e-5)
    # Nothing that tracing left behind disturbs training.
    sum(level.sum() for level in model.train()(images)).backward()


@pytest.mark.slow
def test_one_compilation_per_kind_of_size():
    """One for the first size, one with dynamic sizes for the second, none for a third one."""
    model = tiny_pyramid()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    seen = []
    with torch.no_grad():
        for side in (96, 96, 144, 192):
            images = torch.randn(1, 3, side, side)
            for level, expected in zip(compiled(images), model(images), strict=True):
                torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)
            seen.append(counter.frame_count)
    assert seen == [1, 1, 2, 2]


@pytest.mark.gpu
def test_cuda_equals_cpu():
    attention = trained_like()
    query, feat = torch.randn(2, 24, 32), torch.randn(2, 60, 24)
    expected = attention(query, feat, (4, 6), (6, 10))
    out = attention.cuda()(query.cuda(), feat.cuda(), (4, 6), (6, 10))
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["streams", "graph"])
def test_streams_and_graphs_change_nothing(way):
    model = tiny_pyramid().cuda()
    images = torch.randn(2, 3, 64, 64, device="cuda")
    expected = model(images)
    sum(level.square().sum() for level in expected).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    if way == "streams":
        model.zero_grad()
        model.pyramid.parallel_streams = True
        actual = model(images)
        sum(level.square().sum() for level in actual).backward()
        for a, b in zip([p.grad for p in model.parameters() if p.grad is not None], gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    else:
        captured = CudaGraph(model, torch.zeros_like(images))
        actual = captured(images)
        with pytest.raises(ValueError, match="captured for images of"):
            captured(images[:1])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_graphs_need_a_cuda_device():
    with pytest.raises(ValueError, match="CUDA graphs need images on a CUDA device, these are on cpu"):
        CudaGraph(tiny_pyramid(), torch.zeros(1, 3, 64, 64))

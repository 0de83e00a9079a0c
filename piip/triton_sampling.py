# mypy: disable-error-code="no-untyped-def"
"""Deformable sampling as a Triton kernel, forward and backward, behind one operator of torch.

Import this module only where the kernel is used: it needs Triton. With `TRITON_INTERPRET=1` set before the import, the
kernel runs on CPUs too, slowly; the tests compare it with `piip.deformable.sample_torch` that way.

One program takes a block of queries of one head. Whatever the type of the inputs, positions and sums are float32; the
gradient of the values is summed by float32 atomics, so its last digits depend on the order of the additions.
"""

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

QUERIES = 32  # per program


@triton.jit
def _add(a, b):
    """`tl.sum` is decorated when Triton is imported, and no interpreter that is asked for later can run it."""
    return a + b


@triton.jit
def _corner(value, rows, x, y, wide, high, heads, width, channel):
    """Values of one neighbour of each sample, zeros outside the map; and where they lie, and which are inside."""
    inside = (x >= 0) & (x < wide) & (y >= 0) & (y < high)
    cell = tl.where(inside, y * wide + x, 0.0).to(tl.int64)
    place = rows + cell[:, None] * (heads * width) + channel[None, :]
    mask = inside[:, None] & (channel < width)[None, :]
    return tl.load(value + place, mask=mask, other=0.0).to(tl.float32), place, mask


@triton.jit
def _position(locations, weights, sample, known, wide, high):
    """Weight of each sample, its upper left neighbour, and how far it lies from it."""
    x = tl.load(locations + 2 * sample, mask=known, other=0.0).to(tl.float32) * wide - 0.5
    y = tl.load(locations + 2 * sample + 1, mask=known, other=0.0).to(tl.float32) * high - 0.5
    weight = tl.load(weights + sample, mask=known, other=0.0).to(tl.float32)
    left = tl.floor(x)
    top = tl.floor(y)
    return weight, left, top, x - left, y - top


@triton.jit
def _forward(
    value, locations, weights, out, queries, cells, wide, high, heads, width,
    points: tl.constexpr, block: tl.constexpr, channels: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0) * block + tl.arange(0, block)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    channel = tl.arange(0, channels)
    known = query < queries
    row = (batch * queries + query) * heads + head
    rows = batch * cells * heads * width + head * width
    total = tl.full([block, channels], 0.0, tl.float32)
    for p in tl.static_range(points):
        weight, left, top, dx, dy = _position(locations, weights, row * points + p, known, wide, high)
        a, _, _ = _corner(value, rows, left, top, wide, high, heads, width, channel)
        b, _, _ = _corner(value, rows, left + 1, top, wide, high, heads, width, channel)
        c, _, _ = _corner(value, rows, left, top + 1, wide, high, heads, width, channel)
        d, _, _ = _corner(value, rows, left + 1, top + 1, wide, high, heads, width, channel)
        upper = a * (1 - dx)[:, None] + b * dx[:, None]
        lower = c * (1 - dx)[:, None] + d * dx[:, None]
        total += (upper * (1 - dy)[:, None] + lower * dy[:, None]) * weight[:, None]
    place = row[:, None] * width + channel[None, :]
    mask = known[:, None] & (channel < width)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad, value, locations, weights, grad_value, grad_locations, grad_weights, queries, cells, wide, high, heads, width,
    points: tl.constexpr, block: tl.constexpr, channels: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0) * block + tl.arange(0, block)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    channel = tl.arange(0, channels)
    known = query < queries
    row = (batch * queries + query) * heads + head
    rows = batch * cells * heads * width + head * width
    mask = known[:, None] & (channel < width)[None, :]
    g = tl.load(grad + row[:, None] * width + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    for p in tl.static_range(points):
        sample = row * points + p
        weight, left, top, dx, dy = _position(locations, weights, sample, known, wide, high)
        a, place_a, mask_a = _corner(value, rows, left, top, wide, high, heads, width, channel)
        b, place_b, mask_b = _corner(value, rows, left + 1, top, wide, high, heads, width, channel)
        c, place_c, mask_c = _corner(value, rows, left, top + 1, wide, high, heads, width, channel)
        d, place_d, mask_d = _corner(value, rows, left + 1, top + 1, wide, high, heads, width, channel)
        ga = tl.reduce(g * a, 1, _add)
        gb = tl.reduce(g * b, 1, _add)
        gc = tl.reduce(g * c, 1, _add)
        gd = tl.reduce(g * d, 1, _add)
        of_weight = (ga * (1 - dx) + gb * dx) * (1 - dy) + (gc * (1 - dx) + gd * dx) * dy
        of_x = weight * wide * ((gb - ga) * (1 - dy) + (gd - gc) * dy)
        of_y = weight * high * ((gc - ga) * (1 - dx) + (gd - gb) * dx)
        tl.store(grad_weights + sample, of_weight, mask=known)
        tl.store(grad_locations + 2 * sample, of_x, mask=known)
        tl.store(grad_locations + 2 * sample + 1, of_y, mask=known)
        weighted = g * weight[:, None]
        tl.atomic_add(grad_value + place_a, weighted * ((1 - dx) * (1 - dy))[:, None], mask=mask & mask_a)
        tl.atomic_add(grad_value + place_b, weighted * (dx * (1 - dy))[:, None], mask=mask & mask_b)
        tl.atomic_add(grad_value + place_c, weighted * ((1 - dx) * dy)[:, None], mask=mask & mask_c)
        tl.atomic_add(grad_value + place_d, weighted * (dx * dy)[:, None], mask=mask & mask_d)


INTERPRETED = not isinstance(_forward, triton.runtime.JITFunction)
"""Whether the kernel runs through Triton's interpreter."""


def _launch(kernel: Any, value: Tensor, height: int, width: int, locations: Tensor, *tensors: Tensor) -> None:
    batch, queries, heads, points, _ = locations.shape
    channels = value.shape[3]
    grid = (triton.cdiv(queries, QUERIES), batch * heads)
    sizes = (queries, height * width, width, height, heads, channels)
    kernel[grid](*tensors, *sizes, points=points, block=QUERIES, channels=triton.next_power_of_2(channels))


@torch.library.custom_op("piip::deformable_sampling", mutates_args=())
def deformable_sampling(value: Tensor, height: int, width: int, locations: Tensor, weights: Tensor) -> Tensor:
    """See `piip.deformable.sample_torch`; the grid is given as two numbers, the result has the dtype of `value`."""
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    out = value.new_empty(locations.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    _launch(_forward, value, height, width, locations, value, locations, weights, out)
    return out


@deformable_sampling.register_fake
def _(value: Tensor, height: int, width: int, locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(locations.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op("piip::deformable_sampling_backward", mutates_args=())
def deformable_sampling_backward(
    grad: Tensor, value: Tensor, height: int, width: int, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of values, locations and weights."""
    grad, value, locations, weights = (t.contiguous() for t in (grad, value, locations, weights))
    of_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    of_locations, of_weights = torch.empty_like(locations), torch.empty_like(weights)
    tensors = (grad, value, locations, weights, of_value, of_locations, of_weights)
    _launch(_backward, value, height, width, locations, *tensors)
    return of_value.to(value.dtype, copy=True), of_locations, of_weights


@deformable_sampling_backward.register_fake
def _(
    grad: Tensor, value: Tensor, height: int, width: int, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, height, width, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)
    ctx.grid = height, width


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor]:
    value, locations, weights = ctx.saved_tensors
    of_value, of_locations, of_weights = deformable_sampling_backward(grad, value, *ctx.grid, locations, weights)
    return of_value, None, None, of_locations, of_weights


deformable_sampling.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.piip.deformable_sampling)
def _flops(value: Any, height: int, width: int, locations: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 8 * locations[3] * prod(out_shape)  # four neighbours of every point; a multiply-add counts twice


def sample_triton(value: Tensor, grid: tuple[int, int], locations: Tensor, weights: Tensor) -> Tensor:
    """Sample like `piip.deformable.sample_torch`.

    Raises:
        ValueError: The tensors are on a CPU, or in float64.
    """
    if not (value.is_cuda or INTERPRETED):
        raise ValueError("kernel='triton' runs on CUDA devices: use kernel='torch' or 'auto' on this one")
    if value.dtype == torch.float64:
        raise ValueError("kernel='triton' computes in float32: use kernel='torch' for float64")
    return deformable_sampling(value, *grid, locations, weights)

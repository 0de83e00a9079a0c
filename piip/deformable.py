"""Deformable cross-attention between two token grids (arXiv 2406.04330, section 3.2; Deformable DETR, 2010.04159)."""

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Kernel = Callable[[Tensor, tuple[int, int], Tensor, Tensor], Tensor]


def sample_torch(value: Tensor, grid: tuple[int, int], locations: Tensor, weights: Tensor) -> Tensor:
    """Sample a value map at fractional locations and sum the samples of each query by weight.

    Bilinear, zeros outside the map. One point is sampled at a time: what is kept for the backward pass is then one
    sampled value tensor, and nothing larger exists at any moment.

    Args:
        value: `(B, H*W, heads, C)`.
        grid: `(H, W)` of `value`.
        locations: `(B, Q, heads, points, 2)`, (x, y) in units of the map: 0 and 1 are its outer edges.
        weights: `(B, Q, heads, points)`.

    Returns:
        `(B, Q, heads * C)`.
    """
    b, queries, heads, points, _ = locations.shape
    maps = value.permute(0, 2, 3, 1).reshape(b * heads, value.shape[3], *grid)
    # Each point's locations form one long row, x and y apart: CPUs then sample neighbouring queries side by side.
    rows = (2 * locations.permute(3, 0, 2, 4, 1).contiguous() - 1).flatten(1, 2).unsqueeze(2).transpose(3, 4)
    shares = weights.permute(3, 0, 2, 1).flatten(1, 2)[:, :, None, None]  # (points, B*heads, 1, 1, Q)

    def sample(p: int) -> Tensor:
        return F.grid_sample(maps, rows[p], align_corners=False)  # (B*heads, C, 1, Q)

    total = sample(0) * shares[0]
    for p in range(1, points):
        total = torch.addcmul(total, sample(p), shares[p])
    return total.squeeze(2).unflatten(0, (b, heads)).permute(0, 3, 1, 2).reshape(b, queries, -1)


def sample_triton(value: Tensor, grid: tuple[int, int], locations: Tensor, weights: Tensor) -> Tensor:
    """Sample like `sample_torch`, by a Triton kernel on a CUDA device; see `piip.triton_sampling`."""
    from piip import triton_sampling  # needs Triton

    return triton_sampling.sample_triton(value, grid, locations, weights)


def sample_auto(value: Tensor, grid: tuple[int, int], locations: Tensor, weights: Tensor) -> Tensor:
    """Sample like `sample_torch`, by the fastest kernel that works here.

    On a CUDA device that is Triton's, once it has agreed with the torch kernel there in an eager call; graphs that are
    traced before that, and exported ones, hold torch's own operators.
    """
    if value.is_cuda and value.dtype != torch.float64 and _triton_agrees(value.device):
        return sample_triton(value, grid, locations, weights)
    return sample_torch(value, grid, locations, weights)


_agrees: dict[torch.device, bool] = {}  # by CUDA device


def _triton_agrees(device: torch.device) -> bool:
    if torch.compiler.is_exporting():
        return False
    if device not in _agrees and not torch.compiler.is_compiling():
        _agrees[device] = _compare_with_triton(device)
    return _agrees.get(device, False)


def _compare_with_triton(device: torch.device) -> bool:
    """Whether the Triton kernel gives the torch kernel's output and gradients on a device."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 12, 2, 6), (1, 40, 2, 4, 2), (1, 40, 2, 4))
    given = [torch.rand(shape, generator=generator).to(device) for shape in shapes]
    results = []
    try:
        for kernel in (sample_torch, sample_triton):
            value, locations, weights = (t.clone().requires_grad_() for t in given)
            with torch.inference_mode(False), torch.enable_grad():
                out = kernel(value, (3, 4), locations, weights)
                results.append([out, *torch.autograd.grad(out.square().sum(), [value, locations, weights])])
        agrees = all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(*results, strict=True))
        reason = "its results differ from the torch kernel's"
    except Exception as error:  # noqa: BLE001  a compiler, a driver or an old device: whatever it is, torch's runs
        agrees, reason = False, f"{type(error).__name__}: {error}"
    if not agrees:
        logger.warning("the Triton sampling kernel is not used on %s: %s", device, reason)
    return agrees


KERNELS: dict[str, Kernel] = {"torch": sample_torch, "triton": sample_triton}


def choose_kernel(name: str) -> Kernel:
    """Return the sampling kernel called `name`; `auto` is the fastest that works where it is called.

    Raises:
        ValueError: There is no such kernel.
    """
    if name != "auto" and name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}; known kernels: auto, {', '.join(KERNELS)}")
    return sample_auto if name == "auto" else KERNELS[name]


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Return a region in which operations on the device of `x` keep the dtype that they are given."""
    # The meta device, where costs are counted, knows no autocast. Asking torch what a device knows breaks the graph.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 (or better) whatever the dtype of its input and its parameters.

    The parameters are cast in the call of their own module: hooks that gather sharded parameters see it, and the
    module itself never changes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x (..., in_features)`; returns `(..., out_features)`, at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with no_autocast(x):
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)


def cell_centres(grid: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return x and y of the cell centres of a grid, each `(H*W,)` in units of its map (0 .. 1), typed as `like`."""
    h, w = grid
    x = (torch.arange(w, dtype=like.dtype, device=like.device) + 0.5) / w
    y = (torch.arange(h, dtype=like.dtype, device=like.device) + 0.5) / h
    return x.repeat(h), y.repeat_interleave(w)


class DeformableCrossAttention(nn.Module):
    """Each query samples a few learned points around its own place in the other branch's map.

    The module works in float32 also inside an autocast region: sampling positions need more digits than bf16 has.

    Args:
        dim: Channels of the query and of the result.
        feat_dim: Channels of the features attended to.
        num_heads: Heads; must divide the width of the values.
        points: Points per head and query.
        value_ratio: Width of the values, as a share of `dim`.
        kernel: Sampling kernel, `auto` or a key of `KERNELS`.

    Raises:
        ValueError: The values cannot be split into heads, or the kernel is unknown.
    """

    def __init__(
        self,
        dim: int,
        feat_dim: int,
        num_heads: int,
        points: int = 4,
        value_ratio: float = 0.5,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        value_dim = int(dim * value_ratio)
        if not value_dim or value_dim % num_heads:
            raise ValueError(
                f"value width {value_dim} (= {dim} channels x value_ratio {value_ratio}) cannot be split into "
                f"{num_heads} heads"
            )
        self.num_heads = num_heads
        self.points = points
        self.sample = choose_kernel(kernel)
        self.sampling_offsets = Float32Linear(dim, num_heads * points * 2)
        self.attention_weights = Float32Linear(dim, num_heads * points)
        self.value_proj = Float32Linear(feat_dim, value_dim)
        self.output_proj = Float32Linear(value_dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start like Deformable DETR: head h looks in its own direction, point p is p + 1 cells away, equal weights."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        with torch.no_grad():
            nn.init.zeros_(self.sampling_offsets.weight)
            self.sampling_offsets.bias.copy_((directions[:, None] * steps[:, None]).flatten())
            for layer in (self.attention_weights, self.value_proj, self.output_proj):
                nn.init.zeros_(layer.bias)
            nn.init.zeros_(self.attention_weights.weight)
            nn.init.xavier_uniform_(self.value_proj.weight)
            nn.init.xavier_uniform_(self.output_proj.weight)

    def forward(self, query: Tensor, feat: Tensor, query_grid: tuple[int, int], feat_grid: tuple[int, int]) -> Tensor:
        """Attend from one token grid to another.

        Args:
            query: `(B, Hq*Wq, dim)`.
            feat: `(B, Hf*Wf, feat_dim)`.
            query_grid: `(Hq, Wq)`.
            feat_grid: `(Hf, Wf)`.

        Returns:
            `(B, Hq*Wq, dim)` in the dtype of `query`.
        """
        with no_autocast(query):
            value = self.value_proj(feat).unflatten(-1, (self.num_heads, -1))
            offsets = self.sampling_offsets(query).unflatten(-1, (self.num_heads, self.points, 2))
            weights = self.attention_weights(query).unflatten(-1, (self.num_heads, self.points))
            # Over the first dimension: a softmax over a last one as short as the points is several times slower.
            weights = weights.movedim(-1, 0).softmax(0).movedim(0, -1)
            x, y = cell_centres(query_grid, like=offsets)
            locations = torch.stack(
                [x[:, None, None] + offsets[..., 0] / feat_grid[1], y[:, None, None] + offsets[..., 1] / feat_grid[0]],
                dim=-1,
            )
            attended = self.sample(value, feat_grid, locations, weights)
            return self.output_proj(attended).to(query.dtype)

"""Measuring models: the machine's matrix-multiply peak, the time of every part, the memory of live tensors."""

import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import LayerNorm2d, RmsNorm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from piip.attention import CrossAttention, SelfAttention
from piip.branches import Branch
from piip.deformable import DeformableCrossAttention

# What the time of a part goes to; each kind by the modules whose calls are timed.
KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "self-attention": (SelfAttention,),
    "cross-attention": (DeformableCrossAttention, CrossAttention),
    "norms": (nn.LayerNorm, nn.GroupNorm, LayerNorm2d, RmsNorm),
}


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was given; CPUs always have."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds that pass, and seconds that the process computes (all its threads): the latter for busy machines."""


def seconds(call: Callable[[], Any], device: torch.device, clock: str = "wall") -> float:
    """Return how long a call takes by one of `CLOCKS`, the device's work included."""
    now = CLOCKS[clock]
    synchronise(device)
    start = now()
    call()
    synchronise(device)
    return now() - start


class MatmulPeak:
    """The best rate of a square matrix multiplication seen so far, in multiply-adds per second.

    Args:
        dtype: Type of the matrices.
        device: Where they are.
        side: Their side; by default large enough that a call takes a good tenth of a second on a CPU core.
        clock: See `CLOCKS`.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, side: int | None = None, clock: str = "wall") -> None:
        self.clock = clock
        side = side or (8192 if device.type == "cuda" else 2560)
        self.device, self.macs, self.rate = device, side**3, 0.0
        self._factors = [torch.randn(side, side, device=device).to(dtype) for _ in range(2)]
        self._out = torch.empty_like(self._factors[0])
        self.measure()  # the first call also loads libraries; what counts is the best one

    def measure(self) -> float:
        """Multiply once more; return the best rate so far."""
        with torch.inference_mode():
            taken = seconds(lambda: torch.mm(*self._factors, out=self._out), self.device, self.clock)
        self.rate = max(self.rate, self.macs / taken)
        return self.rate


class PeakMemory(TorchDispatchMode):
    """Count the bytes of live tensors: `peak` is their largest sum so far, the given ones included.

    Temporary buffers inside an operator are not seen, nor is what an allocator keeps for later. Works on fake tensors
    too, which need no memory.

    Args:
        held: Tensors that live already (parameters, inputs).
    """

    def __init__(self, held: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        for tensor in held:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@contextmanager
def timed_parts(
    model: Any, parts: Mapping[str, Sequence[nn.Module]], clock: str = "wall"
) -> Iterator[dict[str, float]]:
    """Collect how long the parts of a model take while the region runs, in seconds, calls summed up.

    Beside the parts, the kinds of `KINDS` and `sampling` are timed: they lie inside the parts. Timing every call costs
    time itself, so the sum is more than the model takes without it.

    Args:
        model: A model with a `pyramid`.
        parts: Modules of every part, see `piip.budget.parts_of`.
        clock: See `CLOCKS`.
    """
    now = CLOCKS[clock]
    device = next(model.parameters()).device
    spent: dict[str, float] = defaultdict(float)

    def timed(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            synchronise(device)
            start = now()
            out = call(*args, **kwargs)
            synchronise(device)
            spent[name] += now() - start
            return out

        return wrapper

    targets: list[tuple[Any, str, str]] = []
    for name, modules in parts.items():
        for module in modules:
            # Branches are entered by their methods, and never called.
            methods = ("embed", "run") if isinstance(module, Branch) else ("forward",)
            targets += [(module, method, name) for method in methods]
    for module in model.modules():
        targets += [(module, "forward", kind) for kind, types in KINDS.items() if isinstance(module, types)]
        if isinstance(module, DeformableCrossAttention):
            targets.append((module, "sample", "sampling"))
    before = [vars(owner).get(attribute) for owner, attribute, _ in targets]
    for owner, attribute, name in targets:
        setattr(owner, attribute, timed(getattr(owner, attribute), name))
    try:
        yield spent
    finally:
        for (owner, attribute, _), own in reversed(list(zip(targets, before, strict=True))):
            if own is None:  # a method of its class
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, own)

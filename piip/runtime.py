"""Running on CUDA devices: work on parallel streams, and captured graphs for inference."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@cache
def _side_stream(device: torch.device, index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def run_in_parallel(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[Any]:
    """Run independent calls, the first on the current stream and each other one on a stream of its own.

    The backward pass of each call takes the stream of its forward pass, as autograd always does.

    Args:
        calls: They read tensors that are ready on the current stream, and nothing of each other.
        device: The CUDA device of the tensors.

    Returns:
        Their results, ready on the current stream.
    """
    current = torch.cuda.current_stream(device)
    sides = [_side_stream(device, i) for i in range(1, len(calls))]
    for side in sides:
        side.wait_stream(current)
    others = []
    for call, side in zip(calls[1:], sides, strict=True):
        with torch.cuda.stream(side):
            others.append(call())
    results = [calls[0](), *others]
    for side, result in zip(sides, others, strict=True):
        # The inputs need no mark of their own: nothing on the current stream goes on before all side streams are done.
        current.wait_stream(side)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                leaf.record_stream(current)  # else its memory could be given away while the current stream reads it
    return results


class CudaGraph:
    """A model's inference on one input shape, captured once and replayed without Python.

    Args:
        call: The model, in evaluation mode, its weights in place: they are read where they lie.
        images: An example of the input, on a CUDA device.

    Raises:
        ValueError: The example is not on a CUDA device.
    """

    def __init__(self, call: Callable[[Tensor], Any], images: Tensor) -> None:
        if not images.is_cuda:
            raise ValueError(f"CUDA graphs need images on a CUDA device, these are on {images.device}")
        self.images = images.clone()
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(images.device)
        side.wait_stream(torch.cuda.current_stream(images.device))
        with torch.no_grad():
            # Libraries allocate and choose kernels in their first calls, which must not be part of the graph.
            with torch.cuda.stream(side):
                for _ in range(3):
                    call(self.images)
            torch.cuda.current_stream(images.device).wait_stream(side)
            with torch.cuda.graph(self.graph):
                self.outputs = call(self.images)

    def __call__(self, images: Tensor) -> Any:
        """Return the model's outputs for images of the captured shape; the next call overwrites them.

        Raises:
            ValueError: Another shape.
        """
        if images.shape != self.images.shape:
            raise ValueError(
                f"the graph was captured for images of {tuple(self.images.shape)}, got {tuple(images.shape)}: capture "
                "one graph per shape"
            )
        self.images.copy_(images)
        self.graph.replay()
        return self.outputs

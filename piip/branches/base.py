"""What the pyramid knows of a branch, and the register of branch types."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from piip.errors import SpecError, unknown
from piip.tokens import Tokens


class Branch(nn.Module, ABC):
    """A pretrained network that the pyramid runs piece by piece. Everything the pyramid knows of a branch is here.

    Attributes:
        dims: Channels of the tokens after each block.
        strides: Input pixels per token after each block.
        grad_checkpointing: Whether blocks recompute their activations in the backward pass.
        layer_decay: Whether layer-wise learning-rate decay applies to this kind of network, whose parameter names then
            say the block, see `piip.optim`.
    """

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    grad_checkpointing: bool = False
    layer_decay: bool = False

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.dims)

    @abstractmethod
    def embed(self, images: Tensor) -> Tokens:
        """Turn images `(B, 3, H, W)` into the tokens that block 0 expects."""

    @abstractmethod
    def run(self, tokens: Tokens, start: int, stop: int) -> Tokens:
        """Run blocks `start` to `stop - 1`; `run(run(t, 0, i), i, j)` equals `run(t, 0, j)`."""

    def build_norm(self) -> nn.Module:
        """Return a new norm for the tokens after the last block, as a classifier of this kind of network has it."""
        return nn.LayerNorm(self.dims[-1], eps=1e-6)

    def call_block(self, block: nn.Module, *args: Any) -> Any:
        """Call a block, with its activations recomputed in the backward pass where checkpointing is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)
        return block(*args)


BranchFactory = Callable[..., Branch]
_FACTORIES: dict[str, tuple[BranchFactory, dict[str, Any]]] = {}


def register_branch(name: str, **defaults: Any) -> Callable[[BranchFactory], BranchFactory]:
    """Return a decorator that makes a branch type known by name.

    Args:
        name: What specs call it.
        **defaults: Options that this name stands for; a spec may override each.

    Raises:
        ValueError: The name is taken.
    """
    if name in _FACTORIES:
        raise ValueError(f"a branch type called {name!r} exists already")

    def add(factory: BranchFactory) -> BranchFactory:
        _FACTORIES[name] = (factory, defaults)
        return factory

    return add


def list_branches() -> list[str]:
    """Return the names of the known branch types."""
    return sorted(_FACTORIES)


def create_branch(name: str, **options: Any) -> Branch:
    """Build a branch by the name of its type.

    Args:
        name: A name from `list_branches`, or timm's name of a ViT or ConvNeXt, see `piip.branches.timm`.
        **options: Options of the type's factory, over the defaults that the name stands for.

    Raises:
        SpecError: Unknown name, or an option that the type does not have, or lacks.
    """
    if name not in _FACTORIES:
        from piip.branches.timm import is_timm_model, timm_branch

        if not is_timm_model(name):
            raise SpecError(f"{unknown('branch type', name, list_branches())}; or any ViT or ConvNeXt by timm's name")
        return timm_branch(name, **options)
    factory, defaults = _FACTORIES[name]
    options = {**defaults, **options}
    parameters = inspect.signature(factory).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in options:
            if key not in parameters:
                raise SpecError(unknown(f"option of branch type {name!r}", key, list(parameters)))
    missing = [k for k, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if missing := [key for key in missing if key not in options]:
        raise SpecError(f"branch type {name!r} needs the option(s) {', '.join(missing)}")
    return factory(**options)

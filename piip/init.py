"""Initialisation shared by everything that the pyramid adds to its pretrained branches."""

import math

from torch import nn


def init_layer(module: nn.Module) -> None:
    """Initialise one layer in place; use with `Module.apply`.

    Linear: truncated normal of std 0.02. Convolutions, transposed ones too: normal of std sqrt(2 / fan_out). Biases
    zero. Norm layers start as identities by themselves.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)

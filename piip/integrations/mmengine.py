"""The pyramid as an mmengine backbone, and layer-wise learning-rate decay for it.

Importing this module registers both in mmengine's root registries, where mmdet and mmseg find them, and puts the
stand-in for mmcv's compiled ops in place. Configs import it first:
`custom_imports = dict(imports=["piip.integrations.mmengine"])`.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from torch import Tensor, nn

from piip.branches.pretrained import find_weights, load_pretrained
from piip.integrations import mmcv_ops
from piip.models import DensePyramid
from piip.optim import layer_decay, param_groups
from piip.zoo.specs import PyramidSpec

mmcv_ops.install()


@MODELS.register_module()
class PIIPBackbone(DensePyramid):
    """`DensePyramid` for mmengine models: `init_weights` loads the pretrained weights of its branches.

    Args:
        spec: See `DensePyramid`.
        pretrained: Folder with the branches' pretrained weights (the `weights` of each `BranchSpec` are file names in
            it); `$PIIP_PRETRAINED` replaces it. None starts from random weights.
        on_meta: Build it without memory, for `piip.load_checkpoint` to fill.
        **options: Further options of `DensePyramid`.
    """

    def __init__(
        self,
        spec: str | PyramidSpec | Mapping[str, Any],
        *,
        pretrained: str | None = None,
        on_meta: bool = False,
        **options: Any,
    ) -> None:
        with torch.device("meta") if on_meta else nullcontext():
            super().__init__(spec, **options)
        self.pretrained = pretrained

    compute_dtype: torch.dtype | None = None
    """What a forward pass is cast to, where that is safe; its maps are float32 all the same. None: nothing is cast."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """See `DensePyramid.forward`."""
        if self.compute_dtype is None:
            return super().forward(images)
        with torch.autocast(images.device.type, self.compute_dtype):
            maps = super().forward(images)
        return [level.float() for level in maps]

    def init_weights(self) -> None:
        """Load the pretrained weights of every branch that names some; mmengine calls this before training.

        Raises:
            CheckpointError: A file is missing, cannot be read or does not fit its branch.
        """
        if self.pretrained is None:
            return
        instead = "start from random weights with --cfg-options model.backbone.pretrained=None"
        paths = find_weights([branch.weights for branch in self.spec.branches], self.pretrained, instead)
        for branch, path in zip(self.pyramid.branches, paths, strict=True):
            if path is not None:
                load_pretrained(branch, path)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning-rate decay for a model whose backbone is a pyramid.

    `paramwise_cfg` holds `layer_decay_rate` alone; depths follow from the spec. See `piip.optim.layer_decay`.
    """

    def add_params(self, params: list[dict], module: nn.Module, **_: Any) -> None:
        """Fill `params` with the parameter groups of `module`.

        Raises:
            ValueError: `paramwise_cfg` has another key, or the model has no pyramid as its backbone.
        """
        if set(self.paramwise_cfg) != {"layer_decay_rate"}:
            raise ValueError(
                f"paramwise_cfg of LayerDecayOptimWrapperConstructor takes layer_decay_rate alone, got "
                f"{sorted(self.paramwise_cfg)}"
            )
        if not isinstance(getattr(module, "backbone", None), DensePyramid):
            raise ValueError("LayerDecayOptimWrapperConstructor needs a model whose backbone is a PIIPBackbone")
        groups = layer_decay(module, self.paramwise_cfg["layer_decay_rate"])
        named = module.named_parameters()
        params.extend(param_groups(named, groups, self.base_lr, self.base_wd or 0.0))

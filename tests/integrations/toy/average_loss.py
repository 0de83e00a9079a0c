"""A pyramid with a head whose loss is an average over images: what two processes and one must agree on."""

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import nn


@MODELS.register_module()
class AverageLossDetector(BaseModel):
    """Tells the pixels that an instance covers from the others; every image counts the same, nothing is sampled."""

    def __init__(self, backbone: dict, data_preprocessor: dict, **_) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.backbone = MODELS.build(backbone)
        channels = self.backbone.out_channels[0]
        self.head = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.GELU(), nn.Conv2d(32, 1, 1)
        )

    def forward(self, inputs: torch.Tensor, data_samples: list, mode: str = "tensor"):
        logits = self.head(self.backbone(inputs)[0])
        covered = [
            torch.as_tensor(sample.gt_instances.masks.to_ndarray().any(0), dtype=logits.dtype, device=logits.device)
            for sample in data_samples
        ]
        target = F.adaptive_avg_pool2d(torch.stack(covered)[:, None], logits.shape[-2:])
        return {"loss": F.binary_cross_entropy_with_logits(logits, target)}

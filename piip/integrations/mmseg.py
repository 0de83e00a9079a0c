"""mmseg's segmentor on a pyramid, with the original's precision, and slide inference that says what it cannot do.

Configs import this module, which brings `piip.integrations.mmengine` along:
`custom_imports = dict(imports=["piip.integrations.mmseg"])`.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

import piip.integrations.mmengine  # noqa: F401  (stands in for mmcv's compiled ops, so it comes before mmseg)

# isort: split
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from torch import Tensor

from piip.deformable import no_autocast
from piip.errors import RunError


@MODELS.register_module()
class PIIPEncoderDecoder(EncoderDecoder):
    """mmseg's EncoderDecoder whose heads stay in float32 beside a backbone in bfloat16 (`--amp`), as the original's.

    Its slide inference refuses an image that is smaller than the window: mmseg would decode the part that is there,
    at a size that the model was not trained for.
    """

    def extract_feat(self, inputs: Tensor) -> list[Tensor]:
        """Return the maps of the backbone and the neck, in float32."""
        maps = [level.float() for level in self.backbone(inputs)]
        with self._precision(inputs):
            return self.neck(maps) if self.with_neck else maps

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """Return the losses of the heads, computed in float32."""
        maps = self.extract_feat(inputs)
        with self._precision(inputs):
            losses = self._decode_head_forward_train(maps, data_samples)
            if self.with_auxiliary_head:
                losses.update(self._auxiliary_head_forward_train(maps, data_samples))
        return losses

    def encode_decode(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Return the logits `(B, classes, H, W)`, computed by the head in float32."""
        maps = self.extract_feat(inputs)
        with self._precision(inputs):
            return self.decode_head.predict(maps, batch_img_metas, self.test_cfg)

    def _precision(self, inputs: Tensor) -> AbstractContextManager:
        # DeepSpeed's bfloat16 holds the heads' weights in bfloat16 too: there they stay in the region that casts.
        whole = next(self.decode_head.parameters()).dtype == torch.float32
        return no_autocast(inputs) if whole else nullcontext()

    def slide_inference(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Return the logits `(B, classes, H, W)`, averaged where windows overlap.

        Raises:
            RunError: An image is smaller than the window.
        """
        window = tuple(self.test_cfg.crop_size)
        size = tuple(inputs.shape[-2:])
        if size[0] < window[0] or size[1] < window[1]:
            image = batch_img_metas[0].get("img_path") or "the image"
            raise RunError(
                f"{image} has {_size(size)} pixels (height x width) when it reaches the model, less than "
                f"the slide window of {_size(window)}; let the test pipeline enlarge it "
                f"(ResizeShortestEdge with scale={max(window)}), or set a smaller window with --cfg-options "
                "model.test_cfg.crop_size=[HEIGHT,WIDTH], or model.test_cfg.mode=whole"
            )
        return super().slide_inference(inputs, batch_img_metas)


def _size(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))

"""mmseg's segmentor on a pyramid, with slide inference that says what it cannot do.

Configs import this module, which brings `piip.integrations.mmengine` along:
`custom_imports = dict(imports=["piip.integrations.mmseg"])`.
"""

import piip.integrations.mmengine  # noqa: F401  (stands in for mmcv's compiled ops, so it comes before mmseg)

# isort: split
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from torch import Tensor

from piip.errors import OwnError


@MODELS.register_module()
class PIIPEncoderDecoder(EncoderDecoder):
    """mmseg's EncoderDecoder whose slide inference refuses an image that is smaller than the window.

    mmseg would decode the part that is there, at a size that the model was not trained for.
    """

    def slide_inference(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Return the logits `(B, classes, H, W)`, averaged where windows overlap.

        Raises:
            OwnError: An image is smaller than the window.
        """
        window = tuple(self.test_cfg.crop_size)
        size = tuple(inputs.shape[-2:])
        if size[0] < window[0] or size[1] < window[1]:
            image = batch_img_metas[0].get("img_path") or "the image"
            raise OwnError(
                f"{image} has {_size(size)} pixels (height x width) when it reaches the model, less than "
                f"the slide window of {_size(window)}; let the test pipeline enlarge it "
                f"(ResizeShortestEdge with scale={max(window)}), or set a smaller window with --cfg-options "
                "model.test_cfg.crop_size=[HEIGHT,WIDTH], or model.test_cfg.mode=whole"
            )
        return super().slide_inference(inputs, batch_img_metas)


def _size(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))

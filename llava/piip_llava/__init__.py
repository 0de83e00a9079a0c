"""PIIP-LLaVA: parameter-inverted image pyramids as vision towers of a language model (arXiv 2501.07783)."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from piip_llava.config import PiipLlavaConfig
from piip_llava.errors import InputError
from piip_llava.modeling import PiipLlavaForConditionalGeneration
from piip_llava.processing import PiipLlavaImageProcessor, PiipLlavaProcessor

# transformers finds a saved model's classes by these.
AutoConfig.register(PiipLlavaConfig.model_type, PiipLlavaConfig)
for _auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
    _auto.register(PiipLlavaConfig, PiipLlavaForConditionalGeneration)
AutoProcessor.register(PiipLlavaConfig, PiipLlavaProcessor)
AutoImageProcessor.register(PiipLlavaConfig, slow_image_processor_class=PiipLlavaImageProcessor)

__all__ = [
    "InputError",
    "PiipLlavaConfig",
    "PiipLlavaForConditionalGeneration",
    "PiipLlavaImageProcessor",
    "PiipLlavaProcessor",
]

"""PIIP-LLaVA: parameter-inverted image pyramids as vision towers of a language model (arXiv 2501.07783)."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from piip_llava.config import PiipLlavaConfig
from piip_llava.modeling import PiipLlavaForConditionalGeneration

AutoConfig.register(PiipLlavaConfig.model_type, PiipLlavaConfig)
for _auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
    _auto.register(PiipLlavaConfig, PiipLlavaForConditionalGeneration)

__all__ = ["PiipLlavaConfig", "PiipLlavaForConditionalGeneration"]

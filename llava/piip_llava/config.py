"""Configuration of a PIIP-LLaVA model: tower, projector and language model, whole."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from piip_llava.rows import IMAGENET, ROWS
from piip_llava.tower import complete_tower


class PiipLlavaConfig(PretrainedConfig):
    """Everything that is needed to build the model again.

    Args:
        text_config: The language model's own configuration, or a mapping with its fields.
        tower: Options of the tower, see `piip_llava.tower.build_tower`. What is saved holds the tower's whole
            structure, not the name of a row.
        projector: Options of the projector, see `piip_llava.projector.build_projector`.
        image_token_id: Id that stands for one token of an image in `input_ids`. It may lie outside of the language
            model's vocabulary, which then can never produce it.
        image_tokens: Tokens per image; follows from tower and projector, and is written down for tools.
        image_aspect_ratio: `pad` (to a square) or `square` (crop), as the model was trained.
        image_mean: Mean that images are normalised with.
        image_std: Standard deviation that images are normalised with.
        sequence_length: Longest sequence in training, image tokens included; longer ones are cut.
        **kwargs: Options of `PretrainedConfig`.
    """

    model_type = "piip_llava"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012
    is_composition = True

    def __init__(
        self,
        text_config: PretrainedConfig | Mapping[str, Any] | None = None,
        tower: Mapping[str, Any] | None = None,
        projector: Mapping[str, Any] | None = None,
        image_token_id: int = 32000,
        image_tokens: int | None = None,
        image_aspect_ratio: str = "pad",
        image_mean: tuple[float, ...] = IMAGENET["image_mean"],
        image_std: tuple[float, ...] = IMAGENET["image_std"],
        sequence_length: int = 2048,
        **kwargs: Any,
    ) -> None:
        default = ROWS["piip-llava_clip-bl_512-256_7B"]
        if text_config is None:
            text_config = {"model_type": "llama"}
        if isinstance(text_config, Mapping):
            text_config = AutoConfig.for_model(**{"model_type": "llama", **text_config})
        self.text_config = text_config
        self.tower = complete_tower(tower or default.tower)
        self.projector = dict(projector or default.projector)
        self.image_token_id = image_token_id
        self.image_tokens = image_tokens
        self.image_aspect_ratio = image_aspect_ratio
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.sequence_length = sequence_length
        kwargs.setdefault("tie_word_embeddings", bool(getattr(text_config, "tie_word_embeddings", False)))
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Size of the language model's vocabulary."""
        return self.get_text_config().vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the language model; Trainer and DeepSpeed ask for it."""
        return self.get_text_config().hidden_size

"""PIIP-LLaVA: a vision tower, a projector and any causal language model of transformers."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from piip.branches.pretrained import load_pretrained
from piip.errors import CheckpointError
from piip_llava import released
from piip_llava.config import PiipLlavaConfig
from piip_llava.projector import build_projector
from piip_llava.tower import build_tower, num_tokens


class PiipLlavaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A language model that sees: image tokens take the places that `image_token_id` holds in `input_ids`.

    Args:
        config: The configuration.
        language_model: A language model to take as it is; built from the configuration, with random weights, by
            default.

    Raises:
        SpecError: Tower or projector cannot be built.
    """

    config_class = PiipLlavaConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_attention_backend = True
    _supports_cache_class = True
    _skip_keys_device_placement = "past_key_values"

    def __init__(self, config: PiipLlavaConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        with _without_zero_init():  # tower and projector bring their own initialisation, which needs whole parameters
            self.vision_tower = build_tower(config.tower)
            self.projector = build_projector(
                config.projector, self.vision_tower.dims, config.get_text_config().hidden_size
            )
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.get_text_config())
        if self.language_model.config._attn_implementation is None:
            # A new configuration around one with a choice of attention clears that choice; without any, the language
            # model would have no causal mask, and learn to look its answers up.
            self.language_model.set_attn_implementation(config._attn_implementation or "sdpa")
        # A language model inside names its own shared, missing and split parts; they apply here under a prefix.
        tied = getattr(self.language_model, "_tied_weights_keys", None) or {}
        prefix = "language_model."
        if isinstance(tied, Mapping):
            self._tied_weights_keys = {prefix + a: prefix + b for a, b in tied.items()}
        else:
            self._tied_weights_keys = [prefix + name for name in tied]
        self._no_split_modules = [
            *(getattr(self.language_model, "_no_split_modules", None) or []),
            "ViTBlock",
            "InteractionStage",
            "ConvNeXtBlock",
        ]
        config.image_tokens = self.image_tokens
        self.post_init()

    @property
    def image_tokens(self) -> int:
        """Tokens that an image becomes."""
        return num_tokens(self.vision_tower, self.projector.out_size)

    def init_weights(self) -> None:
        """Keep what is there: every part initialised itself, and a given language model holds weights."""
        self.tie_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave a module as its constructor initialised it; `_fill_missing` covers what a checkpoint lacks."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the language model's output layer."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's output layer."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        """Return the language model."""
        return self.language_model

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        """Recompute activations in the backward pass, of language model and tower alike."""
        super()._set_gradient_checkpointing(enable=enable, **kwargs)
        self.vision_tower.set_grad_checkpointing(enable)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Map images `(N, 3, S, S)` to tokens of the language model `(N, image_tokens, width)`.

        Raises:
            ValueError: The images have another size than the tower's.
        """
        side = self.vision_tower.image_size
        if tuple(pixel_values.shape[1:]) != (3, side, side):
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape)}, the tower takes (N, 3, {side}, {side}): "
                "prepare images with this model's processor"
            )
        dtype = next(p.dtype for p in self.vision_tower.parameters())  # a projector may have none
        return self.projector(self.vision_tower(pixel_values.to(dtype)))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Return embeddings `(B, L, width)` of text `input_ids (B, L)` with images `(N, 3, S, S)` in their places.

        Raises:
            ValueError: The number of image tokens in `input_ids` is not what the images need.
        """
        places = input_ids == self.config.image_token_id
        # The id of an image token may be outside of the embedding; its row is never used.
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(places, 0))
        if pixel_values is None:
            if bool(places.any()):
                raise ValueError(
                    f"input_ids hold {int(places.sum())} image token(s) and there are no images: give pixel_values"
                )
            seeing = (*self.vision_tower.parameters(), *self.projector.parameters())
            if not (self.training and any(p.requires_grad for p in seeing)):
                return embeddings
            # Every process runs the same modules in a training step, or collective operations would wait forever.
            side = self.vision_tower.image_size
            blank = torch.zeros(1, 3, side, side, device=embeddings.device)
            return embeddings + 0 * self.encode_images(blank).sum().to(embeddings.dtype)
        features = self.encode_images(pixel_values.to(embeddings.device)).to(embeddings.dtype)
        if int(places.sum()) != features.shape[0] * features.shape[1]:
            raise ValueError(
                f"input_ids hold {int(places.sum())} image token(s), {features.shape[0]} image(s) need "
                f"{features.shape[0] * features.shape[1]} ({features.shape[1]} each): "
                "give one image per <image> placeholder, and cut no sequence inside of an image"
            )
        return embeddings.masked_scatter(places.unsqueeze(-1), features)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model.

        Args:
            input_ids: `(B, L)`, every image as `image_tokens` times `image_token_id`.
            pixel_values: `(N, 3, S, S)`, all images of the batch in reading order.
            attention_mask: `(B, L)`, as the language model takes it.
            position_ids: See the language model.
            past_key_values: See the language model.
            inputs_embeds: `(B, L, width)` in place of `input_ids`.
            labels: `(B, L)`, -100 where no loss is wanted.
            **kwargs: Further options of the language model.

        Raises:
            ValueError: Images and image tokens do not agree.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            **kwargs,
        )

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat each prompt with all of its images behind each other; transformers would repeat image by image."""
        images = kwargs.pop("pixel_values", None)
        if images is not None and expand_size > 1 and input_ids is not None:
            counts = (input_ids == self.config.image_token_id).sum(1).div(self.image_tokens).long().tolist()
            if sum(counts) == len(images):  # or `embed` says what is wrong
                images = torch.cat([part.repeat(expand_size, 1, 1, 1) for part in images.split(counts)])
        ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return ids, kwargs if images is None else {**kwargs, "pixel_values": images}

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Hand images to the first step alone: later ones find them in the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = inputs.get("past_key_values")
        if inputs.get("inputs_embeds") is None and (cache is None or cache.get_seq_length() == 0):
            inputs["pixel_values"] = pixel_values
        else:
            inputs.pop("pixel_values", None)
        return inputs

    def load_pretrained_branches(self, folder: str | Path) -> list[Path]:
        """Load the pretrained networks that the tower starts from; returns their files.

        Args:
            folder: Where the files are, under the names of the tower's spec.

        Raises:
            CheckpointError: A file is missing, or does not fit its branch.
        """
        loaded = []
        for branch, weights in self.vision_tower.branches():
            if weights is not None:
                load_pretrained(branch, _existing(Path(folder) / weights))
                loaded.append(Path(folder) / weights)
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model that was saved by `save_pretrained`, or a directory that the authors released.

        A released directory is recognised by its `config.json`; the tower's structure is looked up by the name of the
        config file in there, or given as `tower=...`. It is loaded strictly, shard by shard, and no code of it runs.

        Args:
            pretrained_model_name_or_path: A directory, or a repository of the hub.
            *args: See `PreTrainedModel.from_pretrained`.
            **kwargs: See `PreTrainedModel.from_pretrained`; and for a released directory `tower` (options of the
                tower, or the name of a row) and `vision_weights` (a file of CLIP weights, for directories that hold
                none).

        Raises:
            CheckpointError: The directory is incomplete, or holds another model.
            OSError: The hub has no such repository, or cannot be reached.
        """
        path = pretrained_model_name_or_path
        tower, vision_weights = kwargs.pop("tower", None), kwargs.pop("vision_weights", None)
        if path is not None:
            # A configuration that is given says itself what model it is.
            given = kwargs.get("config") is not None
            if released.is_released(path) if given else released.recognise(path, **kwargs):
                config, state = released.read_directory(released.fetch(path, **kwargs), tower, vision_weights)
                config = kwargs.pop("config", None) or config
                if "dtype" not in kwargs and "torch_dtype" not in kwargs:
                    kwargs["dtype"] = config.dtype if getattr(config, "dtype", None) else config.torch_dtype
                return cls.from_pretrained(None, *args, config=config, state_dict=state, **kwargs)
            if os.path.isdir(path):
                released.check_shards(path)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        model._fill_missing(info["missing_keys"])
        return (model, info) if wants_info else model

    def _fill_missing(self, missing: Any) -> None:
        """Give tower and projector what a directly built model has, wherever the checkpoint held nothing.

        transformers builds models on the meta device. What is neither in the file nor re-initialised by a rule of the
        model's then is uninitialised memory, without a warning. Here the rule is the constructors themselves.
        """
        own = ("vision_tower.", "projector.")
        persistent = self.state_dict().keys()
        names = {name for name in missing if name.startswith(own)}
        names |= {name for name, _ in self.named_buffers() if name.startswith(own) and name not in persistent}
        if not names:
            return
        with torch.device("cpu"):
            tower = build_tower(self.config.tower)
            fresh = nn.ModuleDict(
                {
                    "vision_tower": tower,
                    "projector": build_projector(
                        self.config.projector, tower.dims, self.config.get_text_config().hidden_size
                    ),
                }
            )
        source = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
        target = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name in names:
            with torch.no_grad(), _gathered(target[name]):
                target[name].copy_(source[name])


def _existing(path: Path) -> Path:
    if not path.is_file():
        sibling = path.with_name("model.safetensors")
        if sibling.is_file():
            return sibling
        raise CheckpointError(f"there are no pretrained weights at {path}: see llava/README.md for where to get them")
    return path


def _without_zero_init() -> AbstractContextManager:
    """Return a region in which DeepSpeed ZeRO-3 does not split parameters as soon as they are made."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    return _NoZeroInit()


class _NoZeroInit(AbstractContextManager):
    def __enter__(self) -> None:
        from deepspeed.runtime.zero import partition_parameters

        self._active = bool(partition_parameters.zero_init_context)
        if self._active:
            partition_parameters.shutdown_init_context()

    def __exit__(self, *_: object) -> None:
        from deepspeed.runtime.zero import partition_parameters

        if self._active:
            partition_parameters.restore_init_context()


def _gathered(parameter: Tensor) -> AbstractContextManager:
    """Return a region in which a parameter that ZeRO-3 may have split is whole."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=0)

"""Processors: images and prompts to tensors, saved beside the model."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from piip_llava import conversation, released
from piip_llava.config import PiipLlavaConfig
from piip_llava.errors import InputError
from piip_llava.images import preprocess
from piip_llava.rows import IMAGENET
from piip_llava.tokens import IMAGE, check_tokenizer, expand_images, tokenize
from piip_llava.tower import build_tower, num_tokens


class PiipLlavaImageProcessor(BaseImageProcessor):
    """Images as the tower takes them, see `piip_llava.images.preprocess`.

    Args:
        size: Side of the result in pixels.
        image_mean: Mean per channel, for values from 0 to 1.
        image_std: Standard deviation per channel.
        image_aspect_ratio: `pad` or `square`.
        **kwargs: Options of `BaseImageProcessor`.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        size: int = 512,
        image_mean: Sequence[float] = IMAGENET["image_mean"],
        image_std: Sequence[float] = IMAGENET["image_std"],
        image_aspect_ratio: str = "pad",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.image_aspect_ratio = image_aspect_ratio

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """See `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
        """Turn an image, or a list of images, into `pixel_values (N, 3, size, size)`."""
        arrays = [self.one(image) for image in (images if isinstance(images, (list, tuple)) else [images])]
        return BatchFeature({"pixel_values": np.stack(arrays)}, tensor_type=return_tensors)

    def one(self, image: Any) -> np.ndarray:
        """Turn one image (Pillow, an array `(H, W, 3)` of bytes, or a path) into `(3, size, size)`, float32."""
        return preprocess(open_image(image), self.size, self.image_mean, self.image_std, self.image_aspect_ratio)


def open_image(image: Any) -> Image.Image:
    """Return an image in Pillow's form, as its pixels are stored: models were trained without a camera's rotation.

    Raises:
        InputError: It cannot be read.
    """
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return Image.fromarray(np.asarray(image))
    if isinstance(image, Image.Image):
        return image
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"the image {image} cannot be read: {error}") from None


class PiipLlavaProcessor(ProcessorMixin):
    """Prompts with images to the model's inputs.

    Args:
        image_processor: The image processor.
        tokenizer: A fast tokenizer.
        image_tokens: Tokens per image, as the model says.
        image_token_id: Id of an image token, as the model says.
        context: Longest prompt, image tokens included; None for no limit.
        chat_template: Template of `apply_chat_template`; `v1` by default.
        **kwargs: Ignored.

    Raises:
        InputError: The tokenizer lacks a token that is needed.
    """

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012
    image_processor_class = "PiipLlavaImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: PiipLlavaImageProcessor,
        tokenizer: Any,
        image_tokens: int = 1024,
        image_token_id: int = 32000,
        context: int | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_tokenizer(tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens
        self.image_token_id = image_token_id
        self.context = context
        self.chat_template = chat_template or conversation.chat_template(tokenizer.eos_token)

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, return_tensors: str = "pt", **_: Any
    ) -> BatchFeature:
        """Turn prompts into inputs of the model; several are padded on the left, as generation needs it.

        Args:
            images: An image or a list of images, one per `<image>` in the prompts, in reading order.
            text: A prompt or a list of prompts.
            return_tensors: Always `pt`.
            **_: Ignored.

        Returns:
            `input_ids` and `attention_mask (B, L)`, and `pixel_values (N, 3, S, S)` where there are images.

        Raises:
            InputError: Images and placeholders do not agree, or a prompt is longer than the context.
        """
        if text is None:
            return self.image_processor(images)
        texts = [text] if isinstance(text, str) else list(text)
        pictures = flatten(images)
        wanted = sum(value.count(IMAGE) for value in texts)
        if wanted != len(pictures):
            raise InputError(
                f"the prompt has {wanted} {IMAGE} placeholder(s) and {len(pictures)} image(s) were given: "
                "give one image for each"
            )
        rows = [self.encode(value) for value in texts]
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        data: dict[str, Any] = {
            "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        }
        if pictures:
            data["pixel_values"] = self.image_processor(pictures)["pixel_values"]
        return BatchFeature(data)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt, images expanded.

        Raises:
            InputError: The prompt is longer than the context.
        """
        ids, _ = tokenize(self.tokenizer, text)
        row, _, _ = expand_images(ids, None, image_token_id=self.image_token_id, count=self.image_tokens)
        if self.context is not None and len(row) > self.context:
            raise InputError(
                f"the prompt is {len(row)} tokens long ({self.image_tokens} per image), the model's context is "
                f"{self.context}: ask with fewer images or words"
            )
        return row

    def decode(self, ids: Any, **kwargs: Any) -> str:
        """Return the text of ids; image tokens are left out."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        return self.tokenizer.decode(
            [i for i in ids if i != self.image_token_id], **{"skip_special_tokens": True, **kwargs}
        )

    def batch_decode(self, rows: Any, **kwargs: Any) -> list[str]:
        """Return the text of every row of ids."""
        return [self.decode(row, **kwargs) for row in rows]

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Turn messages into a prompt, or into inputs of the model.

        Args:
            conversation: `[{"role": "user" or "assistant", "content": text or parts}]`; a part is
                `{"type": "text", "text": ...}` or `{"type": "image", "image": an image or a path}`.
            chat_template: Another template.
            tokenize: Return inputs instead of text; their images are those of the messages.
            add_generation_prompt: End where the answer begins.
            **kwargs: Options of the tokenizer's `apply_chat_template`.
        """
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        rows = conversation if batched else [conversation]
        names = ("return_dict", "return_tensors", "processor_kwargs", "padding")
        options = {key: value for key, value in kwargs.items() if key not in names}
        texts = [
            self.tokenizer.apply_chat_template(
                row,
                chat_template=chat_template or self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **options,
            )
            for row in rows
        ]
        if not tokenize:
            return texts if batched else texts[0]
        images = [
            part.get("image") or part.get("path") or part.get("url")
            for row in rows
            for message in row
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "image"
        ]
        return self(images=images, text=texts)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what calling the processor returns."""
        return ["input_ids", "attention_mask", "pixel_values"]

    @classmethod
    def from_model(cls, config: PiipLlavaConfig, tokenizer: Any, **kwargs: Any) -> "PiipLlavaProcessor":
        """Return the processor that a model of this configuration needs."""
        with torch.device("meta"):
            tower = build_tower(config.tower)
        tokens = num_tokens(tower, config.projector.get("out_size"))
        images = PiipLlavaImageProcessor(
            tower.image_size, config.image_mean, config.image_std, config.image_aspect_ratio
        )
        kwargs.setdefault("context", getattr(config.get_text_config(), "max_position_embeddings", None))
        return cls(images, tokenizer, image_tokens=tokens, image_token_id=config.image_token_id, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "PiipLlavaProcessor":
        """Load the processor of a model: one that was saved, or the one that a released directory needs.

        Args:
            pretrained_model_name_or_path: A directory, or a repository of the hub.
            **kwargs: Options of `AutoTokenizer.from_pretrained`; `tower` as in the model's `from_pretrained`.

        Raises:
            InputError: The tokenizer lacks a token that is needed.
            CheckpointError: A released directory names a tower of no published row; or it is another kind of model's.
            OSError: The hub has no such repository, or cannot be reached.
        """
        path = pretrained_model_name_or_path
        tower = kwargs.pop("tower", None)
        if released.recognise(path, **kwargs):
            path = released.fetch(path, ("*.json", "*.model", "*.txt"), **kwargs)
            config = released.released_config(released.read_fields(path), tower)
            return cls.from_model(config, AutoTokenizer.from_pretrained(path, **kwargs))
        hub = {name: kwargs[name] for name in (*released.HUB_OPTIONS, "subfolder") if name in kwargs}
        config = PiipLlavaConfig.from_pretrained(path, **hub)
        tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
        return cls.from_model(config, tokenizer, chat_template=getattr(tokenizer, "chat_template", None))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save tokenizer, template and image options; the model's own `config.json` holds the rest.

        Args:
            save_directory: The directory of the model.
            push_to_hub: Upload too; `kwargs` then are options of `push_to_hub`.
            **kwargs: See above.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(save_directory)
        self.image_processor.save_pretrained(save_directory)
        if push_to_hub:
            self.tokenizer.push_to_hub(**kwargs)
        return [str(file) for file in Path(save_directory).iterdir()]


def flatten(images: Any) -> list[Any]:
    """Return a flat list of images from none, one, a list, or a list of lists."""
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for item in images for image in flatten(item)]

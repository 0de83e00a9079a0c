"""Asking a model about an image: one question, or a conversation, with the answer as it is written."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TextIteratorStreamer

from piip_llava.errors import InputError
from piip_llava.modeling import PiipLlavaForConditionalGeneration
from piip_llava.processing import PiipLlavaProcessor, open_image


def load(
    path: str, device: str | None = None, dtype: str | None = None, vision_weights: str | None = None
) -> tuple[PiipLlavaForConditionalGeneration, PiipLlavaProcessor]:
    """Load a model, ours or a released one, for answering.

    Args:
        path: A directory, or a repository of the hub.
        device: Where to; a GPU if there is one by default.
        dtype: `float32`, `float16` or `bfloat16`; float16 on a GPU (as the released models were evaluated) and float32
            elsewhere by default.
        vision_weights: CLIP's own file, for a LLaVA-1.5 directory that holds none of it.

    Raises:
        CheckpointError: The directory is incomplete, or holds another model.
        OSError: The hub has no such repository, or cannot be reached.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float16" if device.startswith("cuda") else "float32")
    model = PiipLlavaForConditionalGeneration.from_pretrained(
        path, dtype=getattr(torch, dtype), vision_weights=vision_weights
    )
    return model.to(device).eval(), PiipLlavaProcessor.from_pretrained(path)


@dataclass
class Chat:
    """A conversation about one image, or about none.

    Attributes:
        model: The model.
        processor: Its processor.
        image: The image, in the first question's place; see `ask`.
        messages: What was said, as `apply_chat_template` takes it.
    """

    model: PiipLlavaForConditionalGeneration
    processor: PiipLlavaProcessor
    image: Any = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, question: str, image: Any = None, **options: Any) -> Iterator[str]:
        """Ask, and yield the answer piece by piece; it becomes part of the conversation when it is complete.

        Args:
            question: The question.
            image: An image or its path; a new image begins a new conversation.
            **options: Options of `generate`; greedy with at most 512 new tokens by default.

        Raises:
            InputError: The image cannot be read, or the conversation is longer than the context.
        """
        if image is not None:
            self.image, self.messages = open_image(image), []
        content: Any = question
        if self.image is not None and not self.messages:
            content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [*self.messages, {"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(messages)
        inputs = self.processor(images=self.image, text=prompt).to(self.model.device)
        answer = ""
        for piece in self._generate(inputs, {"max_new_tokens": 512, "do_sample": False, **options}):
            answer += piece
            yield piece
        self.messages = [*messages, {"role": "assistant", "content": answer.strip()}]

    def _generate(self, inputs: Any, options: dict[str, Any]) -> Iterator[str]:
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []
        stop = threading.Event()

        def work() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(**inputs, streamer=streamer, stopping_criteria=[until(stop)], **options)
            except BaseException as error:  # noqa: BLE001 - handed to the thread that asked
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:  # also where the one who asked went away
            stop.set()
            thread.join()
        if failed:
            raise failed[0]


def until(stop: threading.Event) -> Any:
    """Return a stopping criterion that ends generation once the event is set."""

    def criterion(input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

    return criterion


def answer(
    model: PiipLlavaForConditionalGeneration, processor: PiipLlavaProcessor, question: str, image: Any = None
) -> str:
    """Return the greedy answer to one question about one image."""
    if not question.strip():
        raise InputError("there is no question: give a prompt")
    return "".join(Chat(model, processor).ask(question, image)).strip()

"""Training data in LLaVA's form: a JSON list of conversations, images read when they are needed."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from piip_llava.conversation import find_template, read_turns, render
from piip_llava.errors import InputError
from piip_llava.processing import PiipLlavaProcessor, open_image
from piip_llava.tokens import IGNORE, expand_images, tokenize

BadImages = Literal["mask", "error"]


class Skipped(NamedTuple):
    """Why nothing of a sample is learned.

    Attributes:
        sample: Id of the sample.
        kind: `unreadable` (an image) or `cut` (no answer is left in the longest sequence).
        reason: What is wrong.
    """

    sample: str
    kind: Literal["unreadable", "cut"]
    reason: str


class ConversationDataset(Dataset):
    """Conversations about images, or about text alone.

    A sample is `{"id", "image" (a path, a list of paths, or nothing), "conversations"}`. The structure of every sample
    is checked at the start; images are read in `__getitem__`.

    With `bad_images="mask"`, a sample whose image is missing or cannot be read stays in its batch with an image of the
    mean colour, and nothing of it is learned; with `"error"`, training stops. Every sample says itself why nothing of
    it is learned: data workers are processes of their own, whose memory ends with them.

    Args:
        path: The JSON file.
        image_folder: Where the paths of images begin.
        processor: The model's processor.
        template: `plain` (captions) or `v1` (conversations).
        limit: Longest sequence, image tokens included; longer ones are cut.
        bad_images: See above.

    Raises:
        InputError: The file cannot be read, or a sample is not what it should be (the message has its id).
    """

    def __init__(
        self,
        path: str | Path,
        image_folder: str | Path,
        processor: PiipLlavaProcessor,
        *,
        template: str = "v1",
        limit: int = 2048,
        bad_images: BadImages = "mask",
    ) -> None:
        self.folder = Path(image_folder)
        self.processor = processor
        self.template = find_template(template)
        self.limit = limit
        self.bad_images = bad_images
        self.samples = self._read(Path(path))

    def _read(self, path: Path) -> list[dict[str, Any]]:
        try:
            samples = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"the data {path} cannot be read: {error}") from None
        if not isinstance(samples, list) or not samples:
            raise InputError(f"the data {path} are no list of samples, or an empty one")
        for number, sample in enumerate(samples):
            try:
                read_turns(sample["conversations"], len(images_of(sample)))
            except (KeyError, TypeError) as error:
                raise InputError(f"{path}, sample {number}: it has no 'conversations' ({error})") from None
            except InputError as error:
                raise InputError(f"{path}, sample {sample.get('id', number)}: {error}") from None
        return samples

    def __len__(self) -> int:
        return len(self.samples)

    def modality_lengths(self) -> list[int]:
        """Return about how long each sample is, in words and image tokens; negative for text alone."""
        lengths = []
        for sample in self.samples:
            words = max(1, sum(len(turn["value"].split()) for turn in sample["conversations"]))
            images = len(images_of(sample))
            lengths.append(words + images * self.processor.image_tokens if images else -words)
        return lengths

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a sample.

        Returns:
            `input_ids` and `labels` (lists), `pixel_values (N, 3, S, S)` or None for text alone, and `skipped`: None,
            or why nothing of it is learned.
        """
        sample = self.samples[index]
        paths = images_of(sample)
        text, answers = render(
            read_turns(sample["conversations"], len(paths)), self.template, self.processor.tokenizer.eos_token
        )
        ids, labels = tokenize(self.processor.tokenizer, text, answers)
        ids, labels, kept = expand_images(
            ids,
            labels,
            image_token_id=self.processor.image_token_id,
            count=self.processor.image_tokens,
            limit=self.limit,
        )
        name = str(sample.get("id", index))
        skipped = None
        if all(label == IGNORE for label in labels):
            skipped = Skipped(name, "cut", f"no answer begins within {self.limit} tokens")
        size = self.processor.image_processor.size
        arrays = []
        for path in paths[:kept]:
            try:
                arrays.append(self.processor.image_processor.one(open_image(self.folder / path)))
            except InputError as error:
                if self.bad_images == "error":
                    raise InputError(f"sample {name}: {error}") from None
                skipped = Skipped(name, "unreadable", str(error))
                labels = [IGNORE] * len(labels)
                arrays.append(np.zeros((3, size, size), dtype=np.float32))  # normalised: the mean colour
        return {
            "input_ids": ids,
            "labels": labels,
            "pixel_values": np.stack(arrays) if arrays else None,
            "skipped": skipped,
        }


def images_of(sample: dict[str, Any]) -> list[str]:
    """Return the paths of a sample's images."""
    given = sample.get("image")
    if given is None:
        return []
    return list(given) if isinstance(given, list) else [given]


@dataclass
class Collator:
    """Put samples together: sequences padded on the right, images one after the other.

    Attributes:
        pad_token_id: Id of padding.
    """

    pad_token_id: int

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch.

        Returns:
            `input_ids`, `labels` and `attention_mask (B, L)`; `pixel_values (N, 3, S, S)` if any sample has images; and
            `skipped`, a list, if nothing is learned of some: the trainer takes it out.
        """
        length = max(len(sample["input_ids"]) for sample in samples)

        def pad(key: str, value: int) -> Tensor:
            return torch.tensor([s[key] + [value] * (length - len(s[key])) for s in samples])

        mask = [[1] * len(s["input_ids"]) + [0] * (length - len(s["input_ids"])) for s in samples]
        batch: dict[str, Any] = {
            "input_ids": pad("input_ids", self.pad_token_id),
            "labels": pad("labels", IGNORE),
            "attention_mask": torch.tensor(mask),
        }
        images = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
        if images:
            batch["pixel_values"] = torch.from_numpy(np.concatenate(images))
        if skipped := [sample["skipped"] for sample in samples if sample["skipped"] is not None]:
            batch["skipped"] = skipped
        return batch


class ModalityLengthSampler(Sampler[int]):
    """Shuffle so that a global batch holds samples of one kind, with images or without, and of similar length.

    Args:
        lengths: See `ConversationDataset.modality_lengths`.
        batch: Samples per optimizer step of all processes.
        seed: Seed; the order of every epoch follows from it and the epoch.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int = 0) -> None:
        if not lengths or 0 in lengths:
            raise InputError("every sample needs a length, positive with images and negative without")
        self.lengths = list(lengths)
        self.batch = batch
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        whole: list[list[int]] = []
        rest: list[int] = []
        for images in (True, False):
            kind = [i for i, length in enumerate(self.lengths) if (length > 0) is images]
            batches = self._by_length(kind, generator)
            if batches and len(batches[-1]) < self.batch:
                rest += batches.pop()
            whole += batches
        order = torch.randperm(len(whole), generator=generator).tolist()
        return iter([i for k in order for i in whole[k]] + rest)

    def _by_length(self, kind: list[int], generator: torch.Generator) -> list[list[int]]:
        """Shuffle, and sort by length within stretches of some batches, so that neighbours are of similar length."""
        shuffled = [kind[i] for i in torch.randperm(len(kind), generator=generator).tolist()]
        stretch = 50 * self.batch
        batches = []
        for start in range(0, len(shuffled), stretch):
            part = sorted(shuffled[start : start + stretch], key=lambda i: -abs(self.lengths[i]))
            batches += [part[i : i + self.batch] for i in range(0, len(part), self.batch)]
        return batches

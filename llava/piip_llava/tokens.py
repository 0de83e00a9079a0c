"""Token sequences with images in them."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from piip_llava.errors import InputError

IGNORE = -100
IMAGE = "<image>"
PLACEHOLDER = -200
"""Stands for a whole image in a sequence that has not been expanded."""


def check_tokenizer(tokenizer: Any) -> None:
    """Check that a tokenizer has what prompts and answers need.

    Raises:
        InputError: It lacks an end or padding token, or cannot say where in the text a token came from.
    """
    if tokenizer.eos_token is None:
        raise InputError("the tokenizer has no end-of-sequence token, which ends every answer: set tokenizer.eos_token")
    if tokenizer.pad_token is None and tokenizer.unk_token is None:
        raise InputError("the tokenizer has neither a padding nor an unknown token: set tokenizer.pad_token")
    if not tokenizer.is_fast:
        raise InputError("the tokenizer cannot tell the place of a token in the text: use a fast tokenizer")


def tokenize(tokenizer: Any, text: str, answers: Sequence[tuple[int, int]] = ()) -> tuple[list[int], list[int]]:
    """Turn text into ids, with `PLACEHOLDER` for each image.

    Text before, between and behind images is tokenised piece by piece, as the released models were trained: with
    sentencepiece, a piece of its own begins differently from the middle of a sentence.

    Args:
        tokenizer: A fast tokenizer.
        text: The text, `<image>` in the place of each image.
        answers: `(start, stop)` of the characters to be learned.

    Returns:
        Ids, and labels: the id within answers, `IGNORE` elsewhere.
    """
    ids: list[int] = []
    labels: list[int] = []
    begin = tokenizer("")["input_ids"]
    if begin and begin[0] == tokenizer.bos_token_id:
        ids, labels = [begin[0]], [IGNORE]
    starts = [start for start, _ in answers]
    offset = 0
    for number, piece in enumerate(text.split(IMAGE)):
        if number:
            ids.append(PLACEHOLDER)
            labels.append(IGNORE)
            offset += len(IMAGE)
        encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            # A token belongs where its last character is: a leading space may be part of it.
            place = offset + max(stop - 1, start)
            answer = bisect_right(starts, place) - 1
            learned = answer >= 0 and place < answers[answer][1]
            ids.append(token)
            labels.append(token if learned else IGNORE)
        offset += len(piece)
    return ids, labels


def expand_images(
    ids: Sequence[int],
    labels: Sequence[int] | None,
    *,
    image_token_id: int,
    count: int,
    placeholder: int = PLACEHOLDER,
    limit: int | None = None,
) -> tuple[list[int], list[int], int]:
    """Put `count` image tokens in the place of each placeholder, then cut to the limit.

    Args:
        ids: Token ids with one placeholder per image.
        labels: One label per id, None for none; an image's are always ignored.
        image_token_id: Id of an image token.
        count: Image tokens per image.
        placeholder: Id of a placeholder.
        limit: Longest sequence, image tokens included; None for no limit. A sequence is never cut inside of an image:
            an image that does not fit is left out with everything behind it.

    Returns:
        Ids, labels and the number of images kept.
    """
    out: list[int] = []
    out_labels: list[int] = []
    images = 0
    for i, token in enumerate(ids):
        is_image = token == placeholder
        if is_image and limit is not None and len(out) + count > limit:
            break
        out += [image_token_id] * count if is_image else [token]
        out_labels += [IGNORE] * count if is_image else [IGNORE if labels is None else labels[i]]
        images += is_image
    return out[:limit], out_labels[:limit], images

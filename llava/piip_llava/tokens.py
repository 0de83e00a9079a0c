"""Image tokens in token sequences."""

from collections.abc import Sequence

IGNORE = -100


def expand_images(
    ids: Sequence[int],
    labels: Sequence[int] | None,
    *,
    placeholder: int,
    image_token_id: int,
    count: int,
    limit: int | None = None,
) -> tuple[list[int], list[int], int]:
    """Put `count` image tokens in the place of each placeholder, then cut to the limit.

    Args:
        ids: Token ids with one placeholder per image.
        labels: One label per id, None for none; an image's are always ignored.
        placeholder: Id of a placeholder.
        image_token_id: Id of an image token.
        count: Image tokens per image.
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

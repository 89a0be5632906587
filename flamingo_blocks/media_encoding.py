"""Encoding of media: each that differs once, and padding never.

The rows of a batch have different numbers of media, of different lengths, and few-shot prompts share their examples.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def encode_distinct(
    media: Float[Tensor, "batch media frames *shape"],
    num_frames: Int[Tensor, "batch media"],
    *,
    encode_frames: Callable[[Tensor], Tensor],
    resample: Callable[[Tensor], Tensor],
    find_copies: bool = True,
) -> Float[Tensor, "batch media latents dim"] | None:
    """Encode media, equal ones once.

    Args:
        media: Frames, or features of them.
        num_frames: How many frames of each medium are real; 0 for padding media.
        encode_frames: From real frames, side by side, to their features (frames, patches, vision_dim).
        resample: From the features of media of one length, (1, media, frames, patches, vision_dim), to their latents,
            (1, media, latents, dim).
        find_copies: Look for equal media. It costs a sum over each frame, and a comparison of those whose sums are
            equal. Do not where copies are not encoded alike, as with dropout, or their gradients are asked for.

    Returns:
        The latents, zero for padding media. None: there is nothing but padding.
    """
    batch, num_media = media.shape[:2]
    media, lengths = media.flatten(0, 1), num_frames.flatten().tolist()
    originals = _find_originals(media, lengths) if find_copies else range(len(lengths))
    chosen = [i for i, original in enumerate(originals) if original == i and lengths[i]]
    if not chosen:
        return None
    features = encode_frames(torch.cat([media[i, : lengths[i]] for i in chosen]))
    of_medium = dict(zip(chosen, features.split([lengths[i] for i in chosen]), strict=True))
    latents: list[Tensor] = []
    place: dict[int, int] = {}  # in the latents
    for length in sorted({lengths[i] for i in chosen}):  # so that there is no padding to be masked
        members = [i for i in chosen if lengths[i] == length]
        place |= {i: len(place) + offset for offset, i in enumerate(members)}
        latents.append(resample(torch.stack([of_medium[i] for i in members])[None])[0])
    padding = torch.zeros_like(latents[0][:1])
    index = [place[original] if lengths[original] else len(place) for original in originals]
    return torch.cat([*latents, padding])[index].unflatten(0, (batch, num_media))


def _find_originals(media: Float[Tensor, "media frames *shape"], lengths: list[int]) -> list[int]:
    """For each medium, give the index of the first one with the same frames."""
    sums = media.flatten(2).sum(-1, dtype=torch.float32).tolist()
    distinct: dict[tuple[float, ...], list[int]] = {}  # by the sums of their frames
    originals = []
    for i, length in enumerate(lengths):
        alike = distinct.setdefault(tuple(sums[i][:length]), [])
        original = next((j for j in alike if torch.equal(media[i, :length], media[j, :length])), i)
        if original == i:
            alike.append(i)
        originals.append(original)
    return originals

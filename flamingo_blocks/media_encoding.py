"""Encoding of media: each that differs once, and padding never.

The rows of a batch have different numbers of media, of different lengths, and few-shot prompts share their examples.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def encode_distinct(
    media: Float[Tensor, "batch media frames *shape"],
    num_frames: Int[Tensor, "batch media"],
    *,
    encode_frames: Callable[[Tensor], Tensor],
    resample: Callable[[Tensor, Tensor | None], Tensor],
    find_copies: bool = True,
) -> Float[Tensor, "batch media latents dim"]:
    """Encode media, equal ones once.

    Both functions are called exactly once, so that processes that hold parts of them keep in step, also one that has
    nothing but padding: it encodes a frame of zeros.

    Args:
        media: Frames, or features of them.
        num_frames: How many frames of each medium are real; 0 for padding media.
        encode_frames: From real frames, side by side, to their features (frames, patches, vision_dim).
        resample: From features (1, media, frames, patches, vision_dim) and, where media differ in length, their numbers
            of frames (1, media), to latents (1, media, latents, dim).
        find_copies: Look for equal media. It costs a sum over each frame, and a comparison of those whose sums are
            equal. Do not where copies are not encoded alike, as with dropout, or their gradients are asked for.

    Returns:
        The latents. Those of padding media are finite, and mean nothing.
    """
    batch, num_media = media.shape[:2]
    media, lengths = media.flatten(0, 1), num_frames.flatten().tolist()
    originals = _find_originals(media, lengths) if find_copies else range(len(lengths))
    chosen = [i for i, original in enumerate(originals) if original == i and lengths[i]]
    pieces = [media[i, : lengths[i]] for i in chosen] or [media.new_zeros(1, *media.shape[2:])]
    features = encode_frames(torch.cat(pieces)).split([len(piece) for piece in pieces])
    counts = None
    if len({len(piece) for piece in pieces}) > 1:
        counts = torch.tensor([[len(piece) for piece in pieces]], device=features[0].device)
    latents = resample(pad_sequence(features, batch_first=True)[None], counts)[0]
    place = {i: number for number, i in enumerate(chosen)}
    index = [place.get(original, 0) for original in originals]
    return latents[index].unflatten(0, (batch, num_media))


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

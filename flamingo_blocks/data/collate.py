"""Rows of packed examples to a batch for the model's forward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flamingo_blocks.data.examples import IGNORED, Example


def collate(
    rows: Sequence[Sequence[Example]],
    *,
    pad_token_id: int,
    media_shape: tuple[int, ...],
    length: int | None = None,
    separate_attention: bool = False,
) -> dict[str, Any]:
    """Make a batch: each row's examples side by side, padded to the right, with the media of each row.

    A batch without media gets one padding medium, a frame of zeros of which `num_frames` says that it is none. Then the
    model runs its vision encoder and resampler on every batch, so that processes that train together, some on text
    alone, wait for each other at the same places, and all parameters have gradients.

    With `separate_attention`, tokens attend to their own document only, in the language model's self-attention, too:
    transformers finds the documents by positions that begin again, where there is no attention mask and no cache.
    Padding is a document of its own. Not every language model does so; ask `separates_documents`.

    Args:
        rows: The examples of each row.
        pad_token_id: Fills rows up.
        media_shape: Of a frame: (channels, height, width) of pixels, see `processor.image_processor.image_shape`, or
            (patches, vision_dim) of features.
        length: Of the rows, in tokens. None: the longest row's.
        separate_attention: Keep documents apart in self-attention, too.

    Returns:
        Arguments of `FlamingoForConditionalGeneration.forward`: `input_ids`, `labels`, `media_ranges`; `pixel_values`
        or `vision_features`, with `num_frames`, 0 where a medium is padding; and `attention_mask`, or `position_ids`
        with `use_cache=False` for separate attention.

    Raises:
        ValueError: If there is a row without examples, one that is longer than `length`, or a medium of another shape.
    """
    if not rows or not all(rows):
        raise ValueError("rows must each hold an example, got one without, or none at all")
    lengths = [sum(map(len, row)) for row in rows]
    length = max(lengths) if length is None else length
    if max(lengths) > length:
        raise ValueError(f"length must be at least that of the longest row, {max(lengths)}, got {length}")
    batch: dict[str, Any] = {
        "input_ids": _pad([_join(row, "input_ids") for row in rows], length, pad_token_id),
        "labels": _pad([_join(row, "labels") for row in rows], length, IGNORED),
        "media_ranges": _pad([_join_ranges(row) for row in rows], length, 0),
    }
    if separate_attention:
        batch["position_ids"] = torch.stack([_positions(row, length) for row in rows])
        batch["use_cache"] = False
    else:
        batch["attention_mask"] = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    name = {3: "pixel_values", 2: "vision_features"}.get(len(media_shape))
    if name is None:
        raise ValueError(
            f"media_shape must be (channels, height, width) or (patches, vision_dim), got {tuple(media_shape)}"
        )
    media = [[medium for example in row for medium in example.media] for row in rows]
    return batch | dict(zip((name, "num_frames"), _pad_media(media, tuple(media_shape)), strict=True))


def _join(row: Sequence[Example], name: str) -> Tensor:
    return torch.cat([getattr(example, name) for example in row])


def _join_ranges(row: Sequence[Example]) -> Tensor:
    """Count the media of the whole row."""
    before, ranges = 0, []
    for example in row:
        sees_something = example.media_ranges[:, :1] < example.media_ranges[:, 1:]
        ranges.append(torch.where(sees_something, example.media_ranges + before, 0))
        before += len(example.media)
    return torch.cat(ranges)


def _pad(rows: Sequence[Tensor], length: int, value: int) -> Tensor:
    padding = rows[0].new_full((length, *rows[0].shape[1:]), value)
    return pad_sequence([*rows, padding], batch_first=True, padding_value=value)[:-1]


def _positions(row: Sequence[Example], length: int) -> Tensor:
    lengths = [*map(len, row), length - sum(map(len, row))]
    return torch.cat([torch.arange(count) for count in lengths])


def _pad_media(rows: Sequence[Sequence[Tensor]], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Give media (batch, media, frames, ...), and how many frames of each are real."""
    every = [medium for row in rows for medium in row]
    if wrong := [tuple(medium.shape) for medium in every if medium.shape[1:] != shape or not len(medium)]:
        raise ValueError(f"media must have shape (frames, {', '.join(map(str, shape))}), got {wrong[0]}")
    num_frames = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.long)
    for row, media in enumerate(rows):
        num_frames[row, : len(media)] = torch.tensor([len(medium) for medium in media], dtype=torch.long)
    is_real = torch.arange(max(1, int(num_frames.max()))) < num_frames[..., None]
    padded = torch.zeros(*is_real.shape, *shape, dtype=every[0].dtype if every else None)
    if every:
        padded[is_real] = torch.cat(every)
    return padded, num_frames


def separates_documents(model: nn.Module) -> bool:
    """Try whether a model keeps documents apart whose positions begin again.

    Most of transformers' language models do. Those with ALiBi, those that are recurrent, and those that make their mask
    without positions (OPT) do not: they would silently mix what is packed.

    Args:
        model: A Flamingo. It runs on a few tokens, without gradients; in several processes that hold parts of it, all
            must ask.

    Returns:
        Whether packed documents give the logits that each gives alone.
    """
    from flamingo_blocks.language import ordinary_token  # it imports transformers

    flamingo: Any = model
    ids: list[int] = []
    while len(ids) < 12:
        ids.append(ordinary_token(flamingo, besides=ids))
    # Two rows of three documents, of which the first differs, and a row of one document.
    rows = torch.tensor([ids, ids[3::-1] + ids[4:], ids], device=flamingo.device)
    packing = [[4, 3, 5], [4, 3, 5], [12]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in packing])
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = flamingo(rows, position_ids=positions.to(rows.device), use_cache=False).logits
            mixed = flamingo(rows, use_cache=False).logits
            documents = [row.split(lengths) for row, lengths in zip(rows, packing, strict=True)]
            alone = torch.stack(
                [torch.cat([flamingo(text[None], use_cache=False).logits[0] for text in row]) for row in documents]
            )
    finally:
        model.train(was_training)
    # What is left of mixing must be rounding, in the coarsest numbers that the model computes with. A leak is looked
    # for apart, since it may be small beside what positions do.
    coarsest = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    leaks = [logits[0, 4:] - logits[1, 4:] for logits in (packed, mixed)]
    errors = [logits - alone for logits in (packed, mixed)]
    return all(
        float(left.abs().max()) <= coarsest**0.5 * float(all_of_it.abs().max()) for left, all_of_it in (leaks, errors)
    )

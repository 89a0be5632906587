"""Which media a text token sees: the index phi, ranges of media, and the table of runs that attention works on.

Source: Alayrac et al. 2022 (Flamingo), section 2.3 and appendices A.1.3 and A.3.2.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Attend = Literal["last", "all_previous", "next"]


def media_index(media_locations: Bool[Tensor, "batch text"]) -> Int[Tensor, "batch text"]:
    """Number the medium that each text token sees (phi in the paper).

    Args:
        media_locations: True where the token is `<image>`.

    Returns:
        0 before the first medium, then 1..media.

    Raises:
        ValueError: If `media_locations` is not boolean, such as token ids, whose sums would mean nothing.

    Source: Alayrac et al. 2022, section 2.3. Differs from the paper: no.
    """
    if media_locations.dtype != torch.bool:
        raise ValueError(
            "media_locations must be boolean, True where the token is <image>, got "
            f"{media_locations.dtype}; for token ids, write input_ids == image_token_id"
        )
    return media_locations.cumsum(-1)


def media_ranges(
    media_locations: Bool[Tensor, "batch text"],
    *,
    document_ids: Int[Tensor, "batch text"] | None = None,
    attend: Attend = "last",
) -> Int[Tensor, "batch text 2"]:
    """Give the half-open range of media, counted from 0 in its row, that each text token may see.

    An `<image>` token sees its own medium under every rule. For the other tokens:

    - `"last"`: the last medium before the token (the paper's model);
    - `"all_previous"`: every medium before the token;
    - `"next"`: the first medium after the token, nothing after the last medium (the paper's data
      augmentation, appendix A.3.2).

    A token with nothing to see has the range (0, 0).

    Args:
        media_locations: True where the token is `<image>`.
        document_ids: For rows that pack several documents: any integer a document; a document is a stretch of
            equal ids. Ranges never leave their document. None: a row is one document.
        attend: The rule. To choose it per document, as the paper does in training, compute two ranges and select:
            `torch.where(is_next[..., None], media_ranges(m, attend="next"), media_ranges(m))`.

    Returns:
        (start, stop) for each token.

    Raises:
        ValueError: If `attend` is not one of the rules, `media_locations` is not boolean, or the shapes of the two
            tensors differ.

    Source: Alayrac et al. 2022, section 2.3, appendices A.1.3 and A.3.2. Differs from the paper: `"all_previous"` and
    packed documents are ours.
    """
    if attend not in get_args(Attend):
        raise ValueError(f"attend must be one of {', '.join(map(repr, get_args(Attend)))}, got {attend!r}")
    if document_ids is not None and document_ids.shape != media_locations.shape:
        raise ValueError(
            f"document_ids must have the shape of media_locations, {tuple(media_locations.shape)}, "
            f"got {tuple(document_ids.shape)}"
        )
    stop = media_index(media_locations)
    first, last = _document_media(media_locations, stop, document_ids)
    if attend == "all_previous":
        start = first
    elif attend == "last":
        start = (stop - 1).maximum(first)
    else:
        start = torch.where(media_locations, stop - 1, stop)
        stop = (start + 1).minimum(last)
    ranges = torch.stack([start, stop], dim=-1)
    return ranges.masked_fill((start >= stop)[..., None], 0)


def _document_media(
    media_locations: Bool[Tensor, "batch text"],
    index: Int[Tensor, "batch text"],
    document_ids: Int[Tensor, "batch text"] | None,
) -> tuple[Int[Tensor, "batch text"], Int[Tensor, "batch text"]]:
    """Give each token the (first, last) of the half-open range of all media in its document."""
    if document_ids is None:
        return torch.zeros_like(index), index[:, -1:].expand_as(index)
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    edge = changes.new_ones(changes.shape[0], 1)
    starts, ends = torch.cat([edge, changes], dim=1), torch.cat([changes, edge], dim=1)
    # Both counts only grow along a row, so a running maximum (minimum from the right) carries the value at a
    # document's edge to all its tokens.
    before = index - media_locations.long()
    first = torch.where(starts, before, 0).cummax(-1).values
    last = torch.where(ends, index, torch.iinfo(index.dtype).max).flip(-1).cummin(-1).values.flip(-1)
    return first, last


def dense_media_mask(ranges: Int[Tensor, "batch text 2"], media: int) -> Bool[Tensor, "batch text media"]:
    """Spell ranges out as a mask: True where the token sees the medium.

    Attention over runs needs no such mask; dense attention does, and so do pictures and other libraries.

    Args:
        ranges: As given by `media_ranges`.
        media: Length of the mask's last axis.
    """
    index = torch.arange(media, device=ranges.device)
    return (ranges[..., :1] <= index) & (index < ranges[..., 1:])


def ranges_of_mask(mask: Bool[Tensor, "batch text media"]) -> Int[Tensor, "batch text 2"]:
    """Give the ranges that say the same as a mask: `dense_media_mask` the other way round.

    The mask is read back from the device.

    Args:
        mask: True where the token sees the medium, as IDEFICS and Llama 3.2 Vision have it; for the latter, each tile
            of an image is a medium.

    Returns:
        (start, stop) for each token; (0, 0) where it sees nothing.

    Raises:
        ValueError: If the media that a token sees are not neighbours, so that no range says it, or `mask` is no mask.
    """
    ranges, is_contiguous = _hulls(mask)
    if not is_contiguous.all():
        row, token = (~is_contiguous).nonzero()[0].tolist()
        raise ValueError(
            "mask must let each token see neighbouring media, which a range can name, but at row "
            f"{row}, token {token} it names {mask[row, token].nonzero().flatten().tolist()}"
        )
    return ranges


def _hulls(mask: Tensor) -> tuple[Int[Tensor, "batch text 2"], Bool[Tensor, "batch text"]]:
    """Give each token the shortest range that holds all that it sees, and tell whether it sees all of the range."""
    if mask.ndim != 3 or mask.dtype != torch.bool:
        raise ValueError(
            "mask must be boolean of shape (batch, text, media), True where the token sees the medium, got "
            f"{mask.dtype} of shape {tuple(mask.shape)}"
        )
    # Sums, since there may be no media to take a minimum of.
    start = (mask.cumsum(-1) == 0).sum(-1)
    stop = (mask.flip(-1).cumsum(-1) > 0).sum(-1)
    ranges = torch.stack([start, stop], dim=-1).masked_fill((start >= stop)[..., None], 0)
    return ranges, ranges[..., 1] - ranges[..., 0] == mask.sum(-1)


class MediaRun(NamedTuple):
    """A stretch of neighbouring tokens of one row that see the same media.

    Attributes:
        row: Index in the batch.
        start: First token.
        length: Number of tokens.
        media_start: First medium that the tokens see, counted from 0 in the row.
        media_stop: One after the last medium; equal to `media_start` when they see nothing.
    """

    row: int
    start: int
    length: int
    media_start: int
    media_stop: int


@dataclass(frozen=True, eq=False)
class MediaRuns:
    """The ranges of a batch with its table of runs: built once per forward, shared by all layers.

    Build it with `from_ranges` or `from_mask`.

    Attributes:
        ranges: As given by `media_ranges`. Where there is a mask, from the first medium that the token sees to the last
            one, and (0, 0) if it sees nothing.
        table: Every token is in exactly one run; runs are maximal and in the order of the tokens, row by row.
            None under `torch.compile`, where reading values back would break the graph; the static-shape algorithms
            use `ranges` alone. None, too, where there is a mask.
        in_order: Whether each token sees at most one medium, and none that comes before one that an earlier token of
            its row sees: so it is under `"last"` and `"next"`.
        mask: What each token sees, if ranges cannot say it; only dense attention knows what to do with it. None: the
            ranges say it.
    """

    ranges: Int[Tensor, "batch text 2"]
    table: tuple[MediaRun, ...] | None
    in_order: bool = False
    mask: Bool[Tensor, "batch text media"] | None = None

    @classmethod
    def from_ranges(
        cls,
        ranges: Int[Tensor, "batch text 2"],
        *,
        num_media: Int[Tensor, " batch"] | None = None,
        in_order: bool | None = None,
    ) -> "MediaRuns":
        """Read the ranges back from the device, once, and collect them into runs.

        Args:
            ranges: As given by `media_ranges`. Any contiguous ranges will do.
            num_media: How many media each row really has, padding not counted. Give it for ranges of a whole
                prompt: since every `<image>` token sees its own medium, a row in which the number of `<image>` tokens
                differs from the number of media shows here. The check is skipped under `torch.compile`.
            in_order: For `torch.compile`, where it cannot be read from the ranges: say True where they follow the rule
                `"last"` or `"next"`, so that not all tokens are compared with all media. Tokens for which it is not
                true come out as NaN. Elsewhere it is found out.

        Raises:
            ValueError: If a range is negative or backwards, if the shapes are wrong, if a row's `<image>` tokens
                and media do not agree in number, or if `in_order` is not true.
        """
        if ranges.ndim != 3 or ranges.shape[-1] != 2:
            raise ValueError(f"ranges must have shape (batch, text, 2), got {tuple(ranges.shape)}")
        if num_media is not None and num_media.shape != ranges.shape[:1]:
            raise ValueError(f"num_media must have shape ({ranges.shape[0]},), got {tuple(num_media.shape)}")
        if torch.compiler.is_compiling():
            return cls(ranges, None, bool(in_order))
        on_host = ranges.detach().cpu()
        check_ranges(on_host)
        if num_media is not None:
            _check_num_media(on_host, num_media.tolist())
        table = _collect_runs(on_host)
        is_in_order = _are_in_order(table)
        if in_order and not is_in_order:
            raise ValueError(
                "ranges are not in order: a token sees several media, or one that comes before that of an earlier "
                "token; leave in_order out"
            )
        return cls(ranges, table, is_in_order)

    @classmethod
    def from_mask(cls, mask: Bool[Tensor, "batch text media"]) -> "MediaRuns":
        """Say by a mask what each token sees, as IDEFICS and Llama 3.2 Vision do.

        Where all tokens see neighbouring media, these are the runs that `from_ranges` makes of their ranges. Else the
        mask is kept, and attention is dense. So it is under `torch.compile` in any case, where the mask cannot be
        looked at: give it ranges if there are some.

        Args:
            mask: True where the token sees the medium. For Llama 3.2 Vision, each tile of an image is a medium.

        Raises:
            ValueError: If `mask` is not boolean, or not of three axes.
        """
        ranges, is_contiguous = _hulls(mask)
        if not torch.compiler.is_compiling() and is_contiguous.all():
            return cls.from_ranges(ranges)
        return cls(ranges, None, mask=mask)

    @property
    def sees_something(self) -> Bool[Tensor, "batch text"]:
        """Which tokens see any medium."""
        return self.ranges[..., 0] < self.ranges[..., 1]

    def dense_mask(self, num_media: int) -> Bool[Tensor, "batch text media"]:
        """Spell out what each token sees, for so many media a row."""
        if self.mask is None:
            return dense_media_mask(self.ranges, num_media)
        return F.pad(self.mask, (0, num_media - self.mask.shape[-1]))

    def sees_all(self, num_media: int) -> bool:
        """Whether every token is known to see all media of its row."""
        return self.table is not None and all(
            run.media_start == 0 and run.media_stop == num_media for run in self.table
        )

    def segments(self, num_media: int) -> "MediaSegments":
        """Give the runs as segments of neighbouring tokens, one for each medium; they must be in order."""
        if torch.compiler.is_compiling():  # which finds by itself that layers do the same, and must not see the table
            return _collect_segments(self.ranges, None, num_media)
        known: dict[int, MediaSegments] = vars(self).setdefault("_segments", {})
        if num_media not in known:
            with torch.inference_mode(False):  # they may serve in training, too
                known[num_media] = _collect_segments(self.ranges, self.table, num_media)
        return known[num_media]

    @cached_property
    def media_stop(self) -> int:
        """One after the last medium that any token sees: the fewest media a batch must have."""
        if self.table is None:
            return int(self.ranges[..., 1].max()) if self.ranges.numel() else 0
        return max((run.media_stop for run in self.table), default=0)


def _collect_runs(ranges: Int[Tensor, "batch text 2"]) -> tuple[MediaRun, ...]:
    batch, text, _ = ranges.shape
    begins = torch.ones(batch, text, dtype=torch.bool, device=ranges.device)
    begins[:, 1:] = (ranges[:, 1:] != ranges[:, :-1]).any(-1)
    first = begins.flatten().nonzero().squeeze(-1)
    length = torch.diff(first, append=first.new_tensor([batch * text]))
    columns = torch.stack([first // text, first % text, length], dim=-1)
    table = torch.cat([columns, ranges.flatten(0, 1)[first]], dim=-1)
    return tuple(MediaRun(*row) for row in table.tolist())


def _are_in_order(table: tuple[MediaRun, ...]) -> bool:
    row, newest = 0, 0
    for run in table:
        if run.row != row:
            row, newest = run.row, 0
        if run.media_start == run.media_stop:
            continue
        if run.media_stop - run.media_start > 1 or run.media_start < newest:
            return False
        newest = run.media_start
    return True


class MediaSegments(NamedTuple):
    """Runs in order, as static shapes can hold them: the tokens of each medium, side by side.

    Tokens that see nothing are counted with the medium before them, or with the first one of their row; what they
    attend to there is to be thrown away.

    Attributes:
        medium: The medium of each token's segment.
        ends: Where segments end in the tokens of all rows, behind a 0: what kernels for sequences of unequal lengths
            want.
        blind: True for tokens that see nothing. None where a table of runs tells that there is none.
        wrong: True for tokens whose ranges are not in order, or name a medium that is not there. None where there is a
            table: both were checked.
    """

    medium: Int[Tensor, "batch text"]
    ends: Int[Tensor, " segments_and_1"]
    blind: Bool[Tensor, "batch text"] | None
    wrong: Bool[Tensor, "batch text"] | None

    def clear(self, x: Float[Tensor, "batch text heads head_dim"]) -> Float[Tensor, "batch text heads head_dim"]:
        """Set tokens that see nothing to zero, their gradients too, and those that are wrong to NaN."""
        if self.blind is not None:
            x = x.masked_fill(self.blind[..., None, None], 0)
        return x if self.wrong is None else x.masked_fill(self.wrong[..., None, None], torch.nan)


def _collect_segments(
    ranges: Int[Tensor, "batch text 2"], table: tuple[MediaRun, ...] | None, num_media: int
) -> MediaSegments:
    start, stop = ranges.unbind(-1)
    sees_nothing = start >= stop
    medium = start.masked_fill(sees_nothing, 0).cummax(-1).values
    blind: Tensor | None = sees_nothing
    wrong: Tensor | None = None
    if table is None:
        wrong = ~sees_nothing & ((stop - start > 1) | (start < medium) | (stop > num_media))
    elif all(run.media_start < run.media_stop for run in table):
        blind = None
    medium = medium.clamp(max=num_media - 1)
    length = medium.new_zeros(ranges.shape[0], num_media).scatter_add(1, medium, torch.ones_like(medium))
    return MediaSegments(medium, F.pad(length.flatten().cumsum(0), (1, 0)).int(), blind, wrong)


def check_ranges(ranges: Int[Tensor, "batch text 2"]) -> None:
    """Refuse ranges that are negative or backwards.

    Args:
        ranges: What each token sees.

    Raises:
        ValueError: If one is. Not checked under `torch.compile`.
    """
    if torch.compiler.is_compiling():
        return
    wrong = (ranges[..., 0] < 0) | (ranges[..., 1] < ranges[..., 0])
    if wrong.any():
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"ranges must hold 0 <= start <= stop, got {tuple(ranges[row, token].tolist())} at row {row}, token {token}"
        )


def check_ranges_fit(ranges: Int[Tensor, "rows text 2"], num_media: Int[Tensor, " batch"]) -> None:
    """Refuse ranges that name media which a row does not have: padding, or none at all.

    Args:
        ranges: What each token sees.
        num_media: How many media each row really has; on the host.

    Raises:
        ValueError: If they do, or there are other rows. Not checked under `torch.compile`.
    """
    if ranges.shape[0] != num_media.shape[0]:
        raise ValueError(
            f"ranges or mask have {ranges.shape[0]} rows, but there are {num_media.shape[0]} rows of text with media "
            "of their own; rows of text share a row only where they share the media of a media_cache"
        )
    if torch.compiler.is_compiling() or not ranges.shape[1]:
        return
    stops = ranges[..., 1].amax(1).tolist()
    for row, (stop, media) in enumerate(zip(stops, num_media.tolist(), strict=True)):
        if stop > media:
            raise ValueError(
                f"row {row} has {media} media, but its tokens are to see {stop}; ranges and masks count all media of "
                "their row from its first one, padding not included"
            )


def _check_num_media(ranges: Int[Tensor, "batch text 2"], num_media: list[int]) -> None:
    tokens = ranges[..., 1].amax(1).tolist() if ranges.shape[1] else [0] * len(num_media)
    for row, (found, expected) in enumerate(zip(tokens, num_media, strict=True)):
        if found != expected:
            raise ValueError(
                f"row {row} has {found} <image> tokens but {expected} media; every medium needs exactly one <image> "
                "token in its row's text. Check that the text was not truncated and that padding media are counted "
                "as 0 frames"
            )

"""MediaCache: what a model keeps of its media while it generates, beside the language model's own cache.

Media are encoded once and projected once per layer. It is no tensor on purpose: `generate` repeats tensors for each
beam, while the beams of a row share their media.
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from flamingo_blocks.blocks import media_mask
from flamingo_blocks.blocks.attention import KeyValues
from flamingo_blocks.blocks.media_mask import Attend, MediaRuns, check_ranges, check_ranges_fit

_NOWHERE = 2**31 - 1  # where padding media stand


class MediaCache:
    """Keys and values of the media of each row, and which of them its text sees.

    It is used as transformers' caches are: pass an empty one along with `cache` and it is filled; pass both again to go
    on, with the new media only. Copies share their tensors, which are never written to.

    Under the rule `"last"`, later text can see the newest medium of its row alone. Once text has run, the others are
    dropped, so that media may come without end, as from a camera.

    Args:
        keep_all: Drop none, so that the language model's cache may be cropped to before the newest medium.

    Attributes:
        key_values: For each decoder layer with a block, by its index, the keys and values of the media that are held.
        num_media: How many media each row has had, padding not counted; on the host.

    Source: Alayrac et al. 2022, section 2.3 (keys and values depend on the media alone). Differs from the paper: the
    paper does not speak of caches.
    """

    def __init__(self, *, keep_all: bool = False) -> None:
        self.keep_all = keep_all
        self.key_values: dict[int, KeyValues] = {}
        self.num_media: Tensor | None = None
        self._num_held: Tensor | None = None  # how many of them each row still has; on the host
        self._num_dropped: Tensor | None = None  # the others, beside the ranges; None: none
        self._keeps_newest = False  # alone, since no other can be seen
        self._positions: Tensor | None = None  # of the token of each medium that is held
        self._ranges: Tensor | None = None  # of the text announced last
        self._start = 0  # its position
        self._closed_by: str | None = None

    def __deepcopy__(self, _: object) -> "MediaCache":
        return copy.copy(self)

    def __repr__(self) -> str:
        media = [] if self.num_media is None else self.num_media.tolist()
        return f"MediaCache(media per row: {media}, layers: {sorted(self.key_values)})"

    @property
    def rows(self) -> int:
        """Number of rows that have media of their own; several rows of text may share one."""
        return 0 if self.num_media is None else self.num_media.shape[0]

    def update(
        self,
        key_values: Mapping[int, KeyValues],
        num_media: Int[Tensor, " batch"],
        media_locations: Bool[Tensor, "batch text"],
        *,
        attend: Attend = "last",
        document_ids: Int[Tensor, "batch text"] | None = None,
        media_ranges: Int[Tensor, "batch text 2"] | None = None,
        start: int | None = None,
    ) -> Int[Tensor, "batch text 2"]:
        """Add new text and its media behind those that each row has.

        Media whose tokens stand at `start` or later are dropped first: the language model's cache was cropped there.

        Args:
            key_values: Keys and values of the new media for each decoder layer with a block; in each row, real media
                come first. It may be empty if there are none, in later calls.
            num_media: How many of them are real.
            media_locations: Where the new text has their `<image>` tokens.
            attend: What a token sees.
            document_ids: For packed documents; earlier text belongs to the document of the first token.
            media_ranges: Instead of all this, what each token sees, counted over all media of its row; then nothing is
                known of `<image>` tokens, and no medium is dropped until a call without them.
            start: Position of the new text's first token. None: behind all text so far.

        Returns:
            What the new text sees, counted over all media of its row. `ranges_at` gives it, too, and for later text
            what the last token saw.

        Raises:
            ValueError: If a row's `<image>` tokens and new media do not agree in number, `media_ranges` do not fit the
                text or name media that are not there, there are neither as many rows as before nor a multiple, text
                would see media that were dropped, or the cache was closed. The cache is then as it was.
        """
        if self._closed_by is not None:
            raise ValueError(
                f"media_cache was used in {self._closed_by}, which leaves other text in the language model's cache "
                "than it returns; begin anew with new caches, or go on from copies that were made before"
            )
        num_media = num_media.cpu()
        batch = num_media.shape[0]
        if self.rows and batch % self.rows:
            raise ValueError(
                f"media_cache has {self.rows} rows, the new text {batch}; rows must not change between calls"
            )
        if media_ranges is None:
            # Checked on the new text alone: what it sees may include earlier media.
            MediaRuns.from_ranges(media_mask.media_ranges(media_locations), num_media=num_media)
        end = 0 if self._ranges is None else self._start + self._ranges.shape[1]
        start = end if start is None else start
        nothing = torch.zeros_like(num_media)
        had, held = self.num_media, self._num_held
        had, held = (nothing, nothing) if had is None or held is None else (had, held)
        num_left = held if start >= end else self._count_before(start)
        num_dropped = had - held if start else torch.zeros_like(had)
        times = batch // had.shape[0]
        if media_ranges is not None:  # refused if need be
            if media_ranges.shape[1] != media_locations.shape[1]:
                raise ValueError(
                    f"media_ranges are for {media_ranges.shape[1]} tokens, but the text has {media_locations.shape[1]}"
                )
            check_ranges(media_ranges)
            check_ranges_fit(media_ranges, (num_dropped + num_left).repeat_interleave(times) + num_media)
            if num_dropped.any():
                _without(media_ranges, num_dropped.repeat_interleave(times).to(media_ranges.device))
        # Nothing can fail any more.
        if self._positions is None:
            self._positions = torch.empty(batch, 0, dtype=torch.long, device=media_locations.device)
        self.num_media, self._num_held = num_dropped + num_left, num_left
        if times > 1:
            self._repeat_rows(times)
        if media_ranges is None:
            # Media of earlier text are as if their tokens stood right before this text.
            earlier = _first(int(self._num_held.max()), self._num_held.to(media_locations.device))
            locations = torch.cat([earlier, media_locations], dim=1)
            if document_ids is not None:
                document_ids = torch.cat([document_ids[:, :1].expand_as(earlier), document_ids], dim=1)
            ranges = media_mask.media_ranges(locations, document_ids=document_ids, attend=attend)
            media_ranges = ranges[:, earlier.shape[1] :]
            if num_dropped.any():
                media_ranges = _shift(media_ranges, num_dropped.repeat_interleave(times).to(media_ranges.device))
            places = torch.arange(start, start + media_locations.shape[1], device=media_locations.device)
            positions = places.where(media_locations, _NOWHERE).sort(dim=1).values
            self._keeps_newest = attend == "last" and not self.keep_all
        else:
            new = int(num_media.max())  # they may be more than the tokens
            positions = torch.full((batch, new), start, device=media_locations.device)
            self._keeps_newest = False
        self._add_media(key_values, num_media, positions)
        self._ranges, self._start = media_ranges, start
        self._note_dropped()
        return media_ranges

    def drop_unseen(self) -> None:
        """Drop the media that no later text can see. The text that was announced must have run."""
        if not self._keeps_newest or self._positions is None or self._positions.shape[1] < 2:
            return
        assert self._num_held is not None
        newest = self._num_held.clamp(min=1)[:, None] - 1
        self.key_values = {
            index: KeyValues(_take(kv.keys, newest), _take(kv.values, newest)) for index, kv in self.key_values.items()
        }
        self._positions = _take(self._positions, newest)
        self._num_held = self._num_held.clamp(max=1)
        self._note_dropped()

    def _note_dropped(self) -> None:
        assert self.num_media is not None
        assert self._num_held is not None
        assert self._ranges is not None
        num_dropped = self.num_media - self._num_held
        self._num_dropped = num_dropped.to(self._ranges.device) if num_dropped.any() else None

    def over_held(self, ranges: Int[Tensor, "batch text 2"]) -> Int[Tensor, "batch text 2"]:
        """Count ranges over the media that are held, as `key_values` has them, instead of over all of the row.

        Args:
            ranges: What `update` or `ranges_at` gave, or other ranges over all media of a row.

        Raises:
            ValueError: If media were dropped that are in the ranges (not checked under `torch.compile`).
        """
        return ranges if self._num_dropped is None else _without(ranges, self._num_dropped)

    def check_runs(self, runs: MediaRuns) -> None:
        """Refuse runs that name media which a row does not have, such as the padding of other rows.

        Args:
            runs: Of ranges over what is held.

        Raises:
            ValueError: If they do (not checked under `torch.compile`).
        """
        assert self._num_held is not None
        held = self._num_held.tolist()
        for run in runs.table or ():
            if run.media_stop > held[run.row]:
                raise ValueError(
                    f"row {run.row} of media_cache holds {held[run.row]} media, but its tokens are to see media up to "
                    f"{run.media_stop}; ranges and masks count all media of their row from its first one"
                )

    def close(self, reason: str) -> None:
        """Let nothing be added any more, since the language model's cache does not hold the text that was returned.

        Args:
            reason: What the caches were used in.
        """
        self._closed_by = reason

    def _count_before(self, start: int) -> Int[Tensor, " batch"]:
        """Count the media of each row whose tokens stand before a position."""
        assert self.num_media is not None
        assert self._num_held is not None
        assert self._positions is not None
        is_real = _first(self._positions.shape[1], self._num_held)
        left = (is_real & (self._positions < start).cpu()).sum(1)
        if start and ((left == 0) & (self._num_held < self.num_media)).any():
            raise ValueError(
                f"text from position {start} on would see media that were dropped when newer ones came; to crop the "
                "language model's cache so far back, begin with MediaCache(keep_all=True)"
            )
        return left

    def _add_media(self, key_values: Mapping[int, KeyValues], num_media: Tensor, positions: Tensor) -> None:
        """Join media row by row, so that each row's real media come first."""
        assert self.num_media is not None
        assert self._num_held is not None
        assert self._positions is not None
        old = next(iter(self.key_values.values())).keys.shape[1] if self.key_values else 0
        new = next(iter(key_values.values())).keys.shape[1] if key_values else 0
        positions = F.pad(positions, (0, new - positions.shape[1]), value=_NOWHERE)  # as many columns as media
        num_held = self._num_held + num_media
        if old == 0 and key_values:
            self.key_values, self._positions = dict(key_values), positions
        elif new:
            is_real = torch.cat([_first(old, self._num_held), _first(new, num_media)], dim=1)
            order = is_real.int().argsort(dim=1, descending=True, stable=True)[:, : int(num_held.max())]
            self.key_values = {
                index: KeyValues(
                    _take(torch.cat([past.keys, key_values[index].keys], dim=1), order),
                    _take(torch.cat([past.values, key_values[index].values], dim=1), order),
                )
                for index, past in self.key_values.items()
            }
            self._positions = _take(torch.cat([self._positions, positions], dim=1), order)
        self.num_media, self._num_held = self.num_media + num_media, num_held

    def ranges_at(self, start: int, length: int) -> Int[Tensor, "batch length 2"]:
        """Give the ranges of the tokens from `start` on, counted over all media of their rows.

        What was not announced by `update` sees what the last announced token saw: a generated `<image>` is a word,
        not a medium. When it begins, all that was announced has run, and media that cannot be seen are dropped.

        Args:
            start: Position of the first token.
            length: Number of tokens.
        """
        assert self._ranges is not None, "update comes first"
        if start >= self._start + self._ranges.shape[1]:
            self.drop_unseen()
        last = self._ranges.shape[1] - 1
        positions = torch.arange(start, start + length, device=self._ranges.device) - self._start
        return self._ranges[:, positions.clamp(0, last)]

    def _repeat_rows(self, times: int) -> None:
        assert self.num_media is not None
        assert self._num_held is not None
        assert self._positions is not None
        self.num_media = self.num_media.repeat_interleave(times)
        self._num_held = self._num_held.repeat_interleave(times)
        self._positions = self._positions.repeat_interleave(times, dim=0)
        self.key_values = {
            index: KeyValues(kv.keys.repeat_interleave(times, dim=0), kv.values.repeat_interleave(times, dim=0))
            for index, kv in self.key_values.items()
        }


def _first(size: int, count: Int[Tensor, " batch"]) -> Bool[Tensor, "batch size"]:
    return torch.arange(size, device=count.device) < count[:, None]


def _shift(ranges: Int[Tensor, "batch text 2"], by: Int[Tensor, " batch"]) -> Int[Tensor, "batch text 2"]:
    return (ranges + by[:, None, None]).masked_fill(ranges[..., :1] >= ranges[..., 1:], 0)


def _without(ranges: Int[Tensor, "batch text 2"], num_dropped: Int[Tensor, " batch"]) -> Int[Tensor, "batch text 2"]:
    ranges = _shift(ranges, -num_dropped)
    if not torch.compiler.is_compiling() and (ranges < 0).any():
        raise ValueError(
            "media_ranges name media that were dropped when newer ones came; begin with MediaCache(keep_all=True)"
        )
    return ranges


def _take(media: Tensor, order: Int[Tensor, "batch media"]) -> Tensor:
    index = order.to(media.device).view(*order.shape, *[1] * (media.ndim - 2)).expand(-1, -1, *media.shape[2:])
    return media.gather(1, index)

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flamingo_blocks import MediaCache, media_ranges
from flamingo_blocks.blocks import Attend, KeyValues
from tests.strategies import Layout, layouts

LATENTS, HEADS, HEAD_DIM = 2, 1, 1


def numbered(num_media: Tensor, first: Tensor) -> dict[int, KeyValues]:
    """Key and values that tell row and number of each medium; -1 is padding."""
    media = int(num_media.max()) + 1
    number = first[:, None] + torch.arange(media)
    number = torch.where(torch.arange(media) < num_media[:, None], number, -1).double()
    keys = number[..., None, None, None].expand(-1, -1, LATENTS, HEADS, HEAD_DIM)
    return {0: KeyValues(keys, keys + 100), 2: KeyValues(keys + 200, keys)}


def seen(cache: MediaCache, ranges: Tensor) -> list[list[list[int]]]:
    """The numbers of the media that each token sees, as the blocks would find them."""
    keys = cache.key_values[2].keys[..., 0, 0, 0] - 200
    held = cache.over_held(ranges).tolist()
    return [[keys[row, start:stop].int().tolist() for start, stop in tokens] for row, tokens in enumerate(held)]


def numbers(ranges: Tensor) -> list[list[list[int]]]:
    return [[list(range(start, stop)) for start, stop in tokens] for tokens in ranges.tolist()]


@pytest.mark.parametrize("keep_all", [False, True])
@given(layout=layouts(packed=False), data=st.data())
def test_text_in_pieces_sees_what_it_sees_in_one_piece(keep_all: bool, layout: Layout, data: Any) -> None:
    """Not so under `next`, where the first piece cannot know what comes."""
    attend: Attend = "last" if layout.attend == "next" else layout.attend
    whole = media_ranges(layout.media_locations, attend=attend)
    cuts = sorted(data.draw(st.sets(st.integers(1, layout.text - 1), max_size=3))) if layout.text > 1 else []
    cache = MediaCache(keep_all=keep_all)
    for start, end in pairwise([0, *cuts, layout.text]):
        piece = layout.media_locations[:, start:end]
        before = torch.zeros(layout.batch, dtype=torch.long) if cache.num_media is None else cache.num_media
        found = cache.update(numbered(piece.sum(1), before), piece.sum(1), piece, attend=attend)
        assert seen(cache, found) == numbers(whole[:, start:end])
        cache.drop_unseen()
    assert cache.num_media is not None
    assert torch.equal(cache.num_media, layout.num_media)
    if attend == "last" and not keep_all:
        held = {cache.key_values[0].keys.shape[1], cache.key_values[2].values.shape[1]}
        assert held == {1} if layout.num_media.any() else max(held) <= 1
    else:
        every = torch.stack([torch.zeros_like(layout.num_media), layout.num_media], dim=-1)[:, None]
        assert seen(cache, every) == numbers(every), "real media come first, in their order"


@given(layouts(packed=False), st.integers(0, 20), st.integers(1, 5), st.integers(0, 7))
def test_later_text_sees_what_the_last_token_saw(layout: Layout, start: int, length: int, offset: int) -> None:
    cache = MediaCache()
    media = numbered(layout.num_media, torch.zeros(layout.batch))
    cache.update(media, layout.num_media, layout.media_locations, attend=layout.attend, start=offset)
    found = seen(cache, cache.ranges_at(offset + start, length))
    expected = numbers(media_ranges(layout.media_locations, attend=layout.attend))
    for row in range(layout.batch):
        assert found[row] == [expected[row][min(start + i, layout.text - 1)] for i in range(length)]


def locations(num_media: Tensor) -> Tensor:
    return torch.arange(3) < num_media[:, None]


def test_rows_that_became_more_share_what_they_had() -> None:
    cache = MediaCache()
    first, second = torch.tensor([1, 2]), torch.tensor([0, 0, 1, 0])
    cache.update(numbered(first, torch.zeros(2)), first, locations(first))
    cache.update(numbered(second, torch.tensor([1, 1, 2, 2])), second, locations(second))
    assert cache.rows == 4
    assert cache.num_media is not None
    assert cache.num_media.tolist() == [1, 1, 3, 2]
    assert cache.key_values[0].keys[2, :, 0, 0, 0].tolist() == [0, 1, 2]


def test_what_is_refused_leaves_the_cache_as_it_was() -> None:
    cache = MediaCache()
    first = torch.tensor([1, 2])
    cache.update(numbered(first, torch.zeros(2)), first, locations(first))
    before = cache.key_values[0].keys.clone()
    three = torch.tensor([1, 1, 1])
    with pytest.raises(ValueError, match="media_cache has 2 rows, the new text 3; rows must not change between calls"):
        cache.update(numbered(three, torch.zeros(3)), three, locations(three))
    four = torch.tensor([1, 1, 1, 1])
    with pytest.raises(ValueError, match="row 1 has 2 <image> tokens but 1 media"):
        cache.update(numbered(four, torch.zeros(4)), four, locations(torch.tensor([1, 2, 1, 1])))
    assert torch.equal(cache.key_values[0].keys, before)
    assert repr(cache) == "MediaCache(media per row: [1, 2], layers: [0, 2])"


def test_text_that_would_see_dropped_media_is_refused_and_the_cache_is_as_it_was() -> None:
    """Row 0 has media at 0, 1 and 2, row 1 at 0."""
    cache, num_media = MediaCache(), torch.tensor([3, 1])
    kept = MediaCache(keep_all=True)
    for each in (cache, kept):
        each.update(numbered(num_media, torch.zeros(2)), num_media, locations(num_media))
        each.drop_unseen()
    assert cache.key_values[0].keys[..., 0, 0, 0].tolist() == [[2], [0]]
    none = torch.tensor([0, 0])
    more: Any = (numbered(none, none), none, torch.zeros(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"text from position 2 on would see media that were dropped .*keep_all=True"):
        cache.update(*more, start=2)
    with pytest.raises(ValueError, match="media_ranges name media that were dropped"):
        cache.update(*more, media_ranges=torch.tensor([[[1, 2]], [[0, 1]]]))
    assert seen(kept, kept.update(*more, start=2)) == [[[1]], [[0]]]
    assert seen(cache, cache.update(*more, media_ranges=torch.tensor([[[2, 3]], [[0, 0]]]))) == [[[2]], [[]]]
    assert cache.num_media is not None
    assert cache.num_media.tolist() == [3, 1]
    cache.update(*more, start=0)
    assert cache.num_media.tolist() == [0, 0]


def test_media_that_are_more_than_the_tokens_stay_when_text_is_cropped() -> None:
    """As the tiles of an image: their place is the begin of the text that came with them."""
    cache, num_media = MediaCache(), torch.tensor([5, 3])
    text = torch.zeros(2, 3, dtype=torch.bool)
    cache.update(
        numbered(num_media, torch.zeros(2)), num_media, text, media_ranges=torch.tensor([[[0, 5]] * 3, [[0, 3]] * 3])
    )
    cache.update({}, torch.zeros(2, dtype=torch.long), text[:, 2:], start=2)
    assert cache.num_media is not None
    assert cache.num_media.tolist() == [5, 3]
    cache.update({}, torch.zeros(2, dtype=torch.long), text, start=0)
    assert cache.num_media.tolist() == [0, 0]


@pytest.mark.unchecked
@pytest.mark.parametrize(
    "ranges, message", [([[[0, 1]] * 2], "are for 2 tokens, but the text has 3"), ([[[1, 0]] * 3], "0 <= start")]
)
def test_ranges_that_do_not_fit_leave_the_cache_as_it_was(ranges: list[list[list[int]]], message: str) -> None:
    cache, num_media = MediaCache(), torch.tensor([1])
    text = torch.zeros(1, 3, dtype=torch.bool)
    cache.update(numbered(num_media, torch.zeros(1)), num_media, text, media_ranges=torch.tensor([[[0, 1]] * 3]))
    before = dict(vars(cache))
    with pytest.raises(ValueError, match=message):
        cache.update(numbered(num_media, torch.ones(1)), num_media, text, media_ranges=torch.tensor(ranges))
    assert vars(cache) == before

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


@given(layouts(packed=False), st.data())
def test_text_in_pieces_sees_what_it_sees_in_one_piece(layout: Layout, data: Any) -> None:
    """Not so under `next`, where the first piece cannot know what comes."""
    attend: Attend = "last" if layout.attend == "next" else layout.attend
    whole = media_ranges(layout.media_locations, attend=attend)
    cut = data.draw(st.integers(1, layout.text))
    cache, seen = MediaCache(), []
    for piece in layout.media_locations.split([cut, layout.text - cut], dim=1):
        if piece.shape[1]:
            before = torch.zeros(layout.batch, dtype=torch.long) if cache.num_media is None else cache.num_media
            seen.append(cache.update(numbered(piece.sum(1), before), piece.sum(1), piece, attend=attend))
    assert torch.equal(torch.cat(seen, dim=1), whole)
    assert cache.num_media is not None
    assert torch.equal(cache.num_media, layout.num_media)
    keys = cache.key_values[2].keys[..., 0, 0, 0] - 200
    for row, count in enumerate(layout.num_media.tolist()):
        assert keys[row, :count].tolist() == list(range(count)), "real media come first, in their order"


@given(layouts(packed=False), st.integers(0, 20), st.integers(1, 5), st.integers(0, 7))
def test_later_text_sees_what_the_last_token_saw(layout: Layout, start: int, length: int, offset: int) -> None:
    cache = MediaCache()
    media = numbered(layout.num_media, torch.zeros(layout.batch))
    ranges = cache.update(media, layout.num_media, layout.media_locations, attend=layout.attend, start=offset)
    found = cache.ranges_at(offset + start, length)
    for i in range(length):
        assert torch.equal(found[:, i], ranges[:, min(start + i, layout.text - 1)])


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

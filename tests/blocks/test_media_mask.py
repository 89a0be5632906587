import re
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from flamingo_blocks import MediaRuns, media_index, media_ranges
from flamingo_blocks.blocks import dense_media_mask, ranges_of_mask
from flamingo_blocks.blocks.media_mask import check_ranges_fit
from tests import reference
from tests.strategies import Layout, layouts, masks


@given(layouts())
def test_media_index_counts_media_up_to_the_token(layout: Layout) -> None:
    for row, index in zip(layout.media_locations.tolist(), media_index(layout.media_locations).tolist(), strict=True):
        assert index == [sum(row[: token + 1]) for token in range(len(row))]


@given(layouts())
def test_ranges_follow_their_definition(layout: Layout) -> None:
    rows = zip(layout.media_locations.tolist(), layout.document_ids.tolist(), strict=True)
    expected = [reference.media_ranges(*row, layout.attend) for row in rows]
    assert layout.ranges.tolist() == [[list(seen) for seen in row] for row in expected]


@given(layouts())
def test_an_image_token_sees_its_own_medium(layout: Layout) -> None:
    own = media_index(layout.media_locations) - 1
    start, stop = layout.ranges.unbind(-1)
    assert ((start <= own) & (own < stop))[layout.media_locations].all()


@given(layouts())
def test_packed_documents_see_what_they_see_alone(layout: Layout) -> None:
    for row in range(layout.batch):
        for document in layout.document_ids[row].unique():
            tokens = layout.document_ids[row] == document
            alone = media_ranges(layout.media_locations[row, tokens][None], attend=layout.attend)[0]
            media_before = int((layout.media_locations[row] & (layout.document_ids[row] < document)).sum())
            is_empty = alone[:, :1] == alone[:, 1:]
            assert torch.equal(layout.ranges[row, tokens], (alone + media_before).masked_fill(is_empty, 0))


@given(layouts(packed=False), st.integers(1, 4), st.sampled_from(["left", "right"]))
def test_padding_tokens_change_no_range(layout: Layout, padding: int, side: str) -> None:
    pad = (padding, 0) if side == "left" else (0, padding)
    padded = media_ranges(torch.nn.functional.pad(layout.media_locations, pad), attend=layout.attend)
    assert torch.equal(padded[:, pad[0] : pad[0] + layout.text], layout.ranges)


@given(layouts())
def test_runs_are_maximal_and_cover_every_token_once_in_order(layout: Layout) -> None:
    table = layout.runs.table
    assert table is not None
    spelled_out = [
        (run.row, token, run.media_start, run.media_stop)
        for run in table
        for token in range(run.start, run.start + run.length)
    ]
    ranges = layout.ranges.tolist()
    assert spelled_out == [
        (row, token, *ranges[row][token]) for row in range(layout.batch) for token in range(layout.text)
    ]
    for run, after in pairwise(table):
        assert run.row != after.row or run[3:] != after[3:]
    assert layout.runs.media_stop == int(layout.ranges.max())


@given(layouts())
def test_dense_mask_spells_the_ranges_out(layout: Layout) -> None:
    mask = dense_media_mask(layout.ranges, layout.media)
    for row in range(layout.batch):
        for token in range(layout.text):
            start, stop = layout.ranges[row, token].tolist()
            assert mask[row, token].nonzero().flatten().tolist() == list(range(start, stop))


# ---------------------------------------------------------------- segments

ranges_of_any_kind = st.tuples(st.integers(0, 3), st.integers(0, 2)).map(lambda pair: (pair[0], sum(pair)))


@given(st.lists(st.lists(ranges_of_any_kind, min_size=4, max_size=4), min_size=1, max_size=2), st.integers(1, 3))
def test_segments_count_the_tokens_of_each_medium_and_know_those_that_are_not_in_order(
    rows: list[list[tuple[int, int]]], num_media: int
) -> None:
    runs, expected = MediaRuns(torch.tensor(rows), None), []
    for row in rows:
        newest = 0
        for start, stop in row:
            sees_something = start < stop
            is_wrong = sees_something and (stop - start > 1 or start < newest or stop > num_media)
            newest = max(newest, start) if sees_something else newest
            expected.append((min(newest, num_media - 1), not sees_something, is_wrong))
    for is_compiling in (False, True):  # then they are not kept
        with mock.patch("torch.compiler.is_compiling", return_value=is_compiling):
            segments = runs.segments(num_media)
            assert (runs.segments(num_media) is segments) != is_compiling
        assert segments.blind is not None
        assert segments.wrong is not None
        columns = (segments.medium, segments.blind, segments.wrong)
        assert list(zip(*(column.flatten().tolist() for column in columns), strict=True)) == expected
        counts = [row.count(medium) for row in segments.medium.tolist() for medium in range(num_media)]
        assert segments.ends.diff(prepend=segments.ends.new_tensor([-1])).tolist() == [1, *counts]


@given(layouts())
def test_nothing_is_to_be_cleared_where_the_table_tells_so(layout: Layout) -> None:
    runs = layout.runs
    assume(runs.in_order)
    segments = runs.segments(max(1, runs.media_stop))
    assert segments.wrong is None
    if segments.blind is None:
        assert runs.sees_something.all()
    else:
        assert torch.equal(segments.blind, ~runs.sees_something)
        assert segments.blind.any()


# ---------------------------------------------------------------- masks


@given(layouts(), st.integers(0, 2))
def test_a_mask_that_spells_ranges_out_is_those_ranges(layout: Layout, more: int) -> None:
    mask = dense_media_mask(layout.ranges, int(layout.num_media.max()) + more)
    runs = MediaRuns.from_mask(mask)
    assert torch.equal(ranges_of_mask(mask), layout.ranges)
    assert torch.equal(runs.ranges, layout.ranges)
    assert (runs.table, runs.in_order, runs.mask) == (layout.runs.table, layout.runs.in_order, None)


def seen_by(mask: Tensor) -> list[list[list[int]]]:
    """The media that each token of each row sees."""
    return [[[i for i, sees in enumerate(token) if sees] for token in row] for row in mask.tolist()]


@given(masks(), st.booleans())
def test_a_mask_is_kept_exactly_where_a_token_sees_media_that_are_not_neighbours(mask: Tensor, only_one: bool) -> None:
    if only_one:  # alone, such tokens are seldom
        mask[1:], mask[:, 1:] = False, False
    seen = seen_by(mask)
    gaps = [
        (row, token)
        for row, tokens in enumerate(seen)
        for token, media in enumerate(tokens)
        if media != list(range(media[0], media[-1] + 1) if media else [])
    ]
    runs = MediaRuns.from_mask(mask)
    if not gaps:
        assert runs.mask is None
        assert torch.equal(dense_media_mask(ranges_of_mask(mask), mask.shape[-1]), mask)
        return
    assert runs.mask is mask
    assert runs.table is None
    assert not runs.in_order
    row, token = gaps[0]
    with pytest.raises(ValueError, match=rf"at row {row}, token {token} it names \[{str(seen[row][token])[1:-1]}\]"):
        ranges_of_mask(mask)


@given(masks())
def test_runs_know_what_their_mask_reaches(mask: Tensor) -> None:
    runs, seen = MediaRuns.from_mask(mask), seen_by(mask)
    hulls = [[[media[0], media[-1] + 1] if media else [0, 0] for media in tokens] for tokens in seen]
    assert runs.ranges.tolist() == hulls
    assert runs.sees_something.tolist() == [[bool(media) for media in tokens] for tokens in seen]
    assert runs.media_stop == max(stop for tokens in hulls for _, stop in tokens)
    assert runs.sees_all(mask.shape[-1]) == bool(mask.all())
    for media in range(runs.media_stop, mask.shape[-1] + 2):
        spelled_out = runs.dense_mask(media)
        assert spelled_out.shape[-1] == media
        assert seen_by(spelled_out) == seen


@pytest.mark.parametrize("shape", [(2, 3, 0), (2, 0, 3), (0, 2, 3)])
def test_a_mask_without_media_or_text_or_rows_shows_nothing(shape: tuple[int, ...]) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    assert torch.equal(ranges_of_mask(mask), torch.zeros(*shape[:2], 2, dtype=torch.long))
    runs = MediaRuns.from_mask(mask)
    assert runs.mask is None
    assert runs.media_stop == 0


@pytest.mark.unchecked
@pytest.mark.parametrize("make", [ranges_of_mask, MediaRuns.from_mask])
def test_what_is_no_mask_is_refused(make: Any) -> None:
    for wrong in (torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"mask must be boolean of shape \(batch, text, media\).* got torch"):
            make(wrong)


# ---------------------------------------------------------------- checks


@given(layouts(), st.data())
def test_every_mismatch_of_image_tokens_and_media_is_found(layout: Layout, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, layout.batch - 1))
    found = int(layout.num_media[row])
    given_media = data.draw(st.integers(0, found + 3))
    assume(given_media != found)
    num_media = layout.num_media.clone()
    num_media[row] = given_media
    with pytest.raises(ValueError, match=f"row {row} has {found} <image> tokens but {given_media} media"):
        MediaRuns.from_ranges(layout.ranges, num_media=num_media)


@given(layouts(), st.integers(0, 3))
def test_ranges_fit_if_no_row_names_more_media_than_it_has(layout: Layout, missing: int) -> None:
    stops = layout.ranges[..., 1].amax(1)
    check_ranges_fit(layout.ranges, stops + missing)
    row = missing % layout.batch
    if stops[row]:
        fewer = stops.index_fill(0, torch.tensor([row]), stops[row] - 1)
        with pytest.raises(
            ValueError, match=f"row {row} has {fewer[row]} media, but its tokens are to see {stops[row]}"
        ):
            check_ranges_fit(layout.ranges, fewer)


def test_ranges_of_no_text_fit_and_those_of_other_rows_do_not() -> None:
    check_ranges_fit(torch.zeros(2, 0, 2, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="ranges or mask have 2 rows, but there are 3 rows of text"):
        check_ranges_fit(torch.zeros(2, 1, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long))


def test_rows_without_text_have_no_image_tokens() -> None:
    ranges = torch.zeros(2, 0, 2, dtype=torch.long)
    MediaRuns.from_ranges(ranges, num_media=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="row 1 has 0 <image> tokens but 1 media"):
        MediaRuns.from_ranges(ranges, num_media=torch.tensor([0, 1]))


def test_a_batch_without_text_or_rows_has_no_runs() -> None:
    assert MediaRuns.from_ranges(torch.zeros(2, 0, 2, dtype=torch.long)).table == ()
    assert MediaRuns.from_ranges(torch.zeros(0, 3, 2, dtype=torch.long)).table == ()


def test_runs_without_a_table_know_how_many_media_they_name() -> None:
    ranges = torch.tensor([[[0, 1], [1, 3]]])
    assert MediaRuns(ranges, None).media_stop == MediaRuns.from_ranges(ranges).media_stop == 3


def test_the_default_device_does_not_matter() -> None:
    ranges = torch.tensor([[[0, 1], [1, 3]]])
    with torch.device("meta"):
        assert MediaRuns.from_ranges(ranges).table == ((0, 0, 1, 0, 1), (0, 1, 1, 1, 3))
        assert dense_media_mask(ranges, 3).tolist() == [[[True, False, False], [False, True, True]]]


def test_the_rule_can_differ_by_document() -> None:
    is_image = torch.tensor([[True, False, True, False]] * 2)
    is_next = torch.tensor([[False], [True]])
    ranges = torch.where(is_next[..., None], media_ranges(is_image, attend="next"), media_ranges(is_image))
    assert ranges.tolist() == [[[0, 1], [0, 1], [1, 2], [1, 2]], [[0, 1], [1, 2], [1, 2], [0, 0]]]


@pytest.mark.parametrize("bad", [(-1, 0), (2, 1)])
def test_negative_or_backward_ranges_are_refused(bad: tuple[int, int]) -> None:
    ranges = torch.tensor([[[0, 1], bad]])
    with pytest.raises(ValueError, match=r"0 <= start <= stop, got .* at row 0, token 1"):
        MediaRuns.from_ranges(ranges)


@pytest.mark.unchecked
def test_wrong_shapes_are_refused() -> None:
    is_image = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"document_ids must have the shape of media_locations, \(2, 3\), got \(3,\)"):
        media_ranges(is_image, document_ids=torch.zeros(3, dtype=torch.long))
    for shape in ((3, 2), (1, 2, 3)):
        with pytest.raises(
            ValueError, match=rf"ranges must have shape \(batch, text, 2\), got {re.escape(str(shape))}"
        ):
            MediaRuns.from_ranges(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"num_media must have shape \(2,\), got \(3,\)"):
        MediaRuns.from_ranges(media_ranges(is_image), num_media=torch.zeros(3, dtype=torch.long))


@pytest.mark.unchecked
@pytest.mark.parametrize("find", [media_index, media_ranges])
def test_token_ids_are_no_places(find: Any) -> None:
    with pytest.raises(ValueError, match=r"must be boolean, .* got torch\.int64; .* write input_ids == image_token_id"):
        find(torch.tensor([[5, 6]]))


@pytest.mark.unchecked
def test_unknown_rule_is_named() -> None:
    with pytest.raises(ValueError, match="attend must be one of 'last', 'all_previous', 'next', got 'previous'"):
        media_ranges(torch.ones(1, 2, dtype=torch.bool), attend="previous")  # type: ignore[arg-type]

"""Packing moves examples into rows, in their order, and does nothing to them."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from flamingo_blocks.data import Example, Packer


def make_example(length: int, media: int = 0) -> Example:
    ids = torch.arange(length)
    return Example(ids, ids, torch.zeros(length, 2, dtype=torch.long), (torch.zeros(1, 2, 3),) * media)


queues = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), max_size=12)  # of tokens and media
lengths = st.integers(9, 20)
limits = st.none() | st.integers(3, 6)


@given(sizes=queues, length=lengths, max_media=limits)
def test_rows_hold_all_examples_in_order_and_begin_with_what_did_not_fit(
    sizes: list[tuple[int, int]], length: int, max_media: int | None
) -> None:
    examples = [make_example(*size) for size in sizes]
    packer, incoming = Packer(length, max_media=max_media), iter(examples)
    expected: list[list[Example]] = []
    for example in examples:
        row = [*expected[-1], example] if expected else []
        media = sum(len(one.media) for one in row)
        if row and sum(len(one.input_ids) for one in row) <= length and (max_media is None or media <= max_media):
            expected[-1].append(example)
        else:
            expected.append([example])
    for wanted in expected:
        row = packer.next_row(incoming)
        assert list(map(id, row)) == list(map(id, wanted))
        seen = sum(map(len, expected[: expected.index(wanted) + 1]))
        assert packer.held is (examples[seen] if seen < len(examples) else None)
    assert packer.next_row(incoming) == []


@given(sizes=queues, length=lengths, max_media=limits, stop=st.integers(0, 12))
def test_packing_goes_on_from_what_is_held(
    sizes: list[tuple[int, int]], length: int, max_media: int | None, stop: int
) -> None:
    examples = [make_example(*size) for size in sizes]
    packer, incoming = Packer(length, max_media=max_media), iter(examples)
    rows = [packer.next_row(incoming) for _ in range(stop)]
    rest = list(incoming)
    resumed = Packer(length, max_media=max_media)
    resumed.held = packer.held
    one, other = iter(rest), iter(rest)
    while row := packer.next_row(one):
        rows.append(resumed.next_row(other))
        assert list(map(id, rows[-1])) == list(map(id, row))
    assert not resumed.next_row(other)
    assert [id(example) for row in rows for example in row] == list(map(id, examples))


def test_an_example_that_fits_into_no_row_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"an example has 5 tokens and 0 media, but a row takes 4 tokens .* max_tokens"
    ):
        Packer(4).next_row(iter([make_example(5)]))
    packer, incoming = Packer(4, max_media=1), iter([make_example(2), make_example(1, 2)])
    with pytest.raises(ValueError, match="2 media, but a row takes 4 tokens and 1 media"):
        packer.next_row(incoming)


@pytest.mark.parametrize("sizes", [{"length": 0}, {"length": 1, "max_media": 0}])
def test_sizes_that_cannot_be_are_errors(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Packer(**sizes)

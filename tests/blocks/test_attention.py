from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flamingo_blocks import MediaRuns
from flamingo_blocks.blocks import Algorithm, KeyValues, attend_to_media, choose_algorithm
from tests import reference
from tests.strategies import Layout, layouts, random_tensor, seeds

algorithms = st.sampled_from(get_args(Algorithm))
LATENTS, HEADS, HEAD_DIM = 3, 4, 5


def draw_inputs(layout: Layout, seed: int, *, kv_heads: int = HEADS) -> tuple[Tensor, KeyValues]:
    queries = random_tensor(seed, layout.batch, layout.text, HEADS, HEAD_DIM, requires_grad=True)
    shape = (layout.batch, layout.media, LATENTS, kv_heads, HEAD_DIM)
    keys, values = (random_tensor(seed + i, *shape, requires_grad=True) for i in (1, 2))
    return queries, KeyValues(keys, values)


@given(layouts(), seeds, st.sampled_from([1, 2, 4]), algorithms)
def test_every_algorithm_equals_the_loop_oracle_gradients_included(
    layout: Layout, seed: int, kv_heads: int, algorithm: Algorithm
) -> None:
    queries, media = draw_inputs(layout, seed, kv_heads=kv_heads)
    output = attend_to_media(queries, media, layout.runs, algorithm=algorithm)
    expected = reference.attend_to_media(queries, media, layout.ranges)
    torch.testing.assert_close(output, expected)

    if layout.ranges.any():
        inputs = (queries, media.keys, media.values)
        weights = random_tensor(seed + 3, *output.shape)
        torch.testing.assert_close(
            torch.autograd.grad((output * weights).sum(), inputs),
            torch.autograd.grad((expected * weights).sum(), inputs),
        )


@given(layouts(), seeds, algorithms)
def test_a_token_depends_on_no_medium_outside_its_range(layout: Layout, seed: int, algorithm: Algorithm) -> None:
    queries, media = draw_inputs(layout, seed)
    _, others = draw_inputs(layout, seed + 10)
    before = attend_to_media(queries, media, layout.runs, algorithm=algorithm)
    for changed in range(layout.media):
        keys, values = media.keys.detach().clone(), media.values.detach().clone()
        keys[:, changed], values[:, changed] = others.keys[:, changed], others.values[:, changed]
        after = attend_to_media(queries, KeyValues(keys, values), layout.runs, algorithm=algorithm)
        start, stop = layout.ranges.unbind(-1)
        sees_it = (start <= changed) & (changed < stop)
        assert torch.equal(after[~sees_it], before[~sees_it])
        assert (after[sees_it] != before[sees_it]).all()


@given(layouts(), seeds, algorithms)
def test_an_empty_range_gives_exactly_zero_and_finite_gradients(
    layout: Layout, seed: int, algorithm: Algorithm
) -> None:
    queries, media = draw_inputs(layout, seed)
    output = attend_to_media(queries, media, layout.runs, algorithm=algorithm)
    sees_nothing = layout.ranges[..., 0] == layout.ranges[..., 1]
    assert (output[sees_nothing] == 0).all()
    if output.requires_grad:
        output.sum().backward()
        for tensor in (queries, media.keys, media.values):
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all()
        assert queries.grad is not None
        assert (queries.grad[sees_nothing] == 0).all()


@given(layouts(), seeds, algorithms, st.permutations(range(LATENTS)))
def test_permuting_the_latents_of_a_medium_changes_nothing(
    layout: Layout, seed: int, algorithm: Algorithm, order: list[int]
) -> None:
    queries, media = draw_inputs(layout, seed)
    permuted = KeyValues(media.keys[:, :, order], media.values[:, :, order])
    torch.testing.assert_close(
        attend_to_media(queries, permuted, layout.runs, algorithm=algorithm),
        attend_to_media(queries, media, layout.runs, algorithm=algorithm),
    )


@given(layouts(), seeds, algorithms)
def test_rows_of_a_batch_are_independent(layout: Layout, seed: int, algorithm: Algorithm) -> None:
    queries, media = draw_inputs(layout, seed)
    together = attend_to_media(queries, media, layout.runs, algorithm=algorithm)
    for row in range(layout.batch):
        own = KeyValues(media.keys[row, None], media.values[row, None])
        runs = MediaRuns.from_ranges(layout.ranges[row, None])
        alone = attend_to_media(queries[row, None], own, runs, algorithm=algorithm)
        torch.testing.assert_close(alone[0], together[row])


@given(layouts(), seeds, algorithms, st.data())
def test_the_order_of_media_matters_only_through_the_ranges(
    layout: Layout, seed: int, algorithm: Algorithm, data: st.DataObject
) -> None:
    """Where each token sees one medium, media may be stored in any order if the ranges say which is which."""
    queries, media = draw_inputs(layout, seed)
    ranges = layout.ranges.clone()
    ranges[..., 1] = ranges[..., 1].minimum(ranges[..., 0] + 1)
    expected = attend_to_media(queries, media, MediaRuns.from_ranges(ranges), algorithm=algorithm)
    place = torch.tensor(data.draw(st.permutations(range(layout.media))))
    stored = place.argsort()
    moved = KeyValues(media.keys[:, stored], media.values[:, stored])
    start = place[ranges[..., 0]]
    moved_ranges = torch.stack([start, start + (ranges[..., 1] - ranges[..., 0])], dim=-1)
    output = attend_to_media(queries, moved, MediaRuns.from_ranges(moved_ranges), algorithm=algorithm)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("algorithm", get_args(Algorithm))
def test_a_batch_without_media_gives_zero(algorithm: Algorithm) -> None:
    queries = torch.randn(2, 3, HEADS, HEAD_DIM)
    nothing = torch.zeros(2, 0, LATENTS, HEADS, HEAD_DIM)
    runs = MediaRuns.from_ranges(torch.zeros(2, 3, 2, dtype=torch.long))
    output = attend_to_media(queries, KeyValues(nothing, nothing), runs, algorithm=algorithm)
    assert torch.equal(output, torch.zeros_like(queries))


@given(layouts(), seeds, algorithms)
def test_nan_of_a_medium_reaches_the_tokens_that_see_it_and_no_others(
    layout: Layout, seed: int, algorithm: Algorithm
) -> None:
    queries, media = draw_inputs(layout, seed)
    before = attend_to_media(queries, media, layout.runs, algorithm=algorithm)
    changed = seed % layout.media
    values = media.values.detach().clone()
    values[:, changed, 0] = torch.nan
    after = attend_to_media(queries, KeyValues(media.keys, values), layout.runs, algorithm=algorithm)
    start, stop = layout.ranges.unbind(-1)
    sees_it = (start <= changed) & (changed < stop)
    assert after[sees_it].isnan().all()
    torch.testing.assert_close(after[~sees_it], before[~sees_it])


@pytest.mark.parametrize("algorithm", get_args(Algorithm))
def test_a_batch_without_tokens_gives_no_output(algorithm: Algorithm) -> None:
    media = torch.randn(2, 1, LATENTS, HEADS, HEAD_DIM)
    runs = MediaRuns.from_ranges(torch.zeros(2, 0, 2, dtype=torch.long))
    output = attend_to_media(torch.zeros(2, 0, HEADS, HEAD_DIM), KeyValues(media, media), runs, algorithm=algorithm)
    assert output.shape == (2, 0, HEADS, HEAD_DIM)


@pytest.mark.parametrize(
    ("text", "media", "latents", "algorithm"),
    [
        pytest.param(30, 10, 4, "dense", id="many short runs over a few latents: the demo"),
        pytest.param(1, 2, 64, "dense", id="a step of decoding, two media"),
        pytest.param(256, 5, 64, "loop", id="a training window of the paper"),
        pytest.param(1, 32, 64, "loop", id="a step of decoding, 32 media"),
        pytest.param(2048, 1, 64, "loop", id="one medium"),
    ],
)
def test_the_choice_on_cpu_is_the_loop_unless_there_is_little_to_compute(
    text: int, media: int, latents: int, algorithm: Algorithm
) -> None:
    heads, head_dim = (4, 16) if latents == 4 else (8, 64)
    index = torch.arange(text) * media // text
    runs = MediaRuns.from_ranges(torch.stack([index, index + 1], dim=-1)[None])
    queries, keys = torch.zeros(1, text, heads, head_dim), torch.zeros(1, media, latents, heads, head_dim)
    assert choose_algorithm(queries, KeyValues(keys, keys), runs) == algorithm


def test_the_choice_is_dense_without_a_table_and_on_other_devices() -> None:
    queries, keys = torch.zeros(1, 256, 8, 64), torch.zeros(1, 2, 64, 8, 64)
    runs = MediaRuns.from_ranges(torch.tensor([[[0, 1]] * 256]))
    assert choose_algorithm(queries, KeyValues(keys, keys), runs) == "loop"
    assert choose_algorithm(queries, KeyValues(keys, keys), MediaRuns(runs.ranges, None)) == "dense"
    assert choose_algorithm(queries.to("meta"), KeyValues(keys, keys), runs) == "dense"


def test_more_image_tokens_than_media_is_an_error() -> None:
    queries, media = torch.randn(1, 2, HEADS, HEAD_DIM), torch.randn(1, 1, LATENTS, HEADS, HEAD_DIM)
    runs = MediaRuns.from_ranges(torch.tensor([[[0, 1], [1, 2]]]))
    with pytest.raises(ValueError, match="runs name 2 media in a row, but there are 1"):
        attend_to_media(queries, KeyValues(media, media), runs)


@pytest.mark.parametrize(
    ("queries", "keys", "values", "message"),
    [
        ((1, 2, 4, 5), (1, 1, 3, 4, 5), (1, 1, 3, 2, 5), "media.values must have the shape of media.keys"),
        ((1, 2, 4, 5), (2, 1, 3, 4, 5), (2, 1, 3, 4, 5), r"media.keys must have shape \(batch=1,"),
        ((1, 2, 4, 5), (1, 1, 3, 4, 6), (1, 1, 3, 4, 6), "head_dim=5"),
        ((1, 2, 4, 5), (1, 1, 3, 3, 5), (1, 1, 3, 3, 5), "kv_heads must divide heads=4, got 3"),
        ((1, 3, 4, 5), (1, 1, 3, 4, 5), (1, 1, 3, 4, 5), r"runs must be built for \(batch=1, text=3\), got \(1, 2\)"),
    ],
)
@pytest.mark.unchecked
def test_wrong_shapes_are_refused(
    queries: tuple[int, ...], keys: tuple[int, ...], values: tuple[int, ...], message: str
) -> None:
    runs = MediaRuns.from_ranges(torch.zeros(1, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        attend_to_media(torch.zeros(queries), KeyValues(torch.zeros(keys), torch.zeros(values)), runs)


@pytest.mark.unchecked
def test_unknown_or_impossible_algorithms_are_refused() -> None:
    queries, media = torch.randn(1, 2, HEADS, HEAD_DIM), torch.randn(1, 1, LATENTS, HEADS, HEAD_DIM)
    ranges = torch.zeros(1, 2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="algorithm must be one of 'loop', 'dense', got 'flash'"):
        attend_to_media(queries, KeyValues(media, media), MediaRuns.from_ranges(ranges), algorithm="flash")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='"loop" needs a run table'):
        attend_to_media(queries, KeyValues(media, media), MediaRuns(ranges, None), algorithm="loop")

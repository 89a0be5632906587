import dataclasses
from typing import Any, get_args
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from flamingo_blocks import MediaRuns
from flamingo_blocks.blocks import Algorithm, KeyValues, attend_to_media, choose_algorithm, dense_media_mask
from tests import reference
from tests.strategies import Layout, layouts, long_layouts, masks, random_tensor, seeds

algorithms = st.sampled_from(get_args(Algorithm))
every_algorithm = pytest.mark.parametrize("algorithm", get_args(Algorithm))
LATENTS, HEADS, HEAD_DIM = 3, 4, 5


def varlen_attn(
    queries: Tensor, keys: Tensor, values: Tensor, ends: Tensor, media_ends: Tensor, *longest: int
) -> Tensor:
    """What torch's kernel computes, which is for CUDA alone: one attention for each pair of segments."""
    assert ends.dtype == media_ends.dtype == torch.int32
    assert all(e.diff().max() <= most for e, most in zip((ends, media_ends), longest, strict=True))
    segments = zip(
        *(tensor.split(e.diff().tolist()) for tensor, e in ((queries, ends), (keys, media_ends), (values, media_ends))),
        strict=True,
    )
    outputs = []
    for q, k, v in segments:
        q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(q, k, v))
    return torch.cat(outputs, dim=1).transpose(0, 1)


def attend(queries: Tensor, media: KeyValues, runs: MediaRuns, algorithm: Algorithm) -> Tensor:
    if not runs.in_order and algorithm in ("tiles", "varlen"):
        assume(False)
    with mock.patch("torch.nn.attention.varlen.varlen_attn", varlen_attn):
        return attend_to_media(queries, media, runs, algorithm=algorithm)


def draw_inputs(
    layout: Layout, seed: int, *, kv_heads: int = HEADS, latents: int = LATENTS
) -> tuple[Tensor, KeyValues]:
    queries = random_tensor(seed, layout.batch, layout.text, HEADS, HEAD_DIM, requires_grad=True)
    shape = (layout.batch, layout.media, latents, kv_heads, HEAD_DIM)
    keys, values = (random_tensor(seed + i, *shape, requires_grad=True) for i in (1, 2))
    return queries, KeyValues(keys, values)


@every_algorithm
@given(layouts(), seeds, st.sampled_from([1, 2, 4]), st.sampled_from([1, LATENTS]))
def test_every_algorithm_equals_the_loop_oracle_gradients_included(
    algorithm: Algorithm, layout: Layout, seed: int, kv_heads: int, latents: int
) -> None:
    check_algorithm(layout, *draw_inputs(layout, seed, kv_heads=kv_heads, latents=latents), algorithm)


@every_algorithm
@settings(max_examples=5)
@given(long_layouts(), seeds)
def test_so_it_does_for_many_media_and_for_long_runs(algorithm: Algorithm, layout: Layout, seed: int) -> None:
    check_algorithm(layout, *draw_inputs(layout, seed, kv_heads=2), algorithm)


def check_algorithm(layout: Layout, queries: Tensor, media: KeyValues, algorithm: Algorithm) -> None:
    output = attend(queries, media, layout.runs, algorithm)
    expected = reference.attend_to_media(queries, media, layout.ranges)
    torch.testing.assert_close(output, expected)

    if layout.ranges.any():
        inputs = (queries, media.keys, media.values)
        weights = random_tensor(3, *output.shape)
        torch.testing.assert_close(
            torch.autograd.grad((output * weights).sum(), inputs),
            torch.autograd.grad((expected * weights).sum(), inputs),
        )


def media_like(mask: Tensor, seed: int, *, padding: int = 0) -> tuple[Tensor, KeyValues]:
    """Queries and media for a mask."""
    batch, text, media = mask.shape
    queries = random_tensor(seed, batch, text, HEADS, HEAD_DIM, requires_grad=True)
    shape = (batch, media + padding, LATENTS, 2, HEAD_DIM)
    keys, values = (random_tensor(seed + i, *shape, requires_grad=True) for i in (1, 2))
    return queries, KeyValues(keys, values)


@given(masks(), seeds, st.integers(0, 1))
def test_any_mask_equals_the_loop_oracle_gradients_included(mask: Tensor, seed: int, padding: int) -> None:
    queries, media = media_like(mask, seed, padding=padding)
    output = attend_to_media(queries, media, MediaRuns.from_mask(mask))
    seen = [[token.nonzero().flatten().tolist() for token in row] for row in mask]
    expected = reference.attend_to_seen_media(queries, media, seen)
    torch.testing.assert_close(output, expected)
    inputs, weights = (queries, media.keys, media.values), random_tensor(seed + 3, *output.shape)
    if mask.any():
        torch.testing.assert_close(
            torch.autograd.grad((output * weights).sum(), inputs),
            torch.autograd.grad((expected * weights).sum(), inputs),
        )


@given(masks(), seeds)
def test_under_any_mask_only_seen_media_reach_a_token_and_those_that_see_nothing_get_zero(
    mask: Tensor, seed: int
) -> None:
    queries, media = media_like(mask, seed)
    runs, changed = MediaRuns.from_mask(mask), seed % mask.shape[-1]
    before = attend_to_media(queries, media, runs)
    with torch.no_grad():
        media.values[:, changed] = torch.nan
    after = attend_to_media(queries, media, runs)
    sees_it, sees_nothing = mask[..., changed], ~mask.any(-1)
    assert after[sees_it].isnan().all()
    torch.testing.assert_close(after[~sees_it], before[~sees_it])
    assert (after[sees_nothing] == 0).all()
    if after.requires_grad:
        (gradient,) = torch.autograd.grad(after.sum(), queries, allow_unused=True, materialize_grads=True)
        assert gradient[~sees_it].isfinite().all()
        assert (gradient[sees_nothing] == 0).all()


@pytest.mark.parametrize("algorithm", [name for name in get_args(Algorithm) if name != "dense"])
def test_a_mask_that_no_ranges_can_say_is_for_dense_attention_alone(algorithm: Algorithm) -> None:
    mask = torch.tensor([[[True, False, True]] * 40])
    queries, media = media_like(mask, 0)
    runs = MediaRuns.from_mask(mask)
    assert choose_algorithm(queries, media, runs) == choose_algorithm(queries.to("meta"), media, runs) == "dense"
    with pytest.raises(ValueError, match=f'algorithm "{algorithm}" needs ranges, but runs hold a mask'):
        attend_to_media(queries, media, runs, algorithm=algorithm)


def test_a_mask_that_names_more_media_than_there_are_is_an_error() -> None:
    mask = torch.tensor([[[True, False, True]]])
    queries, media = media_like(mask[..., :2], 0)
    with pytest.raises(ValueError, match="runs name 3 media in a row, but there are 2"):
        attend_to_media(queries, media, MediaRuns.from_mask(mask))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 1), seeds, algorithms)
def test_so_it_does_where_all_tokens_see_all_media_of_their_row_or_all_but_padding(
    batch: int, text: int, media: int, padding: int, seed: int, algorithm: Algorithm
) -> None:
    queries = random_tensor(seed, batch, text, HEADS, HEAD_DIM)
    keys, values = (random_tensor(seed + i, batch, media + padding, LATENTS, HEADS, HEAD_DIM) for i in (1, 2))
    ranges = torch.tensor([0, media]).expand(batch, text, 2)
    output = attend(queries, KeyValues(keys, values), MediaRuns.from_ranges(ranges), algorithm)
    torch.testing.assert_close(output, reference.attend_to_media(queries, KeyValues(keys, values), ranges))


def test_no_mask_is_made_where_all_tokens_see_all_media() -> None:
    queries, media = torch.randn(1, 3, HEADS, HEAD_DIM), torch.randn(1, 2, LATENTS, HEADS, HEAD_DIM)
    for seen, needs_mask in ((2, False), (1, True)):
        runs = MediaRuns.from_ranges(torch.tensor([0, seen]).expand(1, 3, 2))
        with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as kernel:
            attend_to_media(queries, KeyValues(media, media), runs, algorithm="dense")
        assert (kernel.call_args.kwargs["attn_mask"] is not None) == needs_mask


@pytest.mark.parametrize("head_dim", [1, 2, 4])
def test_heads_share_keys_and_values_whatever_their_width(head_dim: int) -> None:
    queries, media = random_tensor(0, 1, 3, 4, head_dim), random_tensor(1, 1, 2, LATENTS, 2, head_dim)
    ranges = torch.tensor([[[0, 1], [1, 2], [0, 2]]])
    found = attend_to_media(queries, KeyValues(media, media), MediaRuns.from_ranges(ranges))
    torch.testing.assert_close(found, reference.attend_to_media(queries, KeyValues(media, media), ranges))


@given(layouts(), seeds, algorithms)
def test_a_token_depends_on_no_medium_outside_its_range(layout: Layout, seed: int, algorithm: Algorithm) -> None:
    queries, media = draw_inputs(layout, seed)
    _, others = draw_inputs(layout, seed + 10)
    before = attend(queries, media, layout.runs, algorithm)
    for changed in range(layout.media):
        keys, values = media.keys.detach().clone(), media.values.detach().clone()
        keys[:, changed], values[:, changed] = others.keys[:, changed], others.values[:, changed]
        after = attend(queries, KeyValues(keys, values), layout.runs, algorithm)
        start, stop = layout.ranges.unbind(-1)
        sees_it = (start <= changed) & (changed < stop)
        assert torch.equal(after[~sees_it], before[~sees_it])
        assert (after[sees_it] != before[sees_it]).all()


@given(layouts(), seeds, algorithms)
def test_an_empty_range_gives_exactly_zero_and_finite_gradients(
    layout: Layout, seed: int, algorithm: Algorithm
) -> None:
    queries, media = draw_inputs(layout, seed)
    output = attend(queries, media, layout.runs, algorithm)
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
        attend(queries, permuted, layout.runs, algorithm),
        attend(queries, media, layout.runs, algorithm),
    )


@given(layouts(), seeds, algorithms)
def test_rows_of_a_batch_are_independent(layout: Layout, seed: int, algorithm: Algorithm) -> None:
    queries, media = draw_inputs(layout, seed)
    together = attend(queries, media, layout.runs, algorithm)
    for row in range(layout.batch):
        own = KeyValues(media.keys[row, None], media.values[row, None])
        runs = MediaRuns.from_ranges(layout.ranges[row, None])
        alone = attend(queries[row, None], own, runs, algorithm)
        torch.testing.assert_close(alone[0], together[row])


@given(layouts(), seeds, algorithms, st.data())
def test_the_order_of_media_matters_only_through_the_ranges(
    layout: Layout, seed: int, algorithm: Algorithm, data: st.DataObject
) -> None:
    """Where each token sees one medium, media may be stored in any order if the ranges say which is which."""
    queries, media = draw_inputs(layout, seed)
    ranges = layout.ranges.clone()
    ranges[..., 1] = ranges[..., 1].minimum(ranges[..., 0] + 1)
    expected = attend(queries, media, MediaRuns.from_ranges(ranges), algorithm)
    place = torch.tensor(data.draw(st.permutations(range(layout.media))))
    stored = place.argsort()
    moved = KeyValues(media.keys[:, stored], media.values[:, stored])
    start = place[ranges[..., 0]]
    moved_ranges = torch.stack([start, start + (ranges[..., 1] - ranges[..., 0])], dim=-1)
    output = attend(queries, moved, MediaRuns.from_ranges(moved_ranges), algorithm)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("algorithm", get_args(Algorithm))
def test_a_batch_without_media_gives_zero(algorithm: Algorithm) -> None:
    queries = torch.randn(2, 3, HEADS, HEAD_DIM)
    nothing = torch.zeros(2, 0, LATENTS, HEADS, HEAD_DIM)
    runs = MediaRuns.from_ranges(torch.zeros(2, 3, 2, dtype=torch.long))
    output = attend(queries, KeyValues(nothing, nothing), runs, algorithm)
    assert torch.equal(output, torch.zeros_like(queries))


@given(layouts(), seeds, algorithms)
def test_nan_of_a_medium_reaches_the_tokens_that_see_it_and_no_others(
    layout: Layout, seed: int, algorithm: Algorithm
) -> None:
    queries, media = draw_inputs(layout, seed)
    before = attend(queries, media, layout.runs, algorithm)
    changed = seed % layout.media
    values = media.values.detach().clone()
    values[:, changed, 0] = torch.nan
    after = attend(queries, KeyValues(media.keys, values), layout.runs, algorithm)
    start, stop = layout.ranges.unbind(-1)
    sees_it = (start <= changed) & (changed < stop)
    assert after[sees_it].isnan().all()
    torch.testing.assert_close(after[~sees_it], before[~sees_it])


@pytest.mark.parametrize("algorithm", get_args(Algorithm))
@given(layout=layouts(), seed=seeds)
def test_nan_reaches_the_gradients_of_those_that_see_it_and_no_others(
    layout: Layout, seed: int, algorithm: Algorithm
) -> None:
    """Of a medium, or of a token that sees nothing, such as padding."""
    queries, media = draw_inputs(layout, seed)
    start, stop = layout.ranges.unbind(-1)
    changed = seed % layout.media
    sees_it, sees_nothing = (start <= changed) & (changed < stop), start == stop
    with torch.no_grad():
        media.values[:, changed] = torch.nan
        queries[sees_nothing] = torch.nan
    output = attend(queries, media, layout.runs, algorithm)
    inputs = queries, media.keys, media.values
    if not output.requires_grad:
        return
    gradients = torch.autograd.grad(output.sum(), inputs, materialize_grads=True)
    assert gradients[0][~sees_it].isfinite().all()
    seen_with_it = torch.zeros(layout.batch, layout.media, dtype=torch.bool)
    for row, token in sees_it.nonzero().tolist():
        seen_with_it[row, start[row, token] : stop[row, token]] = True
    seen_with_it[:, changed] = True
    for gradient in gradients[1:]:
        assert gradient[~seen_with_it].isfinite().all()


@pytest.mark.parametrize("algorithm", ["loop", "tiles", "dense"])
def test_with_gradients_half_precision_is_float32_rounded_on_cpu(algorithm: Algorithm) -> None:
    inputs = [random_tensor(i, *shape).bfloat16() for i, shape in enumerate([(1, 40, 2, 8), *[(1, 2, 16, 2, 8)] * 2])]
    runs = MediaRuns.from_ranges(torch.tensor([[[0, 1]] * 20 + [[1, 2]] * 20]))
    queries, *key_values = inputs
    exact = attend(queries.float(), KeyValues(*(x.float() for x in key_values)), runs, algorithm)
    assert torch.equal(attend(queries, KeyValues(*key_values), runs, algorithm), exact.bfloat16())


@pytest.mark.parametrize("algorithm", ["loop", "tiles", "dense"])
def test_autocast_does_not_undo_what_is_computed_in_float32(algorithm: Algorithm) -> None:
    inputs = [random_tensor(i, *shape).bfloat16() for i, shape in enumerate([(1, 40, 2, 8), *[(1, 2, 16, 2, 8)] * 2])]
    runs = MediaRuns.from_ranges(torch.tensor([[[0, 1]] * 20 + [[1, 2]] * 20]))
    queries, *key_values = inputs
    expected = attend_to_media(queries, KeyValues(*key_values), runs, algorithm=algorithm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend_to_media(queries, KeyValues(*key_values), runs, algorithm=algorithm)
    assert torch.equal(found, expected)


def test_segments_serve_in_training_after_inference_and_belong_to_their_ranges() -> None:
    queries, keys = torch.randn(1, 40, 2, 8, requires_grad=True), torch.randn(1, 3, 4, 2, 8)
    runs = MediaRuns.from_ranges(torch.tensor([[[0, 1]] * 20 + [[1, 2]] * 20]))
    media = KeyValues(keys, keys)
    with torch.inference_mode():
        expected = attend_to_media(queries, media, runs, algorithm="tiles")
    attend_to_media(queries, media, runs, algorithm="tiles").sum().backward()
    others = dataclasses.replace(runs, ranges=runs.ranges + 1, table=None)
    found = attend_to_media(queries, media, others, algorithm="tiles")
    assert not torch.allclose(found, expected)
    torch.testing.assert_close(found, attend_to_media(queries, media, others, algorithm="dense"))


@pytest.mark.parametrize("algorithm", get_args(Algorithm))
def test_the_default_device_does_not_matter(algorithm: Algorithm) -> None:
    ranges = torch.tensor([[[0, 1], [0, 1], [1, 2]], [[0, 0], [0, 1], [0, 1]]])
    queries, media = torch.randn(2, 3, HEADS, HEAD_DIM), torch.randn(2, 2, LATENTS, HEADS, HEAD_DIM)
    expected = attend(queries, KeyValues(media, media), MediaRuns.from_ranges(ranges), algorithm)
    with torch.device("meta"):
        found = attend(queries, KeyValues(media, media), MediaRuns.from_ranges(ranges), algorithm)
    assert torch.equal(found, expected)


@given(layouts(), seeds)
def test_under_torch_compile_no_value_is_looked_at_and_the_result_is_the_same(layout: Layout, seed: int) -> None:
    queries, media = draw_inputs(layout, seed)
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        runs = MediaRuns.from_ranges(layout.ranges, in_order=layout.runs.in_order)
        assert (runs.table, runs.in_order) == (None, layout.runs.in_order)
        assert choose_algorithm(queries, media, runs) in ("tiles", "dense")
        found = attend_to_media(queries, media, runs)
        masked = attend_to_media(queries, media, MediaRuns.from_mask(dense_media_mask(layout.ranges, layout.media)))
    expected = reference.attend_to_media(queries, media, layout.ranges)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(masked, expected)


@pytest.mark.parametrize("algorithm", get_args(Algorithm))
def test_a_batch_without_tokens_gives_no_output(algorithm: Algorithm) -> None:
    media = torch.randn(2, 1, LATENTS, HEADS, HEAD_DIM)
    runs = MediaRuns.from_ranges(torch.zeros(2, 0, 2, dtype=torch.long))
    output = attend(torch.zeros(2, 0, HEADS, HEAD_DIM), KeyValues(media, media), runs, algorithm)
    assert output.shape == (2, 0, HEADS, HEAD_DIM)


@pytest.mark.parametrize(
    ("text", "media", "latents", "algorithm"),
    [
        pytest.param(30, 10, 4, "dense", id="many short runs over a few latents: the demo"),
        pytest.param(1, 2, 64, "dense", id="a step of decoding, two media"),
        pytest.param(256, 5, 64, "loop", id="a training window of the paper"),
        pytest.param(1, 32, 64, "loop", id="a step of decoding, 32 media"),
        pytest.param(2048, 1, 64, "dense", id="one medium, no mask needed"),
        pytest.param(2, 2, 96, "dense", id="less in a run than a call costs"),
        pytest.param(2, 2, 128, "loop", id="as much in a run as a call costs"),
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


def test_the_choice_elsewhere_needs_no_table() -> None:
    queries, keys = torch.zeros(1, 256, 8, 64), torch.zeros(1, 2, 64, 8, 64)
    ranges = torch.tensor([[[0, 1]] * 100 + [[1, 2]] * 156])
    runs = MediaRuns.from_ranges(ranges)
    assert choose_algorithm(queries, KeyValues(keys, keys), runs) == "loop"
    assert choose_algorithm(queries, KeyValues(keys, keys), MediaRuns(ranges, None, in_order=True)) == "tiles"
    assert choose_algorithm(queries, KeyValues(keys, keys), MediaRuns(ranges, None)) == "dense"
    assert choose_algorithm(queries.to("meta"), KeyValues(keys, keys), runs) == "tiles"
    one_token, one_medium = MediaRuns(ranges[:, :1], None, in_order=True), MediaRuns(ranges % 2, None, in_order=True)
    assert choose_algorithm(queries[:, :1], KeyValues(keys, keys), one_token) == "dense"
    assert choose_algorithm(queries, KeyValues(keys[:, :1], keys[:, :1]), one_medium) == "dense"
    assert choose_algorithm(queries[:, :2, :1], KeyValues(keys, keys), MediaRuns(ranges[:, :2], None, True)) == "tiles"
    nothing = MediaRuns.from_ranges(torch.zeros_like(ranges))
    assert choose_algorithm(queries, KeyValues(keys, keys), nothing) == "dense", "so that there are gradients, of zero"
    with torch.no_grad():
        assert choose_algorithm(queries, KeyValues(keys, keys), nothing) == "loop"
    out_of_order = MediaRuns.from_ranges(ranges.flip(1))
    assert choose_algorithm(queries.to("meta"), KeyValues(keys, keys), out_of_order) == "dense"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "flash", "capability", "algorithm"),
    [
        (torch.bfloat16, 64, True, (8, 0), "varlen"),
        (torch.float16, 8, True, (9, 0), "varlen"),
        (torch.float16, 256, True, (8, 6), "varlen"),
        (torch.float32, 64, True, (8, 0), "tiles"),
        (torch.bfloat16, 4, True, (8, 0), "tiles"),
        (torch.bfloat16, 65, True, (8, 0), "tiles"),
        (torch.bfloat16, 264, True, (8, 0), "tiles"),
        (torch.bfloat16, 64, False, (8, 0), "tiles"),
        (torch.bfloat16, 64, True, (7, 5), "tiles"),
    ],
)
def test_the_choice_on_cuda_is_the_kernel_where_there_is_one(
    dtype: torch.dtype, head_dim: int, flash: bool, capability: tuple[int, int], algorithm: Algorithm
) -> None:
    runs = MediaRuns.from_ranges(torch.tensor([[[0, 1]] * 100 + [[1, 2]] * 156]))
    with (
        FakeTensorMode(),
        mock.patch("torch.backends.cuda.is_flash_attention_available", return_value=flash),
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
    ):
        queries = torch.empty(1, 256, 9, head_dim, dtype=dtype, device="cuda")
        keys = torch.empty(1, 2, 64, 9, head_dim, dtype=dtype, device="cuda")
        assert choose_algorithm(queries, KeyValues(keys, keys), runs) == algorithm


@given(layouts(), seeds)
def test_tokens_whose_ranges_are_not_in_order_come_out_as_nan_where_nobody_could_look(
    layout: Layout, seed: int
) -> None:
    """Under torch.compile, that ranges are in order is a promise."""
    queries, media = draw_inputs(layout, seed)
    promised = attend_to_media(queries, media, MediaRuns(layout.ranges, None, in_order=True), algorithm="tiles")
    expected = reference.attend_to_media(queries, media, layout.ranges)
    is_right = ~promised.isnan().any(-1).any(-1)
    torch.testing.assert_close(promised[is_right], expected[is_right])
    assert is_right.all() == layout.runs.in_order


@given(layouts())
def test_runs_are_in_order_under_the_papers_rules(layout: Layout) -> None:
    ranges = layout.ranges
    assert layout.runs.in_order or layout.attend == "all_previous"
    if not layout.runs.in_order:
        with pytest.raises(ValueError, match="ranges are not in order: a token sees several media"):
            MediaRuns.from_ranges(ranges, in_order=True)


@pytest.mark.parametrize("algorithm", get_args(Algorithm))
@pytest.mark.parametrize("scale", [0.3, 1, 3])
def test_half_precision_is_no_less_exact_than_torchs_dense_attention_in_it(scale: float, algorithm: Algorithm) -> None:
    text, media, latents, heads, head_dim = 160, 5, 64, 4, 64
    ranges = torch.tensor([[[i * media // text, i * media // text + 1] for i in range(text)]])
    runs = MediaRuns.from_ranges(ranges)
    shapes = (1, text, heads, head_dim), (1, media, latents, heads, head_dim), (1, media, latents, heads, head_dim)
    exact = [(scale * random_tensor(i, *shape)).bfloat16().double() for i, shape in enumerate(shapes)]
    weights = random_tensor(3, *shapes[0]).bfloat16()

    def run(dtype: torch.dtype, attention: Any) -> list[Tensor]:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in exact]
        output = attention(*inputs)
        return [output, *torch.autograd.grad(output, inputs, weights.to(dtype))]

    def ours(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attend(queries, KeyValues(keys, values), runs, algorithm)

    def torchs(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        mask = dense_media_mask(ranges, media).repeat_interleave(latents, dim=-1)[:, None]
        keys, values = keys.flatten(1, 2).transpose(1, 2), values.flatten(1, 2).transpose(1, 2)
        return F.scaled_dot_product_attention(queries.transpose(1, 2), keys, values, mask).transpose(1, 2)

    results = run(torch.float64, torchs), run(torch.bfloat16, ours), run(torch.bfloat16, torchs)
    for expected, found, other in zip(*results, strict=True):
        assert (found - expected).norm() <= (other - expected).norm()


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
    with pytest.raises(ValueError, match="algorithm must be one of 'loop', 'tiles', 'varlen', 'dense', got 'flash'"):
        attend_to_media(queries, KeyValues(media, media), MediaRuns.from_ranges(ranges), algorithm="flash")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='"loop" needs a run table'):
        attend_to_media(queries, KeyValues(media, media), MediaRuns(ranges, None), algorithm="loop")
    with pytest.raises(ValueError, match=r'"varlen" needs half precision on a CUDA device, got torch\.float32 on cpu'):
        attend_to_media(queries, KeyValues(media, media), MediaRuns(ranges, None, in_order=True), algorithm="varlen")
    for algorithm in ("tiles", "varlen"):
        with pytest.raises(ValueError, match=f'"{algorithm}" needs runs in order'):
            attend_to_media(queries, KeyValues(media, media), MediaRuns(ranges, None), algorithm=algorithm)

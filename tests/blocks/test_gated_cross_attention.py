from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flamingo_blocks import GatedCrossAttentionBlock, MediaRuns, media_ranges
from flamingo_blocks.blocks import FeedForward, SwiGLU, TanhGate
from tests import reference
from tests.strategies import Layout, layouts, random_tensor, randomize, seeds

DIM, MEDIA_DIM, LATENTS = 8, 6, 3

blocks = st.sampled_from(
    [
        {},
        {"kv_heads": 2, "head_dim": 3},
        {"norm": nn.RMSNorm, "qk_norm": nn.RMSNorm, "feed_forward": partial(SwiGLU, hidden=7)},
        {"kv_heads": 1, "gate_per_channel": True, "feed_forward": partial(FeedForward, activation=nn.GELU)},
    ]
)


def make_block(options: dict[str, object], seed: int = 0) -> GatedCrossAttentionBlock:
    block = GatedCrossAttentionBlock(dim=DIM, media_dim=MEDIA_DIM, heads=4, **options)  # type: ignore[arg-type]
    randomize(block.double(), seed)
    return block


def draw_inputs(layout: Layout, seed: int) -> tuple[Tensor, Tensor]:
    hidden_states = random_tensor(seed, layout.batch, layout.text, DIM, requires_grad=True)
    return hidden_states, random_tensor(seed + 1, layout.batch, layout.media, LATENTS, MEDIA_DIM, requires_grad=True)


@given(layouts(), seeds, blocks)
def test_block_equals_the_papers_two_lines_gradients_included(
    layout: Layout, seed: int, options: dict[str, object]
) -> None:
    block = make_block(options, seed)
    hidden_states, media = draw_inputs(layout, seed)
    output = block(hidden_states, media, layout.runs)
    expected = reference.gated_cross_attention_block(block, hidden_states, media, layout.ranges)
    torch.testing.assert_close(output, expected)
    weights = random_tensor(seed + 2, *output.shape)
    inputs = (hidden_states, media, *block.parameters())
    (gradients, expected_gradients) = (
        torch.autograd.grad((x * weights).sum(), inputs, materialize_grads=True) for x in (output, expected)
    )
    torch.testing.assert_close(gradients, expected_gradients)


@given(layouts(), seeds, blocks)
def test_tokens_without_media_can_be_left_as_they_are(layout: Layout, seed: int, options: dict[str, object]) -> None:
    hidden_states, media = draw_inputs(layout, seed)
    expected = make_block(options, seed)(hidden_states, media, layout.runs)
    found = make_block({**options, "feed_forward_without_media": False}, seed)(hidden_states, media, layout.runs)
    sees_nothing = layout.ranges[..., 0] == layout.ranges[..., 1]
    assert torch.equal(found[sees_nothing], hidden_states[sees_nothing])
    assert torch.equal(found[~sees_nothing], expected[~sees_nothing])


@given(layouts(), seeds, blocks, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_gate_zero_is_identity(layout: Layout, seed: int, options: dict[str, object], dtype: torch.dtype) -> None:
    block = make_block(options, seed).float()
    nn.init.zeros_(block.gate.alpha)
    nn.init.zeros_(block.gate_feed_forward.alpha)
    hidden_states, media = draw_inputs(layout, seed)
    hidden_states = hidden_states.detach().to(dtype).requires_grad_()
    output = block(hidden_states, media.float(), layout.runs)
    assert output.dtype == dtype
    assert torch.equal(output, hidden_states)
    gradient = random_tensor(seed + 2, *output.shape).to(dtype)
    output.backward(gradient)
    assert hidden_states.grad is not None
    assert torch.equal(hidden_states.grad, gradient)


def test_an_algorithm_can_be_forced_by_its_name_at_any_time() -> None:
    block = make_block({"algorithm": "tiles"})
    hidden_states, media = torch.randn(1, 3, DIM).double(), torch.randn(1, 2, LATENTS, MEDIA_DIM).double()
    everything = MediaRuns.from_ranges(torch.tensor([[[0, 1], [0, 2], [0, 2]]]))
    with pytest.raises(ValueError, match='"tiles" needs runs in order'):
        block(hidden_states, media, everything)
    block.algorithm = "dense"
    expected = block(hidden_states, media, everything)
    block.algorithm = None
    torch.testing.assert_close(block(hidden_states, media, everything), expected)


def test_the_gates_start_at_zero_and_are_the_first_to_learn() -> None:
    block = GatedCrossAttentionBlock(dim=DIM, media_dim=MEDIA_DIM, heads=4)
    runs = MediaRuns.from_ranges(media_ranges(torch.tensor([[True, False, False]])))
    output = block(torch.randn(1, 3, DIM), torch.randn(1, 1, LATENTS, MEDIA_DIM), runs)
    (output * torch.randn(output.shape)).sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.any() == name.endswith("alpha"), name


def test_the_parts_are_those_asked_for_and_no_projection_has_a_bias() -> None:
    def shapes(**options: object) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in make_block(options).state_dict().items()}

    def norms(*names: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{kind}": (width,) for name in names for kind in ("weight", "bias")}

    both = norms("norm", "norm_feed_forward", width=DIM)
    hidden = {"feed_forward.to_hidden.weight": (4 * DIM, DIM), "feed_forward.to_out.weight": (DIM, 4 * DIM)}
    attention = {"to_q.weight": (DIM, DIM), "to_kv.weight": (2 * DIM, MEDIA_DIM), "to_out.weight": (DIM, DIM)}
    gates = {"gate.alpha": (1,), "gate_feed_forward.alpha": (1,)}
    assert shapes() == both | hidden | attention | gates
    attention = {"to_q.weight": (12, DIM), "to_kv.weight": (12, MEDIA_DIM), "to_out.weight": (DIM, 12)}
    gates = {"gate.alpha": (DIM,), "gate_feed_forward.alpha": (DIM,)}
    options = {"head_dim": 3, "kv_heads": 2, "qk_norm": nn.LayerNorm, "gate_per_channel": True}
    assert shapes(**options) == both | hidden | attention | gates | norms("q_norm", "k_norm", width=3)


@pytest.mark.parametrize(("options", "alpha"), [({}, 0.0), ({"gate_init": 0.3}, 0.3)])
def test_both_gates_start_where_they_are_told_and_at_zero_by_default(options: dict[str, float], alpha: float) -> None:
    block = GatedCrossAttentionBlock(dim=DIM, media_dim=MEDIA_DIM, heads=1, **options)  # type: ignore[arg-type]
    assert block.gate.alpha.tolist() == block.gate_feed_forward.alpha.tolist() == pytest.approx([alpha])
    assert TanhGate().alpha.tolist() == [0.0]


@given(layouts(), seeds, blocks)
def test_a_token_depends_on_no_medium_outside_its_range(layout: Layout, seed: int, options: dict[str, object]) -> None:
    block = make_block(options, seed)
    hidden_states, media = draw_inputs(layout, seed)
    before = block(hidden_states, media, layout.runs)
    start, stop = layout.ranges.unbind(-1)
    for changed in range(layout.media):
        other = media.detach().clone()
        other[:, changed] = random_tensor(seed + 2, *other[:, changed].shape)
        after = block(hidden_states, other, layout.runs)
        sees_it = (start <= changed) & (changed < stop)
        assert torch.equal(after[~sees_it], before[~sees_it])
        assert (after[sees_it] != before[sees_it]).any(-1).all()


@given(layouts(), seeds, blocks)
def test_tokens_that_see_nothing_take_the_feed_forward_alone(
    layout: Layout, seed: int, options: dict[str, object]
) -> None:
    block = make_block(options, seed)
    hidden_states, media = draw_inputs(layout, seed)
    output = block(hidden_states, media, layout.runs)
    alone = hidden_states + block.gate_feed_forward(block.feed_forward(block.norm_feed_forward(hidden_states)))
    sees_nothing = layout.ranges[..., 0] == layout.ranges[..., 1]
    torch.testing.assert_close(output[sees_nothing], alone[sees_nothing])


@given(layouts(packed=False), seeds, blocks, st.integers(1, 3), st.sampled_from(["left", "right"]), st.integers(0, 2))
def test_padding_of_text_and_media_changes_nothing(
    layout: Layout, seed: int, options: dict[str, object], padding: int, side: str, media_padding: int
) -> None:
    block = make_block(options, seed)
    hidden_states, media = draw_inputs(layout, seed)
    pad = (padding, 0) if side == "left" else (0, padding)
    padded_locations = nn.functional.pad(layout.media_locations, pad)
    runs = MediaRuns.from_ranges(media_ranges(padded_locations, attend=layout.attend), num_media=layout.num_media)
    output = block(
        nn.functional.pad(hidden_states, (0, 0, *pad), value=3.0),
        nn.functional.pad(media, (0, 0, 0, 0, 0, media_padding), value=5.0),
        runs,
    )
    expected = block(hidden_states, media, layout.runs)
    torch.testing.assert_close(output[:, pad[0] : pad[0] + layout.text], expected)


@given(layouts(), seeds, blocks)
def test_packed_equals_unpacked(layout: Layout, seed: int, options: dict[str, object]) -> None:
    """Each document of each row, alone with its own media, gives what it gives in its row."""
    block = make_block(options, seed)
    hidden_states, media = draw_inputs(layout, seed)
    packed = block(hidden_states, media, layout.runs)
    for row in range(layout.batch):
        for document in layout.document_ids[row].unique():
            tokens = layout.document_ids[row] == document
            is_image = layout.media_locations[row, tokens][None]
            first = int((layout.media_locations[row] & (layout.document_ids[row] < document)).sum())
            own_media = media[row, first : first + int(is_image.sum())][None]
            runs = MediaRuns.from_ranges(media_ranges(is_image, attend=layout.attend), num_media=is_image.sum(1))
            torch.testing.assert_close(block(hidden_states[row, tokens][None], own_media, runs)[0], packed[row, tokens])


@given(layouts(), seeds, blocks)
def test_projected_media_give_the_same_as_media(layout: Layout, seed: int, options: dict[str, object]) -> None:
    block = make_block(options, seed)
    hidden_states, media = draw_inputs(layout, seed)
    projected = block.project_media(media)
    assert torch.equal(block(hidden_states, projected, layout.runs), block(hidden_states, media, layout.runs))


def test_text_only_batches_train() -> None:
    block = make_block({})
    runs = MediaRuns.from_ranges(media_ranges(torch.zeros(2, 3, dtype=torch.bool)))
    output = block(torch.randn(2, 3, DIM, dtype=torch.float64), torch.zeros(2, 0, LATENTS, MEDIA_DIM), runs)
    output.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in block.parameters())
    assert block.gate_feed_forward.alpha.grad is not None


def test_nan_of_a_medium_reaches_the_tokens_that_see_it_and_no_others() -> None:
    block = make_block({"gate_init": 0.0})
    media = torch.randn(1, 2, LATENTS, MEDIA_DIM, dtype=torch.float64)
    media[0, 1, 0, 0] = torch.nan
    runs = MediaRuns.from_ranges(media_ranges(torch.tensor([[True, False, True, False]])))
    output = block(torch.randn(1, 4, DIM, dtype=torch.float64), media, runs)
    assert output[0, :2].isfinite().all()
    assert output[0, 2:].isnan().any(-1).all()


def test_state_dict_round_trips_through_safetensors(tmp_path: Path) -> None:
    block, other = make_block({}, seed=1), make_block({}, seed=2)
    save_file(block.state_dict(), tmp_path / "block.safetensors")
    other.load_state_dict(load_file(tmp_path / "block.safetensors"))
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads must divide dim=8, got 3; or give head_dim"),
        ({"heads": 0}, "heads must divide dim=8, got 0"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads must divide heads=4, got 3"),
        ({"heads": 4, "kv_heads": 0}, "kv_heads must divide heads=4, got 0"),
    ],
)
def test_heads_that_do_not_divide_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedCrossAttentionBlock(dim=DIM, media_dim=MEDIA_DIM, **options)  # type: ignore[arg-type]


def test_shapes_are_checked_at_run_time_in_tests() -> None:
    """The jaxtyping hook is on: an annotation that does not hold raises. Without it other tests would check less."""
    block = make_block({})
    runs = MediaRuns.from_ranges(torch.zeros(1, 2, 2, dtype=torch.long))
    with pytest.raises(TypeCheckError):
        block(torch.zeros(1, 2, DIM + 1), torch.zeros(1, 1, LATENTS, MEDIA_DIM), runs)


@pytest.mark.unchecked
def test_wrong_ranks_and_widths_are_refused() -> None:
    block = make_block({})
    runs = MediaRuns.from_ranges(torch.zeros(1, 2, 2, dtype=torch.long))
    good = torch.zeros(1, 2, DIM, dtype=torch.float64), torch.zeros(1, 1, LATENTS, MEDIA_DIM, dtype=torch.float64)
    block(*good, runs)
    for hidden_states in (good[0][0], torch.zeros(1, 2, DIM + 1)):
        with pytest.raises(ValueError, match=r"hidden_states must have shape \(batch, text, dim=8\), got"):
            block(hidden_states, good[1], runs)
    for media in (good[1][0], torch.zeros(1, 1, LATENTS, MEDIA_DIM + 1)):
        with pytest.raises(ValueError, match=r"media must have shape \(batch, media, latents, media_dim=6\), got"):
            block(good[0], media, runs)

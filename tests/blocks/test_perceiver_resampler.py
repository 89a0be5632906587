from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flamingo_blocks import PerceiverResampler
from flamingo_blocks.blocks import FeedForward
from tests import reference
from tests.strategies import random_tensor, randomize, seeds

DIM, LATENTS, MAX_FRAMES = 8, 3, 4

frames_of_media = st.lists(st.lists(st.integers(0, 7), min_size=2, max_size=2), min_size=1, max_size=2)
resamplers = st.sampled_from(
    [
        {},
        {"vision_dim": 5},
        {"qk_norm": nn.LayerNorm, "head_dim": 3, "feed_forward": partial(FeedForward, activation=nn.GELU)},
    ]
)


def make_resampler(options: dict[str, object], seed: int = 0) -> PerceiverResampler:
    resampler = PerceiverResampler(
        dim=DIM,
        depth=2,
        heads=2,
        latents=LATENTS,
        max_frames=MAX_FRAMES,
        **options,  # type: ignore[arg-type]
    )
    randomize(resampler.double(), seed)
    return resampler


def features_of(resampler: PerceiverResampler, seed: int, *shape: int) -> Tensor:
    return random_tensor(seed, *shape, resampler.vision_dim, requires_grad=True)


@given(frames_of_media, st.integers(1, 3), seeds, resamplers, st.integers(0, 2))
def test_each_medium_is_resampled_as_if_it_were_alone_and_unpadded(
    lengths: list[list[int]], patches: int, seed: int, options: dict[str, object], padding: int
) -> None:
    resampler = make_resampler(options, seed)
    num_frames = torch.tensor(lengths)
    frames = int(num_frames.max()) + padding
    features = features_of(resampler, seed, *num_frames.shape, frames, patches)
    output = resampler(features, num_frames)
    expected = torch.stack(
        [
            reference.resample_medium(resampler, features[b, m, :n]) if n else output[b, m]
            for b, row in enumerate(lengths)
            for m, n in enumerate(row)
        ]
    ).view_as(output)
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad(output.square().sum(), features, retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), features))


@given(frames_of_media, seeds, resamplers, st.sampled_from([7.0, torch.nan, torch.inf]))
def test_what_padding_frames_hold_changes_nothing(
    lengths: list[list[int]], seed: int, options: dict[str, object], garbage: float
) -> None:
    resampler = make_resampler(options, seed)
    num_frames = torch.tensor(lengths)
    features = features_of(resampler, seed, *num_frames.shape, 8, 2)
    is_padding = torch.arange(8) >= num_frames[..., None]
    filled = features.detach().masked_fill(is_padding[..., None, None], garbage).requires_grad_()
    output = resampler(filled, num_frames)
    assert torch.equal(output, resampler(features, num_frames))
    output.sum().backward()
    assert filled.grad is not None
    assert torch.equal(filled.grad[is_padding], torch.zeros_like(filled.grad[is_padding]))


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 3), seeds)
def test_the_output_shape_depends_on_neither_frames_nor_patches(
    frames: int, patches: int, media: int, seed: int
) -> None:
    resampler = make_resampler({}, seed)
    assert resampler(features_of(resampler, seed, 2, media, frames, patches)).shape == (2, media, LATENTS, DIM)


@given(st.integers(1, 9), seeds, resamplers)
def test_all_frames_real_is_the_default(frames: int, seed: int, options: dict[str, object]) -> None:
    resampler = make_resampler(options, seed)
    features = features_of(resampler, seed, 1, 2, frames, 2)
    torch.testing.assert_close(resampler(features), resampler(features, torch.full((1, 2), frames)))


@given(st.integers(2, 6), st.integers(2, 4), seeds, st.data())
def test_frame_order_matters_and_patch_order_does_not(
    frames: int, patches: int, seed: int, data: st.DataObject
) -> None:
    resampler = make_resampler({}, seed)
    features = features_of(resampler, seed, 1, 1, frames, patches)
    output = resampler(features)
    patch_order = data.draw(st.permutations(range(patches)))
    torch.testing.assert_close(resampler(features[:, :, :, patch_order]), output)
    frame_order = data.draw(st.permutations(range(frames)).filter(lambda order: order != sorted(order)))
    assert not torch.allclose(resampler(features[:, :, frame_order]), output)


@given(st.integers(1, 12), st.integers(1, 6), seeds)
def test_temporal_embeddings_are_learned_up_to_max_frames_then_interpolated(
    frames: int, max_frames: int, seed: int
) -> None:
    resampler = PerceiverResampler(dim=DIM, depth=1, heads=2, max_frames=max_frames).double()
    randomize(resampler, seed)
    embeddings = resampler.features._embed(frames, None)[0, 0, :, 0]
    if frames <= max_frames:
        assert torch.equal(embeddings, resampler.features.temporal_embeddings[:frames])
        return
    learned = resampler.features.temporal_embeddings.T[None]
    interpolated = nn.functional.interpolate(learned, size=frames, mode="linear", align_corners=True)[0].T
    torch.testing.assert_close(embeddings, interpolated)


@given(seeds, st.integers(2, 4))
def test_without_temporal_embeddings_frames_are_not_told_apart(seed: int, frames: int) -> None:
    resampler = PerceiverResampler(dim=DIM, depth=2, heads=2, max_frames=0).double()
    randomize(resampler, seed)
    assert not any("temporal" in name for name in resampler.state_dict())
    features = random_tensor(seed, 1, 1, frames, 3, DIM)
    torch.testing.assert_close(resampler(features.flip(2)), resampler(features))


@given(seeds)
def test_embeddings_of_places_are_added_to_every_feature_of_a_medium(seed: int) -> None:
    placed = PerceiverResampler(dim=DIM, depth=1, heads=2, max_media=3).double()
    randomize(placed, seed)
    plain = PerceiverResampler(dim=DIM, depth=1, heads=2).double()
    result = plain.load_state_dict(placed.state_dict(), strict=False)
    assert result.unexpected_keys == ["features.media_embeddings"]
    features = random_tensor(seed, 2, 2, 2, 3, DIM)
    places = placed.features.media_embeddings[:2, None, None]
    torch.testing.assert_close(placed(features), plain(features + places))


@given(seeds, st.lists(st.permutations(range(3)), min_size=1, max_size=1))
def test_media_are_resampled_independently(seed: int, orders: list[list[int]]) -> None:
    resampler = make_resampler({}, seed)
    features = features_of(resampler, seed, 2, 3, 2, 4)
    torch.testing.assert_close(resampler(features[:, orders[0]]), resampler(features)[:, orders[0]])


def test_the_defaults_are_the_papers() -> None:
    with torch.device("meta"):
        resampler = PerceiverResampler(dim=1536, vision_dim=3072)
    assert len(resampler.layers) == 6
    assert resampler.latents.shape == (64, 1536)
    assert resampler.features.temporal_embeddings.shape == (8, 1536)
    assert resampler.layers[0].heads == 16
    assert resampler.layers[0].to_q.out_features == 16 * 96  # type: ignore[union-attr]


def test_the_parts_are_those_asked_for_and_no_projection_has_a_bias() -> None:
    resampler = make_resampler(
        {"vision_dim": 5, "head_dim": 3, "qk_norm": nn.LayerNorm, "feed_forward": lambda dim: nn.Linear(dim, dim)}
    )
    assert (resampler.dim, resampler.vision_dim) == (DIM, 5)
    assert resampler.features.project[1].weight.shape == (DIM, 5)  # type: ignore[index]
    norms = {f"{norm}.{name}": (DIM,) for norm in ("norm_features", "norm_latents") for name in ("weight", "bias")}
    heads = {f"{norm}.{name}": (3,) for norm in ("q_norm", "k_norm") for name in ("weight", "bias")}
    attention = {"to_q.weight": (6, DIM), "to_kv.weight": (12, DIM), "to_out.weight": (DIM, 6)}
    after = {"norm_feed_forward.weight": (DIM,), "norm_feed_forward.bias": (DIM,)}
    feed_forward = {"feed_forward.weight": (DIM, DIM), "feed_forward.bias": (DIM,)}
    for layer in resampler.layers:
        found = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        assert found == norms | heads | attention | after | feed_forward


@pytest.mark.parametrize("max_frames", [8, 0])
def test_half_precision_features_meet_full_precision_weights(max_frames: int) -> None:
    resampler = PerceiverResampler(dim=DIM, depth=1, heads=2, max_frames=max_frames)
    features = torch.randn(1, 1, 1, 4, DIM, dtype=torch.bfloat16)
    assert resampler(features).dtype == torch.float32
    assert torch.equal(resampler(features), resampler(features.float()))


def test_nan_of_a_real_frame_is_passed_on() -> None:
    resampler = make_resampler({})
    features = features_of(resampler, 0, 1, 2, 1, 3).detach()
    features[0, 1, 0, 2, 0] = torch.nan
    output = resampler(features, torch.ones(1, 2, dtype=torch.long))
    assert output[0, 0].isfinite().all()
    assert output[0, 1].isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads must divide dim=8, got 3"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"latents": 0}, "latents must be at least 1, got 0"),
        ({"max_frames": -1}, "max_frames must not be negative, got -1"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerceiverResampler(dim=DIM, **options)  # type: ignore[arg-type]


@pytest.mark.unchecked
def test_wrong_ranks_and_widths_are_refused() -> None:
    resampler = make_resampler({})
    for features in (torch.zeros(1, 1, 2, DIM), torch.zeros(1, 1, 1, 2, DIM + 1)):
        with pytest.raises(ValueError, match=r"patches, vision_dim=8\), got .*; an image is one frame"):
            resampler(features)
    with pytest.raises(ValueError, match=r"num_frames must have shape \(1, 2\), got \(2,\)"):
        resampler(torch.zeros(1, 2, 1, 2, DIM), torch.ones(2, dtype=torch.long))

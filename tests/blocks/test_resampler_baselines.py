from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flamingo_blocks.blocks import (
    LinearResampler,
    MeanPoolResampler,
    MLPResampler,
    PerceiverResampler,
    TransformerResampler,
)
from tests.strategies import random_tensor, randomize, seeds

DIM, VISION_DIM, PATCHES = 8, 6, 4
KINDS: dict[str, Any] = {
    "linear": lambda: LinearResampler(dim=DIM, vision_dim=VISION_DIM),
    "mean_pool": lambda: MeanPoolResampler(dim=DIM, vision_dim=VISION_DIM, max_frames=3),
    "mlp": lambda: MLPResampler(dim=DIM, vision_dim=VISION_DIM, max_frames=3),
    "transformer": lambda: TransformerResampler(dim=DIM, vision_dim=VISION_DIM, depth=2, heads=2, max_frames=3),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, seed: int = 0) -> Any:
    resampler = KINDS[kind]().double().eval()
    randomize(resampler, seed)
    return resampler


def features_of(seed: int, frames: int) -> Tensor:
    return random_tensor(seed, 2, 2, frames, PATCHES, VISION_DIM)


@every_kind
@given(seeds, st.integers(1, 5), st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_each_medium_is_resampled_as_if_it_were_alone_and_unpadded(
    kind: str, seed: int, frames: int, lengths: list[int]
) -> None:
    resampler, features = make(kind, seed), features_of(seed, frames)
    num_frames = torch.tensor(lengths).clamp(max=frames).view(2, 2)
    output = resampler(features, num_frames)
    assert output.isfinite().all()
    for row in range(2):
        for medium in range(2):
            if length := int(num_frames[row, medium]):
                alone = resampler(features[row : row + 1, medium : medium + 1, :length])
                torch.testing.assert_close(output[row, medium], alone[0, 0])


@every_kind
def test_what_padding_holds_changes_nothing_and_gradients_are_finite(kind: str) -> None:
    resampler, features = make(kind), features_of(0, 3)
    num_frames = torch.tensor([[3, 1], [2, 0]])
    expected = resampler(features, num_frames)
    features[0, 1, 1:] = features[1, 0, 2:] = features[1, 1] = torch.nan
    output = resampler(features, num_frames)
    assert torch.equal(output, expected)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in resampler.parameters())


@pytest.mark.parametrize(
    ("kind", "latents"), [("linear", PATCHES), ("mean_pool", 1), ("mlp", PATCHES), ("transformer", PATCHES)]
)
def test_the_number_of_latents_does_not_depend_on_the_number_of_frames(kind: str, latents: int) -> None:
    for frames in (1, 2, 5):
        assert make(kind)(features_of(0, frames)).shape == (2, 2, latents, DIM)


def test_a_patch_sees_other_patches_in_the_transformer_only() -> None:
    for kind, sees_others in (("mlp", False), ("transformer", True)):
        resampler, features = make(kind), features_of(0, 1)
        before = resampler(features)
        features[..., 0, :] *= torch.arange(VISION_DIM)
        changed = (resampler(features) - before).abs().amax(dim=(0, 1, 3)) > 1e-9
        assert changed.tolist() == [True, *[sees_others] * (PATCHES - 1)]


def test_the_mean_is_that_of_the_projected_patches() -> None:
    resampler, features = make("mean_pool"), features_of(0, 1)
    mean = (resampler.features.project(features) + resampler.features.temporal_embeddings[0]).mean((2, 3))
    torch.testing.assert_close(resampler(features)[:, :, 0], resampler.norm(mean))


def test_a_linear_resampler_projects_only_where_widths_differ() -> None:
    resampler, features = make("linear"), features_of(0, 1)
    projected = nn.functional.linear(features[:, :, 0], resampler.project.weight, resampler.project.bias)
    torch.testing.assert_close(resampler(features), projected)
    same = LinearResampler(dim=VISION_DIM)
    assert not list(same.parameters())
    assert torch.equal(same(features), features[:, :, 0])


def test_an_mlp_adds_to_each_patch_what_it_makes_of_it() -> None:
    resampler, features = make("mlp"), features_of(0, 1)
    patches = resampler.features(features)[0][:, :, 0]
    patches = patches + resampler.feed_forward(resampler.norm_feed_forward(patches))
    torch.testing.assert_close(resampler(features), resampler.norm(patches))


def test_a_layer_of_the_transformer_is_torchs_with_norms_before_each_part_and_squared_relu_in_training_too() -> None:
    resampler = TransformerResampler(dim=DIM, depth=1, heads=1, hidden=5).double().train()
    randomize(resampler, 0)
    features = random_tensor(1, 2, 2, 1, PATCHES, DIM)
    (layer,) = resampler.layers
    assert isinstance(layer, nn.TransformerEncoderLayer)
    patches = resampler.features(features)[0][:, :, 0].flatten(0, 1)
    normed = layer.norm1(patches)
    patches = patches + layer.self_attn(normed, normed, normed)[0]
    patches = patches + layer.linear2(layer.linear1(layer.norm2(patches)).clamp(min=0).square())
    torch.testing.assert_close(resampler(features), resampler.norm(patches).unflatten(0, (2, 2)))
    assert layer.linear1.out_features == 5


@pytest.mark.parametrize("kind", [PerceiverResampler, TransformerResampler])
def test_checkpointing_gives_equal_gradients_and_keeps_less(kind: Any) -> None:
    found = []
    for gradient_checkpointing in (False, True):
        resampler = kind(dim=DIM, vision_dim=VISION_DIM, depth=2, heads=2, max_frames=3)
        assert resampler.gradient_checkpointing is False
        randomize(resampler.double(), 0)
        features = features_of(0, 3).requires_grad_()
        resampler.gradient_checkpointing = gradient_checkpointing
        kept: list[int] = []

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = resampler(features, torch.tensor([[3, 1], [2, 0]]))
        # Reentrant checkpointing, which loses gradients where no input has one, refuses this call.
        gradients = torch.autograd.grad(output.square().sum(), (features, *resampler.parameters()))
        found.append((output, gradients, sum(kept)))
    (output, gradients, kept_without), (other_output, other_gradients, kept_with) = found
    torch.testing.assert_close((other_output, other_gradients), (output, gradients), rtol=0.0, atol=0.0)
    assert kept_with < kept_without / 2
    with torch.no_grad():
        torch.testing.assert_close(resampler(features, torch.tensor([[3, 1], [2, 0]])), output)


@pytest.mark.parametrize("kind", [LinearResampler, MeanPoolResampler, MLPResampler, TransformerResampler])
def test_widths_are_known_and_equal_by_default(kind: Any) -> None:
    options = {"heads": 2} if kind is TransformerResampler else {}
    for vision_dim, expected in ((None, DIM), (VISION_DIM, VISION_DIM)):
        resampler = kind(dim=DIM, vision_dim=vision_dim, **options)
        assert (resampler.dim, resampler.vision_dim) == (DIM, expected)


def test_the_defaults_are_the_perceivers() -> None:
    for kind in (MeanPoolResampler, MLPResampler, TransformerResampler):
        with torch.device("meta"):
            resampler: Any = kind(dim=1536)
        assert resampler.features.temporal_embeddings.shape == (8, 1536)
    assert len(resampler.layers) == 6
    assert resampler.layers[0].self_attn.num_heads == 16
    assert resampler.layers[0].linear1.out_features == 4 * 1536


@every_kind
def test_half_precision_weights_give_half_precision_latents_for_media_of_different_lengths(kind: str) -> None:
    resampler, num_frames = KINDS[kind]().bfloat16(), torch.tensor([[3, 1], [2, 0]])
    assert resampler(features_of(0, 3).bfloat16(), num_frames).dtype == torch.bfloat16


@every_kind
def test_half_precision_features_meet_full_precision_weights(kind: str) -> None:
    resampler, features = KINDS[kind](), features_of(0, 2).bfloat16()
    assert resampler(features).dtype == torch.float32
    assert torch.equal(resampler(features), resampler(features.float()))


@pytest.mark.parametrize("kind", [MeanPoolResampler, MLPResampler, partial(TransformerResampler, heads=2)])
def test_so_they_do_where_nothing_is_projected_and_frames_are_not_told_apart(kind: Any) -> None:
    features = features_of(0, 2).bfloat16()
    assert kind(dim=VISION_DIM, max_frames=0)(features).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads must divide dim=8, got 3"),
        ({"heads": 2, "depth": 0}, "depth must be at least 1, got 0"),
        ({"heads": 2, "max_frames": -1}, "max_frames must not be negative, got -1"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerResampler(dim=DIM, **options)

import pytest
import torch
from torch import nn

from flamingo_blocks.blocks import MediaFeatures
from flamingo_blocks.blocks.media_features import clear_padding
from tests.strategies import random_tensor, randomize

DIM, VISION_DIM = 8, 5


def test_features_of_another_width_are_normalised_then_projected() -> None:
    module = MediaFeatures(dim=DIM, vision_dim=VISION_DIM, max_frames=0).double()
    randomize(module, 0)
    features = random_tensor(1, 2, 1, 3, 4, VISION_DIM)
    norm, linear = module.project[0], module.project[1]  # type: ignore[index]
    normed = nn.functional.layer_norm(features, (VISION_DIM,), norm.weight, norm.bias)
    torch.testing.assert_close(module(features)[0], nn.functional.linear(normed, linear.weight, linear.bias))
    assert (module.dim, module.vision_dim) == (DIM, VISION_DIM)


def test_embeddings_are_as_many_as_asked_for_and_small() -> None:
    module = MediaFeatures(dim=64, vision_dim=64, max_frames=100, max_media=50)
    assert module.temporal_embeddings.shape == (100, 64)
    assert module.media_embeddings.shape == (50, 64)
    for embeddings in (module.temporal_embeddings, module.media_embeddings):
        assert embeddings.std().item() == pytest.approx(0.02, rel=0.1)
    assert not list(MediaFeatures(dim=DIM, vision_dim=DIM, max_frames=0).parameters())


def test_a_row_may_have_as_many_media_as_there_are_embeddings_of_places() -> None:
    module = MediaFeatures(dim=DIM, vision_dim=DIM, max_frames=4, max_media=2)
    module(torch.zeros(1, 2, 3, 1, DIM))
    with pytest.raises(ValueError, match="a row must have at most max_media=2 media, got 3"):
        module(torch.zeros(1, 3, 2, 1, DIM))


def test_padding_becomes_zero_and_all_is_real_by_default() -> None:
    features, num_frames = torch.full((1, 3, 2, 1, DIM), torch.nan), torch.tensor([[2, 1, 0]])
    features[0, 0], features[0, 1, 0] = 3.0, 4.0
    cleared, is_real = clear_padding(features, num_frames)
    assert cleared[0, :, :, 0, 0].tolist() == [[3.0, 3.0], [4.0, 0.0], [0.0, 0.0]]
    assert is_real is not None
    assert is_real.tolist() == [[[True, True], [True, False], [False, False]]]
    assert clear_padding(features, None) == (features, None)


def test_half_precision_features_meet_full_precision_weights() -> None:
    module = MediaFeatures(dim=DIM, vision_dim=VISION_DIM, max_frames=0)
    assert module(torch.randn(1, 1, 1, 2, VISION_DIM).bfloat16())[0].dtype == torch.float32


def test_the_default_device_does_not_matter() -> None:
    module, features = MediaFeatures(dim=DIM, vision_dim=VISION_DIM, max_frames=2), torch.randn(1, 2, 3, 1, VISION_DIM)
    for num_frames in (None, torch.tensor([[3, 1]])):
        expected = module(features, num_frames)
        with torch.device("meta"):
            assert torch.equal(module(features, num_frames)[0], expected[0])


@pytest.mark.parametrize("name", ["max_frames", "max_media"])
def test_a_negative_number_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must not be negative, got -1"):
        MediaFeatures(**{"dim": DIM, "vision_dim": DIM, "max_frames": 1, name: -1})

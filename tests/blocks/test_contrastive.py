import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flamingo_blocks.blocks import ContrastiveLoss
from tests import reference
from tests.strategies import random_tensor, seeds


@given(st.integers(1, 6), seeds, st.sampled_from([0.0, 0.1]), st.data())
def test_loss_equals_the_pairwise_loop_with_several_positives(
    size: int, seed: int, label_smoothing: float, data: st.DataObject
) -> None:
    images, texts = (random_tensor(seed + i, size, 4, requires_grad=True) for i in (0, 1))
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    positives = labels[:, None] == labels
    loss = ContrastiveLoss(temperature=0.2, label_smoothing=label_smoothing).double()
    result = loss(images, texts, positives)
    expected = reference.contrastive_loss(images, texts, positives, loss.log_scale.exp().item(), label_smoothing)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(
        torch.autograd.grad(result, (images, texts)), torch.autograd.grad(expected, (images, texts))
    )


@given(st.integers(1, 6), seeds)
def test_without_positives_the_pairs_are_the_diagonal(size: int, seed: int) -> None:
    images, texts = (random_tensor(seed + i, size, 4) for i in (0, 1))
    loss = ContrastiveLoss().double()
    assert torch.equal(loss(images, texts), loss(images, texts, torch.eye(size, dtype=torch.bool)))


def test_temperature_is_learned_and_bounded() -> None:
    loss = ContrastiveLoss(temperature=0.5)
    images, texts = torch.randn(3, 4), torch.randn(3, 4)
    loss(images, texts).backward()
    assert loss.log_scale.grad is not None
    assert loss.log_scale.grad.abs() > 0
    torch.nn.init.constant_(loss.log_scale, 50.0)
    at_bound = ContrastiveLoss(temperature=1 / 100)
    torch.testing.assert_close(loss(images, texts), at_bound(images, texts))
    (gradient,) = torch.autograd.grad(loss(images, texts), loss.log_scale)
    assert gradient.abs() > 0, "beyond the bound the temperature could not come back"


def test_half_precision_embeddings_meet_a_full_precision_temperature() -> None:
    images, texts = torch.randn(3, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    loss = ContrastiveLoss()
    torch.testing.assert_close(loss(images, texts), loss(images.float(), texts.float()))


def test_uninformative_embeddings_cost_the_log_of_the_batch() -> None:
    same = torch.ones(8, 4)
    assert ContrastiveLoss()(same, same).item() == pytest.approx(math.log(8))


def test_bad_input_is_refused() -> None:
    loss, embeddings = ContrastiveLoss(), torch.randn(3, 4)
    with pytest.raises(ValueError, match="every image and every text must have a positive"):
        loss(embeddings, embeddings, torch.eye(3, dtype=torch.bool).index_fill(0, torch.tensor([1]), False))
    with pytest.raises(ValueError, match="must not be empty"):
        loss(embeddings[:0], embeddings[:0])
    with pytest.raises(ValueError, match="as many texts as images, got 2, 3"):
        loss(embeddings, embeddings[:2])
    with pytest.raises(ValueError, match=r"temperature must be at least 1 / max_scale = 0\.01, got 0\.0"):
        ContrastiveLoss(temperature=0.0)


@pytest.mark.unchecked
def test_wrong_shapes_are_refused() -> None:
    loss, embeddings = ContrastiveLoss(), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"\(images, dim\) and \(texts, dim\), got \(3, 4\) and \(3, 5\)"):
        loss(embeddings, torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"positives must have shape \(images, texts\) = \(3, 3\), got \(2, 3\)"):
        loss(embeddings, embeddings, torch.ones(2, 3, dtype=torch.bool))

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flamingo_blocks import FlamingoForConditionalGeneration, PerceiverResampler
from flamingo_blocks.media_encoding import encode_distinct
from tests.strategies import random_tensor, randomize, seeds
from tests.tiny_flamingo import Prompt, make_flamingo

PATCHES, WIDTH, FRAMES = 2, 4, 3


@st.composite
def media_and_lengths(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Few different media, so that many are equal, of some lengths; padding frames are garbage."""
    batch, media = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = batch * media
    seeds_of_media = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    lengths = torch.tensor(draw(st.lists(st.integers(0, FRAMES), min_size=size, max_size=size)))
    frames = torch.stack([random_tensor(seed, FRAMES, PATCHES, WIDTH) for seed in seeds_of_media])
    is_padding = torch.arange(FRAMES) >= lengths[:, None]
    frames = torch.where(is_padding[..., None, None], random_tensor(9, *frames.shape), frames)
    return frames.unflatten(0, (batch, media)), lengths.view(batch, media)


def make_resampler(seed: int) -> PerceiverResampler:
    resampler = PerceiverResampler(dim=WIDTH, heads=1, depth=1, latents=2, max_frames=2).double()
    randomize(resampler, seed)
    return resampler


@given(media_and_lengths(), seeds, st.booleans())
def test_each_medium_has_the_latents_that_it_has_alone_and_the_resampler_the_same_gradients(
    drawn: tuple[Tensor, Tensor], seed: int, find_copies: bool
) -> None:
    media, num_frames = drawn
    resampler = make_resampler(seed)
    encoded: list[Tensor] = []
    calls: list[int] = []

    def encode_frames(frames: Tensor) -> Tensor:
        encoded.extend(frames)
        return 2 * frames

    def resample(features: Tensor, num_frames: Tensor | None) -> Tensor:
        calls.append(features.shape[1])
        latents: Tensor = resampler(features, num_frames)
        return latents

    latents = encode_distinct(
        media, num_frames, encode_frames=encode_frames, resample=resample, find_copies=find_copies
    )
    places = num_frames.nonzero().tolist()
    frames = [media[row, medium, : num_frames[row, medium]] for row, medium in places]
    expected = latents.detach().clone()  # of padding: anything finite
    assert expected.isfinite().all()
    for (row, medium), own in zip(places, frames, strict=True):
        expected[row, medium] = resampler(2 * own[None, None])[0, 0]
    torch.testing.assert_close(latents, expected)
    if places:
        weights = random_tensor(seed, *latents.shape) * (num_frames > 0)[..., None, None]
        gradients, expected_gradients = (
            torch.autograd.grad((weights * x).sum(), list(resampler.parameters()), materialize_grads=True)
            for x in (latents, expected)
        )
        torch.testing.assert_close(gradients, expected_gradients)
    distinct = {(len(own), *own.flatten().tolist()) for own in frames}
    real = sorted(distinct) if find_copies else [(len(own), *own.flatten().tolist()) for own in frames]
    assert len(encoded) == (sum(length for length, *_ in real) or 1), (
        "padding costs a frame where there is nothing else"
    )
    assert calls == [len(real) or 1]


def test_media_of_equal_sums_that_are_not_equal_are_told_apart() -> None:
    media = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]).view(1, 3, 1, 1, 2)
    encoded: list[Tensor] = []

    def encode_frames(frames: Tensor) -> Tensor:
        encoded.append(frames)
        return frames

    latents = encode_distinct(
        media, torch.ones(1, 3, dtype=torch.long), encode_frames=encode_frames, resample=first_frame
    )
    assert torch.equal(latents, media[:, :, 0])
    assert encoded[0].flatten().tolist() == [1, 2, 2, 1]


def first_frame(features: Tensor, _: Tensor | None) -> Tensor:
    return features[:, :, 0]


def few_shot_prompt(model: FlamingoForConditionalGeneration) -> dict[str, Any]:
    """Two rows with the same example and a question each; text alone in a third row."""
    prompt = Prompt.make(model)
    example, *questions = prompt.pixel_values[:, :, :1].flatten(0, 1)[:3]
    rows = [torch.stack([example, question]) for question in questions]
    input_ids = prompt.input_ids.clone()
    input_ids[1] = input_ids[0]
    text = torch.where(input_ids[:1] == prompt.image_token_id, 50, input_ids[:1])
    return {
        "input_ids": torch.cat([input_ids, text]),
        "pixel_values": torch.stack([*rows, torch.zeros_like(rows[0])]),
        "num_frames": torch.tensor([[1, 1], [1, 1], [0, 0]]),
    }


def count_images(model: FlamingoForConditionalGeneration) -> list[int]:
    counts: list[int] = []
    model.vision_encoder.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    model.resampler.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[:2].numel()))
    return counts


def test_rows_that_share_examples_and_rows_without_media_cost_no_encoding() -> None:
    model, _ = make_flamingo()
    inputs = few_shot_prompt(model)
    counts = count_images(model)
    logits = model(**inputs).logits
    assert counts == [3, 3], "an example and two questions"
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        torch.testing.assert_close(model(**alone).logits[0], logits[row], atol=2e-5, rtol=1e-5)
    assert counts[2:] == [2, 2, 2, 2], "nothing for the row of text"


@pytest.mark.parametrize("which", ["encoder", "features"])
def test_copies_are_encoded_where_their_gradients_may_differ(which: str) -> None:
    model, _ = make_flamingo()
    inputs = few_shot_prompt(model)
    if which == "encoder":
        model.vision_encoder.unfreeze()
        counts = count_images(model)
        model(**inputs)
        assert counts == [4, 4]
    else:
        with torch.no_grad():
            features = model.vision_encoder(inputs.pop("pixel_values").flatten(0, 2)).unflatten(0, (3, 2, 1))
        features.requires_grad_()
        model(**inputs, vision_features=features, labels=inputs["input_ids"]).loss.backward()
        assert (features.grad[:2].abs().sum((2, 3, 4)) > 0).all()
        assert (features.grad[2] == 0).all()


@pytest.mark.parametrize("resampler", ["perceiver", "mlp", "transformer", "mean_pool"])
def test_a_batch_of_padding_alone_costs_nothing_but_in_training_where_gradients_are_zero_and_not_absent(
    resampler: str,
) -> None:
    model, _ = make_flamingo(resampler=resampler)
    inputs = few_shot_prompt(model)
    inputs["input_ids"] = torch.where(inputs["input_ids"] == model.config.image_token_id, 50, inputs["input_ids"])
    inputs["num_frames"] = torch.zeros_like(inputs["num_frames"])
    expected = model(inputs["input_ids"]).logits
    counts = count_images(model)
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert counts == []
    latents = model.encode_media(**{name: inputs[name] for name in ("pixel_values", "num_frames")})
    one = model.encode_media(inputs["pixel_values"][:1, :1])
    assert latents.shape == (3, 2, *one.shape[2:])
    model.train()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    for part in (model.resampler, model.injector):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
    for name, parameter in model.resampler.named_parameters():
        assert (parameter.grad == 0).all(), name

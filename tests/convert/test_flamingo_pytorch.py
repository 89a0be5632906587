"""flamingo-pytorch's blocks and resamplers, against its formulas restated; `make parity` compares with itself."""

from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from flamingo_blocks import MediaRuns, media_ranges
from flamingo_blocks.convert import flamingo_pytorch
from tests import reference
from tests.strategies import random_tensor, seeds

DIM, INNER, HIDDEN, DEPTH, MEDIA = 12, 128, 20, 2, 3


def tensors_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: random_tensor(i, *shape) / 2 for i, (name, shape) in enumerate(shapes.items())}


def feed_forward(prefix: str, dim: int = DIM) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}0.weight": (dim,),
        f"{prefix}0.bias": (dim,),
        f"{prefix}1.weight": (HIDDEN, dim),
        f"{prefix}3.weight": (dim, HIDDEN),
    }


def block_tensors(media_dim: int = DIM) -> dict[str, Tensor]:
    shapes = {
        "attn_gate": (1,),
        "ff_gate": (1,),
        "attn.norm.weight": (DIM,),
        "attn.norm.bias": (DIM,),
        "attn.to_q.weight": (INNER, DIM),
        "attn.to_kv.weight": (2 * INNER, media_dim),
        "attn.to_out.weight": (DIM, INNER),
    }
    return tensors_of(shapes | feed_forward("ff."))


def resampler_tensors() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"latents": (4, DIM), "norm.weight": (DIM,), "norm.bias": (DIM,)}
    for i in range(DEPTH):
        shapes |= feed_forward(f"layers.{i}.1.")
        for norm in ("norm_media", "norm_latents"):
            shapes |= {f"layers.{i}.0.{norm}.weight": (DIM,), f"layers.{i}.0.{norm}.bias": (DIM,)}
        shapes[f"layers.{i}.0.to_q.weight"] = (INNER, DIM)
        shapes[f"layers.{i}.0.to_kv.weight"] = (2 * INNER, DIM)
        shapes[f"layers.{i}.0.to_out.weight"] = (DIM, INNER)
    return tensors_of(shapes)


@given(seeds)
def test_a_block_computes_what_it_does_there(seed: int) -> None:
    tensors = block_tensors(media_dim=7)
    is_image = random_tensor(seed, 2, 6) > 0.5
    media = max(1, int(is_image.sum(1).max()))
    hidden, latents = random_tensor(seed, 2, 6, DIM), random_tensor(seed + 1, 2, media, 3, 7)
    found = flamingo_pytorch.load_block(tensors)(hidden, latents, MediaRuns.from_ranges(media_ranges(is_image)))
    torch.testing.assert_close(found, reference.lucidrains_block(tensors, hidden, latents, is_image))


def test_a_resampler_computes_what_it_does_there() -> None:
    tensors, places = resampler_tensors(), random_tensor(3, MEDIA, 1, DIM)
    features = random_tensor(4, 2, MEDIA, 5, DIM)
    found = flamingo_pytorch.load_resampler(tensors | {"media_pos_emb": places})(features[:, :, None])
    for row in range(2):
        for i in range(MEDIA):
            expected = reference.lucidrains_resampler(tensors, features[row, i] + places[i])
            torch.testing.assert_close(found[row, i], expected)


def test_a_row_may_not_have_more_media_than_there_are_places() -> None:
    resampler = flamingo_pytorch.load_resampler(
        resampler_tensors() | {"media_pos_emb": random_tensor(3, MEDIA, 1, DIM)}
    )
    with pytest.raises(ValueError, match="at most max_media=3 media, got 4"):
        resampler(random_tensor(0, 1, 4, 1, 5, DIM))


def test_tensors_come_back_as_they_were() -> None:
    block, resampler = block_tensors(), resampler_tensors() | {"media_pos_emb": random_tensor(3, MEDIA, 1, DIM)}
    for tensors, written in (
        (block, flamingo_pytorch.to_flamingo_pytorch(flamingo_pytorch.load_block(block))),
        (resampler, flamingo_pytorch.to_flamingo_pytorch(flamingo_pytorch.load_resampler(resampler))),
    ):
        assert written.keys() == tensors.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "config, heads",
    [(None, 2), ({"dim_head": 32}, 4), ({"heads": 8}, 8), ({"dim": DIM, "heads": 4, "dim_head": 32}, 4)],
)
def test_the_width_of_a_head_is_that_of_the_constructor(config: dict[str, Any] | None, heads: int) -> None:
    assert flamingo_pytorch.load_block(block_tensors(), config).heads == heads
    resampler = flamingo_pytorch.load_resampler(resampler_tensors() | {"media_pos_emb": torch.ones(1, 1, DIM)}, config)
    assert resampler.layers[0].heads == heads


@pytest.mark.parametrize(
    "config, message",
    [
        ({"dim_head": 24}, "heads \\* dim_head = 128"),
        ({"heads": 3, "dim_head": 64}, "heads \\* dim_head = 128"),
        ({"width": 3}, r"got \['width'\]"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flamingo_pytorch.load_block(block_tensors(), config)


def test_what_does_not_fit_is_named() -> None:
    tensors = block_tensors()
    with pytest.raises(ValueError, match=r"no place: attn.to_v.weight"):
        flamingo_pytorch.load_block(tensors | {"attn.to_v.weight": torch.ones(1)})
    del tensors["attn.to_q.weight"]
    with pytest.raises(ValueError, match=r"no tensor attn.to_q.weight; it has attn.norm.bias, "):
        flamingo_pytorch.load_block(tensors)

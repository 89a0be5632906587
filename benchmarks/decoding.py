"""Decoding: what blocks add to a step of the language model, and greedy generation over OpenFlamingo's modules."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.measure import Result, as_script, medians
from benchmarks.models import VOCAB, both, check_equal, for_open_flamingo, language_model, prompt
from flamingo_blocks import MediaCache
from flamingo_blocks.blocks import gated_cross_attention

NEW_TOKENS = 64
TOKENS_PER_IMAGE = 8
TEXT, STEPS = 256, 8  # of the prompt before timed steps; as many steps are timed at once
# Text with its cache in, logits of the last token out.
Step = Callable[[Tensor, Any], Tensor]


def greedy(step: Step, input_ids: Tensor, cache: Any, new_tokens: int = NEW_TOKENS) -> Tensor:
    """Generate tokens one by one: the same loop for all."""
    found = []
    for _ in range(new_tokens):
        input_ids = step(input_ids, cache).argmax(-1, keepdim=True)
        found.append(input_ids)
    return torch.cat(found, dim=1)


def our_step(model: Any, media_cache: MediaCache, input_ids: Tensor, cache: Any, **media: Any) -> Tensor:
    """Run new text, with the media that come along with it."""
    output = model(input_ids, cache=cache, media_cache=media_cache, use_cache=True, logits_to_keep=1, **media)
    return output.logits[:, -1]


def their_step(model: Any, input_ids: Tensor, cache: Any) -> Tensor:
    """Run new text in OpenFlamingo's model, which holds the media already."""
    output = model(None, input_ids, past_key_values=cache, use_cache=True, clear_conditioned_layers=False)
    return output.logits[:, -1]


def text_step(lm: Any, input_ids: Tensor, cache: Any) -> Tensor:
    """Run new text in a language model alone."""
    return lm(input_ids, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def generate_ours(model: Any, input_ids: Tensor, features: Tensor) -> Tensor:
    """Generate with our model: media are encoded and projected in the first step."""
    media = {"vision_features": features}

    def step(input_ids: Tensor, cache: Any) -> Tensor:
        return our_step(model, media_cache, input_ids, cache, **(media if not media_cache.rows else {}))

    media_cache = MediaCache()
    return greedy(step, input_ids, DynamicCache())


def generate_theirs(model: Any, input_ids: Tensor, features: Tensor) -> Tensor:
    """Generate with OpenFlamingo's model, whose own generate() fails with transformers 5.

    As there, media are encoded once; each layer projects them anew in each step.
    """
    model.cache_media(input_ids, for_open_flamingo(features))
    try:
        return greedy(partial(their_step, model), input_ids, DynamicCache())
    finally:
        model.uncache_media()


@contextmanager
def latents_given(ours: Any, theirs: Any, features: Tensor) -> Iterator[None]:
    """Resample beforehand: both do it once, at the same cost."""
    latents = ours.encode_media(vision_features=features)
    with (
        patch.object(ours.resampler, "forward", lambda *_: latents),
        patch.object(theirs.perceiver, "forward", lambda *_: latents),
    ):
        yield


def nothing(queries: Tensor, *_: object, **__: object) -> Tensor:
    """Stand for the core of attention, and look at neither keys nor values."""
    return torch.zeros_like(queries)


def shared_copy(cache: DynamicCache) -> DynamicCache:
    """Copy a cache, but not its tensors, which are replaced as it grows."""
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    return cache


def steps(ours: Any, theirs: Any, lm: Any, images: int) -> Iterator[Result]:
    """Time steps after a prompt. Each alternative goes on from the same text, whose caches are as long."""
    input_ids, features = prompt(images, TEXT)
    with latents_given(ours, theirs, features):
        media_cache, cache = MediaCache(), DynamicCache()
        logits = our_step(ours, media_cache, input_ids, cache, vision_features=features)
        theirs.cache_media(input_ids, for_open_flamingo(features))
        their_cache, text_cache = DynamicCache(), DynamicCache()
        check_equal("logits", logits, their_step(theirs, input_ids, their_cache), tolerance=1e-4)
    text_step(lm, input_ids.clamp(max=VOCAB - 1), text_cache)
    token = logits.argmax(-1, keepdim=True)

    def our_steps() -> Tensor:
        return greedy(partial(our_step, ours, copy.copy(media_cache)), token, shared_copy(cache), STEPS)

    def steps_without_media() -> Tensor:
        with patch.object(gated_cross_attention, "attend_to_media", nothing):
            return our_steps()

    def their_steps() -> Tensor:
        return greedy(partial(their_step, theirs), token, shared_copy(their_cache), STEPS)

    if not torch.equal(our_steps(), their_steps()):
        raise RuntimeError("both models must generate the same tokens")
    first = our_step(ours, copy.copy(media_cache), token, shared_copy(cache))
    with patch.object(gated_cross_attention, "attend_to_media", nothing):
        if torch.equal(first, our_step(ours, copy.copy(media_cache), token, shared_copy(cache))):
            raise RuntimeError("the core of attention must be replaced, but the logits are the same")
    seconds = medians(
        {
            "ours": our_steps,
            "no media": steps_without_media,
            "text": lambda: greedy(partial(text_step, lm), token, shared_copy(text_cache), STEPS),
        },
        seconds=15,
    ) | medians({"theirs": their_steps}, seconds=0, rounds=3)
    theirs.uncache_media()
    a_step = {name: value / STEPS for name, value in seconds.items()}
    what = f"decode step, {count(images)} in {TEXT} tokens"
    yield Result.cost(what, "the language model alone", a_step["ours"], a_step["text"], "<= 1.6")
    yield Result.cost(what, "no work on keys and values", a_step["ours"], a_step["no media"], "<= 1.03")
    yield Result.speed_up(what, "OpenFlamingo", a_step["ours"], a_step["theirs"])


def generation(ours: Any, theirs: Any, images: int, goal: str) -> Iterator[Result]:
    """Time whole generations, prompt included: from latents on, and from features on."""
    input_ids, features = prompt(images, images * TOKENS_PER_IMAGE)

    def own_generate() -> Tensor:
        output: Tensor = ours.generate(
            input_ids, vision_features=features, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        )
        return output[:, input_ids.shape[1] :]

    alternatives = {
        "ours": partial(generate_ours, ours, input_ids, features),
        "theirs": partial(generate_theirs, theirs, input_ids, features),
    }
    with latents_given(ours, theirs, features):
        found = {name: function() for name, function in (alternatives | {"generate": own_generate}).items()}
        if not all(torch.equal(tokens, found["ours"]) for tokens in found.values()):
            raise RuntimeError(f"all must generate the same tokens, got {found}")
        rounds = 1 if images > 5 else 3
        seconds = medians(alternatives | {"generate": own_generate}, seconds=0, rounds=rounds)
    whole = medians(alternatives, seconds=0, rounds=rounds)
    what = f"{NEW_TOKENS} tokens generated after {count(images)} in {input_ids.shape[1]} tokens"
    yield Result.speed_up(f"{what}, one loop for both", "OpenFlamingo", seconds["ours"], seconds["theirs"], goal)
    yield Result.speed_up(f"{what}, ours with generate()", "OpenFlamingo", seconds["generate"], seconds["theirs"])
    yield Result.speed_up(f"{what}, images resampled too", "OpenFlamingo", whole["ours"], whole["theirs"])


def count(images: int) -> str:
    """Say how many images."""
    return "1 image" if images == 1 else f"{images} images"


@torch.no_grad()
def run() -> Iterator[Result]:
    """Compare on the shape of OPT-125M, in float32, with a block before each of 12 layers."""
    lm = language_model()
    ours, theirs = both()
    for images in (1, 32):
        yield from steps(ours, theirs, lm, images)
    yield from generation(ours, theirs, 5, ">= 2.5")
    yield from generation(ours, theirs, 32, ">= 9.5")


if __name__ == "__main__":
    as_script("decoding", run)

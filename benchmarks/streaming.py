"""An endless stream of media: what is held of them, and what the newest one costs, must not depend on how many came.

The language model sees a window of the text only, so that its own part does not grow with the stream either. What is
timed is all that is done for media, and nothing else: a whole forward less what the language model's own layers take.
"""

import dataclasses
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from benchmarks.measure import Result, as_script
from flamingo_blocks import FlamingoConfig, FlamingoForConditionalGeneration, MediaCache
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig

MEDIA, TEXT, EARLY = 1000, 8, 10
# Windows of so many media around the 10th and before the 1,000th; the medians of these are compared.
WINDOW = 10
DIM, LATENTS, VISION_DIM, PATCHES = 256, 64, 64, 64
VOCAB = 1000


class Stopwatch:
    """Measures how long decoder layers take, without what the blocks before them do."""

    def __init__(self, layers: Any) -> None:
        self.seconds = 0.0
        self._start = 0.0
        for layer in layers:
            layer.register_forward_pre_hook(self._begin)  # runs after the block's hook, which was registered earlier
            layer.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self._start = time.process_time()

    def _end(self, *_: object) -> None:
        self.seconds += time.process_time() - self._start


class Stream:
    """A stream of media, each with its text.

    Args:
        model: Sees the stream.
        stopwatch: On its language model's layers.
    """

    def __init__(self, model: Any, stopwatch: Stopwatch) -> None:
        self.model = model
        self.stopwatch = stopwatch
        self.cache = DynamicCache(config=model.config.text_config)
        self.media_cache = MediaCache()
        self.generator = torch.Generator().manual_seed(0)

    def append(self) -> float:
        """Append a medium and its text, and give the seconds that were spent on media."""
        input_ids = torch.randint(5, VOCAB, (1, TEXT), generator=self.generator)
        input_ids[:, 0] = self.model.config.image_token_id
        features = torch.randn(1, 1, 1, PATCHES, VISION_DIM, generator=self.generator)
        self.stopwatch.seconds, start = 0.0, time.process_time()
        self.model(input_ids, vision_features=features, cache=self.cache, media_cache=self.media_cache, use_cache=True)
        return time.process_time() - start - self.stopwatch.seconds


def held(thing: Any) -> int:
    """Count the bytes of all tensors that an object holds, whole storages where it holds views."""
    storages: dict[int, int] = {}

    def visit(thing: Any) -> None:
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            visit(list(thing.values()))
        elif isinstance(thing, list | tuple):
            for item in thing:
                visit(item)
        elif dataclasses.is_dataclass(thing) or isinstance(thing, MediaCache):
            visit(vars(thing))

    visit(thing)
    return sum(storages.values())


def make_model() -> Any:
    """Make a small Flamingo whose language model sees 64 tokens."""
    torch.manual_seed(0)
    lm = MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCAB,
            hidden_size=DIM,
            intermediate_size=DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            sliding_window=64,
            max_position_embeddings=MEDIA * TEXT,
        )
    )
    config = FlamingoConfig(
        text_config=lm.config,
        vision_config=FlamingoVisionConfig(architecture="test_vit", image_size=32),
        gate_init=0.5,
        resampler_depth=1,
        resampler_heads=2,
        num_latents=LATENTS,
    )
    model: Any = FlamingoForConditionalGeneration(config, language_model=lm)
    return model.eval()


@torch.no_grad()
def run() -> Iterator[Result]:
    """Append 1,000 media, and compare the last ones with the 10th of a new stream, in turns."""
    model = make_model()
    stopwatch = Stopwatch(model.language_model.model.layers)
    late = Stream(model, stopwatch)
    late_seconds, early_seconds = [], []
    early_bytes = 0
    for number in range(1, MEDIA + 1):
        seconds = late.append()
        if number == EARLY:
            early_bytes = held(late.media_cache)
        if number > MEDIA - WINDOW:
            late_seconds.append(seconds)
            early = Stream(model, stopwatch)
            window = [early.append() for _ in range(EARLY + WINDOW // 2)]
            early_seconds.append(median(window[-WINDOW:]))
    what = f"{MEDIA:,} media appended one at a time with {TEXT} tokens each"
    late_bytes = held(late.media_cache)
    yield Result.cost(
        f"memory held for media: {what}", "after 10", late_bytes / 2**20, early_bytes / 2**20, "<= 1.0", "MiB"
    )
    yield Result.cost(
        f"work for a new medium: {what}", "the 10th", median(late_seconds), median(early_seconds), "<= 1.1"
    )


if __name__ == "__main__":
    as_script("streaming", run)

"""Ranking answers behind a prompt that runs once over running each prompt in full."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from benchmarks.measure import Result, as_script, medians
from benchmarks.models import check_equal
from flamingo_blocks import MediaCache, build_flamingo, media_ranges
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig
from flamingo_blocks.evaluation import CLASSIFICATION, Example, Prompt, score_candidates, write_prompt

VOCAB, SHOTS, CANDIDATES = 32_000, 32, 100
BATCH = 50
WHAT = f"{SHOTS}-shot ranking of {CANDIDATES} candidates"


def flamingo() -> tuple[Any, Any]:
    """Make a small language model with blocks before every layer, a tiny vision encoder, and words for tokens."""
    torch.manual_seed(0)
    lm = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4
    )
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"<unk>": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vision: dict[str, Any] = {"embed_dim": 64, "depth": 1, "num_heads": 1}
    model: Any
    model, processor = build_flamingo(
        lm,
        FlamingoVisionConfig(architecture="vit_tiny_patch16_224", model_args=vision, image_size=64),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>"),
        gate_init=0.5,
        cross_attention_heads=4,
        cross_attention_head_dim=64,
        resampler_depth=2,
        resampler_heads=4,
        resampler_head_dim=64,
    )
    return model.eval(), processor


def question() -> tuple[Prompt, list[str]]:
    """Write a prompt of labelled images, and candidates of two to four tokens."""
    draw = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in draw.integers(5, VOCAB - 5, count))

    candidates = [words(2 + i % 3) for i in range(CANDIDATES)]
    images = [Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(SHOTS + 1)]
    support = [Example(str(i), (image,), (candidates[i],)) for i, image in enumerate(images[1:])]
    return write_prompt(CLASSIFICATION, support, Example("query", (images[0],), (candidates[0],))), candidates


@torch.no_grad()
def with_shared_media(model: Any, processor: Any, prompt: Prompt, candidates: list[str]) -> Callable[[], Tensor]:
    """Run each text in full, with media that are encoded and projected once: what is saved besides is text alone."""
    inputs = processor(text=[prompt.text], images=[list(prompt.media)], return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    rows = processor.tokenizer([prompt.text + prompt.space + candidate + prompt.end for candidate in candidates])
    texts: dict[int, list[int]] = {}
    for i, ids in enumerate(rows["input_ids"]):
        texts.setdefault(len(ids), []).append(i)
    media_cache = MediaCache(keep_all=True)
    model(**inputs, use_cache=True, media_cache=media_cache, logits_to_keep=1)

    @torch.no_grad()
    def score() -> Tensor:
        scores = torch.empty(len(candidates))
        for length, same_length in texts.items():
            for chosen in torch.tensor(same_length).split(BATCH):
                ids = torch.tensor([rows["input_ids"][i] for i in chosen])
                ranges = media_ranges(ids[:1] == processor.image_token_id)
                keep = length - start + 1
                logits = model(
                    ids, media_cache=media_cache, media_ranges=ranges, use_cache=False, logits_to_keep=keep
                ).logits
                log_probabilities = logits[:, :-1].log_softmax(-1)
                scores[chosen] = log_probabilities.gather(2, ids[:, start:, None]).sum((1, 2))
        return scores

    return score


def run() -> Iterator[Result]:
    """Compare the prompt run once, with each text in full."""
    model, processor = flamingo()
    prompt, candidates = question()

    def score(*, share_prompt: bool) -> Tensor:
        return score_candidates(model, processor, prompt, candidates, batch_size=BATCH, share_prompt=share_prompt)

    ways: dict[str, Callable[[], Tensor]] = {
        "shared": lambda: score(share_prompt=True),
        "in full": lambda: score(share_prompt=False),
        "media once": with_shared_media(model, processor, prompt, candidates),
    }
    expected = ways["in full"]()
    for name in ("shared", "media once"):
        check_equal(name, ways[name](), expected, tolerance=1e-5)
    seconds = medians(ways, seconds=40, rounds=3)
    yield Result.speed_up(WHAT, "each prompt in full", seconds["shared"], seconds["in full"], ">= 10")
    yield Result.speed_up(
        WHAT, "each prompt in full, with images encoded once", seconds["shared"], seconds["media once"]
    )


if __name__ == "__main__":
    as_script("ranking", run)

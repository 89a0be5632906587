"""Type-checked beside the installed wheel. A use with an `ignore` is wrong: mypy fails if it finds no error there."""

import torch
from torch import Tensor

from flamingo_blocks import (
    FlamingoConfig,
    FlamingoForConditionalGeneration,
    GatedCrossAttentionBlock,
    MediaRuns,
    PerceiverResampler,
    build_flamingo,
    media_ranges,
)


def right(images: Tensor, is_image: Tensor, hidden_states: Tensor) -> Tensor:
    """Use blocks as their signatures say."""
    resampler = PerceiverResampler(dim=32, vision_dim=24, depth=1, heads=2, latents=4)
    block = GatedCrossAttentionBlock(dim=16, media_dim=32, heads=2)
    runs = MediaRuns.from_ranges(media_ranges(is_image, attend="last"))
    output: Tensor = block(hidden_states, resampler(images), runs)
    return output


def known(path: str) -> FlamingoConfig:
    """Read what a model is made of: its type is known, and is not Any."""
    model, _ = build_flamingo("language-model", "vision-encoder", cross_attention_every=4)
    wrong: int = model  # type: ignore[assignment]
    del wrong
    named: FlamingoForConditionalGeneration = model
    named.save_pretrained(path)
    return named.config


GatedCrossAttentionBlock(dim="16", media_dim=32, heads=2)  # type: ignore[arg-type]
GatedCrossAttentionBlock(16, 32, 2)  # type: ignore[call-arg]
media_ranges(torch.ones(1, 3).bool(), attend="first")  # type: ignore[arg-type]
PerceiverResampler(dimension=32)  # type: ignore[call-arg]

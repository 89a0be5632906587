import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_blocks import (
    FlamingoConfig,
    FlamingoForConditionalGeneration,
    flamingo_3b,
    flamingo_9b,
    flamingo_80b,
)


@cache
def build(preset: Callable[[], FlamingoConfig]) -> FlamingoForConditionalGeneration:
    with torch.device("meta"):
        return FlamingoForConditionalGeneration(preset())


@pytest.mark.parametrize(
    ("preset", "layers", "width", "heads", "blocks", "every"),
    [
        (flamingo_3b, 24, 2048, 16, 24, 1),
        pytest.param(flamingo_9b, 40, 4096, 32, 10, 4, marks=pytest.mark.slow),
        pytest.param(flamingo_80b, 80, 8192, 64, 12, 7, marks=pytest.mark.slow),
    ],
)
def test_shapes_are_the_papers(
    preset: Callable[[], FlamingoConfig], layers: int, width: int, heads: int, blocks: int, every: int
) -> None:
    model: Any = build(preset)
    text = model.language_model.config
    assert (text.num_hidden_layers, text.hidden_size, text.num_attention_heads) == (layers, width, heads)
    assert model.injector.layer_indices == tuple(range(0, layers, every))
    assert len(model.injector.blocks) == blocks
    blocks_by_layer: Any = model.injector.blocks.values()
    for block in blocks_by_layer:
        assert (block.heads, block.head_dim, block.media_dim) == (heads, 128, 1536)
        assert block.feed_forward.to_hidden.out_features == 4 * width
        assert block.gate.alpha.shape == (1,)
    resampler = model.resampler
    assert (len(resampler.layers), resampler.latents.shape, resampler.features.max_frames) == (6, (64, 1536), 8)
    assert resampler.layers[0].heads * 96 == resampler.layers[0].to_q.out_features == 16 * 96
    assert model.vision_encoder.image_size == (320, 320)
    assert 434e6 < sum(p.numel() for p in model.vision_encoder.parameters()) < 436e6, "the paper: 435M"
    assert model.config.attend == "last"
    # All that the paper trains, and nothing else.
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"resampler", "injector", "new_tokens"}
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.slow
def test_the_tables_in_the_docs_are_what_the_shapes_give() -> None:
    for name in ("preset_sizes", "memory_plan"):  # in one test, so that the models are built once
        script = Path(__file__).parents[1] / "docs" / "figures" / f"{name}.py"
        written = script.parents[1] / "assets" / f"{name}.md"
        table = runpy.run_path(str(script))["table"](build)
        assert table.splitlines() == [line for line in written.read_text().splitlines() if line.startswith("|")]

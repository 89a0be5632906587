"""Draw docs/assets/caching.svg: what two turns of a conversation compute and keep. Run from the project's root.

The lengths, the media that are held and what tokens see are read from a model that runs the calls.
"""

from dataclasses import dataclass

import torch
from diagram import FROZEN, FROZEN_EDGE, MEDIA, MUTED, RULE, TINTS, TRAINED, Card
from transformers import DynamicCache, LlamaConfig

from flamingo_blocks import FlamingoForConditionalGeneration, MediaCache
from flamingo_blocks.configuration_flamingo import FlamingoConfig, FlamingoVisionConfig

# The calls of the model: what each is, and the tokens that it runs.
CALLS = (
    ("prompt", ("<image>", "two")),
    ("step", ("hills",)),
    ("step", ("<EOC>",)),
    ("next turn", ("<image>", "a")),
    ("step", ("red",)),
)
LEFT, CELL, GAP = 1.42, 0.62, 0.1
WORDS = sorted({token for _, tokens in CALLS for token in tokens} - {"<image>"})


@dataclass
class Kept:
    """What there is after a call: tokens in the language model's cache, media held, and what the call's tokens saw."""

    tokens: int
    media: list[int]
    sees: list[int]


def run(*, keep_all: bool) -> list[Kept]:
    """Run the calls on a tiny model, and tell what is kept after each."""
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
    vision = FlamingoVisionConfig(architecture="test_vit", image_size=32)
    config = FlamingoConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=8,
        end_of_chunk_token_id=9,
        new_token_ids=[8, 9],
        num_latents=2,
    )
    model = FlamingoForConditionalGeneration(config).eval()
    cache, media_cache, kept = DynamicCache(), MediaCache(keep_all=keep_all), []
    for _, tokens in CALLS:
        ids = torch.tensor([[8 if token == "<image>" else WORDS.index(token) for token in tokens]])
        pixel_values = torch.zeros(1, 1, 1, 3, 32, 32) if "<image>" in tokens else None
        with torch.no_grad():
            model(ids, pixel_values, cache=cache, media_cache=media_cache)
        assert media_cache.num_media is not None
        end, newest = cache.get_seq_length(), int(media_cache.num_media)
        held = next(iter(media_cache.key_values.values())).keys.shape[1]
        seen = media_cache.ranges_at(end - len(tokens), len(tokens))[0]
        kept.append(Kept(end, list(range(newest - held, newest)), seen[:, 0].tolist()))
    return kept


def main() -> None:
    calls, keeping = run(keep_all=False), run(keep_all=True)
    widths = [len(tokens) * CELL for _, tokens in CALLS]
    card = Card(LEFT + sum(widths) + GAP * len(CALLS) + 0.1, 4.0)
    rows = {"": 3.72, "tokens run": 3.3, "they see": 2.97, "encoded, resampled,\nprojected": 2.52}
    rows |= {"language model's\ncache": 1.88, "MediaCache(),\nlayer by layer": 1.14, "MediaCache(\nkeep_all=True)": 0.5}
    for name, y in rows.items():
        card.text(LEFT - 0.14, y, name, color=MUTED, align="right", size=9)
    heading, text, sees, computed, cache, media, keep_all = rows.values()

    left = LEFT
    for (name, tokens), width, after, keeps in zip(CALLS, widths, calls, keeping, strict=True):
        is_turn = name != "step"
        card.text(left + width / 2, heading, name, weight="bold" if is_turn else "normal", size=10)
        if left > LEFT:
            card.arrow((left - GAP / 2, 0.2), (left - GAP / 2, 3.84), color=RULE, head=False, line=1)
        for i, (token, medium) in enumerate(zip(tokens, after.sees, strict=True)):
            x = left + i * CELL
            colors = {"fill": TINTS[medium], "edge": MEDIA[medium]}
            card.box(x + 0.01, text - 0.16, CELL - 0.02, 0.32, token, size=9, **colors)
            card.text(x + CELL / 2, sees, f"image {medium}", color=MEDIA[medium], size=9)
        middle = left + width / 2
        if "<image>" in tokens:
            medium = after.sees[0]
            card.box(
                left + 0.04,
                computed - 0.2,
                width - 0.08,
                0.4,
                f"image {medium}, once",
                fill=TRAINED,
                edge=TRAINED,
                color="white",
            )
        else:
            card.text(middle, computed, "nothing", color=MUTED, size=9)
        for token in range(after.tokens):
            card.box(
                middle + (token % 4 - 1.98) * 0.13,
                cache + 0.02 - token // 4 * 0.14,
                0.11,
                0.11,
                fill=FROZEN,
                edge=FROZEN_EDGE,
                radius=0.02,
            )
        card.text(middle, cache - 0.26, f"{after.tokens} tokens", size=9)
        for held, y in ((after.media, media), (keeps.media, keep_all)):
            for place, medium in enumerate(held):
                x = middle + (place - len(held) / 2) * 0.28
                for layer in range(2):
                    card.box(
                        x + 0.02 + 0.05 * layer,
                        y - 0.1 + 0.07 * layer,
                        0.2,
                        0.2,
                        fill=TINTS[medium],
                        edge=MEDIA[medium],
                        radius=0.03,
                        layer=3 - layer,
                    )
                card.text(x + 0.12, y, str(medium), color=MEDIA[medium], weight="bold", size=9)
        left += width + GAP
    card.save("caching.svg")


if __name__ == "__main__":
    main()

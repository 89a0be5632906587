"""Draw docs/assets/media_ranges.svg: which media a token sees, under each rule. Run from the project's root."""

from typing import get_args

import torch
from diagram import FROZEN_EDGE, MEDIA, Card

from flamingo_blocks import media_ranges
from flamingo_blocks.blocks import Attend, dense_media_mask

TOKENS = ("<bos>", "<image>", "a", "cat", "<image>", "dogs", "<image>", "fish")
LEFT, CELL, ROW = 1.16, 0.6, 0.24
PANEL = 3 * ROW + 0.42


def main() -> None:
    is_image = torch.tensor([[token == "<image>" for token in TOKENS]])
    rules, num_media = get_args(Attend), int(is_image.sum())
    top = 0.16 + PANEL * len(rules) + 0.4
    card = Card(LEFT + CELL * len(TOKENS) + 0.2, top + 0.16)
    for panel, rule in enumerate(rules):
        mask = dense_media_mask(media_ranges(is_image, attend=rule), num_media)[0]
        y = top - panel * PANEL - 0.14
        card.text(LEFT, y, f'attend="{rule}"', align="left", weight="bold")
        y -= 0.16
        for medium in range(num_media):
            y -= ROW
            card.text(
                LEFT - 0.12,
                y + ROW / 2,
                f"medium {medium}",
                color=MEDIA[medium],
                align="right",
                weight="bold",
                size=9.5,
            )
            for i in range(len(TOKENS)):
                fill = MEDIA[medium] if mask[i, medium] else "#eef1f4"
                card.box(LEFT + i * CELL, y, CELL, ROW, fill=fill, edge="white", radius=0.02, line=1.2)
    for i, token in enumerate(TOKENS):
        card.box(LEFT + i * CELL + 0.02, 0.18, CELL - 0.04, 0.32, token, fill="white", edge=FROZEN_EDGE, size=9)
    card.save("media_ranges.svg")


if __name__ == "__main__":
    main()

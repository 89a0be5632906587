"""Draw docs/assets/media_interleaved.svg, media_packed.svg and media_video.svg: phi, mask and runs of three texts.

Everything is computed by the library. Run from the project's root.
"""

from collections.abc import Sequence

import torch
from diagram import FROZEN_EDGE, MEDIA, MUTED, TINTS, Card

from flamingo_blocks import MediaRuns, PerceiverResampler, media_index, media_ranges
from flamingo_blocks.blocks import dense_media_mask

LEFT, CELL, ROW, LATENTS = 1.16, 0.6, 0.19, 3


def draw(name: str, tokens: Sequence[str], *, frames: Sequence[int], document_ids: Sequence[int] | None = None) -> None:
    """Draw a text with its media, of so many frames each, and what its tokens see."""
    is_image = torch.tensor([[token == "<image>" for token in tokens]])
    documents = None if document_ids is None else torch.tensor([document_ids])
    ranges = media_ranges(is_image, document_ids=documents)
    runs = MediaRuns.from_ranges(ranges, num_media=torch.tensor([len(frames)]))
    phi = media_index(is_image)[0].tolist()
    # A medium has as many latents as any other, whatever its frames.
    features = torch.zeros(1, len(frames), max(frames), 1, 4)
    resampler = PerceiverResampler(dim=4, vision_dim=4, depth=1, heads=1, head_dim=4, latents=LATENTS)
    latents = resampler(features, torch.tensor([frames])).shape[2]
    mask = dense_media_mask(ranges, len(frames))[0].repeat_interleave(latents, dim=-1)

    rows = ["tokens"] + ["document"] * (documents is not None) + ["φ", "range"]
    grid = len(frames) * (latents * ROW + 0.1)
    height = 1.12 + 0.27 * (len(rows) - 1) + grid
    card = Card(LEFT + CELL * len(tokens) + 0.2, height)
    top = height - 0.2

    def label(y: float, text: str) -> None:
        card.text(LEFT - 0.12, y, text, color=MUTED, align="right", size=9.5)

    def color_of(token: int) -> tuple[str, str]:
        start, stop = ranges[0, token].tolist()
        return (TINTS[start], MEDIA[start]) if start < stop else ("white", FROZEN_EDGE)

    label(top - 0.17, "token")
    for i, token in enumerate(tokens):
        fill, edge = color_of(i)
        card.box(LEFT + i * CELL + 0.02, top - 0.34, CELL - 0.04, 0.34, token, fill=fill, edge=edge, size=9)
    y = top - 0.34
    values = {
        "document": document_ids,
        "φ": phi,
        "range": [f"{a}:{b}" if a < b else "none" for a, b in ranges[0].tolist()],
    }
    for row in rows[1:]:
        y -= 0.27
        label(y + 0.09, row)
        cells = values[row]
        assert cells is not None
        for i, value in enumerate(cells):
            card.text(LEFT + (i + 0.5) * CELL, y + 0.09, str(value), size=9.5)
    y -= 0.12
    for medium in range(len(frames)):
        for latent in range(latents):
            y -= ROW
            for i in range(len(tokens)):
                is_seen = bool(mask[i, medium * latents + latent])
                fill, edge = (MEDIA[medium], "white") if is_seen else ("#eef1f4", "white")
                card.box(LEFT + i * CELL, y, CELL, ROW, fill=fill, edge=edge, radius=0.02, line=1.2)
        middle = y + latents * ROW / 2
        kind = "image" if frames[medium] == 1 else "video"
        card.text(LEFT - 0.12, middle + 0.09, f"medium {medium}", color=MEDIA[medium], align="right", weight="bold")
        of = kind if frames[medium] == 1 else f"{kind}, {frames[medium]} frames"
        card.text(LEFT - 0.12, middle - 0.09, of, color=MUTED, align="right", size=9)
        y -= 0.1
    label(y - 0.16, "runs")
    assert runs.table is not None
    for run in runs.table:
        sees = run.media_start < run.media_stop
        start, stop = LEFT + run.start * CELL + 0.04, LEFT + (run.start + run.length) * CELL - 0.04
        text = f"{run.media_start}:{run.media_stop}" if sees else "none"
        card.bracket(start, stop, y + 0.03, text, color=MEDIA[run.media_start] if sees else MUTED, size=9.5)
    card.save(f"{name}.svg")


def main() -> None:
    draw("media_interleaved", ["<bos>", "<image>", "hills", "<EOC>", "<image>", "a", "red", "boat"], frames=(1, 1))
    draw(
        "media_packed",
        ["<image>", "hills", "<EOC>", "the", "sea", ".", "<image>", "boats"],
        frames=(1, 1),
        document_ids=(0, 0, 0, 1, 1, 1, 1, 1),
    )
    draw("media_video", ["<image>", "hills", "<EOC>", "<image>", "a", "boat", "sails", "away"], frames=(1, 3))


if __name__ == "__main__":
    main()

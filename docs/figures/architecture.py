"""Draw docs/assets/architecture.svg: the whole model in one picture. Run from the project's root."""

from itertools import pairwise

import torch
from diagram import GATE, MEDIA, MUTED, TINTS, TRAINED, Card
from matplotlib.patches import Circle, Polygon

from flamingo_blocks import media_index

WIDTH, HEIGHT = 6.1, 6.02
TOKENS = {"<image>": 0.66, "two": 0.42, "hills": 0.48, "<EOC>": 0.6, " <image>": 0.66, "a": 0.3, "red": 0.42}
TEXT_LEFT, TEXT_BOTTOM, GAP = 2.06, 0.56, 0.05
# From the bottom: where the parts of the language model stand, and which are its own layers.
STACK = ((1.36, None), (2.24, 0), (2.8, 1), (3.36, None), (4.24, 2), (4.8, 3))
BLOCK, LAYER = 0.66, 0.36
SIDE, SIDE_WIDTH = 0.22, 1.36


def picture(card: Card, x: float, y: float, width: float, height: float, medium: int) -> None:
    """Draw what the caption says: two hills, or a red boat."""
    card.box(x, y, width, height, fill="#eaf4fb", edge=MEDIA[medium], line=2.2, radius=0.05)
    add = card.axis.add_patch
    if medium == 0:
        add(Circle((x + 0.78 * width, y + 0.72 * height), 0.11 * height, facecolor="#f6c445", zorder=3))
        for points, color in (
            (((0.06, 0.08), (0.36, 0.68), (0.68, 0.08)), "#7fa650"),
            (((0.4, 0.08), (0.68, 0.5), (0.94, 0.08)), "#5e8739"),
        ):
            add(Polygon([(x + a * width, y + b * height) for a, b in points], facecolor=color, zorder=3))
    else:
        for points, color in (
            (((0.06, 0.08), (0.06, 0.3), (0.94, 0.3), (0.94, 0.08)), "#6fb1d6"),
            (((0.24, 0.36), (0.34, 0.18), (0.68, 0.18), (0.8, 0.36)), "#c62f2f"),
            (((0.48, 0.42), (0.48, 0.9), (0.76, 0.42)), "#ffffff"),
            (((0.44, 0.42), (0.44, 0.8), (0.26, 0.42)), "#ffffff"),
        ):
            add(
                Polygon(
                    [(x + a * width, y + b * height) for a, b in points],
                    facecolor=color,
                    edgecolor="#8a98a5" if color == "#ffffff" else "none",
                    linewidth=0.7,
                    zorder=3,
                )
            )


def main() -> None:
    card = Card(WIDTH, HEIGHT)
    is_image = torch.tensor([[token.strip() == "<image>" for token in TOKENS]])
    sees = [phi - 1 for phi in media_index(is_image)[0].tolist()]

    # The text, and which image each token sees.
    left = TEXT_LEFT
    spans: dict[int, tuple[float, float]] = {}
    for (token, width), medium in zip(TOKENS.items(), sees, strict=True):
        colors = {"fill": TINTS[medium], "edge": MEDIA[medium]}
        card.box(left, TEXT_BOTTOM, width, LAYER, token.strip(), size=9.5, **colors)
        spans[medium] = (spans.get(medium, (left, left))[0], left + width)
        left += width + GAP
    right = left - GAP
    middle, width = (TEXT_LEFT + right) / 2, right - TEXT_LEFT
    for medium, (start, stop) in spans.items():
        card.bracket(start, stop, TEXT_BOTTOM - 0.07, f"see image {medium + 1}", color=MEDIA[medium], size=10)

    # The language model, with blocks before some of its layers.
    for bottom, index in STACK:
        if index is not None:
            card.frozen(TEXT_LEFT, bottom, width, LAYER, f"decoder layer {index}")
            continue
        title = bottom + 0.45
        card.trained(TEXT_LEFT, bottom, width, BLOCK, "", sign_at=title)
        card.text(TEXT_LEFT + 0.12, title, "gated cross-attention", color="white", weight="bold", align="left")
        card.box(right - 1.12, title - 0.12, 0.8, 0.24, fill="white", edge="white", radius=0.12, layer=3)
        card.text(right - 0.72, title, f"\N{MULTIPLICATION SIGN} {GATE}", color=TRAINED, weight="bold", layer=6)
        for medium, (start, stop) in spans.items():
            colors = {"fill": TINTS[medium], "edge": MEDIA[medium]}
            text = f"latents of image {medium + 1}"
            card.box(start + 0.07, bottom + 0.07, stop - start - 0.14, 0.2, text, size=9, layer=3, **colors)
    ends = [(TEXT_BOTTOM, TEXT_BOTTOM + LAYER)]
    ends += [(bottom, bottom + (BLOCK if index is None else LAYER)) for bottom, index in STACK]
    for (_, top), (bottom, _) in pairwise(ends):
        card.arrow((middle, top), (middle, bottom))
    top = ends[-1][1]
    card.arrow((right - 0.26, top), (right - 0.26, top + 0.26))
    card.box(right - 0.52, top + 0.26, 0.52, LAYER, "boat", fill=TINTS[1], edge=MEDIA[1], weight="bold")
    card.text(right - 0.62, top + 0.26 + LAYER / 2, "next token", color=MUTED, align="right")

    # The images, on their way to latents.
    for medium in spans:
        picture(card, SIDE + 0.72 * medium, TEXT_BOTTOM, 0.64, 0.52, medium)
        card.text(SIDE + 0.72 * medium + 0.32, TEXT_BOTTOM - 0.26, f"image {medium + 1}", color=MEDIA[medium])
    center = SIDE + SIDE_WIDTH / 2
    card.arrow((center, TEXT_BOTTOM + 0.54), (center, 1.36))
    card.frozen(SIDE, 1.36, SIDE_WIDTH, BLOCK, "vision\nencoder", shift=-0.07)
    card.arrow((center, 1.36 + BLOCK), (center, 2.24))
    card.trained(SIDE, 2.24, SIDE_WIDTH, BLOCK, "Perceiver\nResampler", shift=-0.07)
    card.arrow((center, 2.24 + BLOCK), (center, 3.12))
    card.box(SIDE, 3.12, SIDE_WIDTH, 0.9, fill="white")
    card.text(center, 3.86, "latents")
    for medium in spans:
        for latent in range(6):
            colors = {"fill": TINTS[medium], "edge": MEDIA[medium]}
            card.box(SIDE + 0.1 + latent * 0.2, 3.22 + 0.27 * medium, 0.16, 0.18, radius=0.03, **colors)
    # They go to every block.
    start, bus = (SIDE + SIDE_WIDTH, 3.36 + BLOCK / 2), SIDE + SIDE_WIDTH + 0.24
    card.arrow(start, (TEXT_LEFT, start[1]), line=2)
    card.arrow((bus, start[1]), (bus, 1.36 + BLOCK / 2), (TEXT_LEFT, 1.36 + BLOCK / 2), line=2)

    # What the two kinds of boxes mean.
    card.trained(SIDE, 5.44, 0.94, LAYER, "trained", shift=-0.1)
    card.frozen(SIDE + 1.04, 5.44, 0.94, LAYER, "frozen", shift=-0.1)
    note = f"At the start {GATE} is 0:\nthe model is its frozen\nlanguage model, exactly."
    card.text(SIDE, 4.92, note, color=MUTED, align="left", size=9.5)
    card.save("architecture.svg")


if __name__ == "__main__":
    main()

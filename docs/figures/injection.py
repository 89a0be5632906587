"""Draw docs/assets/injection.svg: hooks before decoder layers, and what a scope gives them.

Run from the project's root.
"""

from itertools import pairwise

from diagram import MEDIA, MUTED, TINTS, TRAINED, TRAINED_TINT, Card

WIDTH, HEIGHT = 6.1, 4.9
LEFT, LM_WIDTH = 0.4, 2.3
STREAM = LEFT + LM_WIDTH / 2
# From the bottom: the language model's own modules, and the layers that have a hook before them.
MODULES = (
    ("token embeddings", 0.92),
    ("layers[0]", 1.74),
    ("layers[1]", 2.26),
    ("layers[2]", 3.08),
    ("layers[3]", 3.6),
    ("head", 4.12),
)
ROW = 0.32
HOOKS = {0: 1.49, 2: 2.83}


def main() -> None:
    card = Card(WIDTH, HEIGHT)
    card.box(0.2, 0.7, WIDTH - 0.4, HEIGHT - 0.86, fill="#f7fbff", edge=MEDIA[0], style=(0, (4, 2)), line=1.4, layer=1)
    card.text(
        WIDTH - 0.36, HEIGHT - 0.32, "with injector.scope(media, runs):", color=MEDIA[0], align="right", weight="bold"
    )
    outside = "Outside of the scope hooks return what they get."
    card.text(WIDTH / 2, 0.44, outside, color=MUTED)
    card.text(WIDTH / 2, 0.24, "After eject() there are no hooks.", color=MUTED)

    # The language model.
    card.text(LEFT, HEIGHT - 0.32, "language model", weight="bold", align="left")
    for name, bottom in MODULES:
        card.frozen(LEFT, bottom, LM_WIDTH, ROW, name)
    ends = sorted([(y, y + ROW) for _, y in MODULES] + [(y - 0.12, y + 0.12) for y in HOOKS.values()])
    for (_, top), (bottom, _) in pairwise(ends):
        card.arrow((STREAM, top), (STREAM, bottom), head=bottom - top > 0.15 or bottom in {y for _, y in MODULES})

    # The injector, which owns the blocks.
    card.box(3.34, 1.1, 1.9, 2.44, fill=TRAINED_TINT, edge=TRAINED, layer=1.5)
    card.text(3.5, 3.36, "injector", color=TRAINED, weight="bold", align="left")
    pill = {"fill": "white", "edge": TRAINED, "radius": 0.12, "size": 9.5}
    for index, y in HOOKS.items():
        card.box(STREAM - 0.34, y - 0.12, 0.68, 0.24, "hook", color=TRAINED, **pill)
        card.trained(3.5, y - 0.24, 1.58, 0.48, f'blocks["{index}"]', shift=-0.06)
        card.arrow((STREAM + 0.34, y - 0.06), (3.5, y - 0.06), color=TRAINED)
        card.arrow((3.5, y + 0.06), (STREAM + 0.34, y + 0.06), color=TRAINED)
        card.arrow((5.54, 3.72), (5.54, y), (5.08, y), color=MEDIA[0])
    card.box(4.2, 3.72, 1.56, 0.5, "media, runs\nof this thread's call", fill=TINTS[0], edge=MEDIA[0], size=9)
    card.save("injection.svg")


if __name__ == "__main__":
    main()

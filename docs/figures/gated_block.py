"""Draw docs/assets/gated_block.svg: the two residual lines of a gated block, and its gates.

Run from the project's root.
"""

from diagram import GATE, MEDIA, MUTED, TINTS, TRAINED, TRAINED_TINT, Card

WIDTH, HEIGHT = 6.1, 4.55
BRANCH, AT_GATE, STREAM = 2.36, 2.86, 3.52
SUB_LAYER = 1.46


def sub_layer(card: Card, bottom: float, name: str, line: str, gate: str) -> None:
    """Draw a branch: it leaves the stream, is normalised, computed and gated, and is added again."""
    left, width, add = BRANCH - 0.75, 1.5, bottom + 1.16
    card.arrow((STREAM, bottom), (BRANCH, bottom), (BRANCH, bottom + 0.16))
    card.box(left, bottom + 0.16, width, 0.28, "norm", fill="white", edge=TRAINED)
    card.arrow((BRANCH, bottom + 0.44), (BRANCH, bottom + 0.64))
    card.box(left, bottom + 0.64, width, 0.34, name, fill=TRAINED, edge=TRAINED, color="white", weight="bold")
    card.arrow((BRANCH, bottom + 0.98), (BRANCH, add), (AT_GATE - 0.1, add))
    card.plus(AT_GATE, add, "x", color=TRAINED)
    card.text(AT_GATE - 0.06, add + 0.2, GATE, color=TRAINED, weight="bold")
    card.arrow((AT_GATE + 0.1, add), (STREAM - 0.1, add))
    card.plus(STREAM, add)
    card.text(STREAM + 0.2, add + 0.1, line, align="left", size=9.5)
    card.text(STREAM + 0.2, add - 0.1, f"{GATE[-1]}: {gate}", color=TRAINED, align="left", size=9.5)


def main() -> None:
    card = Card(WIDTH, HEIGHT)
    first, second = 0.78, 0.78 + SUB_LAYER
    card.box(1.4, 0.62, WIDTH - 1.6, 2 * SUB_LAYER + 0.22, fill=TRAINED_TINT, edge=TRAINED, layer=1)
    card.text(WIDTH - 0.36, 0.8, "gated block", color=TRAINED, weight="bold", align="right")
    card.flame((WIDTH - 0.36, 1.02), color=TRAINED)
    sub_layer(card, first, "cross-attention", f"y + {GATE} · attention(y, x)", "gate.alpha")
    sub_layer(card, second, "feed-forward", f"y + {GATE} · feed-forward(y)", "gate_feed_forward.alpha")
    card.text(BRANCH + 0.08, first + 0.55, "queries", color=MUTED, align="left", size=9)
    # The stream, from what was before to the decoder layer.
    sums = [first + 1.16, second + 1.16]
    card.arrow((STREAM, 0.4), (STREAM, sums[0] - 0.1))
    card.arrow((STREAM, sums[0] + 0.1), (STREAM, sums[1] - 0.1))
    card.arrow((STREAM, sums[1] + 0.1), (STREAM, 3.94))
    card.text(STREAM, 0.26, "y: hidden states on their way to a decoder layer")
    card.frozen(1.4, 3.94, WIDTH - 1.6, 0.4, "decoder layer")
    # What the token sees.
    middle = first + 0.81
    card.text(0.72, middle + 0.48, "x: latents of\nwhat a token\nsees", size=9.5, color=MEDIA[0])
    for latent in range(5):
        card.box(0.2 + latent * 0.2, middle - 0.1, 0.16, 0.2, fill=TINTS[0], edge=MEDIA[0], radius=0.03)
    card.arrow((1.18, middle), (BRANCH - 0.75, middle), color=MEDIA[0])
    card.save("gated_block.svg")


if __name__ == "__main__":
    main()

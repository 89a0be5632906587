"""Draw docs/assets/import_layers.svg from the table of tests/test_architecture.py: the layers, and what each imports.

Run from the project's root: python -m docs.figures.import_layers
"""

import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from tests.test_architecture import LAYERS, imports, modules

WIDTH, LINE, MARGIN, GAP = 7.0, 0.19, 0.12, 0.12  # inches
FIRST_COLUMN, CHARACTERS = 1.3, 68


def main() -> None:
    """Draw a card for each layer, the lowest at the bottom."""
    layer_of = {module: layer for layer, members in LAYERS.items() for module in members}
    cards = []
    for layer, members in LAYERS.items():
        names = set().union(*(imports(modules()[module]) for module in members))
        inside = {layer_of[name.partition(".")[2]] for name in names if name.split(".")[0] == "flamingo_blocks"}
        lower = [other for other in LAYERS if other in inside - {layer}]
        libraries = {name.split(".")[0] for name in names} - {"flamingo_blocks", *sys.stdlib_module_names}
        # The __init__ of a folder only gathers its names.
        own = [name for name in members if name != layer or modules()[name].stem != "__init__"]
        own = [name.removeprefix(f"{layer}.") or "flamingo_blocks" for name in own]
        imported = f"imports {', '.join([*lower, *sorted(libraries, key=str.lower)])}"
        cards.append((layer, textwrap.wrap(", ".join(own), CHARACTERS), textwrap.wrap(imported, CHARACTERS)))

    height = sum((len(own) + len(imported)) * LINE + 2 * MARGIN + GAP for _, own, imported in cards) + GAP + LINE
    plt.rcParams.update({"svg.hashsalt": "flamingo-blocks", "svg.fonttype": "none"})
    figure = plt.figure(figsize=(WIDTH, height), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, height))
    axis.axis("off")
    bottom = GAP
    for layer, own, imported in cards:
        tall = (len(own) + len(imported)) * LINE + 2 * MARGIN
        axis.add_patch(
            FancyBboxPatch(
                (0.55, bottom), WIDTH - 0.7, tall, boxstyle="round,pad=0,rounding_size=0.06", fc="#f7eef3", ec="#d81b60"
            )
        )
        y = bottom + tall - MARGIN - LINE / 2
        axis.text(0.67, y, layer, va="center", fontsize=10.5, fontweight="bold", color="#222222")
        for i, line in enumerate(own + imported):
            color = "#222222" if i < len(own) else "#8e1245"
            axis.text(0.55 + FIRST_COLUMN, y - i * LINE, line, va="center", fontsize=9.5, color=color)
        bottom += tall + GAP
    axis.annotate(
        "", (0.27, GAP), (0.27, height - GAP - LINE), arrowprops={"arrowstyle": "-|>", "color": "#555555", "lw": 1.5}
    )
    axis.text(0.12, height - LINE / 2 - GAP / 2, "imports point down", va="center", fontsize=9.5, color="#555555")
    figure.savefig(Path("docs/assets/import_layers.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()

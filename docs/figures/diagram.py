"""A light card to draw diagrams on, in inches from its lower left corner, with one look for all of them.

The card has its own background, so that it can be read on dark pages too. Text stays text: it falls back to whatever
sans serif the reader has, and nothing depends on its exact width.
"""

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch
from matplotlib.path import Path as Outline

ASSETS = Path(__file__).parents[1] / "assets"
INK, MUTED, RULE = "#1f2933", "#5b6774", "#dde3e8"
FROZEN, FROZEN_EDGE = "#edf1f5", "#a3b0bd"
TRAINED, TRAINED_TINT = "#b3155a", "#fae3ed"
# One for each medium, told apart by anyone, and their tints.
MEDIA = ("#0a6ebd", "#d98200", "#5b7f2b")
TINTS = ("#d8eafa", "#fdebcb", "#e4efd4")

# matplotlib ships the one, so that everybody draws the same; readers have one of the others, which are no wider.
LAID_OUT_IN, READ_IN = "DejaVu Sans", "'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"

GATE = "tanh \N{GREEK SMALL LETTER ALPHA}"

Point = tuple[float, float]


class Card:
    """A drawing of so many inches."""

    def __init__(self, width: float, height: float) -> None:
        plt.rcParams |= {
            "font.family": LAID_OUT_IN,
            "svg.fonttype": "none",
            "svg.hashsalt": "flamingo-blocks",
        }
        self.figure = plt.figure(figsize=(width, height))
        self.figure.patch.set_alpha(0)
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.set(xlim=(0, width), ylim=(0, height))
        self.axis.axis("off")
        self.box(0.02, 0.02, width - 0.04, height - 0.04, fill="white", edge=RULE, radius=0.12, layer=0)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str = "",
        *,
        fill: str = FROZEN,
        edge: str = FROZEN_EDGE,
        color: str = INK,
        size: float = 10,
        weight: str = "normal",
        radius: float = 0.06,
        line: float = 1.0,
        style: str = "solid",
        shift: float = 0,
        layer: float = 2,
    ) -> None:
        """Draw a box with text in its middle, or somewhat to the right of it."""
        self.axis.add_patch(
            FancyBboxPatch(
                (x, y),
                width,
                height,
                boxstyle=f"round,pad=0,rounding_size={radius}",
                facecolor=fill,
                edgecolor=edge,
                linewidth=line,
                linestyle=style,
                zorder=layer,
            )
        )
        if text:
            self.text(
                x + width / 2 + shift, y + height / 2, text, color=color, size=size, weight=weight, layer=layer + 0.5
            )

    def frozen(self, x: float, y: float, width: float, height: float, text: str, **options: Any) -> None:
        """Draw a part that is frozen: pale, with a snowflake."""
        self.box(x, y, width, height, text, **options)
        self.snowflake((x + width - 0.17, y + height / 2))

    def trained(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str,
        *,
        sign_at: float | None = None,
        **options: Any,
    ) -> None:
        """Draw a part that is trained: dark, with a flame."""
        self.box(x, y, width, height, text, fill=TRAINED, edge=TRAINED, color="white", weight="bold", **options)
        self.flame((x + width - 0.17, y + height / 2 if sign_at is None else sign_at))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        color: str = INK,
        size: float = 10,
        weight: str = "normal",
        align: str = "center",
        layer: float = 5,
    ) -> None:
        """Write lines of text whose middle, or left or right end, is at a point."""
        options: dict[str, Any] = {"color": color, "size": size, "weight": weight, "zorder": layer}
        lines = text.split("\n")
        for i, line in enumerate(lines):  # each by itself, since the reader's font has other widths
            middle = y + ((len(lines) - 1) / 2 - i) * 1.25 * size / 72
            self.axis.text(x, middle + 0.013, line, ha=align, va="center_baseline", **options)

    def arrow(self, *points: Point, color: str = MUTED, line: float = 1.4, head: bool = True, style: Any = "-") -> None:
        """Draw a line through points, with a head at its end."""
        path = np.array(points, dtype=float)
        if head:
            direction = path[-1] - path[-2]
            direction /= np.linalg.norm(direction)
            side = np.array([-direction[1], direction[0]])
            tip, length, half = path[-1].copy(), 0.09, 0.045
            corners = [tip, tip - length * direction + half * side, tip - length * direction - half * side]
            self.axis.fill(*np.transpose(corners), facecolor=color, edgecolor="none", zorder=4)
            path[-1] = tip - 0.8 * length * direction
        self.axis.plot(
            *path.T,
            color=color,
            linewidth=line,
            linestyle=style,
            zorder=3,
            solid_joinstyle="round",
            dash_capstyle="butt",
        )

    def bracket(self, left: float, right: float, y: float, text: str, *, color: str = MUTED, size: float = 9) -> None:
        """Mark a stretch from below, and say what it is."""
        self.axis.plot([left, left, right, right], [y, y - 0.06, y - 0.06, y], color=color, linewidth=1.4, zorder=3)
        self.text((left + right) / 2, y - 0.19, text, color=color, size=size)

    def plus(self, x: float, y: float, sign: str = "+", *, color: str = MUTED, fill: str = "white") -> None:
        """Draw a sum, or a product, in a small circle."""
        radius, arm = 0.1, 0.055
        self.axis.add_patch(Circle((x, y), radius, facecolor=fill, edgecolor=color, linewidth=1.3, zorder=4))
        angles = (0, 90) if sign == "+" else (45, 135)
        for angle in np.deg2rad(angles):
            dx, dy = arm * np.cos(angle), arm * np.sin(angle)
            self.axis.plot([x - dx, x + dx], [y - dy, y + dy], color=color, linewidth=1.3, zorder=5)

    def snowflake(self, at: Point, *, size: float = 0.075, color: str = "#4d7ea8") -> None:
        """Draw the sign of what is frozen."""
        for angle in np.deg2rad(np.arange(6) * 60 + 30):
            arm = np.array([np.cos(angle), np.sin(angle)]) * size
            lines = [(np.zeros(2), arm)]
            for turn in (-0.8, 0.8):
                twig = np.array([np.cos(angle + turn), np.sin(angle + turn)]) * size * 0.42
                lines.append((arm * 0.52, arm * 0.52 + twig))
            for start, end in lines:
                self.axis.plot(*np.transpose([at + start, at + end]), color=color, linewidth=1.0, zorder=6)

    def flame(self, at: Point, *, size: float = 0.088, color: str = "#ffd27d") -> None:
        """Draw the sign of what is trained."""
        corners: Sequence[Point] = (
            *((0.05, 1.0), (0.15, 0.45), (0.75, 0.35), (0.7, -0.3)),
            *((0.68, -0.8), (0.3, -1.0), (0.0, -1.0)),
            *((-0.35, -1.0), (-0.7, -0.75), (-0.7, -0.3)),
            *((-0.7, 0.05), (-0.45, 0.2), (-0.38, 0.5)),
            *((-0.2, 0.35), (-0.15, 0.2), (-0.12, 0.05)),
            *((0.1, 0.3), (0.15, 0.65), (0.05, 1.0)),
        )
        codes = [Outline.MOVETO] + [Outline.CURVE4] * (len(corners) - 1)
        outline = Outline(np.array(corners) * size + np.array(at), codes)
        self.axis.add_patch(PathPatch(outline, facecolor=color, edgecolor="none", zorder=6))

    def save(self, name: str) -> None:
        """Write it to docs/assets, the same bytes each time."""
        written = StringIO()
        self.figure.savefig(written, format="svg", metadata={"Date": None})
        plt.close(self.figure)
        (ASSETS / name).write_text(written.getvalue().replace(f"'{LAID_OUT_IN}'", READ_IN))

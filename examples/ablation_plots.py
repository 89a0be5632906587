"""The pictures of ablations.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter


def plot_rows(rows: Sequence[tuple[str, float, float, float | None]], path: Path) -> None:
    """Draw how far each row is from the baseline, here and in the paper.

    Args:
        rows: Label, our difference, half of its 95% interval, and the paper's difference, if it has one; in points.
        path: Where the picture goes.
    """
    figure, axis = plt.subplots(figsize=(8.5, 0.34 * len(rows) + 1.4), layout="constrained")
    places = range(len(rows))
    axis.errorbar(
        [row[1] for row in rows],
        places,
        xerr=[row[2] for row in rows],
        fmt="o",
        color="tab:blue",
        capsize=3,
        label="here: mean and 95% interval",
    )
    in_paper = [(row[3], place) for row, place in zip(rows, places, strict=True) if row[3] is not None]
    if in_paper:
        axis.plot(*zip(*in_paper, strict=True), "D", color="tab:orange", markerfacecolor="none", label="the paper")
    axis.axvline(0, color="0.6", linewidth=1, zorder=0)
    axis.set_yticks(places, [row[0] for row in rows])
    axis.invert_yaxis()
    axis.set(xlabel="difference from the baseline, in points")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_scaling(curves: Mapping[str, Mapping[int, tuple[float, float]]], path: Path) -> None:
    """Draw accuracy by the number of examples in the prompt, for models of several sizes.

    Args:
        curves: For each size, by number of examples, mean and standard error.
        path: Where the picture goes.
    """
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for index, (label, curve) in enumerate(curves.items()):
        shots, values = list(curve), list(curve.values())
        axis.errorbar(
            range(len(shots)),
            [mean for mean, _ in values],
            yerr=[error for _, error in values],
            marker="o",
            capsize=3,
            color=plt.get_cmap("viridis")(0.85 * index / max(1, len(curves) - 1)),
            label=label,
        )
        axis.set_xticks(range(len(shots)), [str(number) for number in shots])
    axis.set(xlabel="examples in the prompt, of two digits", ylabel="right name, of all words", ylim=(0, 1.02))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(alpha=0.3)
    axis.legend(title="language model", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""The three pictures of train_tiny.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from tiny_world import VOCABULARY, Prompts

# Rows of the table of accuracies: how they are called and drawn.
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "nearest_centroid": ("nearest centroid of the frozen features", {"color": "0.5", "linestyle": "--"}),
    "seen": ("digits of stage 3", {"color": "tab:blue", "marker": "o"}),
    "withheld": ("digits withheld from stage 3", {"color": "tab:pink", "marker": "o"}),
    "withheld_all_words": ("the same, against all words", {"color": "tab:pink", "marker": ".", "linestyle": ":"}),
    "names_shuffled": ("withheld, names shuffled", {"color": "tab:olive", "marker": "x"}),
}


def plot_gates(gates: Sequence[Sequence[tuple[float, float]]], path: Path) -> None:
    """Draw |tanh(alpha)| by layer and step, as figure 6 of the paper does."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharex=True, sharey=True, layout="constrained")
    colors = plt.get_cmap("viridis")
    for kind, (axis, title) in enumerate(zip(axes, ("attention", "feed-forward"), strict=True)):
        for layer in range(len(gates[0])):
            color = colors(layer / len(gates[0]))
            axis.plot([step[layer][kind] for step in gates], label=f"layer {layer}", color=color)
        axis.set(title=f"{title} gate", xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("|tanh(alpha)|")
    axes[1].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_shots(few_shot: Mapping[str, Mapping[int, Sequence[float]]], path: Path, *, title: str = "") -> None:
    """Draw accuracy by the number of examples in the prompt.

    Args:
        few_shot: For each line, by number of examples, the accuracies of one or more runs; the mean is drawn, with a
            bar from the least to the greatest.
        path: Where the picture goes.
        title: Above the picture.
    """
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    shots = list(few_shot["withheld"])
    for name, (label, style) in LINES.items():
        runs = few_shot[name]
        at = [shots.index(number) for number in runs]
        mean = [sum(values) / len(values) for values in runs.values()]
        low = [max(0.0, m - min(values)) for m, values in zip(mean, runs.values(), strict=True)]
        high = [max(0.0, max(values) - m) for m, values in zip(mean, runs.values(), strict=True)]
        bars = (low, high) if any(low) or any(high) else None
        axis.errorbar(at, mean, yerr=bars, label=label, capsize=3, elinewidth=0.8, **style)
    axis.axhline(0.5, color="0.7", linewidth=1, zorder=0)
    axis.text(len(shots) - 1, 0.505, "chance", ha="right", va="bottom", color="0.5", fontsize=8)
    axis.set(xlabel="examples in the prompt, of two digits", ylabel="right names", title=title, ylim=(0, 1.02))
    axis.set_xticks(range(len(shots)), [str(number) for number in shots])
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_samples(
    pictures: Sequence[Image.Image], prompts: Prompts, answers: Sequence[str], accuracy: float, path: Path
) -> None:
    """Draw prompts, a row each: the pictures with their names, the last one with the model's answer.

    Args:
        pictures: All pictures, in the order that the prompts' indices count.
        prompts: Those to draw.
        answers: What the model generated for each.
        accuracy: Share of right answers of all prompts, not only those drawn.
        path: Where the picture goes.
    """
    rows, columns = prompts.images.shape
    figure, axes = plt.subplots(rows, columns, figsize=(1.3 * columns, 1.5 * rows), layout="constrained", squeeze=False)
    for row in range(rows):
        names = [VOCABULARY[i] for i in prompts.names[row, prompts.shown[row]].tolist()]
        right = VOCABULARY[int(prompts.answers[row])]
        is_right = answers[row] == right
        for column, (axis, index) in enumerate(zip(axes[row], prompts.images[row].tolist(), strict=True)):
            axis.imshow(pictures[index], cmap="gray_r")
            axis.set(xticks=[], yticks=[])
            if column < len(names):
                axis.set_xlabel(names[column])
            else:
                verdict = "right" if is_right else f"wrong, it is {right}"
                axis.set_xlabel(f"{answers[row]}\n({verdict})", color="tab:green" if is_right else "tab:red")
    figure.suptitle(
        f"{columns - 1} examples, then a question; right and wrong answers are chosen on purpose\n"
        f"right, of all prompts and against all words: {accuracy:.0%}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""Write docs/assets/fine_tuning*: a finished Flamingo of the demo, prompted and fine-tuned, with five seeds.

make fine-tuning

It takes about twenty minutes on one core, half of them to train models. Those that `make demo-seeds` left in runs/seeds
are used again. What is in runs/fine_tuning is not run again.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib.pyplot as plt
from few_shot import ASSETS, ROOT, SEEDS
from few_shot import run as train
from matplotlib.ticker import PercentFormatter

# Rows of the table: how they are called and drawn.
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear_classifier": ("linear classifier on the features", {"color": "0.45", "linestyle": "--", "marker": "."}),
    "frozen_encoder": ("fine-tuned", {"color": "#c2185b", "marker": "o"}),
    "trained_encoder": ("fine-tuned, vision encoder too", {"color": "#1565c0", "marker": "s"}),
    "higher_resolution": ("the same, images of 48 pixels", {"color": "#00796b", "marker": "^"}),
    "prompting": ("examples in the prompt", {"color": "#e07b00", "marker": "D"}),
    "names_shuffled": ("fine-tuned on shuffled names", {"color": "#7a7a1e", "marker": "x", "linestyle": ":"}),
}


def run(seed: int) -> Any:
    """Prompt and fine-tune the model of a seed, in a process of its own, unless it was done; give the metrics."""
    model, out = ROOT / "runs" / "seeds" / str(seed) / "model", ROOT / "runs" / "fine_tuning" / str(seed)
    if not (model / "processor_config.json").is_file():
        train(seed)
    if not (out / "metrics.json").is_file():
        script = ROOT / "examples" / "fine_tune_tiny.py"
        command = [sys.executable, str(script), "--seed", str(seed), "--model", str(model), "--out", str(out)]
        subprocess.run([*command, "--threads", "1"], check=True)
    return json.loads((out / "metrics.json").read_text())


def collect(runs: Sequence[Any], kind: str) -> dict[str, dict[int, list[float]]]:
    """Collect what all runs found, by row and number of labelled images."""
    return {
        name: {int(count): [metrics[kind][name][count] for metrics in runs] for count in row}
        for name, row in runs[0][kind].items()
    }


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Give mean and standard error."""
    return fmean(values), stdev(values) / len(values) ** 0.5


def table(rows: dict[str, dict[int, list[float]]]) -> list[str]:
    """Tabulate, in percent."""
    counts = sorted({count for row in rows.values() for count in row})
    lines = [f"| labelled images | {' | '.join(map(str, counts))} |", "|---" * (len(counts) + 1) + "|"]
    for name, (label, _) in LINES.items():
        if name not in rows:
            continue
        cells = []
        for count in counts:
            mean, error = spread(rows[name][count]) if count in rows[name] else (0.0, 0.0)
            cells.append(f"{100 * mean:.1f} ± {100 * error:.1f}" if count in rows[name] else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def tables(runs: Sequence[Any]) -> dict[str, str]:
    """Write the tables, by their files."""
    few_shot = collect(runs, "few_shot_accuracy")
    before, error = spread(few_shot.pop("before")[0])
    versions = ", ".join(f"{name} {version}" for name, version in runs[0]["versions"].items())
    seconds = [metrics["seconds"] for metrics in runs]
    found = [*table(collect(runs, "accuracy")), ""]
    found.append(
        f"{len(runs)} seeds, {min(seconds):.0f} to {max(seconds):.0f} seconds each on one core. With {versions}."
    )
    forgotten = [*table(few_shot), "", f"Before: {100 * before:.1f} ± {100 * error:.1f}."]
    return {"fine_tuning.md": "\n".join(found) + "\n", "fine_tuning_few_shot.md": "\n".join(forgotten) + "\n"}


def plot(runs: Sequence[Any], path: Path) -> None:
    """Draw accuracy by labelled images."""
    plt.rcParams |= {"svg.hashsalt": "flamingo-blocks", "font.size": 10}
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained", facecolor="white")
    for name, row in collect(runs, "accuracy").items():
        label, style = LINES[name]
        counts = [count for count in row if count > 0]
        mean, error = zip(*(spread(row[count]) for count in counts), strict=True)
        axis.errorbar(counts, mean, yerr=error, label=label, capsize=3, elinewidth=1, **style)
    axis.axhline(0.1, color="0.7", linewidth=1, zorder=0)
    axis.text(2, 0.11, "chance", color="0.4", fontsize=9, va="bottom")
    axis.set_xscale("log", base=2)
    ticks = [2, 4, 8, 16, 64, 256, 997]
    axis.set_xticks(ticks, [str(count) for count in ticks])
    axis.minorticks_off()
    axis.set(xlabel="labelled images", ylabel="right names, of ten", ylim=(0, 1.02))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    order = [labels.index(label) for label, _ in LINES.values()]
    axis.legend([handles[i] for i in order], [labels[i] for i in order], fontsize=9, loc="center right")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Run all seeds and write what they found."""
    runs = [run(seed) for seed in SEEDS]
    (ASSETS / "fine_tuning.json").write_text(json.dumps(runs, indent=1) + "\n")
    for name, text in tables(runs).items():
        (ASSETS / name).write_text(text)
    plot(runs, ASSETS / "fine_tuning.svg")


if __name__ == "__main__":
    main()

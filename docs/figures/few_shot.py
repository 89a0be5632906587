"""Write docs/assets/few_shot*: what the demo finds with five seeds, each with two other digits withheld.

make demo-seeds

It takes about ten minutes on two cores. Everything is kept in runs/seeds, a folder a seed.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from tiny_plots import LINES, plot_shots  # noqa: E402

ASSETS = ROOT / "docs" / "assets"
SEEDS = range(5)


def run(seed: int) -> Any:
    """Run the demo once, in a process of its own, and give its metrics."""
    out = ROOT / "runs" / "seeds" / str(seed)
    command = [sys.executable, str(ROOT / "examples" / "train_tiny.py"), "--seed", str(seed), "--out", str(out)]
    subprocess.run(command, check=True)
    return json.loads((out / "metrics.json").read_text())


def by_shots(runs: Sequence[Any]) -> dict[str, dict[int, list[float]]]:
    """Collect the accuracies of all runs, for each line of the table by number of examples."""
    few_shot = [metrics["few_shot_accuracy"] for metrics in runs]
    return {
        name: {int(shots): [accuracy[name][shots] for accuracy in few_shot] for shots in few_shot[0][name]}
        for name in LINES
    }


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Write mean, least and greatest."""
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def tables(runs: Sequence[Any]) -> str:
    """Tabulate the runs: means with the least and the greatest, then each run."""
    collected = by_shots(runs)
    shots = list(collected["withheld"])
    lines = [f"| examples in the prompt | {' | '.join(map(str, shots))} |", "|---" * (len(shots) + 1) + "|"]
    for name, (label, _) in LINES.items():
        cells = (spread(collected[name][number]) if number in collected[name] else "" for number in shots)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        "| seed | withheld digits | captions right | blank images | withheld, 8 examples | names shuffled | nearest "
        "centroid | LM's text accuracy, before and after | seconds |",
        "|---" * 9 + "|",
    ]
    for metrics in runs:
        captions, text = metrics["caption_accuracy"], metrics["text_accuracy_of_the_lm"]
        few_shot = [metrics["few_shot_accuracy"][n]["8"] for n in ("withheld", "names_shuffled", "nearest_centroid")]
        figures = (captions["unseen"], captions["blank"], *few_shot)
        lines.append(
            f"| {metrics['seed']} | {' and '.join(map(str, metrics['withheld_digits']))} | "
            f"{' | '.join(f'{figure:.3f}' for figure in figures)} | {text['before']:.4f}, {text['after']:.4f} | "
            f"{metrics['seconds']:.0f} |"
        )
    versions = runs[0]["versions"]
    lines += ["", f"With {', '.join(f'{name} {version}' for name, version in versions.items())}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all seeds and write what they found."""
    runs = [run(seed) for seed in SEEDS]
    (ASSETS / "few_shot.json").write_text(json.dumps(runs, indent=1) + "\n")
    (ASSETS / "few_shot.md").write_text(tables(runs))
    title = f"{len(runs)} runs: mean, least and greatest"
    plot_shots(by_shots(runs), ASSETS / "few_shot.png", title=title)
    for name in ("gates", "samples"):
        shutil.copy(ROOT / "runs" / "seeds" / str(SEEDS[0]) / f"{name}.png", ASSETS / f"few_shot_{name}.png")


if __name__ == "__main__":
    main()

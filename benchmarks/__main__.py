"""Run all scripts that need no GPU, each in a process of its own, and write what they found into docs/benchmarks.

    make bench

It takes about half an hour on one core. `python -m benchmarks NAME ...` runs some scripts, and none with `--page`.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.measure import RESULTS, Result

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "attention": "Attention over media",
    "blocks": "The gated block",
    "resampler": "The resampler",
    "decoding": "Generating",
    "ranking": "Ranking answers",
    "streaming": "Media without end",
    "training": "Training",
    "memory": "Memory of training",
    "feature_cache": "Training from cached features",
    "startup": "Importing, building and compiling",
}


def table(name: str, content: Any) -> str:
    """Tabulate what a script found."""
    lines = [f"### {SCRIPTS.get(name, name)}", ""]
    lines += ["| what | compared with | ratio | goal | | ours | theirs |", "|---|---|---|---|---|---|---|"]
    for row in content["results"]:
        result = Result(**row)
        mark = {None: "", True: "✓", False: "short"}[result.is_met]
        ours, theirs = (quantity(value, result.unit) for value in (result.ours, result.theirs))
        cells = (result.what, result.against, f"{result.ratio:.2f}", result.goal, mark, ours, theirs)
        lines.append(f"| {' | '.join(cells)} |")
    machine = content["machine"]
    versions = ", ".join(
        f"{key} {value}" for key, value in machine.items() if key not in ("machine", "threads", "date")
    )
    threads = "one thread" if machine["threads"] == "1" else f"{machine['threads']} threads"
    lines += [
        "",
        f"`python -m benchmarks.{name}`, {content['seconds']} s, {machine['date']}, {machine['machine']}, {threads}; "
        f"{versions}.",
    ]
    return "\n".join(lines)


def quantity(value: float, unit: str) -> str:
    """Write a quantity with its unit, in three digits."""
    if unit == "s" and value < 1:
        value, unit = 1000 * value, "ms"
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(digits, 3)}f} {unit}"


def plot(contents: dict[str, Any], path: Path) -> None:
    """Draw all speed-ups that have a goal on one axis."""
    results = [Result(**row) for content in contents.values() for row in content["results"]]
    speed_ups = [result for result in results if result.goal.startswith(">") and result.ratio > 0]
    figure, axes = plt.subplots(figsize=(11, 0.24 * len(speed_ups) + 0.8), layout="constrained")
    names = [
        f"{result.what.replace(' with its run table', '')} | {result.against.split(',')[0]}" for result in speed_ups
    ]
    bars = axes.barh(range(len(names)), [result.ratio for result in speed_ups], color="#e599b3")
    axes.bar_label(bars, [f" {result.ratio:.2f}" for result in speed_ups], fontsize=7)
    bounds = [float(result.goal.split()[1]) for result in speed_ups]
    axes.plot(bounds, range(len(names)), "k|", markersize=8, label="goal")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(0.8, 200)
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.set_xlabel("times as fast, or of the memory")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_page() -> None:
    """Write the tables and the picture from the figures of all scripts."""
    contents = {
        name: json.loads(path.read_text()) for name in (*SCRIPTS, "gpu") if (path := RESULTS / f"{name}.json").exists()
    }
    on_cpu = {name: content for name, content in contents.items() if name != "gpu"}
    (RESULTS / "cpu.md").write_text("\n\n".join(table(name, content) for name, content in on_cpu.items()) + "\n")
    if "gpu" in contents:
        (RESULTS / "gpu.md").write_text(table("gpu", contents["gpu"]) + "\n")
    plot(on_cpu, RESULTS / "cpu.png")


if __name__ == "__main__":
    chosen = [argument for argument in sys.argv[1:] if argument != "--page"]
    unknown = set(chosen) - {*SCRIPTS, "gpu"}
    if unknown:
        raise SystemExit(f"there are the scripts {', '.join(SCRIPTS)} and gpu, got {', '.join(sorted(unknown))}")
    for script in chosen or ([] if "--page" in sys.argv else SCRIPTS):
        sys.stdout.write(f"{script}\n")
        sys.stdout.flush()
        subprocess.run([sys.executable, "-W", "ignore", "-m", f"benchmarks.{script}"], cwd=ROOT, check=True)
    write_page()

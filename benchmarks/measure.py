"""Measure alternatives fairly, and write down what came out.

Alternatives take turns within one run, so that whatever else the machine does meets all of them; a ratio is one of
medians. On one thread, what counts are the seconds of this process alone. Each script of this folder is a generator of
results: `python -m benchmarks.attention` runs one of them, `make bench` all.
"""

import json
import operator
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from timeit import Timer
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks"
# Those whose versions are written beside the figures.
PACKAGES = ("torch", "transformers", "timm", "open-flamingo", "flamingo-pytorch")


@dataclass(frozen=True)
class Result:
    """A ratio of two measured quantities.

    Attributes:
        what: What was measured, with its sizes.
        against: What it is compared with.
        ratio: Theirs over ours where `goal` is a lower bound, a speed-up; ours over theirs where it is an upper bound.
        goal: What was aimed at, such as ">= 5.5" or "<= 1.3". Empty: nothing, the figure is for information.
        ours: In `unit`.
        theirs: In `unit`.
        unit: "s", "MiB" or "KiB".
    """

    what: str
    against: str
    ratio: float
    goal: str
    ours: float
    theirs: float
    unit: str = "s"

    @classmethod
    def speed_up(cls, what: str, against: str, ours: float, theirs: float, goal: str = "", unit: str = "s") -> "Result":
        """How many times less of the unit is needed than theirs."""
        return cls(what, against, theirs / ours, goal, ours, theirs, unit)

    @classmethod
    def cost(cls, what: str, against: str, ours: float, theirs: float, goal: str = "", unit: str = "s") -> "Result":
        """How many times as much of the unit is needed as theirs."""
        return cls(what, against, ours / theirs, goal, ours, theirs, unit)

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is met; None if there is none."""
        if not self.goal:
            return None
        sign, bound = self.goal.split()
        return {">": operator.gt, ">=": operator.ge, "<=": operator.le}[sign](self.ratio, float(bound))


def medians(
    alternatives: Mapping[str, Callable[[], Any]], *, seconds: float = 6.0, rounds: int = 7
) -> dict[str, float]:
    """Time alternatives in turns.

    Args:
        alternatives: What to time, by name. They are called once or twice beforehand, to warm up.
        seconds: How long all of it should take, about. Short functions are called many times a round.
        rounds: The least number of rounds.

    Returns:
        Median seconds a call, by name.
    """
    timers = {name: Timer(function, timer=_clock) for name, function in alternatives.items()}
    first = {}
    for name, timer in timers.items():
        first[name] = timer.timeit(1)
        if first[name] < 1:  # else being the first makes little difference
            first[name] = max(timer.timeit(1), 1e-9)
    # A round calls each function for about as long, and at least once.
    share = seconds / rounds / len(timers)
    calls = {name: max(1, round(share / duration)) for name, duration in first.items()}
    whole_round = sum(calls[name] * duration for name, duration in first.items())
    rounds = max(rounds, min(round(seconds / whole_round), 50))
    times: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds):
        names = list(timers)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # each goes first as often
            times[name].append(timers[name].timeit(calls[name]) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def _clock() -> float:
    """Tell the time; on CPU that of this process, to which it does not matter who else uses the machine."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def machine(device: str = "cpu") -> dict[str, str]:
    """Name the machine and the versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    found = {"machine": name, "threads": str(torch.get_num_threads()), "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"date": datetime.now(UTC).date().isoformat()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def report(name: str, results: Iterable[Result], *, device: str = "cpu") -> None:
    """Print results as they come, and write them to docs/benchmarks/NAME.json.

    Args:
        name: Of the script.
        results: A generator of results; it does the work.
        device: Where it ran.
    """
    start, rows = time.monotonic(), []
    for result in results:
        mark = {None: " ", True: "+", False: "-"}[result.is_met]
        sys.stdout.write(
            f"{mark} {result.ratio:8.2f}  {result.goal:8}  {result.what} | {result.against}: "
            f"{result.ours:.6g} {result.unit} and {result.theirs:.6g} {result.unit}\n"
        )
        sys.stdout.flush()
        rows.append(asdict(result))
    seconds = round(time.monotonic() - start)
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(device), "seconds": seconds, "results": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def as_script(name: str, run: Callable[[], Iterable[Result]]) -> None:
    """Run a script of this folder on one thread."""
    torch.set_num_threads(1)
    report(name, run())

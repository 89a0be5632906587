"""The harness that measures, not the measurements: these take half an hour, and `make bench` makes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure
from benchmarks.__main__ import SCRIPTS, quantity, table
from benchmarks.measure import RESULTS, Result, medians
from benchmarks.memory import peak_memory, training_step
from tests.tiny_flamingo import make_flamingo


@pytest.mark.parametrize(
    ("goal", "ratio", "is_met"),
    [(">= 2", 2.0, True), ("> 2", 2.0, False), ("<= 2", 2.0, True), (">= 2", 1.99, False), ("<= 2", 2.1, False)],
)
def test_a_goal_is_met_as_its_sign_says(goal: str, ratio: float, is_met: bool) -> None:
    assert Result.cost("a", "b", ratio, 1.0, goal).is_met is is_met
    assert Result.speed_up("a", "b", 1.0, ratio, goal).is_met is is_met
    assert Result.cost("a", "b", ratio, 1.0).is_met is None


def test_medians_are_those_of_rounds_in_which_alternatives_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []
    monkeypatch.setattr(measure, "_clock", lambda: now[0])

    def taking(name: str, seconds: list[float]) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            now[0] += seconds[min(len([c for c in calls if c == name]) - 1, len(seconds) - 1)]

        return call

    # Slow at first, while it warms up, and once by bad luck.
    found = medians({"a": taking("a", [9, 9, 2, 2, 50, 2, 2]), "b": taking("b", [4, 4, 5])}, seconds=1, rounds=5)
    assert found == {"a": 2, "b": 5}
    rounds = ["".join(calls[i : i + 2]) for i in range(len(calls) - 10, len(calls), 2)]
    assert rounds == ["ab", "ba", "ab", "ba", "ab"], "each goes first as often"


@pytest.mark.parametrize(
    ("value", "unit", "text"), [(0.00123, "s", "1.23 ms"), (12.3456, "s", "12.3 s"), (46.2, "MiB", "46.2 MiB")]
)
def test_quantities_have_three_digits(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing")
def test_checkpointing_lowers_the_peak_of_a_step_and_a_longer_text_raises_it() -> None:
    model: Any = make_flamingo("gpt_neox", resampler_depth=3)[0].train()

    def peak(text: int, media: int, *, checkpointed: bool) -> int:
        input_ids = torch.full((1, text), 20)
        input_ids[:, :media] = model.config.image_token_id
        features = torch.randn(1, media, 1, 4, model.vision_encoder.vision_dim)
        return peak_memory(training_step(model, input_ids, features, checkpointed=checkpointed))

    assert peak(64, 2, checkpointed=True) < 0.8 * peak(64, 2, checkpointed=False)
    assert peak(64, 2, checkpointed=False) < peak(128, 2, checkpointed=False)
    assert peak(64, 2, checkpointed=False) < peak(64, 16, checkpointed=False)


def test_the_page_shows_the_figures_on_record() -> None:
    contents = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in SCRIPTS}
    page = "\n\n".join(table(name, content) for name, content in contents.items()) + "\n"
    assert page == Path(RESULTS / "cpu.md").read_text(), "run: python -m benchmarks --page"

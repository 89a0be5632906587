import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "train_tiny.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("train_tiny")
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(out / "new" / "folder")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return out / "new" / "folder", result.stdout


def test_a_quick_run_writes_what_it_says(run: tuple[Path, str]) -> None:
    out, printed = run
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["frozen_parameters"] > 100_000
    assert metrics["trained_parameters"] > 100_000
    assert 0 <= metrics["caption_accuracy"]["test"] <= 1
    assert len(metrics["gates_at_the_end"]) == 4
    assert (out / "gates.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "metrics.json") in printed


def test_training_starts_from_the_language_model_and_leaves_it_alone(run: tuple[Path, str]) -> None:
    metrics = json.loads((run[0] / "metrics.json").read_text())
    assert metrics["max_difference_from_lm_at_start"] == 0
    assert metrics["text_loss_of_the_lm"]["before"] == metrics["text_loss_of_the_lm"]["after"]
    assert all(gate > 0 for layer in metrics["gates_at_the_end"] for gate in layer.values())

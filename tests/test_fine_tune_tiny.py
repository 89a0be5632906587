"""examples/fine_tune_tiny.py: it runs from start to end, freezes what it says, and the page shows what it found."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fine_tune_tiny
import tiny_world
from flamingo_blocks import FlamingoForConditionalGeneration
from tiny_world import Digits, Features

SCRIPT = Path(__file__).parents[1] / "examples" / "fine_tune_tiny.py"
FIGURES = SCRIPT.parents[1] / "docs" / "figures"
LANGUAGE_MODEL, VISION_ENCODER, NEW = "language_model.", "vision_encoder.", ("resampler.", "injector.", "new_tokens.")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train_tiny")
    script = SCRIPT.with_name("train_tiny.py")
    command = [sys.executable, str(script), "--quick", "--threads", "1", "--shots", "2", "--out", str(out)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    return out / "model"


@pytest.mark.slow
def test_a_quick_run_writes_metrics_and_adapters_that_load(trained: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--quick",
        "--threads",
        "1",
        "--model",
        str(trained),
        "--out",
        str(tmp_path),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["evaluated_on"] == "test"
    for name, row in metrics["accuracy"].items():
        assert list(row) == (["0", "2"] if name == "prompting" else ["16"])
        assert all(f"{accuracy:.3f}" in result.stdout for accuracy in row.values())
    assert metrics["accuracy"].keys() == {"prompting", "linear_classifier", *fine_tune_tiny.WAYS}
    assert metrics["few_shot_accuracy"].keys() == {"before", *fine_tune_tiny.WAYS}
    adapters = metrics["adapters"]
    assert adapters["trained_encoder"]["trained_parameters"] > adapters["frozen_encoder"]["trained_parameters"]
    assert adapters["frozen_encoder"]["bytes"] < adapters["trained_encoder"]["bytes"]
    assert adapters["trained_encoder"]["bytes"] < metrics["bytes_of_the_whole_model"]
    # Weights elsewhere in memory may change the last bit of a sum.
    assert all(adapter["max_difference_of_the_loaded_model"] < 1e-4 for adapter in adapters.values())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["frozen_encoder", "trained_encoder", "higher_resolution"])
def test_fine_tuning_moves_what_is_not_frozen_and_nothing_else(trained: Path, way: str) -> None:
    train_encoder, image_size = fine_tune_tiny.WAYS[way]
    model, processor = fine_tune_tiny.load(trained, train_encoder=train_encoder, image_size=image_size)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    split = tiny_world.load_splits()["val"]
    pixel_values = processor.image_processor(split.pictures[:16])["pixel_values"]
    assert pixel_values.shape == (16, 1, image_size, image_size)
    names = tiny_world.ids_of(tiny_world.UNSEEN_NAMES)[split.digits[:16]]
    fine_tune_tiny.fine_tune(model, pixel_values, names, steps=2, learning_rate=1e-3)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in moved if name.startswith(LANGUAGE_MODEL)} == set()
    assert any(name.startswith(VISION_ENCODER) for name in moved) == train_encoder
    for part in NEW:
        assert any(name.startswith(part) for name in moved)
    assert not model.training


@pytest.mark.slow
def test_a_prompt_shows_each_example_with_its_own_name(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FlamingoForConditionalGeneration.from_pretrained(trained)
    called: list[Any] = []
    forward = model.forward

    def record(*words: Any, **given: Any) -> Any:
        called.append((words, given))
        return forward(*words, **given)

    monkeypatch.setattr(model, "forward", record)
    dim = model.vision_encoder.vision_dim
    # The features of an image say which one it is.
    images = Features(
        torch.arange(9.0)[:, None, None, None].expand(9, 1, 16, dim), torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5])
    )
    shown, asked = Features(images.features[:4], images.digits[:4]), Features(images.features[4:], images.digits[4:])
    names = tiny_world.ids_of(tiny_world.UNSEEN_NAMES)[:10]
    logits = fine_tune_tiny.ask(model, asked, names, shown)
    assert logits.shape == (5, 10)
    ((text,), given) = called[0]
    which = given["vision_features"][:, :, 0, 0, 0].long()
    assert which[:, -1].tolist() == [4, 5, 6, 7, 8]
    assert all(sorted(row) == [0, 1, 2, 3] for row in which[:, :-1].tolist())
    assert torch.equal(text[:, 2::3], names[images.digits[which[:, :-1]]])


def test_labelled_images_are_drawn_by_digit_in_turn() -> None:
    digits = torch.tensor([0] * 30 + [1] * 5 + [2] * 20)
    drawn = fine_tune_tiny.draw_labelled(Digits([None] * 55, torch.arange(55.0), digits), 55)  # type: ignore[list-item]
    assert sorted(drawn.pixel_values.tolist()) == list(range(55))
    assert torch.equal(drawn.digits, digits[drawn.pixel_values.long()])
    for turn in range(5):
        assert sorted(drawn.digits[3 * turn : 3 * turn + 3].tolist()) == [0, 1, 2]
    for turn in range(15):
        assert sorted(drawn.digits[15 + 2 * turn : 17 + 2 * turn].tolist()) == [0, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shots", "33"), "--shots: give numbers from 0 to 32"),
        (("--examples", "9"), "--examples: give numbers from 10 to 997"),
        (("--examples", "1024"), "--examples: give numbers from 10 to 997"),
        (("--ways", "none"), "argument --ways: invalid choice"),
    ],
)
def test_options_that_cannot_be_met_are_refused(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        fine_tune_tiny.parse_arguments(options)
    assert message in capsys.readouterr().err


def test_the_tables_in_the_docs_are_what_the_runs_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FIGURES)
    assets = FIGURES.parent / "assets"
    runs = json.loads((assets / "fine_tuning.json").read_text())
    assert all(metrics["evaluated_on"] == "test" for metrics in runs)
    assert len({metrics["seed"] for metrics in runs}) == len(runs) >= 3
    for name, text in runpy.run_path(str(FIGURES / "fine_tuning.py"))["tables"](runs).items():
        assert (assets / name).read_text() == text

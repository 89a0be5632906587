import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import tiny_world
import train_tiny
from flamingo_blocks import FlamingoForConditionalGeneration, FlamingoProcessor
from tiny_world import Features, Prompts, draw_prompts

SCRIPT = Path(__file__).parents[1] / "examples" / "train_tiny.py"
ROWS = {"withheld", "withheld_all_words", "seen", "names_shuffled", "nearest_centroid"}


def run_script(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--quick", "--threads", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("train_tiny") / "new" / "folder"
    result = run_script("--seed", "3", "--shots", "0", "2", "4", "--out", str(out))
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def read_metrics(out: Path) -> Any:
    return json.loads((out / "metrics.json").read_text())


def test_a_quick_run_writes_what_it_says(run: tuple[Path, str]) -> None:
    out, printed = run
    metrics = read_metrics(out)
    assert metrics["withheld_digits"] == [3, 8]
    assert metrics["evaluated_on"] == "test"
    assert metrics["frozen_parameters"] > 100_000
    assert metrics["trained_parameters"] > 100_000
    assert metrics["few_shot_accuracy"].keys() == ROWS
    for name, row in metrics["few_shot_accuracy"].items():
        assert list(row) == (["2", "4"] if name in ("names_shuffled", "nearest_centroid") else ["0", "2", "4"])
        assert all(0 <= accuracy <= 1 for accuracy in row.values())
        assert all(f"{accuracy:.3f}" in printed for accuracy in row.values())
    assert len(metrics["gates_at_the_end"]) == 4
    for name in ("gates.png", "shots.png", "samples.png"):
        assert Image.open(out / name).width > 300
        assert name in printed


def test_training_starts_from_the_language_model_and_leaves_it_alone(run: tuple[Path, str]) -> None:
    metrics = read_metrics(run[0])
    assert metrics["max_difference_from_lm_at_start"] == 0
    assert metrics["text_accuracy_of_the_lm"]["before"] == metrics["text_accuracy_of_the_lm"]["after"]
    assert all(gate > 0 for layer in metrics["gates_at_the_end"] for gate in layer.values())


def test_the_saved_model_loads_and_answers_the_same(run: tuple[Path, str]) -> None:
    out, _ = run
    # With the oldest supported versions, weights elsewhere in memory change the last bit of a sum.
    assert read_metrics(out)["max_difference_of_the_loaded_model"] < 1e-5
    model = FlamingoForConditionalGeneration.from_pretrained(out / "model")
    processor: Any = FlamingoProcessor.from_pretrained(out / "model")
    split = tiny_world.load_splits()["test"]
    # The processor that build_flamingo made prepares pictures as the vision encoder was trained with.
    pixel_values = processor.image_processor(split.pictures[:5])["pixel_values"]
    assert torch.equal(pixel_values, split.pixel_values[:5])
    # Text and pictures through processor and generate give what ids and features give.
    features = train_tiny.encode_split(model, split)
    prompts = draw_prompts(features, [3, 8], 4, 5, seed=0)
    expected = train_tiny.answer(model, features, prompts).argmax(1)
    assert train_tiny.write_samples(model, processor, split, prompts) == [
        [*tiny_world.VOCABULARY, "<image>", "<EOC>"][i] for i in expected.tolist()
    ]


def test_the_tables_in_the_docs_are_what_the_runs_found() -> None:
    script = SCRIPT.parents[1] / "docs" / "figures" / "few_shot.py"
    assets = script.parents[1] / "assets"
    runs = json.loads((assets / "few_shot.json").read_text())
    assert sorted(digit for metrics in runs for digit in metrics["withheld_digits"]) == list(range(10))
    assert all(metrics["evaluated_on"] == "test" for metrics in runs)
    assert runpy.run_path(str(script))["tables"](runs) == (assets / "few_shot.md").read_text()


def test_the_third_stage_sees_no_withheld_digit(run: tuple[Path, str]) -> None:
    model = FlamingoForConditionalGeneration.from_pretrained(run[0] / "model")
    torch.manual_seed(0)
    digits = torch.arange(10).repeat(12)
    features = torch.randn(120, 8, 16, model.vision_encoder.vision_dim)
    features[torch.isin(digits, torch.tensor([3, 8]))] = torch.nan  # whoever looks at them, loses everything
    seen = [digit for digit in range(10) if digit not in (3, 8)]
    train_tiny.train_flamingo(model, Features(features, digits), torch.randn(9, 4, *features.shape[2:]), seen, 2)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--withhold", "3"), "--withhold: give 2 to 5 digits"),
        (("--withhold", "3", "3"), "--withhold: give 2 to 5 digits"),
        (("--withhold", "3", "12"), "--withhold: invalid choice: 12"),
        (("--shots", "-1"), "--shots: give numbers from 0 to 32"),
        (("--steps", "5", "0", "5"), "--steps: give at least 1"),
        (("--prompts", "0"), "--prompts: give at least 1"),
        (("--shots", "50"), "--shots: give numbers from 0 to 32"),
    ],
)
def test_options_that_cannot_be_met_are_refused(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_tiny.parse_arguments(options)
    assert message in capsys.readouterr().err


def test_the_nearest_centroid_is_that_of_the_prompts_own_examples() -> None:
    torch.manual_seed(0)
    features = Features(torch.randn(40, 8, 3, 5), torch.arange(40) % 10)
    prompts = draw_prompts(features, [1, 2, 3], 4, 30, seed=0)
    center = torch.randn(5)
    right = 0
    for row in range(30):
        vectors = [
            nn.functional.normalize(features.features[i, 0].mean(0) - center, dim=0) for i in prompts.images[row]
        ]
        means = [
            torch.stack([v for v, which in zip(vectors[:-1], prompts.which[row], strict=False) if which == each]).mean(
                0
            )
            for each in (0, 1)
        ]
        first, second = (nn.functional.cosine_similarity(mean, vectors[-1], dim=0) for mean in means)
        right += int(second > first) == int(prompts.which[row, -1])
    assert train_tiny.nearest_centroid(features, prompts, center) == pytest.approx(right / 30)


def test_answers_are_counted_among_two_names_and_among_all_words() -> None:
    prompts = Prompts(
        images=torch.zeros(3, 1, dtype=torch.long),
        names=torch.tensor([[2, 4], [2, 4], [2, 4]]),
        shown=torch.zeros(3, 0, dtype=torch.long),
        which=torch.tensor([[0], [1], [1]]),
    )
    logits = torch.zeros(3, 6)
    logits[0, 2] = logits[1, 2] = logits[2, 4] = 1  # right, wrong, right
    logits[2, 5] = 2  # but another word is likelier still
    assert train_tiny.accuracy(logits, prompts) == pytest.approx((2 / 3, 1 / 3))


@pytest.mark.parametrize("steps", [1, 2, 10, 600])
def test_the_learning_rate_rises_and_falls(steps: int) -> None:
    rates = [train_tiny.learning_rate(step, steps) for step in range(steps + 1)]
    peak = max(range(steps + 1), key=rates.__getitem__)
    assert peak <= steps / 10
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0.9 < rates[peak] <= 1
    assert rates[-1] == 0
    assert min(rates[:-1]) > 0


def test_each_trained_parameter_descends_once() -> None:
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(4, 3), "linear": nn.Linear(3, 3), "tied": nn.Linear(3, 4, bias=False)}
    )
    embedding, tied = model["embedding"], model["tied"]
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(tied, nn.Linear)
    tied.weight = embedding.weight
    model["linear"].bias.requires_grad_(False)
    descent = train_tiny.Descent(model, 10)
    descended = [p for o in descent.optimizers for group in o.param_groups for p in group["params"]]
    assert len(descended) == len({id(p) for p in descended}) == 2
    assert all(p.requires_grad for p in descended)
    (matrix,) = descent.optimizers[1].param_groups[0]["params"]
    assert matrix is model["linear"].weight

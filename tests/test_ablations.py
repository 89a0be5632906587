import json
import math
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import LlamaForCausalLM

import ablations
from ablation_plots import plot_rows
from ablations import RUNS, VARIANTS, Settings, Spread, Variant, build, cut_layers, stack_layers, steps_of
from train_tiny import Descent, episodes_loss, make_language_model_config

SCRIPT = Path(__file__).parents[1] / "examples" / "ablations.py"
SETTINGS = Settings(steps=(1, 1, 2), prompts=5)


@pytest.fixture
def lm() -> Any:
    return LlamaForCausalLM(make_language_model_config(layers=2, width=32)).eval()


@torch.no_grad()
def test_layers_cut_in_two_compute_what_whole_ones_did(lm: Any) -> None:
    text = torch.randint(100, (2, 7))
    expected = lm(text).logits
    assert torch.equal(cut_layers(lm)(text, use_cache=False).logits, expected)
    assert len(lm.model.layers) == 4


@torch.no_grad()
def test_new_layers_stand_on_top_of_those_that_were_there(lm: Any) -> None:
    text = torch.randint(100, (2, 7))
    below = lm.model(text, output_hidden_states=True).hidden_states
    taller = stack_layers(lm).eval()
    hidden = taller.model(text, output_hidden_states=True).hidden_states
    assert len(hidden) == 2 * len(below) - 1
    assert torch.equal(hidden[1], below[1])


def test_each_row_of_the_paper_has_its_score() -> None:
    in_paper = {variant.section for variant in VARIANTS.values() if variant.paper is not None}
    assert in_paper == {"", "(i)", "(ii)", "(iii)", "(iv)", "(v)", "(vi)", "(vii)", "(viii)"}
    assert all(variant.paper is not None for variant in VARIANTS.values() if variant.section)


def test_a_spread_is_a_mean_and_its_standard_error() -> None:
    spread = Spread.of([1.0, 2.0, 3.0])
    assert spread.mean == 2
    assert spread.error == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(Spread.of([1.0]).error)


@pytest.mark.parametrize(
    "values, direction",
    [
        ([-0.2, -0.1, -0.15], "worse"),
        ([0.2, 0.1, 0.15], "better"),
        ([-0.2, 0.1, 0.15], "cannot tell"),
        ([0.5], "cannot tell"),
        ([0.1, 0.3], "cannot tell"),  # two runs tell little: zero is in the interval
    ],
)
def test_a_direction_is_told_only_where_zero_is_outside_of_the_interval(values: list[float], direction: str) -> None:
    assert Spread.of(values).direction == direction


@pytest.mark.parametrize(
    "values, in_paper, verdict",
    [
        ([-0.2, -0.1, -0.15], -4.2, "worse, as in the paper"),
        ([0.2, 0.1, 0.15], -4.2, "better, unlike the paper"),
        ([0.2, 0.1, 0.15], None, "better"),
        ([-0.2, 0.1, 0.15], -4.2, "cannot tell"),
    ],
)
def test_a_verdict_compares_with_the_paper(values: list[float], in_paper: float | None, verdict: str) -> None:
    assert ablations.verdict(Spread.of(values), in_paper) == verdict


def result(name: str, seed: int, names: float, captions: float) -> dict[str, Any]:
    return {
        "name": name,
        "seed": seed,
        "few_shot": {"4": {"of_two_names": 1.0, "of_all_words": names}},
        "captions": captions,
        "text": 0.5,
        "text_of_the_lm": {"before": 0.9, "after": 0.25},
        "trained_parameters": 12_345,
        "gates": [[[0.1, 0.2]]],
    }


def test_rows_are_compared_with_the_baseline_seed_by_seed() -> None:
    # Seeds differ by far more than rows; the second row lacks a seed.
    results = [result("baseline", seed, 0.2 * seed, 0.2 * seed) for seed in range(3)]
    results += [result("no_gates", seed, 0.2 * seed - 0.04, 0.2 * seed) for seed in (2, 1)]
    lines = ablations.table(ablations.by_name(results), {"baseline": 2.0, "no_gates": 3.0}, SETTINGS).splitlines()
    assert len(lines) == 4
    cells = [cell.strip() for cell in lines[3].split("|")[1:-1]]
    header = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    row = dict(zip(header, cells, strict=True))
    assert row["difference"] == "-2.0 ± 0.0"
    assert row["the paper's"] == "-4.2"
    assert row["direction"] == "worse, as in the paper"
    assert row["text, LM alone"] == "25.0 ± 0.0"
    assert row["trained"] == "12k"
    assert row["step"] == "1.50"


def test_without_the_time_of_the_baseline_no_ratio_is_given() -> None:
    found = ablations.by_name([result("no_gates", 0, 0.5, 0.5)])
    assert "| 12k |  |" in ablations.table(found, {"no_gates": 3.0}, SETTINGS)


def test_the_gates_of_a_single_run_have_no_error() -> None:
    assert ablations.gates_table({0: result("baseline", 0, 0.5, 0.5)}).splitlines()[2] == "| 0 | 0.100 | 0.200 |"


def test_rows_that_the_paper_does_not_have_are_drawn_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[list[str]] = []

    def note(figure: Figure, *_: Any, **__: Any) -> None:
        labels.append(figure.axes[0].get_legend_handles_labels()[1])

    monkeypatch.setattr(Figure, "savefig", note)
    plot_rows([("mean pooling", -1.0, math.nan, None)], tmp_path / "rows.png")
    plot_rows([("no gates", -1.0, 0.5, -4.2)], tmp_path / "rows.png")
    assert [len(names) for names in labels] == [1, 2]


def test_after_an_interruption_no_further_run_begins() -> None:
    waiting: list[Future[None]] = []

    def interrupted() -> None:
        with ablations.workers(1) as pool:
            waiting.extend(pool.submit(time.sleep, 0.1) for _ in range(50))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(future.done() for future in waiting)
    assert sum(future.cancelled() for future in waiting) > 40


# ------------------------------------------------------------ with backbones


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones")
    for name in ("nfnet", "medium"):
        ablations.pretrain(name, 0, SETTINGS, folder)
    return folder


def trained(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
def test_each_row_trains_what_it_says(backbones: Path) -> None:
    bridge = ("resampler.", "injector.", "new_tokens.")
    of_baseline = trained(build(VARIANTS["baseline"], 0, backbones))
    assert all(name.startswith(bridge) for name in of_baseline)
    for name in ("scratch", "fine_tuned", "fine_tuned_text"):
        model: Any = build(VARIANTS[name], 0, backbones)
        of_lm = {f"language_model.{name}" for name, _ in model.language_model.named_parameters()}
        assert trained(model) == of_baseline | of_lm
    grafted = trained(build(VARIANTS["grafting"], 0, backbones))
    layers = {name.split(".")[3] for name in grafted if name.startswith("language_model.model.layers.")}
    assert layers == {"4", "5", "6", "7"}
    assert all(name.startswith((*bridge, "language_model.model.layers.")) for name in grafted)
    of_blocks = [name for name in trained(build(VARIANTS["vanilla"], 0, backbones)) if name.startswith("injector.")]
    assert of_blocks
    assert not any("feed_forward" in name for name in of_blocks)


@pytest.mark.slow
def test_the_cross_attention_of_vanilla_stands_between_attention_and_feed_forward(backbones: Path) -> None:
    model: Any = build(VARIANTS["vanilla"], 0, backbones)
    order: list[str] = []
    for module in (*model.language_model.model.layers, *model.injector.blocks.values()):
        module.register_forward_hook(lambda module, *_: order.append(type(module).__name__))
    config = model.config
    text = torch.tensor([[1, config.image_token_id, 5]])
    model(text, vision_features=torch.randn(1, 1, 1, 16, model.vision_encoder.vision_dim))
    assert order == ["SelfAttentionHalf", "GatedCrossAttentionBlock", "FeedForwardHalf"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("name, steps", [("baseline", 2), ("round_robin", 4), ("no_captions", 2), ("text", 2)])
def test_rows_see_the_same_batches_in_one_step_or_in_turn(
    name: str, steps: int, backbones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, drawn = [], []
    step, draw = Descent.step, episodes_loss

    def count(self: Descent, loss: Any) -> None:
        taken.append(loss)
        step(self, loss)

    def note(*arguments: Any) -> Any:
        drawn.append(torch.get_rng_state())
        return draw(*arguments)

    monkeypatch.setattr(Descent, "step", count)
    monkeypatch.setattr(ablations, "episodes_loss", note)
    variant, world = RUNS[name], ablations.see_the_world("nfnet", 0, SETTINGS, backbones)
    for _ in steps_of(build(variant, 0, backbones), variant, world, 0, 2):
        pass
    assert len(taken) == steps
    torch.manual_seed(0)
    assert torch.equal(drawn[0], torch.get_rng_state())
    assert len(drawn) == 2


@pytest.mark.slow
def test_runs_go_on_where_they_were_and_do_not_depend_on_how_many_run_at_a_time(
    backbones: Path, tmp_path: Path
) -> None:
    earlier = {**ablations.run("baseline", 0, SETTINGS, backbones), "seconds": 12345}
    expected = ablations.run("vanilla", 0, SETTINGS, backbones)
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({**earlier, "settings": ablations.record(SETTINGS)}) + '\n{"name": "vanilla", "se')
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--only", "baseline", "vanilla", "--seeds", "1"]
    command += ["--steps", "1", "1", "2", "--prompts", "5", "--jobs", "2", "--time"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in results.read_text().splitlines())
    assert first == json.loads(json.dumps({**earlier, "settings": ablations.record(SETTINGS)}))
    expected = json.loads(json.dumps({**expected, "settings": ablations.record(SETTINGS)}))
    assert {**second, "seconds": 0} == {**expected, "seconds": 0}
    assert "VANILLA XATTN" in (tmp_path / "table.md").read_text()
    assert [path.name for path in tmp_path.glob("backbones*")] == ["backbones-1-1"], "those of other steps stay apart"
    assert json.loads((tmp_path / "step_times.json").read_text())["vanilla"] > 0
    for name in ("rows.png", "gates.png", "scaling.png"):
        assert Image.open(tmp_path / name).width > 300


def test_results_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({**result("baseline", 0, 0.5, 0.5), "settings": ablations.record(SETTINGS)}) + "\n")
    assert len(ablations.read_results(path, ablations.record(SETTINGS))) == 1
    with pytest.raises(SystemExit, match="results of other settings"):
        ablations.read_results(path, ablations.record(Settings()))


@pytest.mark.parametrize("options", [["--seeds", "0"], ["--steps", "1", "0", "1"], ["--only", "nothing"]])
def test_wrong_options_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ablations.parse_arguments(options)
    assert options[0] in capsys.readouterr().err


def test_a_row_is_one_switch() -> None:
    baseline = Variant("")
    for name, variant in VARIANTS.items():
        changed = [
            field
            for field in vars(baseline)
            if field not in ("label", "section", "paper") and getattr(variant, field) != getattr(baseline, field)
        ]
        # Other architectures take several words to say; "also trained on text" comes on top of another row.
        allowed = {"vanilla": 3, "grafting": 3, "scratch": 2, "fine_tuned_text": 2, "baseline": 0}.get(name, 1)
        assert len(changed) == allowed, name

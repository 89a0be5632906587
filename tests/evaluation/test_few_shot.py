"""The loop: everything is asked once, answers depend on their settings alone, and scores are those of the metrics."""

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from flamingo_blocks.evaluation import (
    CLASSIFICATION,
    VQA,
    Answer,
    AnswerLog,
    Benchmark,
    Example,
    Options,
    RandomSupport,
    Scores,
    Template,
    evaluate,
    generate_answers,
    read_scores,
    score_answers,
    score_candidates,
    write_prompt,
)
from flamingo_blocks.evaluation.few_shot import choose_queries
from tests.tiny_flamingo import make_flamingo, make_tokenizer
from tests.tiny_language_models import CONFIGS


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def examples(name: str, count: int) -> list[Example]:
    return [
        Example(f"{name}{i}", (image(i),), (f"w{20 + i % 3}", "w5"), {"question": f"w{10 + i}"}) for i in range(count)
    ]


ASKED = Benchmark("asked", VQA, examples("s", 6), examples("q", 5), "vqa_accuracy")
CHOSEN = replace(
    ASKED, name="chosen", template=CLASSIFICATION, metric="top_1", candidates=("w20", "w21 w22", "w22", "w5")
)


@cache
def flamingo() -> tuple[Any, Any]:
    model: Any
    model, processor = make_flamingo(dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.mul_(20 if parameter.ndim == 2 else 1)
    return model.eval(), processor


def run(benchmark: Benchmark, out: Path, **options: Any) -> Scores:
    model, processor = flamingo()
    defaults: dict[str, Any] = {"shots": (0, 2), "seeds": (0, 1), "options": Options(num_beams=2, max_new_tokens=3)}
    return evaluate(model, processor, benchmark, RandomSupport(benchmark.support), out=out, **defaults | options)


def answers(out: Path) -> dict[tuple[int, int, str], Answer]:
    return AnswerLog(out).answers


@pytest.mark.parametrize("benchmark", [ASKED, CHOSEN])
def test_no_answer_depends_on_the_batch_or_on_the_number_of_processes(benchmark: Benchmark, tmp_path: Path) -> None:
    scores = run(benchmark, tmp_path / "one", batch_size=1)
    for process in range(3):
        run(benchmark, tmp_path / "three", batch_size=4, process=process, processes=3)
    one, three = answers(tmp_path / "one"), answers(tmp_path / "three")
    assert len(one) == 2 * 2 * 5
    assert one.keys() == three.keys()
    for key, answer in one.items():
        assert three[key].text == answer.text
        assert three[key].support == answer.support
        assert three[key].scores == (None if answer.scores is None else pytest.approx(answer.scores, abs=1e-4))
    assert read_scores(benchmark, tmp_path / "three") == scores
    assert scores.by_shots.keys() == {0, 2}


def test_an_open_answer_is_what_the_model_writes_after_the_prompt(tmp_path: Path) -> None:
    run(ASKED, tmp_path, shots=[2], seeds=[1])
    model, processor = flamingo()
    query = ASKED.queries[3]
    answer = answers(tmp_path)[2, 1, query.key]
    support = RandomSupport(ASKED.support)(query, shots=2, seed=1)
    assert answer.support == tuple(example.key for example in support)
    prompt = write_prompt(VQA, support, query)
    assert [answer.text] == generate_answers(model, processor, [prompt], num_beams=2, max_new_tokens=3)


def test_zero_shots_are_two_without_media(tmp_path: Path) -> None:
    run(ASKED, tmp_path, shots=[0], seeds=[0])
    model, processor = flamingo()
    query = ASKED.queries[0]
    answer = answers(tmp_path)[0, 0, query.key]
    support = RandomSupport(ASKED.support)(query, shots=2, seed=0)
    prompt = write_prompt(VQA, support, query, show_support_media=False)
    assert len(prompt.media) == 1
    assert [answer.text] == generate_answers(model, processor, [prompt], num_beams=2, max_new_tokens=3)


def test_an_answer_among_candidates_is_the_likeliest_over_all_orders_of_the_support(tmp_path: Path) -> None:
    run(CHOSEN, tmp_path, shots=[2], seeds=[0], options=Options(ensemble=2, length_normalization="tokens"))
    model, processor = flamingo()
    query = CHOSEN.queries[1]
    answer = answers(tmp_path)[2, 0, query.key]
    support = RandomSupport(CHOSEN.support)(query, shots=2, seed=0)
    prompts = [write_prompt(CLASSIFICATION, order, query) for order in (support, support[::-1])]
    assert CHOSEN.candidates is not None
    scores = score_candidates(model, processor, prompts, CHOSEN.candidates, length_normalization="tokens").tolist()
    assert answer.scores == pytest.approx(scores, abs=1e-4)
    assert answer.text == CHOSEN.candidates[int(np.argmax(scores))]


# ------------------------------------------------------------ going on


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(done: int, _: int) -> None:
        if done >= 4:
            raise KilledError

    with pytest.raises(KilledError):
        run(ASKED, tmp_path / "killed", batch_size=2, progress=kill)
    before = answers(tmp_path / "killed")
    assert len(before) == 4
    counted: list[tuple[int, int]] = []
    scores = run(ASKED, tmp_path / "killed", batch_size=2, progress=lambda *counts: counted.append(counts))
    assert counted[-1] == (16, 16)
    assert scores == run(ASKED, tmp_path / "whole")
    assert answers(tmp_path / "killed") == answers(tmp_path / "whole")


def test_what_is_there_is_not_asked_again_and_more_shots_can_be_asked_later(tmp_path: Path) -> None:
    run(ASKED, tmp_path, shots=[2], seeds=[0])
    counted: list[tuple[int, int]] = []
    run(ASKED, tmp_path, shots=[2, 1], seeds=[0], progress=lambda *counts: counted.append(counts))
    assert counted[-1] == (5, 5)
    run(ASKED, tmp_path, shots=[2, 1], seeds=[0], progress=lambda *_: pytest.fail("nothing is left"))


@pytest.mark.parametrize(
    "change",
    [
        {"options": Options(num_beams=3, max_new_tokens=3)},
        {"limit": 3},
        {"about": {"model": "another"}},
    ],
)
def test_answers_of_other_settings_are_not_mixed_in(change: dict[str, Any], tmp_path: Path) -> None:
    run(ASKED, tmp_path, shots=[1], seeds=[0])
    with pytest.raises(ValueError, match="holds answers with"):
        run(ASKED, tmp_path, **change)


@pytest.mark.parametrize(
    "changed",
    [
        replace(ASKED, queries=[replace(query, fields={"question": "w30"}) for query in ASKED.queries]),
        replace(ASKED, queries=[replace(query, media=query.media * 2) for query in ASKED.queries]),
        replace(ASKED, support=[replace(example, label="w30") for example in ASKED.support]),
        replace(ASKED, support=ASKED.support[::-1]),
    ],
    ids=["questions", "media", "shown answers", "order of the support"],
)
def test_answers_of_examples_that_changed_under_their_keys_are_not_mixed_in(changed: Benchmark, tmp_path: Path) -> None:
    run(ASKED, tmp_path, shots=[1], seeds=[0])
    with pytest.raises(ValueError, match="holds answers with"):
        run(changed, tmp_path, shots=[1], seeds=[1])


def test_answers_of_a_model_that_was_trained_on_are_not_mixed_in(tmp_path: Path) -> None:
    model: Any
    model, processor = make_flamingo()
    options: dict[str, Any] = {"out": tmp_path, "shots": [1], "options": Options(num_beams=1, max_new_tokens=1)}
    evaluate(model.eval(), processor, ASKED, RandomSupport(ASKED.support), **options)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("alpha")).add_(0.01)
    with pytest.raises(ValueError, match="holds answers with weights="):
        evaluate(model, processor, ASKED, RandomSupport(ASKED.support), **options)


@pytest.mark.parametrize("seeds", [[0], [1]])
def test_answers_of_support_that_was_chosen_otherwise_are_not_mixed_in(seeds: list[int], tmp_path: Path) -> None:
    model, processor = flamingo()
    options: dict[str, Any] = {"out": tmp_path, "shots": [2], "options": Options(num_beams=1, max_new_tokens=1)}
    evaluate(model, processor, ASKED, RandomSupport(ASKED.support), seeds=[0], **options)
    with pytest.raises(ValueError, match="holds answers with other support: for query 'q0'"):
        evaluate(model, processor, ASKED, RandomSupport(ASKED.support, balanced=True), seeds=seeds, **options)


def test_only_complete_sets_of_answers_are_scored(tmp_path: Path) -> None:
    scores = run(ASKED, tmp_path, shots=[1], seeds=[0], process=1, processes=2)
    assert scores.by_shots == {}
    assert [key for *_, key in answers(tmp_path)] == ["q1", "q3"]


# ------------------------------------------------------------ queries and scores


def test_fewer_queries_are_among_more_whatever_their_order() -> None:
    chosen = [choose_queries(ASKED, count) for count in range(1, 6)]
    for less, more in pairwise(chosen):
        assert more[: len(less)] == less
    shuffled = replace(ASKED, queries=ASKED.queries[::-1])
    assert choose_queries(shuffled, 3) == chosen[2]
    assert choose_queries(ASKED, None) == ASKED.queries


def answered(texts: list[str], scores: list[tuple[float, float]] | None = None) -> list[Answer]:
    return [
        Answer(0, 0, query.key, text, None if scores is None else scores[i])
        for i, (query, text) in enumerate(zip(ASKED.queries, texts, strict=True))
    ]


def test_accuracies_are_shares_of_right_answers() -> None:
    right = answered([query.answers[0] for query in ASKED.queries])
    wrong = answered(["nothing"] * 5)
    for benchmark in (replace(ASKED, queries=[replace(q, answers=q.answers[:1] * 10) for q in ASKED.queries]), CHOSEN):
        assert score_answers(benchmark, benchmark.queries, right) == 1
        assert score_answers(benchmark, benchmark.queries, wrong) == 0
        assert score_answers(benchmark, benchmark.queries, right[:2] + wrong[2:]) == pytest.approx(0.4)


def test_captions_are_scored_by_cider() -> None:
    captions = [f"{word} on a green mat" for word in ("cats", "dogs", "cars", "trees", "birds")]
    queries = [replace(query, answers=(text, text)) for query, text in zip(ASKED.queries, captions, strict=True)]
    benchmark = replace(ASKED, metric="cider", queries=queries)
    assert score_answers(benchmark, queries, answered(captions)) == pytest.approx(10)
    assert score_answers(benchmark, queries, answered(captions[1:] + captions[:1])) < 8


def test_roc_auc_is_of_the_margin_of_the_second_candidate() -> None:
    labels = ["yes", "no", "yes", "no", "no"]
    queries = [replace(query, answers=(label,)) for query, label in zip(ASKED.queries, labels, strict=True)]
    benchmark = replace(ASKED, metric="roc_auc", queries=queries, candidates=("no", "yes"))
    # The margins order the queries otherwise than the second candidate's own scores do.
    scores = [(-9.0, -8.0), (-1.0, -3.0), (-5.0, -1.0), (-1.0, -0.5), (-4.0, -6.0)]
    assert score_answers(benchmark, queries, answered(labels, scores)) == 1
    swapped = [(no, yes) for yes, no in scores]
    assert score_answers(benchmark, queries, answered(labels, swapped)) == 0


def test_the_table_has_mean_and_standard_error_over_seeds(tmp_path: Path) -> None:
    values = [0.5, 0.6, 0.8]
    scores = Scores("top_1", {4: dict(enumerate(values)), 0: {7: 0.25}})
    (shots, mean, error, seeds), (*_, of_several) = scores.spread()
    assert (shots, mean, error, seeds) == (0, 0.25, None, 1)
    assert of_several == 3
    assert scores.spread()[1][1] == pytest.approx(fmean(values))
    assert scores.spread()[1][2] == pytest.approx(stdev(values) / math.sqrt(3))
    lines = scores.table().splitlines()
    assert lines[2] == "| 0 | 25.00 |  | 1 |"
    assert lines[3] == "| 4 | 63.33 | 8.82 | 3 |"
    scores.plot(tmp_path / "plot.png", title="a model")
    assert Image.open(tmp_path / "plot.png").width > 300


# ------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shots": []}, r"shots must be different numbers from 0 on, got \[\]"),
        ({"shots": [1, -1]}, r"shots must be different numbers from 0 on, got \[1, -1\]"),
        ({"shots": [1, 1]}, r"shots must be different numbers"),
        ({"seeds": []}, r"seeds must be different numbers, at least one"),
        ({"seeds": [2, 2]}, r"seeds must be different numbers"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"limit": 0}, r"limit must be at least 1, got 0"),
        ({"process": 2, "processes": 2}, r"process must be in 0..1"),
        ({"shots": [7]}, r"shots must be at most 6"),
        ({"options": Options(max_new_tokens=0)}, r"max_new_tokens must be at least 1, got 0"),
        ({"options": Options(ensemble=6)}, r"ensemble and length_normalization are for candidates, but asked has none"),
        ({"options": Options(length_normalization="tokens")}, r"leave them out, got 1 and 'tokens'"),
    ],
)
def test_what_cannot_be_asked_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(ASKED, tmp_path, **options)


def test_a_processor_with_other_tokens_is_given_its_own(tmp_path: Path) -> None:
    model, processor = flamingo()
    benchmark = replace(ASKED, template=Template("{media}w1 {answer}{end}"))
    seen: list[str] = []

    class Spy:
        image_token, end_of_chunk_token = processor.image_token, processor.end_of_chunk_token
        tokenizer, image_processor = processor.tokenizer, processor.image_processor

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            seen.extend(options["text"])
            return processor(*arguments, **options)

    evaluate(model, Spy(), benchmark, RandomSupport(benchmark.support), out=tmp_path, shots=[1], options=Options(1, 1))
    assert all(text.count(processor.end_of_chunk_token) == 1 for text in seen)


@pytest.mark.parametrize("benchmark", [ASKED, CHOSEN])
def test_another_model_of_images_and_text_is_asked_about_files(benchmark: Benchmark, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(specials=("<image>", "<EOC>"))
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    image_id = tokenizer.get_vocab()["<image>"]
    config: Any = LlavaConfig(vision_config=vision, text_config=CONFIGS["llama"](), image_token_index=image_id)
    model: Any = LlavaForConditionalGeneration(config).eval()
    processor: Any = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )

    def save(example: Example) -> Example:
        example.media[0].save(tmp_path / f"{example.key}.png")
        return replace(example, media=(tmp_path / f"{example.key}.png",))

    in_files = replace(
        benchmark,
        support=[save(each) for each in benchmark.support],
        queries=[save(each) for each in benchmark.queries],
    )
    for name, asked in (("memory", benchmark), ("files", in_files)):
        evaluate(
            model,
            processor,
            asked,
            RandomSupport(asked.support),
            out=tmp_path / name,
            shots=[0, 2],
            options=Options(num_beams=2, max_new_tokens=3),
        )
    assert answers(tmp_path / "files") == answers(tmp_path / "memory")
    assert len(answers(tmp_path / "files")) == 10

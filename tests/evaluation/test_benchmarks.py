"""A benchmark is what its official files say, with support and queries of splits of their own."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flamingo_blocks.evaluation import (
    BENCHMARKS,
    CAPTIONING,
    CLASSIFICATION,
    HATEFUL_MEMES,
    VQA,
    Benchmark,
    Example,
    Template,
    read_benchmark,
    read_own_benchmark,
    write_examples,
    write_prompt,
)
from tests.evaluation import tiny_annotations as tiny

# Writes the files; template, metric, candidates; the first words of support, and of queries.
EXPECTED: dict[str, tuple[Callable[[Path], Path], Template, str, tuple[str, ...] | None, list[str], list[str]]] = {
    "vqav2": (
        tiny.write_vqa,
        VQA,
        "vqa_accuracy",
        None,
        ["9000 stew", "9001 2", "581921002 yes"],
        ["262148000 skateboard", "393225001 swim"],
    ),
    "okvqa": (
        partial(tiny.write_vqa, version=""),
        VQA,
        "vqa_accuracy",
        None,
        ["9000 soup", "9001 2", "581921002 no"],
        ["262148000 down", "393225001 surf"],
    ),
    "textvqa": (
        tiny.write_text_vqa,
        VQA,
        "vqa_accuracy",
        None,
        ["34602 soup", "34603 2", "34604 no"],
        ["34605 down", "34606 surf"],
    ),
    "vizwiz": (
        tiny.write_vizwiz,
        VQA,
        "vqa_accuracy",
        None,
        ["VizWiz_train_00000000.jpg soup", "VizWiz_train_00000001.jpg 2", "VizWiz_train_00000002.jpg no"],
        ["VizWiz_val_00000000.jpg down", "VizWiz_val_00000001.jpg surf"],
    ),
    "coco": (
        tiny.write_karpathy,
        CAPTIONING,
        "cider",
        None,
        ["9 A bowl of soup."],
        ["391895 A man rides a dirt bike."],
    ),
    "flickr30k": (
        partial(tiny.write_karpathy, dataset="flickr30k"),
        CAPTIONING,
        "cider",
        None,
        ["9 A bowl of soup."],
        ["391895 A man rides a dirt bike."],
    ),
    "hateful_memes": (
        tiny.write_hateful_memes,
        HATEFUL_MEMES,
        "roc_auc",
        ("no", "yes"),
        ["42953 no", "8291 yes"],
        ["1796 yes", "35618 no"],
    ),
    "image_folder": (
        partial(tiny.write_image_folder, class_names={"n01": "tench", "n02": "gold fish"}),
        CLASSIFICATION,
        "top_1",
        ("tench", "gold fish"),
        ["train/n01/a.jpg tench", "train/n01/b.JPEG tench", "train/n02/a.png gold fish"],
        ["val/n01/a.jpg tench", "val/n01/b.JPEG tench", "val/n02/a.png gold fish"],
    ),
}


def outline(examples: list[Example]) -> list[str]:
    return [f"{example.key} {example.shown_answer}" for example in examples]


def test_all_benchmarks_are_tested() -> None:
    assert tuple(EXPECTED) == BENCHMARKS


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_read_from_its_official_files(tmp_path: Path, name: str) -> None:
    write, template, metric, candidates, support, queries = EXPECTED[name]
    found = read_benchmark(name, write(tmp_path))
    assert (found.name, found.template, found.metric, found.candidates) == (name, template, metric, candidates)
    assert (outline(found.support), outline(found.queries)) == (support, queries)
    for example in (*found.support, *found.queries):
        assert all(medium.is_file() for medium in example.media)
        assert candidates is None or set(example.answers) <= set(candidates)
    prompt = write_prompt(template, found.support, found.queries[0])
    assert prompt.text.count("<image>") == len(prompt.media) == len(support) + 1, "its template finds all its fields"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_file_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    tops = sorted(path.name for path in EXPECTED[name][0](tmp_path).iterdir() if path.name != "classes.json")
    for top in tops:
        (tmp_path / top).rename(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=f" has no {re.escape(top)}; put") as error:
            read_benchmark(name, tmp_path)
        assert all(needed in str(error.value) for needed in tops)
        (tmp_path / "elsewhere").rename(tmp_path / top)
    with pytest.raises(ValueError, match=f"{name} is read from .*has no .*{', no '.join(['.*'] * len(tops))}"):
        read_benchmark(name, tmp_path / "elsewhere")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_documentation_names_the_files(tmp_path: Path, name: str) -> None:
    documented = f"{read_benchmark.__doc__}".partition(f"- `{name}`:")[2].partition("    - `")[0]
    for path in EXPECTED[name][0](tmp_path).iterdir():
        assert f"`{path.name.replace('val2014', 'train2014')}`" in documented


def test_missing_images_are_left_out_of_support_and_queries_where_asked(tmp_path: Path) -> None:
    tiny.write_hateful_memes(tmp_path)
    for image in ("42953", "35618"):
        (tmp_path / "img" / f"{image}.png").unlink()
    with pytest.raises(ValueError, match="1 of 2 examples"):
        read_benchmark("hateful_memes", tmp_path)
    found = read_benchmark("hateful_memes", tmp_path, skip_missing=True)
    assert (outline(found.support), outline(found.queries)) == (["8291 yes"], ["1796 yes"])


def test_classes_are_called_as_their_folders_where_no_file_says_otherwise(tmp_path: Path) -> None:
    found = read_benchmark("image_folder", tiny.write_image_folder(tmp_path))
    assert found.candidates == ("n01", "n02")


def test_candidates_are_the_classes_of_both_splits(tmp_path: Path) -> None:
    tiny.touch(tiny.write_image_folder(tmp_path), ["train/n03/a.jpg", "val/n00/a.jpg"])
    assert set(read_benchmark("image_folder", tmp_path).candidates or ()) == {"n00", "n01", "n02", "n03"}


def test_no_example_is_support_and_query() -> None:
    cat, dog = Example("1", (), ("a cat",)), Example("2", (), ("a dog",))
    with pytest.raises(ValueError, match=r"both support and query, but 1 are, e\.g\. '2'"):
        Benchmark("pets", CAPTIONING, [cat, dog], [dog], "cider")


def test_an_unknown_benchmark_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be one of vqav2, .*image_folder, got 'vqa'"):
        read_benchmark("vqa", tmp_path)


# ------------------------------------------------------------ your own


def write_own(root: Path, **content: Any) -> Path:
    squares = [Example(str(i), (root / f"{i}.png",), ("red",)) for i in range(3)]
    tiny.touch(root, ["0.png", "1.png", "2.png"])
    write_examples(squares[:2], root / "support.jsonl")
    write_examples(squares[2:], root / "queries.jsonl")
    tiny.write_json(root / "benchmark.json", {"template": CLASSIFICATION.text, "metric": "top_1"} | content)
    return root


@pytest.mark.parametrize("candidates", [None, ["red", "blue"]])
def test_a_benchmark_of_your_own_is_read(candidates: list[str] | None, tmp_path: Path) -> None:
    root = write_own(tmp_path / "squares", **({} if candidates is None else {"candidates": candidates}))
    benchmark = read_own_benchmark(root)
    assert benchmark.name == "squares"
    assert benchmark.template == CLASSIFICATION
    assert [example.key for example in benchmark.support] == ["0", "1"]
    assert [example.key for example in benchmark.queries] == ["2"]
    assert benchmark.metric == "top_1"
    assert benchmark.candidates == (None if candidates is None else tuple(candidates))


@pytest.mark.parametrize(
    "content, message",
    [
        ({"metric": "roc_auc"}, "candidates must be two for roc_auc"),
        ({"candidates": "red"}, "a list of texts for candidates"),
        ({"candidates": [1]}, "a list of texts for candidates"),
        ({"template": 1}, "a text for a template"),
        ({"template": "{answer}"}, "a template must have"),
        ({"tempalte": "x"}, r'must hold "template", "metric" and'),
    ],
)
def test_what_your_own_benchmark_cannot_be_is_told(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_own_benchmark(write_own(tmp_path, **content))


@pytest.mark.unchecked
def test_an_unknown_metric_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metric must be one of vqa_accuracy, cider, top_1, roc_auc, got 'f1'"):
        read_own_benchmark(write_own(tmp_path, metric="f1"))


def test_a_file_of_your_own_benchmark_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"benchmark\.json cannot be read"):
        read_own_benchmark(tmp_path)


def test_a_benchmark_without_queries_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one query"):
        Benchmark("empty", VQA, [], [], "top_1")


def test_queries_with_one_key_are_refused() -> None:
    with pytest.raises(ValueError, match="examples must have a key each, but several have '1'"):
        Benchmark("twice", VQA, [], [Example("1", (), ("a",)), Example("1", (), ("b",))], "top_1")


def test_vqa_accuracy_of_one_person_is_refused_as_nobody_else_can_agree() -> None:
    queries = [Example("1", (), ("a", "a")), Example("2", (), ("b",))]
    with pytest.raises(ValueError, match=r"but 1 have one, of which nothing counts as right, e\.g\. '2'; take top_1"):
        Benchmark("alone", VQA, [], queries, "vqa_accuracy")

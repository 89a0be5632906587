"""Benchmarks: support, queries, template and metric, from one folder with the official files."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from flamingo_blocks.evaluation.annotations import (
    read_examples,
    read_hateful_memes,
    read_image_folder,
    read_karpathy,
    read_text_vqa,
    read_vizwiz,
    read_vqa,
)
from flamingo_blocks.evaluation.prompts import CAPTIONING, CLASSIFICATION, HATEFUL_MEMES, VQA, Example, Template
from flamingo_blocks.evaluation.support import check_keys

Metric = Literal["vqa_accuracy", "cider", "top_1", "roc_auc"]


@dataclass(frozen=True)
class Benchmark:
    """What a model is evaluated on.

    Args:
        name: Names it.
        template: How its examples are written.
        support: Examples that prompts may show with their answers.
        queries: Examples that the model is asked about.
        metric: How its answers are scored.
        candidates: All possible answers, which the model ranks; for `"roc_auc"` the negative one, then the positive
            one. None: it writes its answers.

    Raises:
        ValueError: If there are no queries, two have the same key, an example is both support and query, so that a
            prompt would tell its answer, the metric is unknown, or candidates or answers do not fit the metric.
    """

    name: str
    template: Template
    support: list[Example]
    queries: list[Example]
    metric: Metric
    candidates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.metric not in get_args(Metric):
            raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, got {self.metric!r}")
        if self.metric == "roc_auc" and len(self.candidates or ()) != 2:
            raise ValueError(
                f"candidates must be two for roc_auc, the negative one, then the positive one, got {self.candidates}"
            )
        if not self.queries:
            raise ValueError(f"{self.name} must have at least one query, got none")
        check_keys(self.queries)
        if self.metric == "vqa_accuracy" and (
            alone := [query.key for query in self.queries if len(query.answers) == 1]
        ):
            raise ValueError(
                "for vqa_accuracy each query must have the answers of several people, ten in the standard data sets, "
                f"but {len(alone)} have one, of which nothing counts as right, e.g. {alone[0]!r}; take top_1 for those"
            )
        asked = {example.key for example in self.queries}
        if shared := [example.key for example in self.support if example.key in asked]:
            raise ValueError(
                f"no example of {self.name} may be both support and query, but {len(shared)} are, e.g. {shared[0]!r}; "
                "take the support from the training split"
            )


@dataclass(frozen=True)
class _Split:
    """A reader, and the files of a benchmark's folder that it is called with."""

    reader: Callable[..., list[Example]]
    files: tuple[str, ...]

    def read(self, root: Path, *, skip_missing: bool) -> list[Example]:
        return self.reader(*(root / name for name in self.files), skip_missing=skip_missing)


@dataclass(frozen=True)
class _Recipe:
    template: Template
    metric: Metric
    support: _Split
    queries: _Split
    media: tuple[str, ...] = ()  # folders that no reader is called with, as the annotations name them
    candidates: tuple[str, ...] | None = None

    @property
    def files(self) -> list[str]:
        """All that must be in the folder."""
        names = dict.fromkeys((*self.support.files, *self.queries.files, *self.media))
        return [name for name in names if name != "."]


def _vqa(version: str, subset: str) -> _Split:
    questions = f"{version}OpenEnded_mscoco_{subset}_questions.json"
    return _Split(read_vqa, (questions, f"{version}mscoco_{subset}_annotations.json", subset))


def _karpathy(file: str, images: str, split: str) -> _Split:
    return _Split(partial(read_karpathy, split=split), (file, images))


def _read_classes(folder: Path, *, skip_missing: bool) -> list[Example]:  # noqa: ARG001 # the folder names the images
    path = folder.parent / "classes.json"
    return read_image_folder(folder, class_names=path if path.exists() else None)


_RECIPES = {
    "vqav2": _Recipe(VQA, "vqa_accuracy", _vqa("v2_", "train2014"), _vqa("v2_", "val2014")),
    "okvqa": _Recipe(VQA, "vqa_accuracy", _vqa("", "train2014"), _vqa("", "val2014")),
    "textvqa": _Recipe(
        VQA,
        "vqa_accuracy",
        _Split(read_text_vqa, ("TextVQA_0.5.1_train.json", "train_images")),
        _Split(read_text_vqa, ("TextVQA_0.5.1_val.json", "train_images")),
    ),
    "vizwiz": _Recipe(
        VQA,
        "vqa_accuracy",
        _Split(read_vizwiz, ("train.json", "train")),
        _Split(read_vizwiz, ("val.json", "val")),
    ),
    "coco": _Recipe(
        CAPTIONING,
        "cider",
        _karpathy("dataset_coco.json", ".", "train"),
        _karpathy("dataset_coco.json", ".", "test"),
        media=("train2014", "val2014"),
    ),
    "flickr30k": _Recipe(
        CAPTIONING,
        "cider",
        _karpathy("dataset_flickr30k.json", "flickr30k-images", "train"),
        _karpathy("dataset_flickr30k.json", "flickr30k-images", "test"),
    ),
    "hateful_memes": _Recipe(
        HATEFUL_MEMES,
        "roc_auc",
        _Split(read_hateful_memes, ("train.jsonl", ".")),
        _Split(read_hateful_memes, ("dev_seen.jsonl", ".")),
        media=("img",),
        candidates=("no", "yes"),
    ),
    "image_folder": _Recipe(
        CLASSIFICATION, "top_1", _Split(_read_classes, ("train",)), _Split(_read_classes, ("val",))
    ),
}
BENCHMARKS = tuple(_RECIPES)


def read_benchmark(name: str, root: str | Path, *, skip_missing: bool = False) -> Benchmark:
    """Read a benchmark from a folder that holds its files under their official names.

    - `vqav2`: `v2_OpenEnded_mscoco_train2014_questions.json`, `v2_mscoco_train2014_annotations.json`, and the folder
      `train2014`; for queries the same of `val2014`.
    - `okvqa`: `OpenEnded_mscoco_train2014_questions.json`, `mscoco_train2014_annotations.json`, and the folder
      `train2014`; for queries the same of `val2014`.
    - `textvqa`: `TextVQA_0.5.1_train.json`, `TextVQA_0.5.1_val.json` for queries, and the folder `train_images`.
    - `vizwiz`: `train.json` and the folder `train`, `val.json` and the folder `val` for queries.
    - `coco`: `dataset_coco.json`, of which the split `test` is for queries, and the folders `train2014` and `val2014`.
    - `flickr30k`: `dataset_flickr30k.json`, the same way, and the folder `flickr30k-images`.
    - `hateful_memes`: `train.jsonl`, `dev_seen.jsonl` for queries, and the folder `img`.
    - `image_folder`: the folder `train`, and the folder `val` for queries, each with a folder for each class.

    A file or folder may be a link to where it is. `image_folder` takes what the classes are called from `classes.json`,
    if it is there: `{"n01440764": "tench", ...}`, by folder.

    Args:
        name: One of `BENCHMARKS`, the names above.
        root: The folder.
        skip_missing: Whether to leave out examples whose image is not there. Scores are of fewer queries then, and not
            comparable.

    Raises:
        ValueError: If there is no such benchmark, a file is missing, or one cannot be read.

    Source: Alayrac et al. 2022, section 2.5. Differs from the paper: queries are of splits whose answers are public (of
    VQAv2 and VizWiz the validation split, as in OpenFlamingo), not of those that a server scores.
    """
    if name not in _RECIPES:
        raise ValueError(f"name must be one of {', '.join(BENCHMARKS)}, got {name!r}")
    recipe, root = _RECIPES[name], Path(root)
    if missing := [file for file in recipe.files if not (root / file).exists()]:
        raise ValueError(
            f"{name} is read from {', '.join(recipe.files)}, but {root} has no {', no '.join(missing)}; put files and "
            "folders of these names there, or links to them"
        )
    support = recipe.support.read(root, skip_missing=skip_missing)
    queries = recipe.queries.read(root, skip_missing=skip_missing)
    candidates = recipe.candidates
    if recipe.metric == "top_1":
        candidates = tuple(dict.fromkeys(example.answers[0] for example in (*support, *queries)))
    return Benchmark(name, recipe.template, support, queries, recipe.metric, candidates)


def read_own_benchmark(root: str | Path, *, skip_missing: bool = False) -> Benchmark:
    """Read a benchmark of your own from a folder with three files.

    - `benchmark.json`: `{"template": "{media}What is this? {answer}{end}", "metric": "top_1", "candidates": ["cat",
      "dog"]}`, as `Template` and `Benchmark` have them. Without candidates, the model writes its answers.
    - `support.jsonl` and `queries.jsonl`: see `read_examples`.

    Args:
        root: The folder, which names the benchmark.
        skip_missing: Whether to leave out examples of which a medium is not there.

    Raises:
        ValueError: If a file is missing or broken, or says what cannot be.
    """
    root = Path(root)
    path = root / "benchmark.json"
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    names = {"template", "metric", "candidates"}
    if not isinstance(content, dict) or not {"template", "metric"} <= content.keys() <= names:
        raise ValueError(
            f'{path} must hold "template", "metric" and, if there are any, "candidates", got {content!s:.80}'
        )
    candidates = content.get("candidates")
    texts = [content["template"], *(candidates if isinstance(candidates, list) else [])]
    if not isinstance(candidates, list | None) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path} must have a text for a template, and a list of texts for candidates")
    return Benchmark(
        name=root.resolve().name,
        template=Template(content["template"]),
        support=read_examples(root / "support.jsonl", skip_missing=skip_missing),
        queries=read_examples(root / "queries.jsonl", skip_missing=skip_missing),
        metric=content["metric"],
        candidates=None if candidates is None else tuple(candidates),
    )

"""Annotation files of standard benchmarks, as they are downloaded, read into examples.

Media are paths: nothing is decoded, and no file of an image is touched. That they are there is seen from the lists of
their folders.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from flamingo_blocks.data.pairs import IMAGE_SUFFIXES
from flamingo_blocks.data.writing import written_whole
from flamingo_blocks.evaluation.prompts import Example

T = TypeVar("T")

_ID = (str, int)
_HATEFUL = {0: "no", 1: "yes"}


# ------------------------------------------------------------ questions


def read_vqa(
    questions: str | Path, annotations: str | Path, images: str | Path, *, skip_missing: bool = False
) -> list[Example]:
    """Read VQAv2 or OK-VQA: the two files of a split, and COCO's images.

    The answers are those under `answer`, which the official evaluation compares with. In OK-VQA these are stemmed
    ("race" for "racing"; what people wrote is under `raw_answer`): answers of a model that are not stemmed alike count
    as wrong there.

    Args:
        questions: E.g. `v2_OpenEnded_mscoco_val2014_questions.json`.
        annotations: E.g. `v2_mscoco_val2014_annotations.json`.
        images: The folder with `COCO_val2014_000000262148.jpg` and so on, named by the questions' `data_subtype`.
        skip_missing: Whether to leave out examples whose image is not there.

    Returns:
        Examples in the order of the questions, with the field `question`. The label is `multiple_choice_answer`, or the
        most frequent answer where there is none, as in OK-VQA.

    Raises:
        ValueError: If a file is missing, broken or another one, a question has no annotation, or images are missing.

    Source: Goyal et al. 2017 (VQAv2); Marino et al. 2019 (OK-VQA).
    """
    questions, annotations, images = Path(questions), Path(annotations), Path(images)
    content = _load(questions)
    entries = _listed(questions, content, "questions")
    subset = content.get("data_subtype")
    if not isinstance(subset, str):
        raise ValueError(f'{questions} must have a text "data_subtype", such as "val2014", got {subset!r}')

    def annotated(entry: Any) -> tuple[str, Example]:
        key, answers = str(_get(entry, "question_id", *_ID)), _answers(entry)
        chosen = "multiple_choice_answer"
        label = _get(entry, chosen, str) if chosen in entry else _most_frequent(answers)
        return key, Example(key, (), answers, label=label)

    answered = _by_key(annotations, "annotation", _listed(annotations, _load(annotations), "annotations"), annotated)

    @cache  # an image has several questions
    def image(number: int) -> Path:
        return images / f"COCO_{subset}_{number:012d}.jpg"

    def asked(entry: Any) -> tuple[str, tuple[Path, str]]:
        medium = image(_get(entry, "image_id", int))
        return str(_get(entry, "question_id", *_ID)), (medium, _get(entry, "question", str))

    asked_for = _by_key(questions, "question", entries, asked)
    if alone := [key for key in asked_for if key not in answered]:
        raise ValueError(
            f"{len(alone)} of {len(asked_for)} questions of {questions} have no annotation in {annotations}, e.g. "
            f"question {alone[0]}; the two files must be of the same split"
        )
    examples = [
        Example(key, (medium,), answered[key].answers, {"question": question}, answered[key].label)
        for key, (medium, question) in asked_for.items()
    ]
    return _with_media(questions, examples, skip_missing=skip_missing)


def read_text_vqa(annotations: str | Path, images: str | Path, *, skip_missing: bool = False) -> list[Example]:
    """Read TextVQA.

    Args:
        annotations: E.g. `TextVQA_0.5.1_val.json`.
        images: `train_images`, where those of the validation split are, too.
        skip_missing: Whether to leave out examples whose image is not there.

    Returns:
        Examples with ten answers and the field `question`. The label is the most frequent answer.

    Raises:
        ValueError: If the file is missing, broken or another one, or images are missing.

    Source: Singh et al. 2019.
    """
    annotations, images = Path(annotations), Path(images)

    def make(entry: Any) -> tuple[str, Example]:
        key = str(_get(entry, "question_id", *_ID))
        answers = _texts(entry, "answers")
        medium = images / f"{_get(entry, 'image_id', str)}.jpg"
        return key, _question(key, medium, entry, answers)

    entries = _listed(annotations, _load(annotations), "data")
    examples = _by_key(annotations, "entry", entries, make).values()
    return _with_media(annotations, examples, skip_missing=skip_missing)


def read_vizwiz(annotations: str | Path, images: str | Path, *, skip_missing: bool = False) -> list[Example]:
    """Read VizWiz-VQA.

    Args:
        annotations: `train.json` or `val.json`; `test.json` has no answers.
        images: The folder with `VizWiz_val_00000000.jpg` and so on.
        skip_missing: Whether to leave out examples whose image is not there.

    Returns:
        Examples with ten answers and the field `question`; they are named by their image. The label is the most
        frequent answer. Questions that cannot be answered are among them: the answer is "unanswerable".

    Raises:
        ValueError: If the file is missing, broken or another one, or images are missing.

    Source: Gurari et al. 2018.
    """
    annotations, images = Path(annotations), Path(images)

    def make(entry: Any) -> tuple[str, Example]:
        key = _get(entry, "image", str)
        return key, _question(key, images / key, entry, _answers(entry))

    entries = _listed(annotations, _load(annotations), None)
    examples = _by_key(annotations, "entry", entries, make).values()
    return _with_media(annotations, examples, skip_missing=skip_missing)


# ------------------------------------------------------------ captions


def read_karpathy(
    annotations: str | Path,
    images: str | Path,
    *,
    split: str | tuple[str, ...] = "test",
    skip_missing: bool = False,
) -> list[Example]:
    """Read captions of COCO or Flickr30k in Karpathy's splits.

    Args:
        annotations: `dataset_coco.json` or `dataset_flickr30k.json`.
        images: The folder with the images of Flickr30k, or with the folders `train2014` and `val2014` of COCO.
        split: `"train"`, `"val"` or `"test"`, or several. COCO has also `"restval"`: images of `val2014` that are in
            neither of the last two, and that many add to the training split, `split=("train", "restval")`.
        skip_missing: Whether to leave out examples whose image is not there.

    Returns:
        Examples with their five captions or so as answers. They are named by COCO's number of the image or, in
        Flickr30k, by its file.

    Raises:
        ValueError: If the file is missing, broken or another one, has no such split, or images are missing.

    Source: Karpathy and Fei-Fei 2015.
    """
    annotations, images = Path(annotations), Path(images)
    wanted = {split} if isinstance(split, str) else set(split)
    splits = set()

    def make(entry: Any) -> tuple[str, Example | None]:
        name = _get(entry, "filename", str)
        key = str(_get(entry, "cocoid", *_ID)) if "cocoid" in entry else Path(name).stem
        splits.add(part := _get(entry, "split", str))
        if part not in wanted:
            return key, None
        folder = _get(entry, "filepath", str) if "filepath" in entry else ""
        captions = tuple(_get(sentence, "raw", str).strip() for sentence in _get(entry, "sentences", list))
        return key, Example(key, (images / folder / name,), captions)

    entries = _listed(annotations, _load(annotations), "images")
    examples = [each for each in _by_key(annotations, "image", entries, make).values() if each is not None]
    if unknown := sorted(wanted - splits):
        raise ValueError(f"{annotations} has no images of the split {unknown}; split must be among {sorted(splits)}")
    return _with_media(annotations, examples, skip_missing=skip_missing)


def read_coco_captions(annotations: str | Path, images: str | Path, *, skip_missing: bool = False) -> list[Example]:
    """Read captions in COCO's own form.

    Args:
        annotations: E.g. `captions_val2014.json`.
        images: The folder of the images, e.g. `val2014`.
        skip_missing: Whether to leave out examples whose image is not there.

    Returns:
        An example for each image, with its captions as answers, named by COCO's number of the image.

    Raises:
        ValueError: If the file is missing, broken or another one, an image has no caption, or images are missing.

    Source: Chen et al. 2015.
    """
    annotations, images = Path(annotations), Path(images)
    content = _load(annotations)
    captions: dict[str, list[str]] = {}

    def caption(entry: Any) -> tuple[str, None]:
        captions.setdefault(str(_get(entry, "image_id", *_ID)), []).append(_get(entry, "caption", str).strip())
        return str(_get(entry, "id", *_ID)), None

    _by_key(annotations, "annotation", _listed(annotations, content, "annotations"), caption)

    def make(entry: Any) -> tuple[str, Example]:
        key = str(_get(entry, "id", *_ID))
        return key, Example(key, (images / _get(entry, "file_name", str),), tuple(captions.pop(key, ())))

    examples = _by_key(annotations, "image", _listed(annotations, content, "images"), make).values()
    if captions:
        raise ValueError(f"{annotations} has captions of images that it does not list, e.g. of {next(iter(captions))}")
    return _with_media(annotations, examples, skip_missing=skip_missing)


# ------------------------------------------------------------ classes


def read_hateful_memes(
    annotations: str | Path, images: str | Path | None = None, *, skip_missing: bool = False
) -> list[Example]:
    """Read Hateful Memes.

    Args:
        annotations: `train.jsonl`, `dev_seen.jsonl` or another one with labels.
        images: The folder that holds the folder `img`. None: that of the annotations.
        skip_missing: Whether to leave out examples whose image is not there.

    Returns:
        Examples with the answer `"yes"` or `"no"` to whether it is hateful, and the field `text`.

    Raises:
        ValueError: If the file is missing, broken, another one or without labels, or images are missing.

    Source: Kiela et al. 2020.
    """
    annotations = Path(annotations)
    images = annotations.parent if images is None else Path(images)

    def make(entry: Any) -> tuple[str, Example]:
        key = str(_get(entry, "id", *_ID))
        if (label := _get(entry, "label", int)) not in _HATEFUL:
            raise ValueError(f'"label" must be 0 or 1, got {label}')
        fields = {"text": _get(entry, "text", str)}
        return key, Example(key, (images / _get(entry, "img", str),), (_HATEFUL[label],), fields)

    examples = _by_key(annotations, "line", _lines(annotations), make).values()
    return _with_media(annotations, examples, skip_missing=skip_missing)


def read_image_folder(
    folder: str | Path, *, class_names: Mapping[str, str] | str | Path | None = None
) -> list[Example]:
    """Read images of classes: `folder/class/image`. Files of other kinds, and hidden ones, are left out.

    Args:
        folder: It holds a folder for each class.
        class_names: What the classes are called, by their folders, such as `{"n01440764": "tench"}`, or a JSON file
            that says it. Folders with the same name are one class. None: folders are called as their classes are.

    Returns:
        Examples with the name of the class as their answer, sorted by the names of the folders, then of the images.
        They are named by their last three names: `val/cat/1.jpg`.

    Raises:
        ValueError: If there is no such folder, a class has no image, or a folder's class has no name.
    """
    folder = Path(folder)
    folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not folders:
        raise ValueError(f"{folder} must be a folder that holds a folder for each class")
    names = _load(Path(class_names)) if isinstance(class_names, str | Path) else class_names
    examples = []
    for path in folders:
        name = path.name if names is None else names.get(path.name) if isinstance(names, Mapping) else None
        if not isinstance(name, str):
            raise ValueError(f"class_names must have the name of the class of the folder {path}, got {name!r}")
        found = sorted(image for image in path.iterdir() if _is_image(image.name))
        if not found:
            raise ValueError(f"the folder {path} must hold images of its class, got none; remove it if it is no class")
        examples += [Example(f"{folder.name}/{path.name}/{image.name}", (image,), (name,)) for image in found]
    return examples


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not name.startswith(".")


# ------------------------------------------------------------ anything else


def read_examples(path: str | Path, root: str | Path | None = None, *, skip_missing: bool = False) -> list[Example]:
    """Read examples from JSON lines: what to write for a data set that has no reader here.

    A line is `{"key": "7", "media": ["cat.jpg"], "answers": ["a cat"], "fields": {"question": "What is this?"},
    "label": "a cat"}`, as `Example` has them. The last two may be left out. Empty lines are skipped.

    Args:
        path: The file.
        root: The folder that paths of media start from. None: that of the file.
        skip_missing: Whether to leave out examples of which a medium is not there.

    Raises:
        ValueError: If the file is missing or broken, a line is of another form, or media are missing.

    Example:
        ```python
        import tempfile
        from pathlib import Path

        from flamingo_blocks.evaluation import Example, read_examples, write_examples

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "cat.jpg").write_bytes(b"...")
            cat = Example("7", (folder / "cat.jpg",), ("a cat",), {"question": "What is this?"})
            write_examples([cat], folder / "cats.jsonl")
            assert read_examples(folder / "cats.jsonl") == [cat]
        ```
    """
    path = Path(path)
    root = path.parent if root is None else Path(root)
    names = {"key", "media", "answers", "fields", "label"}

    def make(entry: Any) -> tuple[str, Example]:
        if unknown := sorted(set(entry) - names):
            raise ValueError(f"unknown names {unknown}, must be among {sorted(names)}")
        fields = _get(entry, "fields", dict) if "fields" in entry else {}
        for name in fields:
            _get(fields, name, str)
        label = None if entry.get("label") is None else _get(entry, "label", str)
        media = tuple(root / medium for medium in _texts(entry, "media"))
        return (key := _get(entry, "key", str)), Example(key, media, _texts(entry, "answers"), fields, label)

    return _with_media(path, _by_key(path, "line", _lines(path), make).values(), skip_missing=skip_missing)


def write_examples(examples: Iterable[Example], path: str | Path, root: str | Path | None = None) -> None:
    """Write examples whose media are files as JSON lines, which `read_examples` reads.

    Args:
        examples: The examples.
        path: The file.
        root: The folder that paths of media are to start from. None: that of the file.

    Raises:
        TypeError: If a medium is not a path.
    """
    path = Path(path)
    root = path.parent if root is None else root
    with written_whole(path) as part, part.open("w", encoding="utf-8") as file:
        for example in examples:
            media = [Path(os.path.relpath(medium, root)).as_posix() for medium in example.media]
            line = {"key": example.key, "media": media, "answers": example.answers, "fields": dict(example.fields)}
            file.write(json.dumps({**line, "label": example.label}, ensure_ascii=False) + "\n")


# ------------------------------------------------------------ files


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except ValueError as error:  # wrong UTF-8, too
        raise ValueError(f"{path} must be JSON: {error}; it may have been downloaded in part") from error


def _lines(path: Path) -> dict[int, Any]:
    entries = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    entries[number] = json.loads(line)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: line {number} must be JSON: {error}") from error
    return entries


def _listed(path: Path, content: Any, name: str | None) -> dict[int, Any]:
    """Number the entries of a list: of the one with this name or, without a name, of the content itself."""
    entries = content if name is None else content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        expected = "be a list" if name is None else f'have a list "{name}"'
        found = f"the names {sorted(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{path} must {expected}, got {found}; is it another file?")
    return dict(enumerate(entries))


def _by_key(path: Path, what: str, entries: Mapping[int, Any], make: Callable[[Any], tuple[str, T]]) -> dict[str, T]:
    """Make a key and what it stands for of each entry."""
    found: dict[str, T] = {}
    for number, entry in entries.items():
        try:
            key, value = make(entry)
        except KeyError as error:
            raise ValueError(f'{path}: {what} {number} must have "{error.args[0]}", got {entry!s:.200}') from error
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {what} {number} cannot be read: {error}; it is {entry!s:.200}") from error
        if key in found:
            raise ValueError(f"{path}: {what} {number} has the key {key!r}, as one before has; keys must be unique")
        found[key] = value
    if not found:
        raise ValueError(f"{path} has no {what}, must have at least one")
    return found


# ------------------------------------------------------------ entries


def _get(entry: Any, name: str, *kinds: type) -> Any:
    value = entry[name]
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f'"{name}" must be of type {expected}, got {value!r:.80}')
    return value


def _texts(entry: Any, name: str) -> tuple[str, ...]:
    texts = _get(entry, name, list)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f'"{name}" must hold texts, got {texts!s:.80}')
    return tuple(texts)


def _answers(entry: Any) -> tuple[str, ...]:
    return tuple(_get(answer, "answer", str) for answer in _get(entry, "answers", list))


def _most_frequent(answers: Sequence[str]) -> str | None:
    return max(answers, key=answers.count, default=None)  # the first of those that are


def _question(key: str, medium: Path, entry: Any, answers: tuple[str, ...]) -> Example:
    return Example(key, (medium,), answers, {"question": _get(entry, "question", str)}, _most_frequent(answers))


# ------------------------------------------------------------ media


def _with_media(path: Path, examples: Iterable[Example], *, skip_missing: bool) -> list[Example]:
    """Give examples whose media are there. Folders are listed: to look for 200,000 files one by one takes minutes."""
    examples = list(examples)
    folders = {medium.parent for example in examples for medium in example.media}
    names = {folder: {path.name for path in folder.iterdir()} if folder.is_dir() else set() for folder in folders}
    missing: list[Path] = []
    found: list[Example] = []
    for example in examples:
        lost = [medium for medium in example.media if medium.name not in names[medium.parent]]
        missing += lost
        if not lost:
            found.append(example)
    if missing and not (skip_missing and found):
        advice = "" if skip_missing else ", or pass skip_missing=True to leave out the examples that need them"
        raise ValueError(
            f"{len(examples) - len(found)} of {len(examples)} examples of {path} lack media, e.g. "
            f"{', '.join(map(str, missing[:3]))}; put the files there{advice}"
        )
    return found

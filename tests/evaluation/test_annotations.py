"""Every entry of an official file is an example with its own media, answers and question, or an error that names it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_blocks.evaluation import (
    Example,
    read_coco_captions,
    read_examples,
    read_hateful_memes,
    read_image_folder,
    read_karpathy,
    read_text_vqa,
    read_vizwiz,
    read_vqa,
    write_examples,
)
from tests.evaluation import tiny_annotations as tiny

VAL = tiny.QUESTIONS["val2014"]


def read_official_vqa(root: Path, version: str = "v2_", subset: str = "val2014", **options: Any) -> list[Example]:
    questions = root / f"{version}OpenEnded_mscoco_{subset}_questions.json"
    return read_vqa(questions, root / f"{version}mscoco_{subset}_annotations.json", root / subset, **options)


# Writes what is downloaded, and reads one file of it.
READERS: dict[str, tuple[Callable[[Path], Path], str, Callable[..., list[Example]]]] = {
    "vqa": (tiny.write_vqa, "v2_mscoco_val2014_annotations.json", read_official_vqa),
    "vqa questions": (tiny.write_vqa, "v2_OpenEnded_mscoco_val2014_questions.json", read_official_vqa),
    "text_vqa": (
        tiny.write_text_vqa,
        "TextVQA_0.5.1_val.json",
        lambda root, **options: read_text_vqa(root / "TextVQA_0.5.1_val.json", root / "train_images", **options),
    ),
    "vizwiz": (
        tiny.write_vizwiz,
        "val.json",
        lambda root, **options: read_vizwiz(root / "val.json", root / "val", **options),
    ),
    "karpathy": (
        tiny.write_karpathy,
        "dataset_coco.json",
        lambda root, **options: read_karpathy(
            root / "dataset_coco.json", root, split=("train", "restval", "val", "test"), **options
        ),
    ),
    "coco": (
        tiny.write_coco_captions,
        "captions_val2014.json",
        lambda root, **options: read_coco_captions(root / "captions_val2014.json", root / "val2014", **options),
    ),
    "hateful_memes": (
        tiny.write_hateful_memes,
        "dev_seen.jsonl",
        lambda root, **options: read_hateful_memes(root / "dev_seen.jsonl", **options),
    ),
}


# ------------------------------------------------------------ what is read


@pytest.mark.parametrize("subset", ["train2014", "val2014"])
def test_vqav2_joins_questions_with_their_annotations_and_images_by_number(tmp_path: Path, subset: str) -> None:
    assert read_official_vqa(tiny.write_vqa(tmp_path), subset=subset) == [
        Example(
            str(tiny.question_id(image, number)),
            (tmp_path / subset / f"COCO_{subset}_{image:012d}.jpg",),
            tuple(answers),
            {"question": question},
            answers[-1],  # which the file gives as the multiple choice
        )
        for number, (image, question, answers) in enumerate(tiny.QUESTIONS[subset])
    ]


def test_okvqa_has_the_stemmed_answers_and_shows_the_most_frequent_one_or_the_first_of_several(tmp_path: Path) -> None:
    first, second = read_official_vqa(tiny.write_vqa(tmp_path, version=""), version="")
    assert (first.answers, first.shown_answer) == (tuple(VAL[0][2]), "down")
    assert (second.answers, second.shown_answer) == (tuple(VAL[1][2]), "surf")


def test_textvqa_and_vizwiz_have_ten_answers_and_show_the_most_frequent_one(tmp_path: Path) -> None:
    text = READERS["text_vqa"][2](tiny.write_text_vqa(tmp_path / "text"))
    vizwiz = READERS["vizwiz"][2](tiny.write_vizwiz(tmp_path / "vizwiz"))
    shared = [(tuple(answers), {"question": question}) for _, question, answers in VAL]
    for found in (text, vizwiz):
        assert [(each.answers, each.fields) for each in found] == shared
        assert [each.shown_answer for each in found] == ["down", "surf"]
    assert [each.key for each in text] == ["34605", "34606"]
    assert [each.media for each in text] == [
        (tmp_path / "text" / "train_images" / f"{image:016x}.jpg",) for image, _, _ in VAL
    ]
    assert [each.key for each in vizwiz] == ["VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg"]
    assert [each.media for each in vizwiz] == [(tmp_path / "vizwiz" / "val" / each.key,) for each in vizwiz]


@pytest.mark.parametrize("split", ["train", "restval", "val", "test", ("train", "restval"), ("test", "val")])
def test_karpathys_splits_of_coco_are_those_of_the_file(tmp_path: Path, split: str | tuple[str, ...]) -> None:
    found = read_karpathy(tiny.write_karpathy(tmp_path) / "dataset_coco.json", tmp_path, split=split)
    assert found == [
        Example(str(image), (tmp_path / folder / tiny.coco_name(image),), tuple(map(str.strip, captions)))
        for image, (folder, part, captions) in tiny.CAPTIONS.items()
        if part in ([split] if isinstance(split, str) else split)
    ]


def test_flickr30k_is_named_by_its_files(tmp_path: Path) -> None:
    file = tiny.write_karpathy(tmp_path, "flickr30k") / "dataset_flickr30k.json"
    (found,) = read_karpathy(file, tmp_path / "flickr30k-images", split="test")
    assert found == Example("391895", (tmp_path / "flickr30k-images" / "391895.jpg",), tuple(tiny.CAPTIONS[391895][2]))


def test_cocos_own_captions_are_those_of_karpathys_file(tmp_path: Path) -> None:
    tiny.write_karpathy(tiny.write_coco_captions(tmp_path))
    expected = read_karpathy(tmp_path / "dataset_coco.json", tmp_path, split=("restval", "val", "test"))
    assert READERS["coco"][2](tmp_path) == expected


def test_hateful_memes_are_answered_with_yes_or_no(tmp_path: Path) -> None:
    images = tmp_path / "img"
    assert READERS["hateful_memes"][2](tiny.write_hateful_memes(tmp_path)) == [
        Example("1796", (images / "01796.png",), ("yes",), {"text": "everybody loves sunshine"}),
        Example("35618", (images / "35618.png",), ("no",), {"text": "no thank you"}),
    ]


def test_images_of_a_folder_have_the_name_of_its_class(tmp_path: Path) -> None:
    folder = tiny.write_image_folder(tmp_path) / "val"
    keys = ["val/n01/a.jpg", "val/n01/b.JPEG", "val/n02/a.png"]
    for class_names in (None, {"n01": "tench", "n02": "gold fish", "n03": "shark"}, {"n01": "fish", "n02": "fish"}):
        answer = {"n01": "n01", "n02": "n02"} if class_names is None else class_names
        expected = [Example(key, (tmp_path / key,), (answer[key.split("/")[1]],)) for key in keys]
        assert read_image_folder(folder, class_names=class_names) == expected
        if class_names is not None:
            file = tiny.write_json(tmp_path / "classes.json", class_names)
            assert read_image_folder(folder, class_names=file) == expected


# Some end lines for Python, but not in JSON lines.
texts = st.text(st.sampled_from('a"\\ \n\r\x85\u2028') | st.characters(exclude_categories=["Cs"]), max_size=8)
files = st.sampled_from(["a.jpg", "videos/b.mp4", "c d.png"])


@given(
    st.lists(
        st.builds(
            lambda key, media, answers, fields, label: (key, tuple(media), tuple(answers), fields, label),
            texts,
            st.lists(files, max_size=3),
            st.lists(texts, min_size=1, max_size=3),
            st.dictionaries(texts, texts, max_size=2),
            st.none() | texts,
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda row: row[0],
    ),
    st.booleans(),
)
def test_written_examples_are_read_again(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, ...]], elsewhere: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "written"
    root = folder / "media" if elsewhere else folder
    tiny.touch(root, ["a.jpg", "videos/b.mp4", "c d.png"])
    examples = [
        Example(key, tuple(root / name for name in media), answers, fields, label)
        for key, media, answers, fields, label in rows
    ]
    write_examples(examples, folder / "examples.jsonl", root if elsewhere else None)
    assert read_examples(folder / "examples.jsonl", root if elsewhere else None) == examples


def test_a_line_needs_neither_fields_nor_label_and_empty_lines_are_skipped(tmp_path: Path) -> None:
    tiny.touch(tmp_path, ["cat.jpg"])
    (tmp_path / "x.jsonl").write_bytes(b'\n{"key": "1", "media": ["cat.jpg"], "answers": ["a cat"]}\r\n\n')
    assert read_examples(tmp_path / "x.jsonl") == [Example("1", (tmp_path / "cat.jpg",), ("a cat",))]


# ------------------------------------------------------------ media


@pytest.mark.parametrize("name", READERS)
def test_missing_media_are_counted_and_named_or_their_examples_left_out(tmp_path: Path, name: str) -> None:
    write, _, read = READERS[name]
    whole = read(write(tmp_path))
    whole[0].media[0].unlink()
    lost = [example for example in whole if example.media[0] == whole[0].media[0]]
    with pytest.raises(
        ValueError, match=f"{len(lost)} of {len(whole)} examples .*{whole[0].media[0].name}; .*skip_mis"
    ):
        read(tmp_path)
    assert read(tmp_path, skip_missing=True) == [example for example in whole if example not in lost]
    for example in whole:
        example.media[0].unlink(missing_ok=True)
    with pytest.raises(ValueError, match=f"{len(whole)} of {len(whole)} examples"):
        read(tmp_path, skip_missing=True)


def test_a_folder_that_is_not_there_has_no_media(tmp_path: Path) -> None:
    tiny.write_vizwiz(tmp_path)
    with pytest.raises(ValueError, match=r"2 of 2 examples .* lack media, e.g. .*elsewhere.VizWiz_val_00000000.jpg"):
        read_vizwiz(tmp_path / "val.json", tmp_path / "elsewhere")


def test_media_are_found_by_listing_each_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_karpathy(tmp_path)
    calls: list[Path] = []
    listed, stat = Path.iterdir, Path.stat

    def record(wrapped: Callable[..., Any], path: Path, **options: Any) -> Any:
        calls.append(path)
        return wrapped(path, **options)

    monkeypatch.setattr(Path, "iterdir", lambda path: record(listed, path))
    monkeypatch.setattr(Path, "stat", lambda path, **options: record(stat, path, **options))
    READERS["karpathy"][2](tmp_path)
    assert set(calls) == {tmp_path / "train2014", tmp_path / "val2014"}
    assert len(calls) == 4, "each is listed, after a look whether it is there"


# ------------------------------------------------------------ what cannot be read


REQUIRED = {  # of an entry of the file
    "vqa": ("question_id", "answers"),
    "vqa questions": ("question_id", "image_id", "question"),
    "text_vqa": ("question_id", "image_id", "question", "answers"),
    "vizwiz": ("image", "question", "answers"),
    "karpathy": ("filename", "split", "sentences"),
    "coco": ("image_id", "id", "caption"),
    "hateful_memes": ("id", "img", "label", "text"),
}


def change(path: Path, changed: Callable[[list[Any]], Any]) -> None:
    """Change the entries of a file."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        changed(rows)
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        content = json.loads(path.read_text())
        names = ("annotations", "questions", "data", "images")
        changed(content if isinstance(content, list) else next(content[name] for name in names if name in content))
        tiny.write_json(path, content)


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_missing_or_broken_or_another_one_is_named(tmp_path: Path, name: str) -> None:
    write, file, read = READERS[name]
    path = write(tmp_path) / file
    told = re.escape(str(path))
    content = path.read_bytes()
    another = json.dumps({"info": {}, "scores": []}).encode()
    for broken in (content[:-3], b"\xff\xfe\xff", another, b"7"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"^{told}(: line . | cannot be read| must be| must have)"):
            read(tmp_path)
    path.write_bytes(content)
    change(path, lambda rows: rows.clear())
    with pytest.raises(ValueError, match=rf"{told} has no \w+, must have at least one"):
        read(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=f"{told} cannot be read: .*No such file"):
        read(tmp_path)


@pytest.mark.parametrize("name, key", [(name, key) for name, keys in REQUIRED.items() for key in keys])
def test_an_entry_that_cannot_be_read_is_named(tmp_path: Path, name: str, key: str) -> None:
    write, file, read = READERS[name]
    path = write(tmp_path) / file
    place = rf"^{re.escape(str(path))}: \w+ {2 if path.suffix == '.jsonl' else 1} "
    content = path.read_bytes()
    change(path, lambda rows: rows[1].pop(key))
    with pytest.raises(ValueError, match=f'{place}must have "{key}", got '):
        read(tmp_path)
    values: list[Any] = [None, {}, 1.5]
    for value in values:
        path.write_bytes(content)
        change(path, lambda rows, value=value: rows[1].update({key: value}))  # type: ignore[misc]
        with pytest.raises(ValueError, match=f'{place}cannot be read: "{key}" must be of type .*, got '):
            read(tmp_path)
    rows_of_another_form: list[Any] = [None, [], "text", 7]
    for row in rows_of_another_form:
        path.write_bytes(content)
        change(path, lambda rows, row=row: rows.__setitem__(1, row))  # type: ignore[misc]
        with pytest.raises(ValueError, match=f"{place}cannot be read: .*; it is "):
            read(tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_keys_are_unique(tmp_path: Path, name: str) -> None:
    write, file, read = READERS[name]
    path = write(tmp_path) / file
    change(path, lambda rows: rows.append(rows[0]))
    with pytest.raises(ValueError, match=r"has the key '\w+(\.jpg)?', as one before has"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["vqa", "text_vqa", "vizwiz"])
def test_a_question_without_answers_is_named(tmp_path: Path, name: str) -> None:
    write, file, read = READERS[name]
    change(path := write(tmp_path) / file, lambda rows: rows[1].update(answers=[]))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*at least one answer"):
        read(tmp_path)


def test_questions_and_annotations_must_be_of_one_split_and_not_be_exchanged(tmp_path: Path) -> None:
    tiny.write_vqa(tmp_path)
    names = "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"
    questions, annotations = (tmp_path / name.format("val2014") for name in names)
    of_train = tmp_path / names[1].format("train2014")
    with pytest.raises(
        ValueError, match=r"2 of 2 questions .* have no annotation .*e.g. question 262148000; .*same split"
    ):
        read_vqa(questions, of_train, tmp_path / "val2014")
    with pytest.raises(ValueError, match=r"annotations.json must have a list \"questions\", got .*'annotations'"):
        read_vqa(annotations, questions, tmp_path / "val2014")
    with pytest.raises(ValueError, match=r"questions.json must have a list \"annotations\", got .*'questions'"):
        read_vqa(questions, questions, tmp_path / "val2014")
    content = json.loads(questions.read_text())
    tiny.write_json(questions, {**content, "data_subtype": None})
    with pytest.raises(ValueError, match='must have a text "data_subtype"'):
        read_vqa(questions, annotations, tmp_path / "val2014")


@pytest.mark.parametrize("name", ["vqa", "vqa questions", "text_vqa", "karpathy", "coco"])
def test_a_list_without_a_name_is_another_file(tmp_path: Path, name: str) -> None:
    write, file, read = READERS[name]
    tiny.write_json(write(tmp_path) / file, [{"image": "x.jpg", "question": "?", "answers": []}])
    with pytest.raises(ValueError, match=rf'{file} must have a list "\w+", got a list; is it another file\?'):
        read(tmp_path)


def test_an_unknown_split_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    tiny.write_karpathy(tmp_path, "flickr30k")
    with pytest.raises(ValueError, match=r"no images of the split \['restval'\]; .* \['test', 'train', 'val'\]"):
        read_karpathy(tmp_path / "dataset_flickr30k.json", tmp_path / "flickr30k-images", split=("train", "restval"))


def test_captions_and_images_of_coco_must_belong_together(tmp_path: Path) -> None:
    path = tiny.write_coco_captions(tmp_path) / "captions_val2014.json"
    content = json.loads(path.read_text())
    tiny.write_json(path, {**content, "images": content["images"][1:]})
    with pytest.raises(ValueError, match=r"has captions of images that it does not list, e.g. of 42"):
        READERS["coco"][2](tmp_path)
    captions = [each for each in content["annotations"] if each["image_id"] != 73]
    tiny.write_json(path, {**content, "annotations": captions})
    with pytest.raises(ValueError, match="image 1 cannot be read: example '73' must have at least one answer"):
        READERS["coco"][2](tmp_path)


def test_a_meme_that_is_neither_hateful_nor_not_is_told(tmp_path: Path) -> None:
    change(tiny.write_hateful_memes(tmp_path) / "dev_seen.jsonl", lambda rows: rows[1].update(label=2))
    with pytest.raises(ValueError, match=r'dev_seen.jsonl: line 2 .*"label" must be 0 or 1, got 2'):
        READERS["hateful_memes"][2](tmp_path)


def test_classes_without_images_or_name_are_told(tmp_path: Path) -> None:
    folder = tiny.write_image_folder(tmp_path) / "val"
    for class_names in ({"n01": "tench"}, tiny.write_json(tmp_path / "names.json", {"n01": "tench", "n02": 7})):
        with pytest.raises(ValueError, match=r"must have the name of the class of the folder .*n02"):
            read_image_folder(folder, class_names=class_names)
    with pytest.raises(ValueError, match=r"must have the name of the class of the folder .*n01, got None"):
        read_image_folder(folder, class_names=tiny.write_json(tmp_path / "names.json", ["tench"]))
    (folder / "n02" / "a.png").unlink()
    with pytest.raises(ValueError, match="n02 must hold images of its class, got none"):
        read_image_folder(folder)
    for wrong in (folder / "n02", tmp_path / "elsewhere"):
        with pytest.raises(ValueError, match="must be a folder that holds a folder for each class"):
            read_image_folder(wrong)


@pytest.mark.parametrize(
    "line, told",
    [
        ({"key": "1", "media": []}, 'must have "answers"'),
        ({"key": 1, "media": [], "answers": ["a"]}, '"key" must be of type str, got 1'),
        ({"key": "1", "media": "cat.jpg", "answers": ["a"]}, '"media" must be of type list'),
        ({"key": "1", "media": [7], "answers": ["a"]}, r'"media" must hold texts, got \[7\]'),
        ({"key": "1", "media": [], "answers": []}, "at least one answer"),
        ({"key": "1", "media": [], "answers": ["a"], "fields": {"question": 7}}, '"question" must be of type str'),
        ({"key": "1", "media": [], "answers": ["a"], "label": ["a"]}, '"label" must be of type str'),
        ({"key": "1", "media": [], "answers": ["a"], "lable": "a"}, r"unknown names \['lable'\]"),
        (["key"], "cannot be read"),
    ],
)
def test_a_line_of_another_form_is_told(tmp_path: Path, line: object, told: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"key": "0", "media": [], "answers": ["a"]}\n' + json.dumps(line))
    with pytest.raises(ValueError, match=f"x.jsonl: line 2 .*{told}"):
        read_examples(tmp_path / "x.jsonl")


def test_only_media_that_are_files_are_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_examples([Example("1", (b"...",), ("a",))], tmp_path / "x.jsonl")
    assert not list(tmp_path.iterdir()), "nothing is written in part"

"""A pair is its medium, then its text, from whichever files it comes; what is no pair is counted in its place."""

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from flamingo_blocks.data import (
    CorruptSample,
    Document,
    IndexedSource,
    JsonLinesSource,
    Medium,
    PairFolder,
    ParquetSource,
    TarSource,
    document_from_pair,
    pair_from_sample,
)
from tests.data.tiny_files import outline, read, write_files, write_tar

# A sample's members, and the pair or the error.
SAMPLES: dict[str, tuple[dict[str, bytes], tuple[str, bytes, str] | str]] = {
    "jpg": ({"jpg": b"1", "txt": b"A cat."}, ("image", b"1", "A cat.")),
    "capitals, space, more": ({"PNG": b"1", "json": b"{", "txt": b" A cat.\n"}, ("image", b"1", "A cat.")),
    "not ASCII, marked as UTF-8": ({"webp": b"1", "txt": "\ufeffKätzchen".encode()}, ("image", b"1", "Kätzchen")),
    "mp4": ({"mp4": b"1", "txt": b"A cat runs."}, ("video", b"1", "A cat runs.")),
    "webm": ({"txt": b"A cat runs.", "webm": b"1"}, ("video", b"1", "A cat runs.")),
    "no text": ({"jpg": b"1"}, r"must have its text in a member txt, got \['jpg'\]"),
    "empty text": ({"jpg": b"1", "txt": b" \n"}, "the text is empty"),
    "not UTF-8": ({"jpg": b"1", "txt": b"K\xe4tzchen"}, "UnicodeDecodeError"),
    "no medium": ({"txt": b"A cat."}, r"must have one image or video, got the members \['txt'\]"),
    "two media": ({"jpg": b"1", "mp4": b"2", "txt": b"A cat."}, "must have one image or video"),
    "an empty medium": ({"jpg": b"", "txt": b"A cat."}, "the image must be bytes, .*, got empty"),
}


def check(found: Document | CorruptSample, expected: tuple[str, bytes, str] | str, key: str) -> None:
    if isinstance(expected, str):
        assert isinstance(found, CorruptSample)
        assert found.key.endswith(key)
        with pytest.raises(ValueError, match=expected):
            raise ValueError(found.error)
    else:
        assert isinstance(found, Document)
        medium, text = found.parts
        assert isinstance(medium, Medium)
        assert (medium.kind, medium.read(), text) == expected
        assert found.key.endswith(key)


def test_samples_of_a_tar_file_are_pairs_or_counted_in_their_place(tmp_path: Path) -> None:
    members = [(f"{i:03d}.{name}", c) for i, (sample, _) in enumerate(SAMPLES.values()) for name, c in sample.items()]
    found = read(TarSource(write_tar(tmp_path / "x.tar", members), pair_from_sample))
    for i, (each, (_, expected)) in enumerate(zip(found, SAMPLES.values(), strict=True)):
        check(each, expected, f"{i:03d}")
    assert [each.key for each in found if isinstance(each, Document)] == ["000", "001", "002", "003", "004"]


def test_pairs_of_a_folder_are_the_same_or_counted_in_their_place(tmp_path: Path) -> None:
    for i, (sample, _) in enumerate(SAMPLES.values()):
        write_files(tmp_path, {f"{i:03d}.{name}": content for name, content in sample.items()})
    found = read(PairFolder(tmp_path))
    for i, (each, (_, expected)) in enumerate(zip(found, SAMPLES.values(), strict=True)):
        if i == list(SAMPLES).index("an empty medium"):  # it is read later
            assert isinstance(each, Document)
        else:
            check(each, expected, str(tmp_path / f"{i:03d}"))


@pytest.mark.parametrize(
    "content, expected",
    [
        (b'{"alt": "A cat.", "width": 3}', ("image", b"1", "A cat.")),
        (b'{"caption": "A cat."}', "must have a field 'alt', got .*caption"),
        (b"[1]", "must have a field 'alt'"),
        (b'{"alt": null}', "the text must be a string, got NoneType"),
        (b'{"alt": "\\ud83d"}', "surrogates not allowed"),
        (b"{", "JSONDecodeError"),
        (None, "must have its text in a member json"),
    ],
)
def test_the_text_may_be_a_field_of_json(
    content: bytes | None, expected: tuple[str, bytes, str] | str, tmp_path: Path
) -> None:
    members = {"7.jpg": b"1", "7.txt": b"Another.", **({} if content is None else {"7.json": content})}
    tar = TarSource(write_tar(tmp_path / "x.tar", members), partial(pair_from_sample, caption_field="alt"))
    folder = PairFolder(write_files(tmp_path / "files", members), caption_field="alt")
    for source in (tar, folder):
        (found,) = read(source)
        check(found, expected, "7")


def test_a_folder_is_read_as_img2dataset_writes_it(tmp_path: Path) -> None:
    files = {"00000_stats.json": b"{}", "00000.parquet": b"", "empty/x.txt": b"no medium in this folder"}
    for shard in range(2):
        for i in (2, 0, 1):
            name = f"{shard:05d}/{shard:05d}{i:04d}"
            files |= {f"{name}.jpg": b"%d" % i, f"{name}.txt": b"text %d" % i, f"{name}.json": b"{}"}
    source = PairFolder(write_files(tmp_path, {**files, "00001/._000010000.jpg": b"of a Mac"}))
    assert len(source) == 2
    found = read(source)
    assert [each.text for each in found if isinstance(each, Document)] == ["text 0", "text 1", "text 2"] * 2
    assert [each.key for each in found] == [
        str(tmp_path / f"{shard:05d}/{shard:05d}{i:04d}") for shard in range(2) for i in range(3)
    ]
    assert [medium.read() for each in found if isinstance(each, Document) for medium in each.media] == [
        b"0", b"1", b"2"
    ] * 2  # fmt: skip


def test_a_folder_may_hold_pairs_itself(tmp_path: Path) -> None:
    files = {"cat.a.jpg": b"1", "cat.a.txt": b"A cat.", "dog.JPG": b"2", "dog.TXT": b"A dog.", "b/eel.webm": b"3"}
    source = PairFolder(write_files(tmp_path, {**files, "eel.jpg": b"", "eel.JPG": b"", "b/eel.txt": b"An eel."}))
    assert len(source) == 2
    assert outline(source) == [
        str(tmp_path / "cat.a"),
        str(tmp_path / "dog"),
        "corrupt: ValueError: a pair must have one image or video, got the members ['JPG', 'jpg']",
        str(tmp_path / "b" / "eel"),
    ]


@pytest.mark.parametrize("folder", ["missing", "a.txt", "."])
def test_a_wrong_folder_is_an_error_at_once(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_files(tmp_path, {"a.txt": b"A cat."}))
    with pytest.raises(ValueError, match=r"there is no folder|hold no images and no videos"):
        PairFolder(folder)


# Records


def test_a_folder_with_metadata_is_read_as_datasets_has_it(tmp_path: Path) -> None:
    lines = [
        {"file_name": "b/cat.jpg", "text": "A cat."},
        {"file_name": "missing.jpg", "text": "Nothing."},
        {"file_name": "dog.png", "text": ""},
        {"file_name": "dog.png"},
        {"file_name": "dog.png", "text": "A dog.", "more": 3},
    ]
    metadata = "\n".join(map(json.dumps, lines)).encode()
    write_files(tmp_path, {"b/cat.jpg": b"1", "dog.png": b"2", "metadata.jsonl": metadata})
    source = JsonLinesSource(tmp_path / "metadata.jsonl", partial(document_from_pair, medium="file_name"))
    assert read(source) == [
        Document((Medium("image", tmp_path / "b/cat.jpg"), "A cat."), key="b/cat.jpg"),
        CorruptSample(f"{source.files[0]}: line 2", f"ValueError: there is no file '{tmp_path / 'missing.jpg'}'"),
        CorruptSample(f"{source.files[0]}: line 3", "ValueError: the text is empty"),
        CorruptSample(f"{source.files[0]}: line 4", "ValueError: a pair must have a field 'text', got ['file_name']"),
        Document((Medium("image", tmp_path / "dog.png"), "A dog."), key="dog.png"),
    ]


def test_descriptions_of_videos_are_read_from_lines(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.webm": b"1", "x.jsonl": b'{"clip": "a.webm", "what": "It runs.", "id": 7}'})
    make = partial(document_from_pair, medium="clip", text="what", kind="video", key="id")
    assert read(JsonLinesSource(tmp_path, make)) == [
        Document((Medium("video", tmp_path / "a.webm"), "It runs."), key="7")
    ]


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "value, expected",
    [
        (b"1", (b"1", "")),
        ({"bytes": b"1", "path": "a.jpg"}, (b"1", "a.jpg")),
        ({"bytes": None, "path": "a.jpg"}, (Path("a.jpg"), "a.jpg")),
        ("b/a.jpg", (Path("b/a.jpg"), "b/a.jpg")),
        (Path("a.jpg"), (Path("a.jpg"), "a.jpg")),
        ({"bytes": None, "path": None}, "got NoneType"),
        ({"bytes": b"", "path": "a.jpg"}, "got empty"),
        ("", "got empty"),
        (None, "got NoneType"),
        (3, "the image must be bytes, a path or a dict of both, got int"),
    ],
)
def test_a_medium_may_be_given_in_many_ways(value: Any, expected: tuple[bytes | Path, str] | str) -> None:
    (found,) = read(IndexedSource([{"image": value, "text": "A cat."}], document_from_pair))
    if isinstance(expected, str):
        assert isinstance(found, CorruptSample)
        assert found.error.endswith(expected)
    else:
        assert found == Document((Medium("image", expected[0]), "A cat."), key=expected[1])


@pytest.mark.parametrize("decode", [False, True])
def test_datasets_are_read(decode: bool) -> None:
    import datasets

    photograph = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"
    file = io.BytesIO()
    PICTURE.save(file, "png")
    rows = {
        "image": [{"bytes": file.getvalue(), "path": None}, {"bytes": photograph.read_bytes(), "path": "china.jpg"}],
        "text": ["Noise.", "China."],
    }
    features = datasets.Features({"image": datasets.Image(decode=decode), "text": datasets.Value("string")})
    found = read(IndexedSource(datasets.Dataset.from_dict(rows, features=features), document_from_pair))
    for each, expected in zip(found, (PICTURE, Image.open(photograph)), strict=True):
        assert isinstance(each, Document)
        with Image.open(each.media[0].open()) as image:
            np.testing.assert_array_equal(image, expected)
    assert [each.text for each in found if isinstance(each, Document)] == ["Noise.", "China."]
    if not decode:
        assert [each.media[0].read() for each in found if isinstance(each, Document)][1] == photograph.read_bytes()


def test_img2datasets_parquet_files_are_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = {"key": ["0", "1"], "jpg": [b"1", None], "caption": ["A cat.", "A dog."], "status": ["success", "failed"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "00000.parquet")
    make = partial(document_from_pair, medium="jpg", text="caption", key="key")
    document, corrupt = read(ParquetSource(tmp_path, make))
    assert document == Document((Medium("image", b"1"), "A cat."), key="0")
    assert isinstance(corrupt, CorruptSample)
    assert corrupt.key == f"{tmp_path / '00000.parquet'}: row 1"

"""MMC4 and OBELICS: text and images stand as the pages had them."""

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given

from flamingo_blocks.data import (
    CorruptSample,
    Document,
    JsonLinesSource,
    Medium,
    PairFolder,
    ParquetSource,
    TarSource,
    document_from_mmc4,
    document_from_obelics,
    pair_from_sample,
    write_shards,
)
from tests.data.tiny_files import outline, read, write_files, write_tar


class Files:
    """What was downloaded: all but some."""

    def __init__(self, missing: frozenset[str] = frozenset()) -> None:
        self.missing = missing

    def __call__(self, name: str) -> bytes | None:
        return None if name in self.missing else name.encode()


def image(name: str) -> Medium:
    return Medium("image", name.encode())


def spelled(document: Document) -> str:
    """One string, in which images are braced."""
    return "".join(p if isinstance(p, str) else f"<{p.read().decode()}>" for p in document.parts)


@given(
    sentences=st.integers(1, 6),
    matches=st.lists(st.integers(0, 5), max_size=6),
    missing=st.frozensets(st.integers(0, 5)),
    place=st.sampled_from(("before", "after")),
    name=st.sampled_from(("image_name", "raw_url")),
)
def test_mmc4s_images_stand_at_their_sentences(
    sentences: int, matches: list[int], missing: frozenset[int], place: Any, name: str
) -> None:
    matches = [match % sentences for match in matches]
    infos = [
        {"image_name": f"{i}.jpg", "raw_url": f"https://a.org/{i}", "matched_text_index": match, "matched_sim": 0.3}
        for i, match in enumerate(matches)
    ]
    texts = [f"s{i}" for i in range(sentences)]
    record = {"text_list": texts, "image_info": infos, "url": "https://a.org"}
    resolve = Files(frozenset(str(infos[i][name]) for i in missing if i < len(infos)))
    make = partial(document_from_mmc4, resolve=resolve, image=name, place=place)
    there = [i for i in range(len(infos)) if i not in missing]
    if infos and not there:
        with pytest.raises(ValueError, match=f"none of its {len(infos)} images is there"):
            make(record)
        return
    document = make(record)
    assert document.key == "https://a.org"
    assert sorted(m.read().decode() for m in document.media) == sorted(str(infos[i][name]) for i in there)
    expected = ""
    for i, text in enumerate(texts):
        its_images = "".join(f"<{infos[j][name]}>" for j in there if matches[j] == i)
        unit = its_images + text if place == "before" else text + its_images
        touches = expected and not expected.endswith(">") and not unit.startswith("<")
        expected += " " + unit if touches else unit
    assert spelled(document) == expected


@given(kinds=st.lists(st.sampled_from(("text", "blank", "there", "missing", "bytes", "dict")), max_size=9))
def test_obelics_keeps_the_order_of_texts_and_images(kinds: list[str]) -> None:
    values: dict[str, Any] = {
        "there": lambda i: f"u{i}",
        "missing": lambda i: f"gone{i}",
        "bytes": lambda i: b"u%d" % i,
        "dict": lambda i: {"bytes": b"u%d" % i, "path": None},
    }
    row = {
        "images": [values[kind](i) if kind in values else None for i, kind in enumerate(kinds)],
        "texts": [{"text": f"t{i}", "blank": " \n"}.get(kind) for i, kind in enumerate(kinds)],
        "metadata": "[]",
        "general_metadata": json.dumps({"url": "https://a.org"}),
    }
    make = partial(document_from_obelics, resolve=Files(frozenset(f"gone{i}" for i in range(9))))
    is_bare = not {"there", "bytes", "dict"} & set(kinds) and ("missing" in kinds or "text" not in kinds)
    if is_bare:
        with pytest.raises(ValueError, match=r"none of its \d images is there|neither text nor an image"):
            make(row)
        return
    document = make(row)
    assert document.key == "https://a.org"
    left = [(i, kind) for i, kind in enumerate(kinds) if kind not in ("blank", "missing")]
    expected = ""
    for (i, kind), before in zip(left, [("", ""), *left], strict=False):
        expected += "\n\n" if kind == "text" == before[1] else ""
        expected += f"t{i}" if kind == "text" else f"<u{i}>"
    assert spelled(document) == expected


MMC4: dict[str, tuple[dict[str, Any], str]] = {
    "a sentence that is not there": ({"matched_text_index": 2}, "matched_text_index must be in 0..1, got 2"),
    "a negative sentence": ({"matched_text_index": -1}, "got -1"),
    "no number": ({"matched_text_index": "0"}, "got '0'"),
    "no name": ({"matched_text_index": 0, "image_name": None}, "the name of an image must be a string, got None"),
}


@pytest.mark.parametrize("kind", MMC4)
def test_lines_that_are_not_mmc4s_are_corrupt(kind: str, tmp_path: Path) -> None:
    info, error = MMC4[kind]
    good = {"text_list": ["a", "b"], "image_info": [{"image_name": "1.jpg", "matched_text_index": 1}]}
    bad = {**good, "image_info": [{"image_name": "1.jpg", **info}]}
    records = [good, bad, {"text_list": "a", "image_info": []}, {"text_list": [3], "image_info": []}, {}, good]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = outline(JsonLinesSource(tmp_path, partial(document_from_mmc4, resolve=Files())))
    assert (found[0], found[-1]) == ("", "")
    assert error in found[1]
    assert "text_list must be a list, got str" in found[2]
    assert "a text must be a string, got 3" in found[3]
    assert "KeyError: 'text_list'" in found[4]


def test_rows_of_obelics_are_read_from_parquet(tmp_path: Path) -> None:
    rows = [
        ([None, "u1", None], ["a", None, "b"]),
        ([None, "gone"], ["a", None]),
        (["u1"], ["a"]),
        ([None], [None]),
        (["u1", "u2"], [None]),
        ([], []),
    ]
    table = {"images": [row[0] for row in rows], "texts": [row[1] for row in rows], "other": [1] * len(rows)}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    make = partial(document_from_obelics, resolve=Files(frozenset({"gone"})))
    document, *corrupt = read(ParquetSource(tmp_path, make, columns=["images", "texts"]))
    assert document == Document(("a", image("u1"), "b"))
    errors = (
        "none of its 1 images is there",
        "either an image or a text must be at place 0, got 'u1' and 'a'",
        "either an image or a text must be at place 0, got None and None",
        "images and texts must be equally long, got 2 and 1",
        "there is neither text nor an image",
    )
    for each, error in zip(corrupt, errors, strict=True):
        assert isinstance(each, CorruptSample)
        assert each.error == f"ValueError: {error}"
    first = read(ParquetSource(tmp_path, document_from_obelics))[0]
    assert isinstance(first, CorruptSample)
    assert "the image at place 1 is an address, 'u1'; pass resolve= to look it up" in first.error


@pytest.mark.unchecked
def test_another_place_is_an_error() -> None:
    with pytest.raises(ValueError, match='place must be "before" or "after", got \'middle\''):
        document_from_mmc4({}, resolve=Files(), place="middle")  # type: ignore[arg-type]


def test_every_source_can_be_sent_to_another_process(tmp_path: Path) -> None:
    write_shards([Document(("a",), key="1")], tmp_path / "tar")
    write_tar(tmp_path / "pairs.tar", {"1.jpg": b"1", "1.txt": b"a"})
    write_files(tmp_path, {"pairs/1.jpg": b"1", "pairs/1.txt": b"a"})
    (tmp_path / "x.jsonl").write_text(json.dumps({"text_list": ["a"], "image_info": [], "url": "1"}))
    table = {"images": [[None]], "texts": [["a"]]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    for source in (
        TarSource(tmp_path / "tar"),
        TarSource(tmp_path / "pairs.tar", partial(pair_from_sample, caption_field=None)),
        PairFolder(tmp_path / "pairs"),
        JsonLinesSource(tmp_path / "x.jsonl", partial(document_from_mmc4, resolve=Files())),
        ParquetSource(tmp_path / "x.parquet", partial(document_from_obelics, resolve=Files())),
    ):
        sent = pickle.loads(pickle.dumps(source))
        (document,) = read(source)
        assert isinstance(document, Document)
        assert read(sent) == [document]

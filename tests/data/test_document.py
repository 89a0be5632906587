"""A document comes back as it was written, part by part."""

import io
import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from PIL import ExifTags, Image, ImageOps

from flamingo_blocks.data import Document, Medium

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
kinds = st.sampled_from(["image", "video"])
held = st.builds(Medium, kinds, st.binary(max_size=40))
filed = st.builds(Medium, kinds, texts.filter(lambda text: text and "\0" not in text).map(Path))


@given(parts=st.lists(texts | held | filed, max_size=6), key=texts)
def test_a_document_comes_back_from_json(parts: list[str | Medium], key: str) -> None:
    document = Document(tuple(parts), key=key)
    line = document.to_json()
    assert "\n" not in line
    assert Document.from_json(line) == document


@given(parts=st.lists(texts | held, max_size=6), key=texts)
def test_a_document_comes_back_from_a_sample_of_webdataset(parts: list[str | Medium], key: str) -> None:
    document = Document(tuple(parts), key=key)
    sample = document.to_sample()
    assert all(isinstance(value, bytes) for name, value in sample.items() if name != "__key__")
    assert "." not in sample["__key__"]
    assert Document.from_sample(sample) == document


def test_files_are_read_into_a_sample_and_named_by_what_they_are(tmp_path: Path) -> None:
    files = []
    for suffix in ("jpeg", "png", "gif", "webp", "bmp", "tiff"):
        file = io.BytesIO()
        Image.new("RGB", (4, 4), "orange").save(file, format=suffix)
        files.append((tmp_path / f"a.{suffix}", file.getvalue()))
        files[-1][0].write_bytes(file.getvalue())
    sample = Document(tuple(Medium("image", path) for path, _ in files)).to_sample()
    assert list(sample)[2:] == ["0.jpg", "1.png", "2.gif", "3.webp", "4.bmp", "5.tiff"]
    assert [medium.source for medium in Document.from_sample(sample).media] == [content for _, content in files]


def test_relative_paths_begin_at_the_root(tmp_path: Path) -> None:
    line = Document((Medium("image", Path("a/b.png")), Medium("image", Path("/c.png")))).to_json()
    paths = [medium.source for medium in Document.from_json(line, root=tmp_path).media]
    assert paths == [tmp_path / "a/b.png", Path("/c.png")]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F", "CMYK", "YCbCr"])
def test_an_image_is_encoded_without_loss(mode: str) -> None:
    image = Image.radial_gradient("L").convert(mode)
    found = Image.open(Medium.from_pil(image).open())
    assert found.mode == mode
    assert found.tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_an_encoded_image_is_as_upright_as_its_file(mode: str) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new(mode, (6, 4)).save(file, format="JPEG", exif=exif)
    upright = [ImageOps.exif_transpose(Image.open(f)) for f in (file, Medium.from_pil(Image.open(file)).open())]
    assert [image.size for image in upright] == [(4, 6)] * 2


def test_a_digest_tells_bytes_apart_not_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    assert Medium("image", tmp_path / "a").digest() == Medium("image", b"1").digest() != Medium("image", b"2").digest()


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        b"\xff\xfe",
        "[]",
        "{}",
        '{"parts": 3}',
        '{"parts": ["text"]}',
        '{"parts": [{"type": "text"}]}',
        '{"parts": [{"type": "audio", "path": "a"}]}',
        '{"parts": [{"type": "image"}]}',
        '{"parts": [{"type": "image", "base64": "?"}]}',
        '{"parts": [{"type": "image", "base64": 3}]}',
    ],
)
def test_what_is_no_document_is_an_error(content: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"a document must be|a part must be|a medium must have"):
        Document.from_json(content)


def test_a_sample_without_its_medium_is_an_error() -> None:
    sample = Document((Medium("image", b"GIF8"),)).to_sample()
    del sample["0.gif"]
    with pytest.raises(ValueError, match=r"'0\.gif' is not in the sample"):
        Document.from_sample(sample)
    with pytest.raises(ValueError, match="a member json"):
        Document.from_sample({"0.gif": b""})


@pytest.mark.unchecked
def test_parts_of_other_kinds_are_errors() -> None:
    with pytest.raises(ValueError, match="parts must be strings and Medium"):
        Document((3,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='kind must be "image" or "video"'):
        Medium("audio", b"")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="source must be bytes or a Path"):
        Medium("image", "a.png")  # type: ignore[arg-type]


def test_json_is_written_as_chats_write_it() -> None:
    parts = json.loads(Document(("a", Medium("image", Path("b.png")), Medium("video", b"c"))).to_json())["parts"]
    assert parts == [
        {"type": "text", "text": "a"},
        {"type": "image", "path": "b.png"},
        {"type": "video", "base64": "Yw=="},
    ]

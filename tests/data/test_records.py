"""Lines and rows are documents, or counted in their place."""

import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings

from flamingo_blocks.data import CorruptSample, Document, IndexedSource, JsonLinesSource, Medium, ParquetSource
from tests.data.test_document import held, texts
from tests.data.tiny_files import outline, read, write_files

documents = st.lists(st.tuples(st.lists(texts | held, max_size=3), texts), max_size=6)


@given(drawn=documents, is_compressed=st.booleans())
def test_documents_come_back_from_lines(drawn: list[tuple[list[str | Medium], str]], is_compressed: bool) -> None:
    written = [Document(tuple(parts), key=key) for parts, key in drawn]
    content = "\n\n".join(document.to_json() for document in written).encode()
    with tempfile.TemporaryDirectory() as folder:
        name = "x.jsonl.gz" if is_compressed else "x.jsonl"
        write_files(Path(folder), {name: gzip.compress(content) if is_compressed else content})
        assert read(JsonLinesSource(folder)) == written


def test_paths_start_from_the_folder_of_their_file(tmp_path: Path) -> None:
    line = b'{"key": "1", "parts": [{"type": "text", "text": "a"}, {"type": "image", "path": "%s"}]}'
    files = {"a/x.jsonl": line % b"i/1.jpg", "b/x.jsonl": line % b"../a/i/1.jpg", "a/i/1.jpg": b"1"}
    write_files(tmp_path, {**files, "c.jsonl": line % b"%s/a/i/1.jpg" % str(tmp_path).encode()})
    source = JsonLinesSource([tmp_path / name for name in ("a", "b/x.jsonl", "c.jsonl")])
    assert len(source) == 3
    for each in read(source):
        assert isinstance(each, Document)
        assert each.media[0].read() == b"1"


LINES: dict[bytes, str] = {
    b'{"key": "1", "parts": []}': "1",
    b"{": "corrupt: ValueError: a document must be JSON",
    b'{"key": "2", "parts": []}': "2",
    b'{"key": "K\xe4"}': "corrupt: ValueError: a document must be JSON: 'utf-8' codec can't decode",
    b"[" * 100_000: "corrupt: RecursionError",
    b'{"parts": [{"type": "text", "text": "\\ud800"}]}': "corrupt: UnicodeEncodeError",
    b'{"parts": [{"type": "image", "path": "missing.jpg"}]}': "corrupt: ValueError: there is no file",
    b'{"parts": [{"type": "image", "path": "\\u0000"}]}': "corrupt: ValueError: ",
    b'{"key": "3", "parts": []}': "3",
}


def test_what_is_no_document_is_counted_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\r\n".join(LINES))
    (tmp_path / "y.jsonl").write_bytes(b"")
    source = JsonLinesSource(tmp_path)
    assert len(source) == 2
    for line, (found, expected) in enumerate(zip(outline(source), LINES.values(), strict=True), 1):
        assert found.startswith(expected)
        each = read(source)[line - 1]
        assert isinstance(each, Document) or each.key == f"{tmp_path / 'x.jsonl'}: line {line}"


def test_to_document_may_raise_what_it_likes(tmp_path: Path) -> None:
    def make(record: Any) -> Any:
        if record is None:
            raise ImportError("pip install ...")
        return record.text if record else 1 / record

    (tmp_path / "x.jsonl").write_bytes(b"1\n0\nnull\n")
    found = JsonLinesSource(tmp_path, make).read(0)
    assert "AttributeError" in str(next(found))
    assert "ZeroDivisionError" in str(next(found))
    with pytest.raises(ImportError, match="pip install"):
        next(found)


@pytest.mark.unchecked
def test_to_document_must_give_a_document() -> None:
    (each,) = read(IndexedSource([1], lambda _: "no document"))  # type: ignore[arg-type, return-value]
    assert "a document was expected, got str; pass to_document=" in str(each)


def test_a_sample_that_is_known_to_be_corrupt_is_passed_on() -> None:
    samples = [Document(("a",)), CorruptSample("7", "a test")]
    assert read(IndexedSource(samples)) == samples


@settings(max_examples=20)
@given(share=st.floats(0.01, 0.99))
def test_a_truncated_compressed_file_gives_what_is_before_the_cut_and_one_corrupt_sample(share: float) -> None:
    content = b"".join(b'{"key": "%d", "parts": []}\n' % i for i in range(50))
    with tempfile.TemporaryDirectory() as folder:
        compressed = gzip.compress(content)
        write_files(Path(folder), {"x.jsonl.gz": compressed[: int(share * len(compressed))]})
        found = outline(JsonLinesSource(folder))
    assert found[:-1] == [str(i) for i in range(len(found) - 1)]
    assert "lost" in found[-1]


@pytest.mark.parametrize("source", [JsonLinesSource, lambda path: ParquetSource(path, text_of)])
def test_missing_files_are_errors_at_once(source: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file or folder"):
        source(tmp_path / "x")
    with pytest.raises(ValueError, match=r"has no files that end in \.(jsonl or \.jsonl\.gz|parquet)"):
        source(tmp_path)


# Parquet


def text_of(row: dict[str, Any]) -> Document:
    return Document((row["text"],), key=str(row.get("number")))


def write_rows(path: Path, rows: int, *, group: int = 20) -> Path:
    table = pyarrow.table({"number": range(rows), "text": [f"text {i}" for i in range(rows)]})
    pyarrow.parquet.write_table(table, path, row_group_size=group, compression="gzip", use_dictionary=False)
    return path


def test_rows_are_read_in_order_from_the_columns_that_are_asked_for(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", 50)
    write_rows(tmp_path / "b.parquet", 0)
    write_rows(tmp_path / "c.parquet", 3)
    source = ParquetSource(tmp_path, text_of)
    assert len(source) == 3
    assert read(source) == [Document((f"text {i}",), key=str(i)) for i in (*range(50), *range(3))]
    assert outline(ParquetSource(tmp_path, text_of, columns=["text"])) == ["None"] * 53
    (found, *_) = outline(ParquetSource(tmp_path, text_of, columns=["texts"]))
    assert "has no columns ['texts'], but ['number', 'text']; all of it is lost" in found


def test_a_damaged_row_group_is_one_corrupt_sample(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.parquet", 60)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(1)
    content = bytearray(path.read_bytes())
    start = column.data_page_offset
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    found = read(ParquetSource(path, text_of))
    assert [each.key for each in found if isinstance(each, Document)] == [str(i) for i in (*range(20), *range(40, 60))]
    damage = found[20]
    assert isinstance(damage, CorruptSample)
    assert damage.key == f"{path}: row 20"
    assert damage.error.startswith("20 rows are damaged and lost: ")


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_truncated_file_is_one_corrupt_sample(share: float, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.parquet", 60)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    (found,) = outline(ParquetSource(path, text_of))
    assert found.startswith("corrupt: the file cannot be read, all of it is lost: ")


def test_a_row_that_is_no_document_is_counted_in_its_place(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a", b"K\xe4", None, b"b"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet")
    first, latin, missing, last = read(ParquetSource(tmp_path, text_of))
    assert (first, last) == (Document(("a",), key="None"), Document(("b",), key="None"))
    assert isinstance(latin, CorruptSample)
    assert latin.key.endswith(": row 1")
    assert "UnicodeDecodeError" in latin.error
    assert isinstance(missing, CorruptSample)


def test_rows_are_not_read_before_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    iterate = pyarrow.parquet.ParquetFile.iter_batches

    def watch(self: Any, *args: Any, row_groups: list[int], **options: Any) -> Any:
        groups.extend(row_groups)
        for batch in iterate(self, *args, row_groups=row_groups, **options):
            assert batch.num_rows <= 16
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", watch)
    rows = ParquetSource(write_rows(tmp_path / "x.parquet", 60), text_of).read(0)
    for _ in range(20):
        next(rows)
    assert groups == [0]
    next(rows)
    assert groups == [0, 1]


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "x.parquet", 3)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install flamingo-blocks\[data\]"):
        ParquetSource(path, text_of)


def test_importing_the_package_loads_no_library_of_files() -> None:
    code = "import flamingo_blocks.data, sys; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    assert not {"pyarrow", "webdataset", "av", "transformers", "PIL", "selectolax"} & set(json.loads(result.stdout))

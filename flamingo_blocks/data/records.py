"""Records: rows of JSON lines and of parquet files."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flamingo_blocks.data.document import CorruptSample, Document, Medium
from flamingo_blocks.data.shards import find_shards
from flamingo_blocks.data.source import read_one


class JsonLinesSource:
    """Lines of JSON in files. Each file is a shard. Empty lines are left out.

    Paths of media start from the folder of the file that names them. A document whose medium has no file is a
    corrupt sample.

    Args:
        paths: A file, a folder of `.jsonl` files (or `.jsonl.gz`), or several.
        to_document: Makes a document of what a line holds: `document_from_pair`, `document_from_mmc4`. None: lines are
            documents, as `Document.to_json` writes them.

    Raises:
        ValueError: If there is no such file.

    Example:
        ```python
        import tempfile
        from functools import partial
        from pathlib import Path

        from flamingo_blocks.data import JsonLinesSource, document_from_pair

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "cat.jpg").write_bytes(b"...")
            (folder / "metadata.jsonl").write_text('{"file_name": "cat.jpg", "text": "A cat."}')
            source = JsonLinesSource(folder, partial(document_from_pair, medium="file_name"))
            (document,) = source.read(0)
            assert document.parts[0].source == folder / "cat.jpg"
        ```
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        to_document: Callable[[Any], Document] | None = None,
    ) -> None:
        self.files = find_shards(paths, ".jsonl", ".jsonl.gz")
        self.to_document = to_document

    def __len__(self) -> int:
        """Tell how many files there are."""
        return len(self.files)

    def read(self, shard: int) -> Iterator[Document | CorruptSample]:
        """Read the lines of a file, one by one."""
        path = self.files[shard]
        number = 0
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield read_one(partial(self._document, line, path.parent), key=f"{path}: line {number}")
        except (OSError, EOFError, zlib.error) as error:
            yield CorruptSample(str(path), f"damaged after {number} lines, the rest is lost: {error}")

    def _document(self, line: bytes, folder: Path) -> Document:
        document = Document.from_json(line) if self.to_document is None else self.to_document(json.loads(line))
        parts = tuple(_found(part, folder) if isinstance(part, Medium) else part for part in document.parts)
        return replace(document, parts=parts)


class ParquetSource:
    """Rows of parquet files. Each file is a shard. Of a file, no more than some rows of a row group are in memory.

    Rows of a row group that cannot be read are one corrupt sample, which says how many they are.

    Args:
        paths: A file, a folder of `.parquet` files, or several.
        to_document: Makes a document of a row: `document_from_obelics`, `document_from_pair`.
        columns: The columns to read. None: all.

    Raises:
        ValueError: If there is no such file.
        ImportError: If pyarrow is missing.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        to_document: Callable[[Any], Document],
        *,
        columns: Sequence[str] | None = None,
    ) -> None:
        self.files = find_shards(paths, ".parquet")
        self.to_document = to_document
        self.columns = None if columns is None else list(columns)
        _pyarrow()

    def __len__(self) -> int:
        """Tell how many files there are."""
        return len(self.files)

    def read(self, shard: int) -> Iterator[Document | CorruptSample]:
        """Read the rows of a file, one by one."""
        pyarrow = _pyarrow()
        damages = (pyarrow.ArrowException, OSError)
        path = self.files[shard]
        try:
            file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        except damages as error:
            yield CorruptSample(str(path), f"the file cannot be read, all of it is lost: {error}")
            return
        with file:
            if missing := set(self.columns or ()) - set(file.schema_arrow.names):
                found = f"the file has no columns {sorted(missing)}, but {file.schema_arrow.names}; all of it is lost"
                yield CorruptSample(str(path), found)
                return
            row = end = 0
            for group in range(file.num_row_groups):
                row, end = end, end + file.metadata.row_group(group).num_rows
                try:
                    for batch in file.iter_batches(16, row_groups=[group], columns=self.columns, use_threads=False):
                        for i in range(batch.num_rows):
                            yield read_one(partial(self._document, batch, i), key=f"{path}: row {row}")
                            row += 1
                except damages as error:
                    yield CorruptSample(f"{path}: row {row}", f"{end - row} rows are damaged and lost: {error}")

    def _document(self, batch: Any, row: int) -> Document:
        return self.to_document(batch.slice(row, 1).to_pylist()[0])


def _found(medium: Medium, folder: Path) -> Medium:
    if isinstance(medium.source, bytes):
        return medium
    path = folder / medium.source
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    return replace(medium, source=path)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "parquet files are read with pyarrow; install it with: pip install flamingo-blocks[data]"
        ) from error
    return pyarrow

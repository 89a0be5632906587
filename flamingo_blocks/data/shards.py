"""Shards: tar files of samples, as webdataset has them. Reading them, and writing documents to them.

The standard library reads them. webdataset would run addresses that begin with `pipe:`, and takes a damaged header for
the end of a file, so that what follows is lost without a word. Each reads what the other writes.
"""

import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Any

from flamingo_blocks.data.document import CorruptSample, Document
from flamingo_blocks.data.source import read_one
from flamingo_blocks.data.writing import written_whole


def find_shards(paths: str | Path | Sequence[str | Path], *suffixes: str) -> tuple[Path, ...]:
    """Find the files of a source.

    Args:
        paths: A file, a folder, or several. A folder stands for its own files that end in a suffix, sorted by name.
        *suffixes: E.g. `".tar"`.

    Raises:
        ValueError: If there is no such file, or a folder has none.
    """
    found: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.name.endswith(suffixes) and file.is_file())
            if not files:
                raise ValueError(f"the folder {str(path)!r} has no files that end in {' or '.join(suffixes)}")
            found += files
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"there is no file or folder {str(path)!r}; paths are those of files on this machine")
    if not found:
        raise ValueError("paths must name at least one file, got none")
    return tuple(found)


class TarSource:
    """Samples in tar files, compressed or not. Each file is a shard.

    As for webdataset, neighbouring members whose names agree up to the first dot are a sample: `7.jpg` and `7.txt` are
    the members `jpg` and `txt` of sample `7`. Members without a suffix are left out. A damaged or truncated file gives
    the samples before the damage, then one corrupt sample that stands for the rest.

    Args:
        paths: A file, a folder of `.tar` files (or `.tar.gz`, `.tgz`), or several.
        to_document: Makes a document of a sample: its members by name, and its `"__key__"`. The default reads what
            `write_shards` wrote; `pair_from_sample` captioned images and videos.

    Raises:
        ValueError: If there is no such file.

    Example:
        ```python
        import tempfile

        from flamingo_blocks.data import Document, TarSource, write_shards

        with tempfile.TemporaryDirectory() as folder:
            write_shards([Document(("A cat.",)), Document(("A dog.",))], folder)
            assert [document.text for document in TarSource(folder).read(0)] == ["A cat.", "A dog."]
        ```
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        to_document: Callable[[Mapping[str, Any]], Document] = Document.from_sample,
    ) -> None:
        self.files = find_shards(paths, ".tar", ".tar.gz", ".tgz")
        self.to_document = to_document

    def __len__(self) -> int:
        """Tell how many files there are."""
        return len(self.files)

    def read(self, shard: int) -> Iterator[Document | CorruptSample]:
        """Read the samples of a file, one by one."""
        path = self.files[shard]
        count = 0
        for sample, damage in _samples(path):
            found = read_one(partial(self._document, sample), key=f"{path}: {sample.get('__key__')}")
            if damage is None or isinstance(found, Document):  # the damage may come after the last sample's end
                count += 1
                yield found
            if damage is not None:
                yield CorruptSample(str(path), f"damaged after {count} samples, the rest is lost: {damage}")

    def _document(self, sample: Mapping[str, Any]) -> Document:
        if "__error__" in sample:
            raise ValueError(sample["__error__"])
        return self.to_document(sample)


def write_shards(documents: Iterable[Document], folder: str | Path, *, per_shard: int = 1000) -> list[Path]:
    """Write documents with their media to tar files, which `TarSource` reads: `000000.tar`, `000001.tar`, ...

    A file gets its name when it is complete. The same documents give the same bytes.

    Args:
        documents: They are taken one by one.
        folder: Where to. It is made if it is not there.
        per_shard: Documents of a file; the last has the rest.

    Returns:
        The files.

    Raises:
        ValueError: If the folder has such files already, or a medium's file is missing.
    """
    if per_shard < 1:
        raise ValueError(f"per_shard must be at least 1, got {per_shard}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise ValueError(f"the folder {str(folder)!r} has tar files already; write to an empty one")
    remaining = iter(documents)
    written: list[Path] = []
    for first in remaining:
        path = folder / f"{len(written):06d}.tar"
        with written_whole(path) as part, tarfile.open(part, mode="w") as archive:
            for number, document in enumerate(chain([first], islice(remaining, per_shard - 1))):
                _add(archive, number, document)
        written.append(path)
    return written


def _add(archive: tarfile.TarFile, number: int, document: Document) -> None:
    try:
        sample = document.to_sample()
    except OSError as error:
        raise ValueError(f"a medium of document {document.key!r} cannot be read: {error}") from error
    for name, content in sample.items():
        if isinstance(content, bytes):  # all but the key: several documents may have the same one
            member = tarfile.TarInfo(f"{number:06d}.{name}")
            member.size = len(content)
            archive.addfile(member, BytesIO(content))


class _Member(tarfile.TarInfo):
    """A member whose header must be whole: tarfile alone takes a damaged one for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, {archive.offset} bytes after its start") from error


def _samples(path: Path) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Group members. The last sample may come with what is wrong with the rest of the file."""
    sample: dict[str, Any] = {}
    try:
        with tarfile.open(path, "r|*", tarinfo=_Member) as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined] # else all are kept until the end
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if member.isdir() or not stem or not suffix:
                    continue
                key, suffix = f"{folder}{slash}{stem}", suffix.lower()
                if key != sample.get("__key__"):
                    if sample:
                        yield sample, None
                    sample = {"__key__": key}
                file = archive.extractfile(member) if member.isreg() else None
                if file is None:
                    sample["__error__"] = f"{member.name} is a link or a device, not a file; pack it as a file"
                elif suffix in sample:
                    sample["__error__"] = f"there are several members {suffix}"
                else:
                    sample[suffix] = file.read()
        if sample:
            yield sample, None
    except Exception as error:  # of many kinds, where a header is damaged
        yield sample, str(error) or type(error).__name__

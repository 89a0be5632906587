"""Files as others write them, by the standard library alone."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from flamingo_blocks.data import CorruptSample, Document, Source


def write_tar(path: Path, members: Sequence[tuple[str, bytes]] | Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items() if isinstance(members, Mapping) else members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read(source: Source) -> list[Document | CorruptSample]:
    """All that a source gives, which must be the same a second time."""
    found = [each for shard in range(len(source)) for each in source.read(shard)]
    assert found == [each for shard in range(len(source)) for each in source.read(shard)]
    return found


def outline(source: Source) -> list[str]:
    """Keys of documents, and what is wrong with corrupt samples."""
    return [each.key if isinstance(each, Document) else f"corrupt: {each.error}" for each in read(source)]

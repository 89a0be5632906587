"""Tar files give what was put into them, up to where they are damaged, and say what is lost."""

import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from flamingo_blocks.data import CorruptSample, Document, Medium, TarSource, pair_from_sample, write_shards
from tests.data.test_document import held, texts
from tests.data.tiny_files import outline, read, write_tar

documents = st.lists(st.tuples(st.lists(texts | held, max_size=4), texts), max_size=7)


@settings(max_examples=20)  # each waits for the disk
@given(drawn=documents, per_shard=st.integers(1, 4))
def test_written_documents_come_back_in_order(drawn: list[tuple[list[str | Medium], str]], per_shard: int) -> None:
    written = [Document(tuple(parts), key=key) for parts, key in drawn]
    with tempfile.TemporaryDirectory() as folder:
        files = write_shards(iter(written), folder, per_shard=per_shard)
        assert [file.name for file in files] == [f"{i:06d}.tar" for i in range(-(-len(written) // per_shard))]
        assert sorted(Path(folder).iterdir()) == files
        if files:
            assert read(TarSource(folder)) == read(TarSource(files)) == written
            assert len(list(TarSource(files[0]).read(0))) == min(per_shard, len(written))


def test_the_same_documents_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = write_shards(PAIRS, tmp_path / "one")
    monkeypatch.setattr("time.time", lambda: 1e9)
    (other,) = write_shards(PAIRS, tmp_path / "other")
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("suffix, mode", [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
def test_documents_are_read_that_others_wrote(suffix: str, mode: str, tmp_path: Path) -> None:
    parts = [{"type": "image", "member": "0.jpg"}, {"type": "text", "text": "Ä"}, {"type": "video", "member": "1.mp4"}]
    content = json.dumps({"key": "page 7", "parts": parts}).encode()
    members = {"a/7.json": content, "a/7.0.jpg": b"image", "a/7.1.mp4": b"video", "a/8.json": b'{"parts": []}'}
    write_tar(tmp_path / f"x{suffix}", members, mode)
    (tmp_path / "README.md").write_text("not a shard")
    expected = Document((Medium("image", b"image"), "Ä", Medium("video", b"video")), key="page 7")
    assert read(TarSource(tmp_path)) == [expected, Document(())]


def test_webdataset_reads_what_is_written_and_its_own_files_are_read(tmp_path: Path) -> None:
    import webdataset

    written = [Document((f"a{i}", Medium("image", b"GIF8%d" % i), Medium("video", b"?"))) for i in range(5)]
    (path,) = write_shards(written, tmp_path / "ours")
    samples = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    assert [Document.from_sample(sample) for sample in samples] == written
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        for i, document in enumerate(written):
            writer.write(document.to_sample() | {"__key__": f"{i}"})
    assert read(TarSource(tmp_path / "theirs.tar")) == written


def test_neighbouring_members_are_samples(tmp_path: Path) -> None:
    """Up to the first dot of the name; folders, and what has no suffix, are none."""
    path = tmp_path / "x.tar"
    write_tar(path, [("b.c/1.JPG", b"1"), ("b.c/1.txt", b"t"), ("LICENSE", b""), (".hidden", b""), ("2.txt", b"t")])
    with tarfile.open(path, "a") as archive:
        folder = tarfile.TarInfo("d.e")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo("3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "b.c/1.jpg"
        archive.addfile(link)
        for name in ("3.txt", "4.jpg", "4.jpg", "4.txt", "5.x.jpg", "5.txt", "2.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b"t"))
    assert outline(TarSource(path, pair_from_sample)) == [
        "b.c/1",
        "corrupt: ValueError: a pair must have one image or video, got the members ['txt']",
        "corrupt: ValueError: 3.jpg is a link or a device, not a file; pack it as a file",
        "corrupt: ValueError: there are several members jpg",
        "corrupt: ValueError: a pair must have one image or video, got the members ['txt', 'x.jpg']",
        "corrupt: ValueError: a pair must have its text in a member txt, got ['jpg']",
    ]
    keys = [each.key for each in read(TarSource(path, pair_from_sample)) if isinstance(each, CorruptSample)]
    assert keys == [f"{path}: {key}" for key in ("2", "3", "4", "5", "2")]


PAIRS = [Document((Medium("image", bytes([i]) * 700 * i), f"text {i}"), key=str(i)) for i in range(1, 5)]


def pairs_tar(folder: str, mode: str = "w") -> tuple[Path, list[tarfile.TarInfo]]:
    members = [(f"{d.key}.{s}", c) for d in PAIRS for s, c in (("jpg", d.media[0].read()), ("txt", d.text.encode()))]
    path = write_tar(Path(folder, "x.tar"), members, mode)
    with tarfile.open(path) as archive:
        return path, archive.getmembers()


@given(share=st.floats(0, 1))
def test_a_truncated_file_gives_what_is_before_the_cut_and_one_corrupt_sample(share: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, members = pairs_tar(folder)
        end = members[-1].offset_data + 512  # then come blocks of zeros, the first of which ends it
        cut = round(share * (end + 600))
        path.write_bytes(path.read_bytes()[:cut])
        found = read(TarSource(path, pair_from_sample))
    whole = [document for i, document in enumerate(PAIRS) if (m := members[2 * i + 1]).offset_data + m.size <= cut]
    damage = found.pop() if cut < end + 512 else None
    assert found == whole
    if damage is not None:
        assert isinstance(damage, CorruptSample)
        assert damage.error.startswith(f"damaged after {len(whole)} samples, the rest is lost: ")


outside_of_the_checksum = st.integers(0, 147) | st.integers(156, 511)


@given(sample=st.integers(0, 3), byte=outside_of_the_checksum, bit=st.integers(0, 7))
def test_a_damaged_header_is_not_taken_for_the_end(sample: int, byte: int, bit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, members = pairs_tar(folder)
        content = bytearray(path.read_bytes())
        content[members[2 * sample].offset + byte] ^= 1 << bit
        path.write_bytes(content)
        *found, damage = read(TarSource(path, pair_from_sample))
    assert found == PAIRS[:sample]
    assert isinstance(damage, CorruptSample)
    assert f"damaged after {sample} samples" in damage.error


@given(share=st.floats(0, 0.99))
def test_a_truncated_compressed_file_is_damaged(share: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, _ = pairs_tar(folder, "w:gz")
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        found = read(TarSource(path, pair_from_sample))
    if found != PAIRS:  # which may all stand before the cut
        *found, damage = found
        assert found == PAIRS[: len(found)]
        assert isinstance(damage, CorruptSample)
        assert "the rest is lost" in damage.error


@pytest.mark.parametrize("content", [b"", b"no tar file", bytes(range(256)) * 9])
def test_a_file_of_another_kind_is_a_corrupt_sample(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    write_tar(tmp_path / "y.tar", {"1.json": b'{"key": "1", "parts": []}'})
    write_tar(tmp_path / "z.tar", {})
    damage, document = read(TarSource(tmp_path))
    assert isinstance(damage, CorruptSample)
    assert damage.key == str(tmp_path / "x.tar")
    assert document == Document((), key="1")


@pytest.mark.parametrize("paths", ["missing.tar", ["a.tar", "missing.tar"], ".", "empty", []])
def test_missing_files_are_errors_at_once(paths: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(Path("a.tar"), {}).rename("a.tar")
    Path("empty").mkdir()
    if paths == ".":
        Path("a.tar").unlink()
    with pytest.raises(
        ValueError, match=r"there is no file or folder 'missing\.tar'|has no files that end in|got none"
    ):
        TarSource(paths)


def test_what_stops_the_writing_leaves_whole_files_only(tmp_path: Path) -> None:
    def stop() -> Iterator[Document]:
        yield from PAIRS[:3]
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_shards(stop(), tmp_path, per_shard=2)
    assert [path.name for path in tmp_path.iterdir()] == ["000000.tar"]
    assert read(TarSource(tmp_path)) == [Document(d.parts, key=d.key) for d in PAIRS[:2]]
    with pytest.raises(ValueError, match="has tar files already"):
        write_shards(PAIRS, tmp_path)


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    seen = []

    def watch() -> Iterator[Document]:
        for document in PAIRS:
            seen.append(sorted(path.name for path in tmp_path.glob("*.tar")))
            yield document

    write_shards(watch(), tmp_path, per_shard=2)
    assert seen == [[], [], ["000000.tar"], ["000000.tar"]]


def test_what_cannot_be_written_is_an_error_that_names_the_document(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a medium of document 'cat' cannot be read: .*missing\.jpg"):
        write_shards([Document((Medium("image", Path("missing.jpg")),), key="cat")], tmp_path)
    with pytest.raises(ValueError, match="per_shard must be at least 1, got 0"):
        write_shards([], tmp_path, per_shard=0)
    assert list(tmp_path.iterdir()) == []

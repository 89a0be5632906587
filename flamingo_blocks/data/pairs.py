"""Pairs: an image or a video, then the text that describes it (ALIGN, LTIP and VTP in the paper).

Source: Alayrac et al. 2022 (Flamingo), section 2.4. Media are not decoded here.
"""

import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, no_type_check

from flamingo_blocks.data.document import CorruptSample, Document, Medium
from flamingo_blocks.data.source import read_one

IMAGE_SUFFIXES = frozenset({"avif", "bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp"})


def pair_from_sample(sample: Mapping[str, Any], *, caption_field: str | None = None) -> Document:
    """Make a document of a sample of a tar file, as webdataset and img2dataset have them.

    Args:
        sample: Its members by name: one that is named as images (`jpg`, `png`, ...) or videos (`mp4`, `webm`, ...) are,
            and one with the text. Bytes, or where they are.
        caption_field: Where the text is in the member `json`. None: the member `txt` is the text.

    Raises:
        ValueError: If there is not one medium, or no text.

    Example:
        ```python
        from functools import partial

        from flamingo_blocks.data import pair_from_sample

        sample = {"__key__": "7", "jpg": b"...", "json": b'{"alt": "A cat."}'}
        assert pair_from_sample(sample, caption_field="alt").text == "A cat."
        # TarSource("shards", partial(pair_from_sample, caption_field="alt"))
        ```
    """
    names = sorted(name for name in sample if not name.startswith("__"))
    media = [(name, kind) for name in names if (kind := _kind(name)) is not None]
    if len(media) != 1:
        raise ValueError(f"a pair must have one image or video, got the members {names}")
    ((name, kind),) = media
    member = "txt" if caption_field is None else "json"
    if member not in sample:
        raise ValueError(f"a pair must have its text in a member {member}, got {names}")
    content = sample[member]
    text = (content.read_bytes() if isinstance(content, Path) else content).decode("utf-8-sig")
    if caption_field is not None:
        if not isinstance(fields := json.loads(text), dict) or caption_field not in fields:
            raise ValueError(f"the member json must have a field {caption_field!r}, got {text:.80}")
        text = fields[caption_field]
    return _pair(as_medium(sample[name], kind), text, key=sample["__key__"])


def document_from_pair(
    record: Mapping[str, Any],
    *,
    medium: str = "image",
    text: str = "text",
    kind: Literal["image", "video"] = "image",
    key: str | None = None,
) -> Document:
    """Make a document of a record with an image or a video and a text: a line of JSON, a row of a table.

    Args:
        record: E.g. `{"image": "cat.jpg", "text": "A cat."}`. The medium is bytes, a path, `{"bytes": ..., "path":
            ...}` or a PIL image. PIL images are encoded again; let `datasets` give bytes instead, by
            `dataset.cast_column("image", datasets.Image(decode=False))`.
        medium: The name of the field with the medium; `"file_name"` in metadata of `datasets`' folders.
        text: That of the text.
        kind: What the medium is.
        key: The name of the field that names the document. None: the medium's path names it, if there is one.

    Raises:
        ValueError: If a field is missing or of another kind, or there is no text.
    """
    for name in (medium, text) if key is None else (medium, text, key):
        if name not in record:
            raise ValueError(f"a pair must have a field {name!r}, got {sorted(record)}")
    value = record[medium]
    path = value.get("path") if isinstance(value, Mapping) else value
    named = (path if isinstance(path, str | Path) else "") if key is None else record[key]
    return _pair(as_medium(value, kind), record[text], key=str(named or ""))


class PairFolder:
    """Images or videos in a folder, each beside a file of the same name with its text: `cat.jpg` and `cat.txt`.

    The folder itself and the folders in it are shards, where they hold media, sorted by name: img2dataset writes files
    so. Of a folder, pairs are sorted by name. A medium without a text is a corrupt sample, and so is a text without a
    medium. Files of other kinds are left out.

    Args:
        folder: Where they are.
        caption_field: Where the text is in a file `.json`. None: a file `.txt` is the text.

    Raises:
        ValueError: If there is no such folder, or no medium in it.
    """

    def __init__(self, folder: str | Path, *, caption_field: str | None = None) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"there is no folder {str(folder)!r}")
        inner = sorted(path for path in folder.iterdir() if path.is_dir())
        self.folders = tuple(path for path in (folder, *inner) if _holds_media(path))
        if not self.folders:
            raise ValueError(f"the folder {str(folder)!r} and the folders in it hold no images and no videos")
        self.caption_field = caption_field

    def __len__(self) -> int:
        """Tell how many folders there are."""
        return len(self.folders)

    def read(self, shard: int) -> Iterator[Document | CorruptSample]:
        """Read the pairs of a folder, one by one."""
        folder = self.folders[shard]
        text_suffix = "txt" if self.caption_field is None else "json"
        samples: dict[str, dict[str, Any]] = {}
        for name in sorted(path.name for path in folder.iterdir()):
            stem, _, suffix = name.rpartition(".")
            is_text = suffix.lower() == text_suffix
            if (is_text or _kind(suffix)) and not name.startswith("."):
                sample = samples.setdefault(stem, {"__key__": str(folder / stem)})
                sample[text_suffix if is_text else suffix] = folder / name
        for stem, sample in sorted(samples.items()):
            make = partial(pair_from_sample, sample, caption_field=self.caption_field)
            yield read_one(make, key=str(folder / stem))


@no_type_check  # PIL is not imported for a signature
def as_medium(value: Any, kind: Literal["image", "video"]) -> Medium:
    """Make a medium of what holds one: bytes, a path, `{"bytes": ..., "path": ...}`, a PIL image.

    Raises:
        ValueError: If it is something else, or empty.
    """
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes) and value:
        return Medium(kind, value)
    if isinstance(value, str | Path) and str(value):
        return Medium(kind, Path(value))
    if hasattr(value, "getbands") and kind == "image":  # a PIL image
        return Medium.from_pil(value)
    what = "empty" if value == b"" or value == "" else type(value).__name__
    raise ValueError(f"the {kind} must be bytes, a path or a dict of both, got {what}")


def _pair(medium: Medium, text: Any, *, key: str) -> Document:
    if not isinstance(text, str):
        raise ValueError(f"the text must be a string, got {type(text).__name__}")
    if not text.strip():
        raise ValueError("the text is empty")
    return Document((medium, text.strip()), key=key)


def _kind(suffix: str) -> Literal["image", "video"] | None:
    from flamingo_blocks.video import has_video_suffix  # which needs more than torch

    if suffix.lower() in IMAGE_SUFFIXES:
        return "image"
    return "video" if has_video_suffix(f"file.{suffix}") else None


def _holds_media(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(_kind(entry.name.rpartition(".")[2]) for entry in entries)

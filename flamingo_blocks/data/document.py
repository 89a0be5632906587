"""Document: text and media in the order in which they are read. Every source of data gives it."""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, no_type_check

# How files of each kind begin, for the names of members in webdataset's form.
_SIGNATURES = (
    (re.compile(rb"\xff\xd8\xff"), "jpg"),
    (re.compile(rb"\x89PNG\r\n"), "png"),
    (re.compile(rb"GIF8"), "gif"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "webp"),
    (re.compile(rb"....ftypavif", re.DOTALL), "avif"),
    (re.compile(rb"BM"), "bmp"),
    (re.compile(rb"II\*\0|MM\0\*"), "tiff"),
    (re.compile(rb"....ftyp", re.DOTALL), "mp4"),
    (re.compile(rb"\x1a\x45\xdf\xa3"), "mkv"),
    (re.compile(rb"RIFF....AVI ", re.DOTALL), "avi"),
)
# Modes of PIL images that PNG gives back as they were.
_PNG_MODES = frozenset({"1", "I;16", "L", "LA", "P", "RGB", "RGBA"})


@dataclass(frozen=True)
class Medium:
    """An image or a video as it is stored: a file, or the bytes of one. It is not decoded here.

    Args:
        kind: `"image"` or `"video"`.
        source: The bytes, or where the file is.
    """

    kind: Literal["image", "video"]
    source: bytes | Path = field(repr=False)

    def __post_init__(self) -> None:
        if self.kind not in ("image", "video"):
            raise ValueError(f'kind must be "image" or "video", got {self.kind!r}')
        if not isinstance(self.source, bytes | Path):
            raise ValueError(f"source must be bytes or a Path, got {type(self.source).__name__}")

    @classmethod
    @no_type_check  # PIL is not imported for a signature
    def from_pil(cls, image: Any) -> "Medium":
        """Encode a PIL image, without loss, and which way is up. PNG does not have all modes, e.g. CMYK: TIFF does."""
        file = BytesIO()
        form = "PNG" if image.mode in _PNG_MODES else "TIFF"
        image.save(file, format=form, exif=image.info.get("exif", b""))
        return cls("image", file.getvalue())

    def open(self) -> BytesIO | Path:
        """Give what image and video readers take."""
        return BytesIO(self.source) if isinstance(self.source, bytes) else self.source

    def read(self) -> bytes:
        """Give the bytes of the file.

        Raises:
            OSError: If there is no such file.
        """
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    def digest(self) -> str:
        """Give a SHA-256 of the bytes, by which features are cached."""
        return hashlib.sha256(self.read()).hexdigest()


@dataclass(frozen=True)
class Document:
    """Text and media in the order in which they are read: a web page, a captioned image, a described video, or text.

    Args:
        parts: Strings and media.
        key: Names the document in reports.

    Raises:
        ValueError: If a part is neither a string nor a `Medium`.

    Example:
        ```python
        from pathlib import Path
        from flamingo_blocks.data import Document, Medium

        document = Document(("Our cat.", Medium("image", Path("cat.jpg")), "She sleeps."), key="page 7")
        assert Document.from_json(document.to_json()) == document
        ```
    """

    parts: tuple[str | Medium, ...]
    key: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        for part in self.parts:
            if not isinstance(part, str | Medium):
                raise ValueError(f"parts must be strings and Medium objects, got {type(part).__name__}")

    @property
    def media(self) -> tuple[Medium, ...]:
        """The media alone."""
        return tuple(part for part in self.parts if isinstance(part, Medium))

    @property
    def text(self) -> str:
        """The text alone."""
        return "".join(part for part in self.parts if isinstance(part, str))

    # ------------------------------------------------------------ JSON

    def to_json(self) -> str:
        """Write one line of JSON.

        Parts are written as transformers' chats have them: `{"type": "text", "text": ...}`, `{"type": "image", "path":
        ...}`, with `"base64"` instead of a path where the document holds the bytes.
        """
        return self._dump([_to_json(part) for part in self.parts])

    @classmethod
    def from_json(cls, line: str | bytes, *, root: Path | None = None) -> "Document":
        """Read a document from JSON.

        Args:
            line: What `to_json` wrote.
            root: The folder that relative paths start from; the working directory, if not given.

        Raises:
            ValueError: If it is no such JSON.
        """

        def load(part: Mapping[str, Any]) -> bytes | Path:
            if isinstance(path := part.get("path"), str):
                return Path(path) if root is None else root / path
            try:
                return base64.b64decode(part["base64"], validate=True)
            except (KeyError, TypeError, binascii.Error) as error:
                raise ValueError('a medium must have a "path", or its bytes as "base64"') from error

        return cls._load(line, load)

    # ------------------------------------------------------------ webdataset

    def to_sample(self) -> dict[str, str | bytes]:
        """Give a sample of webdataset: a member `json` with the order of the parts, and one for each medium.

        Raises:
            OSError: If a medium's file is missing.
        """
        members: dict[str, str | bytes] = {}
        parts = []
        for part in self.parts:
            if isinstance(part, str):
                parts.append(_to_json(part))
            else:
                content = part.read()
                name = f"{len(members)}.{_suffix(content)}"
                members[name] = content
                parts.append({"type": part.kind, "member": name})
        key = re.sub(r"[^\w/-]", "_", self.key)  # a dot would end it
        return {"__key__": key or "document", "json": self._dump(parts).encode(), **members}

    @classmethod
    def from_sample(cls, sample: Mapping[str, Any]) -> "Document":
        """Read a document from a sample that `to_sample` made.

        Raises:
            ValueError: If it is no such sample, or a medium is missing.
        """

        def load(part: Mapping[str, Any]) -> bytes:
            content = sample.get(part.get("member", ""))
            if not isinstance(content, bytes):
                raise ValueError(f"the medium {part.get('member')!r} is not in the sample, which has {sorted(sample)}")
            return content

        if "json" not in sample:
            raise ValueError(f"a document's sample must have a member json, got {sorted(sample)}")
        return cls._load(sample["json"], load)

    def _dump(self, parts: Sequence[Mapping[str, Any]]) -> str:
        return json.dumps({"key": self.key, "parts": parts}, ensure_ascii=False)

    @classmethod
    def _load(cls, line: str | bytes, load: Any) -> "Document":
        try:
            content = json.loads(line)
        except ValueError as error:  # wrong UTF-8, too
            raise ValueError(f"a document must be JSON: {error}") from error
        parts = content.get("parts") if isinstance(content, dict) else None
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise ValueError('a document must be {"key": ..., "parts": [{"type": ..., ...}, ...]}')
        found: list[str | Medium] = []
        for part in parts:
            kind = part.get("type")
            if kind == "text" and isinstance(part.get("text"), str):
                found.append(part["text"])
            elif kind in ("image", "video"):
                found.append(Medium(kind, load(part)))
            else:
                raise ValueError(f'a part must be a "text", an "image" or a "video", got {part!s:.80}')
        return cls(tuple(found), key=str(content.get("key", "")))


@dataclass(frozen=True)
class CorruptSample:
    """What a source gives in the place of a sample that it cannot read, so that it is counted and reported.

    Args:
        key: Names the sample.
        error: What is wrong with it.
    """

    key: str
    error: str


def _to_json(part: str | Medium) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part.source, Path):
        return {"type": part.kind, "path": str(part.source)}
    return {"type": part.kind, "base64": base64.b64encode(part.source).decode()}


def _suffix(content: bytes) -> str:
    return next((suffix for signature, suffix in _SIGNATURES if signature.match(content)), "bin")

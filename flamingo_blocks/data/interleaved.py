"""Interleaved: public collections of web pages with images in their text, MMC4 and OBELICS.

Both tell where images were on the web, not the images: these come from `resolve`, which looks them up among what was
downloaded before. An image that it does not have is left out of its document, as web pages lose images all the time. A
document that had images and is left with none of them is corrupt.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from flamingo_blocks.data.document import Document, Medium
from flamingo_blocks.data.pairs import as_medium

Resolve = Callable[[str], bytes | None]


def document_from_mmc4(
    record: Mapping[str, Any],
    *,
    resolve: Resolve,
    image: str = "image_name",
    place: Literal["before", "after"] = "before",
) -> Document:
    """Make a document of a line of MMC4.

    Sentences are joined by spaces.

    Args:
        record: `text_list` has the sentences of a page. Each item of `image_info` has an image's names and, as
            `matched_text_index`, the sentence that it belongs to.
        resolve: Gives the bytes of an image by its name, or None where it is not there.
        image: Which name `resolve` takes: `"image_name"`, that of MMC4's own files, or `"raw_url"`.
        place: Whether images stand before their sentence or after it. MMC4 does not say. Before it, the sentence is
            learned from its image, as a caption is.

    Raises:
        ValueError: If the record is another one, or none of its images is there.

    Source: Zhu et al. 2023 (Multimodal C4), section 3.

    Example:
        ```python
        from functools import partial

        from flamingo_blocks.data import Document, Medium, document_from_mmc4

        record = {
            "text_list": ["Our cats.", "This is Tom."],
            "image_info": [{"image_name": "a.jpg", "matched_text_index": 1}],
        }
        document = document_from_mmc4(record, resolve={"a.jpg": b"..."}.get)
        assert document.parts == ("Our cats.", Medium("image", b"..."), "This is Tom.")
        # JsonLinesSource("docs_no_face_shard_0_v3.jsonl", partial(document_from_mmc4, resolve=...))
        ```
    """
    if place not in ("before", "after"):
        raise ValueError(f'place must be "before" or "after", got {place!r}')
    sentences, images = _list(record, "text_list"), _list(record, "image_info")
    media: list[list[Medium | None]] = [[] for _ in sentences]
    for info in images:
        index = info["matched_text_index"]
        if type(index) is not int or not 0 <= index < len(sentences):
            raise ValueError(f"matched_text_index must be in 0..{len(sentences) - 1}, got {index!r}")
        media[index].append(_look_up(info[image], resolve))
    parts: list[str | Medium | None] = []
    for sentence, its_media in zip(map(_text, sentences), media, strict=True):
        parts += [*its_media, sentence] if place == "before" else [sentence, *its_media]
    return _join(parts, " ", key=record.get("url"))


def document_from_obelics(row: Mapping[str, Any], *, resolve: Resolve | None = None) -> Document:
    """Make a document of a row of OBELICS.

    Neighbouring texts are joined by empty lines, as paragraphs are.

    Args:
        row: `images` and `texts` are equally long; at each place, one of them has something and the other None. Images
            are addresses on the web; or bytes, or `{"bytes": ..., "path": ...}`, where somebody has added them.
        resolve: Gives the bytes of an image by its address, or None where it is not there.

    Raises:
        ValueError: If the row is another one, none of its images is there, or there are addresses and no `resolve`.

    Source: Laurençon et al. 2023 (OBELICS), section 3.

    Example:
        ```python
        from functools import partial

        from flamingo_blocks.data import Document, Medium, document_from_obelics

        row = {"images": [None, "https://a.org/1.jpg", None], "texts": ["Our cat.", None, "She sleeps."]}
        document = document_from_obelics(row, resolve={"https://a.org/1.jpg": b"..."}.get)
        assert document.parts == ("Our cat.", Medium("image", b"..."), "She sleeps.")
        # ParquetSource("data", partial(document_from_obelics, resolve=...), columns=["images", "texts"])
        ```
    """
    images, texts = _list(row, "images"), _list(row, "texts")
    if len(images) != len(texts):
        raise ValueError(f"images and texts must be equally long, got {len(images)} and {len(texts)}")
    parts: list[str | Medium | None] = []
    for place, (image, text) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (text is None):
            raise ValueError(f"either an image or a text must be at place {place}, got {image!r:.80} and {text!r:.80}")
        if image is None:
            parts.append(_text(text))
        elif not isinstance(image, str):
            parts.append(as_medium(image, "image"))
        elif resolve is None:
            raise ValueError(f"the image at place {place} is an address, {image!r:.200}; pass resolve= to look it up")
        else:
            parts.append(_look_up(image, resolve))
    page = json.loads(row.get("general_metadata") or "{}")
    return _join(parts, "\n\n", key=page.get("url") if isinstance(page, dict) else None)


def _list(record: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = record[name]
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, got {type(value).__name__}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a text must be a string, got {value!r:.80}")
    return value


def _look_up(name: Any, resolve: Resolve) -> Medium | None:
    if not isinstance(name, str):
        raise ValueError(f"the name of an image must be a string, got {name!r:.80}")
    content = resolve(name)
    return as_medium(content, "image") if content else None


def _join(parts: Sequence[str | Medium | None], separator: str, *, key: str | None) -> Document:
    """Join neighbouring texts, and leave out images that are not there."""
    joined: list[str | Medium] = []
    missing = 0
    for part in parts:
        if part is None:
            missing += 1
        elif isinstance(part, Medium):
            joined.append(part)
        elif part.strip():
            before = joined[-1] if joined else None
            if isinstance(before, str):
                joined[-1] = before + separator + part
            else:
                joined.append(part)
    document = Document(tuple(joined), key=str(key or ""))
    if missing and not document.media:
        raise ValueError(f"none of its {missing} images is there")
    if not joined:
        raise ValueError("there is neither text nor an image")
    return document

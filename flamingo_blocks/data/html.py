"""Web pages to documents: text and images in the order of the page, as in the paper's M3W.

Source: Alayrac et al. 2022 (Flamingo), section 2.4 and appendix A.3.1.
"""

import base64
import binascii
import codecs
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit, urlunsplit

from flamingo_blocks.data.document import Document, Medium

Node: TypeAlias = Any  # selectolax's, which is not imported for a signature

# Never text of the page: what is not shown, what is shown by a plugin or a script, and what a user fills in or presses.
# fmt: off
_DROPPED = frozenset([
    "applet", "audio", "button", "canvas", "datalist", "dialog", "embed", "frameset", "head", "iframe", "input",
    "noembed", "noframes", "object", "rp", "script", "select", "style", "svg", "template", "textarea", "title",
    "video",
])
_BLOCKS = frozenset([
    "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "dir", "div", "dl",
    "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header",
    "hgroup", "hr", "html", "legend", "li", "listing", "main", "menu", "nav", "ol", "p", "plaintext", "pre",
    "search", "section", "summary", "table", "tbody", "tfoot", "thead", "tr", "ul", "xmp",
])
# fmt: on
_PREFORMATTED = frozenset(["listing", "plaintext", "pre", "xmp"])
_LAZY = ("data-src", "data-original", "data-lazy-src", "data-lazy")
_LAZY_SETS = ("data-srcset", "data-lazy-srcset", "data-original-set")
_RASTER = frozenset(["", "image/gif", "image/jpeg", "image/jpg", "image/png", "image/webp"])

_SPACE = re.compile(r"[ \t\n\f\r]+")  # what HTML collapses: a non-breaking space stays
_HIDDEN = re.compile(r"(?:^|;)\s*+(?:display\s*+:\s*+none|visibility\s*+:\s*+hidden)\b", re.IGNORECASE)
_LENGTH = re.compile(r"\s*+([0-9]{1,6})(?:\.[0-9]*+)?\s*+(?:px)?\s*+", re.IGNORECASE)
_CANDIDATE = re.compile(r"([^\s,]\S*+)(?:(?<=,)|([^,]*+))")  # a comma ends a URL only before white space
_DESCRIPTOR = re.compile(r"\s*+([0-9]{1,9}(?:\.[0-9]{1,9})?)[wx]")
_BLANK = b" \t\n\f\r\xef\xbb\xbf"
_LONGEST_URL = 2048
_NEAR = 32  # how many nodes beside an image are looked at

# What keeps the parser's time in bounds. Each of its steps may walk through all open elements, so that the number of
# tags and comments bounds it. Each attribute is compared with those before it, so that a tag must not have too many;
# every place is tried where a tag may begin, for what is in a comment or a quotation only the parser knows.
_MARKUP = re.compile(r"<[a-zA-Z/!?]")
_MANY_ATTRIBUTES = re.compile(
    r"<[a-zA-Z][^ \t\n\f\r/>]*+"
    r"(?:[ \t\n\f\r/]*+[^ \t\n\f\r/>][^ \t\n\f\r/>=]*+"
    r"(?:[ \t\n\f\r]*+=[ \t\n\f\r]*+(?:\"[^\"]*+\"?+|'[^']*+'?+|[^ \t\n\f\r>\"'][^ \t\n\f\r>]*+|(?=>)))?+){500}"
)
# Formatting elements that are left open are opened anew in each later paragraph, which can make gigabytes of a small
# page. A mark in their names makes them elements like any other; where it stands in text or attributes, it is taken out
# again. So does <noscript>, of which the head of a page would keep no images and no text.
_MARK = "\ufdd0"  # no character, says Unicode
_FORMATTING = re.compile(
    r"(</?(?:a|b|big|code|em|font|i|nobr|noscript|s|small|strike|strong|tt|u|selectedcontent))(?=[ \t\n\f\r/>])",
    re.IGNORECASE,
)

# Encodings of the web, by their names in Python. Names that browsers read as another encoding's are replaced.
_ENCODING = re.compile(
    r"utf-8|utf-16(?:-[lb]e)?|cp(?:866|874|932|949|125[0-8])|iso8859-\d+|koi8-[ru]|mac-(?:roman|cyrillic)|gbk|gb18030|"
    r"big5(?:hkscs)?|euc_j[px]\w*|iso2022_jp|hz"
)
_READ_AS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
}
_META_CHARSET = re.compile(rb"<meta\b[^>]{0,500}?\bcharset\s*+=\s*+[\"']?\s*+([\w.:-]{1,40})", re.IGNORECASE)


def document_from_html(
    html: bytes | str,
    *,
    resolve: Callable[[str], bytes | None],
    url: str | None = None,
    charset: str | None = None,
    alt_text: bool = False,
    boilerplate: Collection[str] = ("aside", "footer", "nav"),
    min_side: int = 8,
    max_images: int = 256,
    max_image_bytes: int = 2**24,
    max_bytes: int = 2**23,
    max_tags: int = 40_000,
) -> Document:
    r"""Read a web page: its text and images, in the order of its DOM. Nothing is fetched.

    **Text** is what a browser shows, without styles: white space is collapsed, except in `<pre>`; blocks stand on lines
    of their own, `<br>` breaks a line, table cells are parted by a space. Comments, scripts, styles, templates, SVG,
    frames, plugins and the controls of forms (not the text around them: some sites put the whole page into a form) are
    dropped. So is what the attribute `hidden`, `aria-hidden="true"`, or a style `display: none` or `visibility: hidden`
    hides, and the elements of `boilerplate`. `<header>` is not among these, as it often holds the title of an article.

    **Images** are `<img>`; others, such as backgrounds, are not read. For each, these places are tried in turn until
    one gives an image: attributes for lazy loading (`data-srcset`, `data-src`, `data-original`, `data-lazy-src`),
    `<source>` of its `<picture>` (if its type is JPEG, PNG, GIF or WebP, or not said), `srcset`, the `<noscript>`
    beside it, and `src`. Of a set of candidates the largest is tried. `<noscript>` is read for images alone: if it
    holds one and stands beside an image that seems to be loaded lazily, both are one image; otherwise its images stand
    for themselves. Inline `data:` images are decoded. What is SVG or text is no image. An image that is on the page
    several times is kept each time.

    Args:
        html: The page.
        resolve: Gives the bytes that belong to a URL, or None (or no bytes), which drops the image. It is asked once
            for each URL of a page. What it raises is passed on: in a source, an `OSError` makes the page a corrupt
            sample. For the records of a WARC file, use the `get` of a dict from URLs to bytes; for files,
            `FolderResolver`.
        url: Where the page is from. Relative URLs start there, or at the page's `<base href>`; without both, they stay
            relative. It is the key of the document, too.
        charset: The encoding that the server told. An unknown one is passed over, as browsers do.
        alt_text: Whether the `alt` of an image follows it as text.
        boilerplate: The names of elements to drop.
        min_side: An image whose attribute `width` or `height` is less is dropped: it is there to count visitors.
        max_images: The document ends before the image after these many.
        max_image_bytes: A larger image is dropped.
        max_bytes: A longer page is an error, also if it is already decoded (characters are counted then).
        max_tags: A page with more tags and comments is an error. The parser's time may grow with the square of it:
            the worst pages take some seconds with the default, or more if they have tens of thousands of long URLs.

    Returns:
        The document. It has no empty text, and no two texts beside each other.

    Raises:
        ValueError: If the page is longer than a limit, a tag has 500 attributes or more, or `resolve` does not give
            bytes.
        ImportError: If selectolax is missing.

    Bytes are decoded by their byte order mark, else by `charset`, else by the page's `<meta charset>`, else as UTF-8;
    what is wrong becomes U+FFFD.

    Example:
        ```python
        from flamingo_blocks.data import IndexedSource, document_from_html

        images = {"https://example.org/cat.jpg": b"..."}
        pages = [("https://example.org/", b"<p>Our cat:</p><img src='cat.jpg'>")]
        source = IndexedSource(pages, lambda page: document_from_html(page[1], url=page[0], resolve=images.get))
        [document] = source.read(0)
        assert document.text == "Our cat:\n"
        ```

    Source: Alayrac et al. 2022, section 2.4. Differs from the paper: it does not tell which elements were dropped.
    """
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError as error:
        raise ImportError("HTML is read with selectolax; install it with: pip install flamingo-blocks[data]") from error
    if isinstance(boilerplate, str):
        raise ValueError(f"boilerplate must be several names of elements, got {boilerplate!r}; write [{boilerplate!r}]")
    for name, limit in (
        ("min_side", min_side),
        ("max_images", max_images),
        ("max_image_bytes", max_image_bytes),
        ("max_bytes", max_bytes),
        ("max_tags", max_tags),
    ):
        if limit < 0:
            raise ValueError(f"{name} must not be negative, got {limit}")
    if len(html) > max_bytes:
        raise ValueError(f"html must have at most max_bytes={max_bytes} bytes, got {len(html)}")
    page = _decode(html, charset) if isinstance(html, bytes) else html
    page = page.replace("\0", "").replace(_MARK, "")
    if sum(1 for _ in _MARKUP.finditer(page)) > max_tags:
        raise ValueError(
            f"html must have at most max_tags={max_tags} tags and comments; raise it if you trust the page"
        )
    if _MANY_ATTRIBUTES.search(page):
        raise ValueError("html must have less than 500 attributes in a tag; this page has more, which no real page has")
    tree = LexborHTMLParser(_FORMATTING.sub(rf"\1{_MARK}", page).encode("utf-8", "replace"))
    base = tree.css_first("base[href]")
    start = (None if base is None else _absolute(_attributes(base)["href"], url)) or url
    images = _Images(resolve, start, min_side=min_side, max_bytes=max_image_bytes)
    reader = _Reader(images, dropped=_DROPPED | set(boilerplate), alt_text=alt_text, max_images=max_images)
    reader.read(tree.root)
    return Document(reader.writer.parts(), key=url or "")


@dataclass(frozen=True)
class FolderResolver:
    """Find images in a folder on disk, for `document_from_html`.

    The part of a URL that follows the prefix is a path from the folder; a query and a fragment are ignored. What is not
    there, is no file, is larger than the limit, or lies outside of the folder (by `..` or by a symbolic link) is None.

    Args:
        folder: Where the files are.
        prefix: How the URLs begin that are in the folder, e.g. `"https://example.org/"`; others are None. Without one,
            these are the relative URLs, which stay so where a page is read without `url`.
        max_bytes: A larger file is None.

    Example:
        ```python
        from pathlib import Path
        from flamingo_blocks.data import FolderResolver, document_from_html

        document = document_from_html("<img src='a%20cat.jpg'>", resolve=FolderResolver(Path("site")))
        ```
    """

    folder: Path
    prefix: str = ""
    max_bytes: int = 2**24

    def __call__(self, url: str) -> bytes | None:
        """Give the bytes of a file.

        Raises:
            OSError: If there is such a file, and it cannot be read.
        """
        if not url.startswith(self.prefix):
            return None
        parts = urlsplit(url[len(self.prefix) :])
        if parts.scheme or parts.netloc:
            return None
        folder = self.folder.resolve()
        try:
            path = (folder / unquote(parts.path).lstrip("/")).resolve()
            if not path.is_relative_to(folder) or not path.is_file():
                return None
        except (OSError, RuntimeError, ValueError):  # too long a name, links in a circle, a null byte
            return None
        with path.open("rb") as file:
            content = file.read(self.max_bytes + 1)
        return content if len(content) <= self.max_bytes else None


# ------------------------------------------------------------ text


class _Writer:
    """Join texts and media as a browser sets them: breaks and spaces wait until something follows them."""

    def __init__(self) -> None:
        self._parts: list[Medium | list[str]] = []
        self._breaks = 0
        self._space = False

    def text(self, text: str) -> None:
        """Add running text."""
        text = _SPACE.sub(" ", text)
        self._space |= text.startswith(" ")
        if word := text.strip(" "):
            self._write(word)
            self._space = text.endswith(" ")

    def preformatted(self, text: str) -> None:
        """Add text whose white space counts."""
        lines = text.replace("\r\n", "\n").replace("\r", "\n")
        if inner := lines.strip("\n"):
            self._breaks += len(lines) - len(lines.lstrip("\n"))
            self._write(inner)
            self._breaks = len(lines) - len(lines.rstrip("\n"))
        else:
            self._breaks += len(lines)

    def medium(self, medium: Medium) -> None:
        """Add an image, which stands in its line like a word."""
        self._write("")
        self._parts.append(medium)

    def space(self) -> None:
        """Part what is before from what follows."""
        self._space = True

    def line_break(self) -> None:
        """End a line."""
        self._breaks += 1

    def block(self) -> None:
        """Begin a new line, if this one is not empty."""
        self._breaks = max(self._breaks, 1)

    def parts(self) -> tuple[str | Medium, ...]:
        """Give what was written."""
        return tuple(part if isinstance(part, Medium) else "".join(part) for part in self._parts)

    def _write(self, text: str) -> None:
        before = "" if not self._parts else "\n" * self._breaks or " " * self._space
        self._breaks, self._space = 0, False
        if before + text:
            if not self._parts or isinstance(self._parts[-1], Medium):
                self._parts.append([])
            self._parts[-1].append(before + text)  # type: ignore[union-attr]


# ------------------------------------------------------------ the tree


class _Reader:
    """Walk through a tree, and write its texts and images."""

    def __init__(self, images: "_Images", *, dropped: frozenset[str], alt_text: bool, max_images: int) -> None:
        self.writer = _Writer()
        self._images = images
        self._dropped = dropped
        self._alt_text = alt_text
        self._images_left = max_images
        self._preformatted = 0  # how many such elements are open
        self._noscripts = 0

    def read(self, root: Node) -> None:
        """Read it all, or up to the first image that is too many. Depth costs no stack: the tree knows the way back."""
        node = root
        while node is not None:
            if node.is_element_node and node.tag == "img" and self._images.is_shown(node):
                if self._images_left == 0:
                    return
                self._image(node)
            child = self._enter(node)
            while child is None and node is not None:
                child = node.next
                if child is None:
                    node = node.parent
                    if node is not None:
                        self._leave(node)
            node = child

    def _enter(self, node: Node) -> Node | None:
        """Write a text or the beginning of an element; give its first child, if the element is read."""
        if node.is_text_node:
            if not self._noscripts:
                text = node.text_content.replace(_MARK, "")
                self.writer.preformatted(text) if self._preformatted else self.writer.text(text)
            return None
        if not node.is_element_node:
            return None
        tag = _tag(node)
        if tag in self._dropped:
            self._edge(tag)
            return None
        if _is_hidden(_attributes(node)):
            return None
        if tag == "noscript" and self._images.replaced_by(node) is not None:
            return None
        if tag == "br" and not self._noscripts:
            self.writer.line_break()
        self._edge(tag)
        child = node.first_child
        if child is not None:
            self._preformatted += tag in _PREFORMATTED
            self._noscripts += tag == "noscript"
        return child

    def _leave(self, node: Node) -> None:
        tag = _tag(node)
        self._edge(tag)
        self._preformatted -= tag in _PREFORMATTED
        self._noscripts -= tag == "noscript"

    def _edge(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.writer.block()
        elif tag in ("td", "th"):
            self.writer.space()

    def _image(self, node: Node) -> None:
        content = self._images.content(node)
        if content is None:
            return
        self._images_left -= 1
        self.writer.medium(Medium("image", content))
        if self._alt_text and (alt := _attributes(node).get("alt")):
            self.writer.space()
            self.writer.text(alt)
            self.writer.space()


def _tag(node: Node) -> str:
    return node.tag.removesuffix(_MARK)


def _attributes(node: Node) -> dict[str, str]:
    return {name: (value or "").replace(_MARK, "") for name, value in node.attributes.items()}


def _is_hidden(attributes: dict[str, str]) -> bool:
    return (
        "hidden" in attributes
        or attributes.get("aria-hidden", "").lower() == "true"
        or _HIDDEN.search(attributes.get("style", "")) is not None
    )


def _siblings(node: Node | None, way: Literal["next", "prev"] = "next") -> Iterator[Node]:
    """Give a node and some after or before it, but no comments and blank texts."""
    for _ in range(_NEAR):
        if node is None:
            return
        if node.is_element_node or (node.is_text_node and node.text_content.strip()):
            yield node
        node = getattr(node, way)


# ------------------------------------------------------------ images


@dataclass(frozen=True)
class _Images:
    """Find the bytes of images."""

    resolve: Callable[[str], bytes | None]
    base: str | None
    min_side: int
    max_bytes: int
    resolved: dict[str, bytes | None] = field(default_factory=dict)

    def is_shown(self, node: Node) -> bool:
        """Tell whether an image is neither hidden nor tiny."""
        attributes = _attributes(node)
        sides = (_LENGTH.fullmatch(attributes.get(name, "")) for name in ("width", "height"))
        return not _is_hidden(attributes) and all(side is None or int(side[1]) >= self.min_side for side in sides)

    def content(self, node: Node) -> bytes | None:
        """Give the bytes of an image, from the first place that has them."""
        for url in self._places(node):
            absolute = _absolute(url, self.base)
            if absolute is None:
                continue
            content = _inline(absolute, self.max_bytes) if _is_inline(absolute) else self._resolve(absolute)
            if content and len(content) <= self.max_bytes and not content[:64].lstrip(_BLANK).startswith(b"<"):
                return content
        return None

    def _resolve(self, url: str) -> bytes | None:
        if url not in self.resolved:
            content = self.resolve(url)
            if not (content is None or isinstance(content, bytes)):
                raise ValueError(f"resolve must give bytes or None, got {type(content).__name__} for {url}")
            self.resolved[url] = content
        return self.resolved[url]

    def _places(self, node: Node) -> Iterator[str]:
        attributes = _attributes(node)
        yield from (_largest(attributes.get(name, "")) for name in _LAZY_SETS)
        yield from (attributes.get(name, "") for name in _LAZY)
        if node.parent is not None and node.parent.tag == "picture":
            for sibling in _siblings(node.parent.first_child):
                source = _attributes(sibling) if sibling.tag == "source" else {"type": "none"}
                if source.get("type", "").lower().strip() in _RASTER:
                    yield from (_largest(source.get(name, "")) for name in (*_LAZY_SETS, "srcset"))
        yield _largest(attributes.get("srcset", ""))
        for noscript in _beside(node):
            if _tag(noscript) == "noscript" and self.replaced_by(noscript) == node:
                yield from self._places(_only_image(noscript))
        yield attributes.get("src", "")

    def replaced_by(self, noscript: Node) -> Node | None:
        """Give the image beside a `<noscript>` that its image stands for, if there is one."""
        fallback = _only_image(noscript)
        if fallback is None:
            return None
        for node in _beside(noscript):
            image = _image_in(node)
            if image is not None and self.is_shown(image) and _is_lazy(image, fallback):
                return image
        return None


def _beside(node: Node) -> Iterator[Node]:
    """Give what stands directly before and after an element, or after and before the `<picture>` that it is in."""
    if node.parent is not None and node.parent.tag == "picture":
        node = node.parent
    yield from islice(_siblings(node.prev, "prev"), 1)
    yield from islice(_siblings(node.next), 1)


def _image_in(node: Node) -> Node | None:
    """Give a node that is an image, or the image of a `<picture>`."""
    if node.tag == "picture":
        return next((child for child in _siblings(node.first_child) if child.tag == "img"), None)
    return node if node.tag == "img" else None


def _only_image(noscript: Node) -> Node | None:
    """Give the image of a `<noscript>` that has nothing else."""
    content = list(islice(_siblings(noscript.first_child), 2))
    return _image_in(content[0]) if len(content) == 1 else None


def _is_lazy(image: Node, fallback: Node) -> bool:
    attributes = _attributes(image)
    source = attributes.get("src", "")
    return (
        not source
        or _is_inline(source)
        or source == _attributes(fallback).get("src")
        or "lazy" in attributes.get("class", "")
        or any(name in attributes for name in (*_LAZY, *_LAZY_SETS))
    )


def _largest(srcset: str) -> str:
    """Give the URL of the widest or densest candidate, the first of these; an empty string, if there is none."""
    largest, best = "", -1.0
    for url, descriptor in _CANDIDATE.findall(srcset):
        size = _DESCRIPTOR.match(descriptor)
        value = float(size[1]) if size else 1.0
        if value > best:
            largest, best = url.rstrip(","), value
    return largest


def _is_inline(url: str) -> bool:
    return url[:32].lstrip().lower().startswith("data:")


def _inline(url: str, max_bytes: int) -> bytes | None:
    """Decode a `data:` URL, if it is a raster image of at most so many bytes."""
    head, _, body = url.lstrip()[5:].partition(",")
    kind = head.partition(";")[0].strip().lower()
    if not kind.startswith("image/") or "svg" in kind or len(body) > 4 * max_bytes:
        return None
    content = unquote_to_bytes(body)
    if head.rstrip().lower().endswith("base64"):
        digits = re.sub(rb"[^A-Za-z0-9+/]", b"", content)
        try:
            content = base64.b64decode(digits + b"=" * (-len(digits) % 4))
        except binascii.Error:  # one digit too many
            return None
    return content


def _absolute(url: str, base: str | None) -> str | None:
    """Give a URL as a browser asks for it: from the base, without a fragment, with unusual characters encoded.

    None where there is nothing to ask for: an empty or endless URL, or an image that is no raster.
    """
    if _is_inline(url):
        return url
    url = re.sub(r"[\t\n\r]", "", url.strip())
    if not url or len(url) > _LONGEST_URL:
        return None
    try:
        parts = urlsplit(urljoin(base or "", url))
        path, query = quote(parts.path, safe="%/:@!$&'()*+,;=|[]"), quote(parts.query, safe="%/:@!$&'()*+,;=|[]?^`{}\\")
    except ValueError:  # no such host, or half a character
        return None
    if path.lower().endswith((".svg", ".svgz")):
        return None
    return urlunsplit(parts._replace(path=path, query=query, fragment=""))


# ------------------------------------------------------------ bytes


def _decode(html: bytes, charset: str | None) -> str:
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if html.startswith(mark):
            return html[len(mark) :].decode(encoding, "replace")
    if told := _encoding(charset or ""):
        return html.decode(told, "replace")
    meta = _META_CHARSET.search(html, 0, 2048)
    found = _encoding(meta[1].decode("ascii", "replace")) if meta else None
    if found is not None and found.startswith("utf-16"):  # in which that could not have been read
        found = "utf-8"
    return html.decode(found or "utf-8", "replace")


def _encoding(charset: str) -> str | None:
    """Give the encoding that browsers read under this name."""
    try:
        name = codecs.lookup(charset.strip().strip("\"'")).name
    except (LookupError, ValueError):  # a null byte
        return None
    name = _READ_AS.get(name, name)
    return name if _ENCODING.fullmatch(name) else None

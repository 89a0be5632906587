"""A page is read as a browser shows it: its text and images in their order, whatever the page does."""

import base64
import importlib.metadata
import io
import os
import re
import time
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import hypothesis.strategies as st
import markdown  # type: ignore[import-untyped]
import matplotlib
import pytest
from hypothesis import example, given
from PIL import Image

from flamingo_blocks.data import CorruptSample, Document, FolderResolver, IndexedSource, Medium, document_from_html


def read(html: bytes | str, **options: Any) -> Document:
    """Read a page whose every URL has an image: itself."""
    return document_from_html(html, **{"resolve": str.encode, **options})


def shown(html: bytes | str, **options: Any) -> str:
    """Show images as their bytes in brackets."""
    parts = read(html, **options).parts
    return "".join(part if isinstance(part, str) else f"[{part.read().decode()}]" for part in parts)


class SlowReader(HTMLParser):
    """Read well-formed pages with the standard library: what is between words is reduced at the end."""

    BLOCKS = frozenset(
        [
            "blockquote",
            "body",
            "details",
            "div",
            "h1",
            "h2",
            "h3",
            "h4",
            "hr",
            "html",
            "li",
            "nav",
            "ol",
            "p",
            "pre",
            "summary",
            "ul",
        ]
    )

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found = ""
        self.skipped = 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BLOCKS and not self.skipped:
            self.found += "\x01"
        if tag in ("script", "style", "nav", "title"):
            self.skipped += 1
        elif self.skipped:
            return
        elif tag == "img":
            self.found += f"[{dict(attrs)['src']}]"
        elif tag == "br":
            self.found += "\x02"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style", "nav", "title"):
            self.skipped -= 1
        if tag in self.BLOCKS and not self.skipped:
            self.found += "\x01"

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.found += re.sub(r"[ \t\n]", " ", data)

    def result(self) -> str:
        def between(match: re.Match[str]) -> str:
            lines = 0
            for character in match[0]:
                lines = lines + 1 if character == "\x02" else max(lines, 1) if character == "\x01" else lines
            return "\n" * lines or " "

        return re.sub(r"[ \x01\x02]+", between, self.found.strip(" \x01\x02"))


words = st.text("ab <&;\n\té\xa0", max_size=6).map(lambda text: escape(text, quote=False))
images = st.integers(0, 5).map(lambda number: f'<img src="{number}.png">')
leaves = words | images | st.just("<br>") | st.sampled_from(["<!-- no -->", "<script>if (a<b) no()</script>"])
inline = st.recursive(
    leaves,
    lambda inner: st.builds("<{0}>{1}</{0}>".format, st.sampled_from(["b", "i", "span"]), st.lists(inner).map("".join)),
    max_leaves=8,
)
markup = st.recursive(
    inline,
    lambda inner: st.builds(
        "<{0}>{1}</{0}>".format, st.sampled_from(["div", "ul", "nav"]), st.lists(inner).map("".join)
    ),
    max_leaves=20,
)


@given(html=markup)
@example(html="a<div> b</div>c <br> <br><div>d</div><img src=0.png> <img src=0.png>")
def test_a_page_is_read_as_the_standard_library_reads_it(html: str) -> None:
    assert shown(html) == SlowReader(html).result()
    assert shown(html.encode(), charset="utf-8") == shown(html)


@given(st.lists(st.integers(0, 3), max_size=12))
def test_each_image_is_kept_once_for_each_time_and_asked_for_once(numbers: list[int]) -> None:
    asked = []

    def resolve(url: str) -> bytes:
        asked.append(url)
        return url.encode()

    document = document_from_html("".join(f"<p><img src={number}>" for number in numbers), resolve=resolve)
    assert [medium.source for medium in document.media] == [str(number).encode() for number in numbers]
    assert asked == [str(number) for number in dict.fromkeys(numbers)]


PIECES = [
    b"<",
    b">",
    b"</",
    b"<p>",
    b"<b a=",
    b'"',
    b"'",
    b"<!--",
    b"-->",
    b"<table>",
    b"<td>",
    b"<svg>",
    b"<img src=",
    b"&#",
]
PIECES += [b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xb7\x90", b"<noscript>", b"<picture>", b"<source srcset=", b" data:"]
PIECES += [
    b"http://[",
    b"//[",
    b"<base href=",
    b"<meta charset=",
    b"zip>",
    b"<pre>",
    b"<template>",
    b"<frameset>",
    b" 1x,",
]
PIECES += [b"image/png;base64,", b" style=display:none", b"<select>", b"<plaintext>", b"<script>", b"image/png,%4"]


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=4), max_size=30).map(b"".join))
def test_any_bytes_are_a_page(html: bytes) -> None:
    document = read(html, url="http://e.org/", alt_text=True)
    kinds = [isinstance(part, str) for part in document.parts]
    assert "" not in document.parts
    assert not any(a and b for a, b in pairwise(kinds))


@given(st.text(st.characters(), max_size=20))
def test_any_string_is_a_page(html: str) -> None:
    read(html)


# ------------------------------------------------------------ pages that exist


@pytest.mark.parametrize("package", ["accelerate", "einops", "mkdocs-material", "timm", "transformers"])
def test_descriptions_of_packages_have_the_words_and_images_that_the_standard_library_finds(package: str) -> None:
    description = importlib.metadata.metadata(package).json["description"]
    html = markdown.markdown(description, extensions=["fenced_code"])
    expected = SlowReader(html).result().split()
    assert len(expected) > 50
    assert shown(html).split() == [word for word in expected if not re.match(r"\[[^?]*\.svg(\?.*)?\]", word)]


def test_a_page_of_scripts_says_what_it_shows() -> None:
    folder = Path(matplotlib.__file__).parent / "backends" / "web_backend"
    assert read((folder / "all_figures.html").read_bytes()).parts == ()


# ------------------------------------------------------------ text


@pytest.mark.parametrize(
    "html, text",
    [
        ("<p> one\n two<b> three</b>four </p> five", "one two threefour\nfive"),
        ("a<br>b<br><br>c<br></p>d", "a\nb\n\nc\nd"),
        ("a<pre>\n  b\n\n c\n</pre>d", "a\n  b\n\n c\nd"),
        ("<table><tr><td>1<td>2<tr><td>3</table>", "1 2\n3"),
        ("&lt;a&gt; &eacute;&nbsp; &#x1F600;&#0;", "<a> é\xa0 😀\ufffd"),
        ("a\0b", "ab"),
        ("<b>a<p>b</b>c", "a\nbc"),
        ("<title>no</title>a<script>no</script><style>no</style><template>no</template><!-- no --><svg><text>no", "a"),
        ("a<nav>no</nav>c<aside>no</aside><footer>no</footer><header>b</header>", "a\nc\nb"),
        ("<form>a<select><option>no</select><textarea>no</textarea><button>no</button></form>", "a"),
        (
            "a<p hidden>no<p aria-hidden=TRUE>no<p style='color: red;DISPLAY : none'>no<p style='visibility:hidden'>no",
            "a",
        ),
        ("<p style='display: nonet; x: display:none'>a<p aria-hidden=false>b", "a\nb"),
        ("<noscript>no</noscript>a<noscript>no<br>no</noscript>b", "ab"),
        ("<img src=a alt='a &lt;b&gt; c'>d", "[a]d"),
    ],
)
def test_text_is_what_a_browser_shows(html: str, text: str) -> None:
    assert shown(html) == text


def test_boilerplate_is_what_the_caller_says() -> None:
    html = "<nav>a</nav><i>b</i><header>c</header>"
    assert shown(html, boilerplate=()) == "a\nb\nc"
    assert shown(html, boilerplate=("header", "i")) == "a"
    with pytest.raises(ValueError, match=r"boilerplate must be several names"):
        read(html, boilerplate="nav")


def test_alt_text_follows_its_image() -> None:
    html = "x<img src=a alt='a &lt;b&gt; c'>d <img src=b.svg alt=no>"
    assert shown(html, alt_text=True) == "x[a] a <b> c d"


# ------------------------------------------------------------ images


@pytest.mark.parametrize(
    "html, images",
    [
        ("<img data-src=a src=b><img src=c data-original=d><img data-srcset='e 1w, f 2w' data-src=g>", "[a][d][f]"),
        (
            "<img srcset='a 100w, b 300w, c 200w' src=d><img srcset='a, b 1.5x, c 1.5x'><img srcset='a,b 1x,, c'>",
            "[b][b][a,b]",
        ),
        (
            "<picture><source srcset=a type=image/avif><source srcset='b, c 2x' type=image/webp><img src=d></picture>",
            "[c]",
        ),
        ("<img src=a width=1><img src=b height=0px><img src=c width=100%><img src=d width=8 height=9.5>", "[c][d]"),
        (
            "<img src=a.svg><img src='b.SVG?x'><img src='data:image/svg+xml,<svg/>'><img><img src=''><img src='http://['>",
            "",
        ),
        ("<img src='data:image/gif,GIF' class=lazy><noscript><img src=a></noscript>", "[a]"),
        ("<noscript><img src=a></noscript> <!-- x --> <img data-src=b src=c>", "[b]"),
        ("<picture><source><img></picture><noscript><picture><source srcset=a><img src=b></picture></noscript>", "[a]"),
        ("<img src=a><noscript><img src=a></noscript>", "[a]"),
        ("<img src=a><noscript><img src=b></noscript>", "[a][b]"),
        ("<img class=lazy width=1><noscript><img src=b></noscript>", "[b]"),
        ("<noscript>no<p>no<img src=a></noscript><noscript><img src=b width=1></noscript>", "[a]"),
        ("<b><img src='a b&eacute;.png?q= #f'><img src=' c\n d '>", "[a%20b%C3%A9.png?q=%20][c%20d]"),
        (
            "<img src='data:image/png;base64,YW\nI'><img src='DATA:image/gif,%41%z'><img src='data:,x'><img src=data:>",
            "[ab][A%z]",
        ),
        ("<img src='data:image/png;base64,YWJjZ'><img src='data://[,'><img src='data:image/png,'>", ""),
        ("<div hidden><img src=a></div><img src=b style='display:none'><svg><image href=c></svg>", ""),
    ],
)
def test_an_image_is_found_where_a_page_keeps_it(html: str, images: str) -> None:
    assert shown(html).replace("\n", "").replace(" ", "") == images


def test_the_next_place_is_tried_where_there_is_no_image() -> None:
    places = {"a": None, "b": b"", "c": b" \n<html>", "d": b"12345", "e": b"1234"}
    html = "<img data-src=a data-original=b data-lazy-src=c srcset=d src=e>"
    assert document_from_html(html, resolve=places.get, max_image_bytes=4).parts == (Medium("image", b"1234"),)
    html = "<img src='data:image/png;base64,MTIzNDU='><img src='data:image/png,12345'>"
    assert document_from_html(html, resolve=places.get, max_image_bytes=4).parts == ()


@pytest.mark.parametrize(
    "base, url, expected",
    [
        ("", None, "a/../b.png"),
        ("", "https://e.org/x/y.html?z", "https://e.org/x/b.png"),
        ("<base href='/z/'><base href='/no/'>", "https://e.org/x/y.html", "https://e.org/z/b.png"),
        ("<base href='//o.org/z/'>", "https://e.org/x/y.html", "https://o.org/z/b.png"),
        ("<base href='http://['>", "https://e.org/x/y.html", "https://e.org/x/b.png"),
        ("<base href='https://o.org/'>", None, "https://o.org/b.png"),
    ],
)
def test_relative_urls_start_at_the_page_or_its_base(base: str, url: str | None, expected: str) -> None:
    document = read(base + "<img src='a/../b.png'>", url=url)
    assert document.parts == (Medium("image", expected.encode()),)
    assert document.key == (url or "")


def test_what_resolve_raises_is_told() -> None:
    def fail(url: str) -> bytes:
        raise OSError(f"no connection for {url}")

    pages = ["a<img src=b>", "a"]
    source = IndexedSource(pages, lambda page: document_from_html(page, resolve=fail))
    assert [next(source.read(shard)) for shard in range(2)] == [
        CorruptSample("item 0", "OSError: no connection for b"),
        Document(("a",)),
    ]


@pytest.mark.unchecked
def test_what_resolve_gives_must_be_bytes() -> None:
    with pytest.raises(ValueError, match="resolve must give bytes or None, got str for b"):
        document_from_html("<img src=b>", resolve=str)  # type: ignore[arg-type]


def test_an_image_of_a_page_can_be_opened() -> None:
    file = io.BytesIO()
    Image.radial_gradient("L").save(file, "PNG")
    for url in (
        f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}",
        f"data:image/png,{quote(file.getvalue())}",
    ):
        [medium] = document_from_html(f'<img src="{url}">', resolve=lambda _: None).media
        assert Image.open(medium.open()).tobytes() == Image.radial_gradient("L").tobytes()


# ------------------------------------------------------------ bytes


@pytest.mark.parametrize(
    "html, charset, text",
    [
        ("é€".encode(), None, "é€"),
        ("é".encode("cp1252"), "ISO-8859-1", "é"),
        ("<meta charset='windows-1251'>Ж".encode("cp1251"), None, "Ж"),
        ("<meta http-equiv=x content='text/html; charset=Shift_JIS'>①".encode("cp932"), None, "①"),
        ("<meta charset=koi8-r>é".encode(), "utf-8", "é"),
        ("<meta charset=koi8-r>é".encode("utf-8-sig"), "koi8-r", "é"),
        ("é<meta charset=koi8-r>".encode("utf-16"), None, "é"),
        (b"\xfe\xff" + "é".encode("utf-16-be"), "utf-8", "é"),
        ("<meta charset=utf-16>é".encode(), None, "é"),
        ("<meta charset=zip>é".encode(), "punycode", "é"),
        ("<meta charset=no>é".encode(), "no\0", "é"),
        (b"a\xffb", None, "a\ufffdb"),
    ],
)
def test_bytes_are_decoded_as_they_say(html: bytes, charset: str | None, text: str) -> None:
    assert shown(html, charset=charset) == text


# ------------------------------------------------------------ files


def test_images_are_found_in_their_folder_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "site" / "sub").mkdir(parents=True)
    for name in ("secret", "site/a b.png", "site/sub/c.png", "site/large"):
        (tmp_path / name).write_bytes(name.encode() * (100 if name == "site/large" else 1))
    (tmp_path / "site" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "site" / "inside").symlink_to("sub/c.png")
    (tmp_path / "site" / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "site" / "pipe")
    resolve: Callable[[str], bytes | None] = FolderResolver(tmp_path / "site", max_bytes=100)
    for url, name in (("a%20b.png?x#y", "a b.png"), ("/sub/c.png", "sub/c.png"), ("sub/../inside", "sub/c.png")):
        assert resolve(url) == f"site/{name}".encode()
    nothing = [
        "../secret",
        "%2e%2e/secret",
        "/../secret",
        str(tmp_path / "secret"),
        "link",
        "circle",
        "pipe",
        "sub",
        "",
    ]
    nothing += ["large", "no", "a%00b", "x" * 5000, "http://e.org/sub/c.png", "//e.org/sub/c.png", "file:///sub/c.png"]
    assert [resolve(url) for url in nothing] == [None] * len(nothing)
    resolve = FolderResolver(tmp_path / "site", prefix="https://e.org/")
    assert resolve("https://e.org/sub/c.png") == b"site/sub/c.png"
    assert resolve("sub/c.png") is resolve("https://o.org/sub/c.png") is None
    assert shown("<img src=/sub/c.png>", url="https://e.org/x/", resolve=resolve) == "[site/sub/c.png]"


# ------------------------------------------------------------ hostile pages


def test_a_page_ends_before_the_image_that_is_too_many() -> None:
    assert shown("a<img src=1>b<img src=2 width=1><img src=3>c<img src=4>d", max_images=2) == "a[1]b[3]c"


@pytest.mark.parametrize(
    "html, options, message",
    [
        ("x" * 11, {"max_bytes": 10}, "at most max_bytes=10 bytes, got 11"),
        (b"<p>" * 4, {"max_tags": 3}, "at most max_tags=3 tags"),
        ("<div>" * 200_000, {}, "at most max_tags=40000 tags"),
        ("<img src=a>" * 1_000_000, {}, "at most max_bytes"),
        ("<!--" + "<p a='>' " + "".join(f" a{i}" for i in range(500)), {}, "less than 500 attributes"),
        (("<a b='\"" + "y" * 50) * 10_000, {}, "less than 500 attributes"),
        ('<a b="' * 10_000, {}, "less than 500 attributes"),
        ("", {"max_images": -1}, "max_images must not be negative"),
    ],
)
def test_a_page_past_a_limit_is_an_error(html: str | bytes, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(html, **options)


LONG = 1_000_000
HOSTILE = {
    "deep": "<div>" * 10_000 + "x",
    "deep and closed": "<i>" * 10_000 + "x" + "</i>" * 10_000,
    "formatting that is opened anew": "<p>" + "".join(f"<b id={i}>" for i in range(1_500)) + "<p>x" * 1_500,
    "attributes": ("<p" + "".join(f" a{i}" for i in range(490)) + ">") * 200 + "x",
    "a long data: URL": f"x<img src='data:image/png;base64,{'A' * LONG}'>",
    "a long srcset": f"x<img srcset='{'a 1w, ' * (LONG // 6)}'>",
    "a srcset of commas": f"x<img srcset='{',' * LONG}'>",
    "a long style": f"x<p style='display{' ' * LONG}'>",
    "a long URL": f"x<base href='http://e.org/{'a/' * LONG}'>" + "<img src=a>" * 3_000,
    "many URLs": "x" + "".join(f"<img src={i}>" for i in range(3_000)),
    "a picture of many": "x<picture>" + "<source srcset=a><img>" * 1_000,
    "noscripts": "x" + "<img><noscript>" * 3_000,
    "comments between": "x<picture>" + "<img>" * 3_000 + "</picture>" + "<!---->" * 10_000 + "<noscript>",
    "text before a table": "x<table>" + "a<!---->" * 10_000,
    "null bytes": "x" + "\0" * LONG,
    "less than": "x" + "<" * LONG,
    "ampersands": "x" + "&" * LONG,
    "breaks": "x" + "<br>" * 30_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_page_ends(name: str) -> None:
    start = time.monotonic()
    assert "x" in document_from_html(HOSTILE[name], resolve=lambda _: None).text
    assert time.monotonic() - start < 10

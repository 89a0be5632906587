"""Source: where documents come from, in pieces that can be read apart and again."""

from collections.abc import Callable, Iterator, Sized
from typing import Any, Protocol, runtime_checkable

from flamingo_blocks.data.document import CorruptSample, Document


@runtime_checkable
class Source(Protocol):
    """Documents in shards, e.g. files. A shard gives the same documents in the same order each time it is read.

    What cannot be read is given as a `CorruptSample` in its place; reading raises for nothing that one sample does.
    """

    def __len__(self) -> int:
        """Tell how many shards there are."""

    def read(self, shard: int) -> Iterator[Document | CorruptSample]:
        """Read the documents of a shard, one by one."""


@runtime_checkable
class _Indexed(Sized, Protocol):
    def __getitem__(self, index: int) -> Any: ...


class IndexedSource:
    """Documents that can be asked for by their number: a list, or a `datasets.Dataset`.

    Args:
        items: Anything with a length and items.
        to_document: Makes a document of an item. Where it raises an error, the item is a corrupt sample. None: the
            items are documents, or samples that are known to be corrupt.

    Example:
        ```python
        from flamingo_blocks.data import Document, IndexedSource

        source = IndexedSource(["A cat.", "A dog."], lambda text: Document((text,)))
        ```
    """

    def __init__(self, items: _Indexed, to_document: Callable[[Any], Document] | None = None) -> None:
        self.items = items
        self.to_document = to_document

    def __len__(self) -> int:
        """Tell how many there are: each is a shard of its own, so that they are shuffled all together."""
        return len(self.items)

    def read(self, shard: int) -> Iterator[Document | CorruptSample]:
        """Give one document."""
        yield read_one(lambda: self._document(shard), key=f"item {shard}")

    def _document(self, index: int) -> Document | CorruptSample:
        item = self.items[index]
        return item if self.to_document is None else self.to_document(item)


def read_one(read: Callable[[], Document | CorruptSample], *, key: str) -> Document | CorruptSample:
    """Read a document, or tell why it cannot be read.

    Args:
        read: Gives the document, or raises. A sample that is known to be corrupt is passed on.
        key: Names it.

    Raises:
        ImportError: If a library is missing, and with it all samples.
    """
    try:
        document: Any = read()
        if isinstance(document, CorruptSample):
            return document
        if not isinstance(document, Document):
            raise ValueError(f"a document was expected, got {type(document).__name__}; pass to_document=")
        document.text.encode()  # JSON may hold halves of characters, which no tokenizer takes
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # of many kinds: samples are of anybody's making
        return CorruptSample(key, f"{type(error).__name__}: {error}")
    return document


def check_corrupt(what: str, corrupt: int, read: int, *, max_corrupt: float, last: CorruptSample) -> None:
    """Stop where too many samples are corrupt. It is judged from the hundredth one on.

    Args:
        what: Names the samples.
        corrupt: How many of them cannot be read.
        read: How many there were.
        max_corrupt: The share of them that may be corrupt.
        last: The last one of them.

    Raises:
        RuntimeError: If there are more.
    """
    if read >= 100 and corrupt > max_corrupt * read:
        raise RuntimeError(
            f"{corrupt} of {read} {what} are corrupt, more than the share of max_corrupt={max_corrupt}; the last one "
            f"is {last.key}: {last.error}"
        )

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
        to_document: Makes a document of an item. A `ValueError`, `KeyError`, `TypeError` or `OSError` of it makes the
            item a corrupt sample. None: the items are documents.

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

    def _document(self, index: int) -> Document:
        item = self.items[index]
        document = item if self.to_document is None else self.to_document(item)
        if not isinstance(document, Document):
            raise ValueError(f"a document was expected, got {type(document).__name__}; pass to_document=")
        return document


def read_one(read: Callable[[], Document], *, key: str) -> Document | CorruptSample:
    """Read a document, or tell why it cannot be read.

    Args:
        read: Gives the document, or raises.
        key: Names it.
    """
    try:
        return read()
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        return CorruptSample(key, f"{type(error).__name__}: {error}")

"""Stream: the documents of a source without end, shuffled, shared out among processes, and resumed exactly.

A stream has no hidden state: every choice follows from the seed, the epoch and the place in it. So where it stands is
told by a few numbers, however much is read ahead.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from flamingo_blocks.data.document import CorruptSample, Document
from flamingo_blocks.data.source import Source

# Where documents are few or shards are empty, an epoch may have nothing for a consumer, and the next one may have
# something. After so many with nothing, it is taken that none has.
_EMPTY_EPOCHS = 20


@dataclass(frozen=True)
class Position:
    """Where a stream stands.

    Attributes:
        epoch: How many times the whole share was given.
        shard: How many shards of this epoch's order are done.
        document: How many documents of the present shard were given.
    """

    epoch: int = 0
    shard: int = 0
    document: int = 0


def derive_seed(*values: Any) -> int:
    """Make one seed of several values, the same in each process and version of Python."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=7).digest(), "big")


class Stream:
    """Give the documents of a source epoch by epoch, in an order that is new for each.

    In each epoch, every document of the source is given to exactly one of the consumers: by shards where there are at
    least as many as consumers; else each consumer reads all shards, and takes every so-many-th document. Consumers are
    not in step: one may begin its next epoch while another is not through.

    Shards are shuffled among each other. The documents of a shard are shuffled in a buffer, which never reaches over
    the shard's end. To resume in the middle of a shard, it is read again from its beginning.

    Args:
        source: The documents.
        seed: Of all orders. It must be the same for all consumers.
        consumer: Number of this consumer.
        consumers: How many share the source: processes times data workers.
        shuffle: Whether to shuffle at all.
        buffer: How many documents are held for shuffling.
        position: Where to begin.

    Attributes:
        position: Where the stream stands.
        identity: Of the document that was given last: the epoch, the number of its shard, and its place there. It is
            the same whoever is given the document, so that what is drawn for it can be, too.

    Raises:
        ValueError: If a number is out of range; while reading, if epoch after epoch has no document for this
            consumer.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int = 0,
        consumer: int = 0,
        consumers: int = 1,
        shuffle: bool = True,
        buffer: int = 1000,
        position: Position | None = None,
    ) -> None:
        if not 0 <= consumer < consumers:
            raise ValueError(f"consumer must be in 0..{consumers - 1}, as there are {consumers}, got {consumer}")
        if buffer < 1:
            raise ValueError(f"buffer must be at least 1, got {buffer}")
        self.source = source
        self.seed = seed
        self.consumer = consumer
        self.consumers = consumers
        self.shuffle = shuffle
        self.buffer = buffer
        self.position = Position() if position is None else position
        self.identity = (0, 0, 0)
        self._documents = self._read()

    def __iter__(self) -> Iterator[Document | CorruptSample]:
        return self

    def __next__(self) -> Document | CorruptSample:
        return next(self._documents)

    def _read(self) -> Iterator[Document | CorruptSample]:
        empty_epochs = 0
        while True:
            epoch = self.position.epoch
            by_shards = len(self.source) >= self.consumers
            order = self._order(epoch, slice(self.consumer, None, self.consumers) if by_shards else slice(None))
            empty_epochs += 1
            for number in range(self.position.shard, len(order)):
                documents: Iterator[tuple[int, Document | CorruptSample]] = enumerate(self._shard(order[number], epoch))
                if not by_shards:  # each shard begins with another consumer, so that short ones are shared out, too
                    documents = islice(documents, (self.consumer - number) % self.consumers, None, self.consumers)
                for place, document in islice(documents, self.position.document, None):
                    self.position = Position(epoch, number, self.position.document + 1)
                    self.identity = (epoch, order[number], place)
                    empty_epochs = 0
                    yield document
                self.position = Position(epoch, number + 1)
            if empty_epochs == _EMPTY_EPOCHS:
                raise ValueError(
                    f"there is no document for consumer {self.consumer} of {self.consumers} in the source's "
                    f"{len(self.source)} shards; give more data, or use fewer processes or data workers"
                )
            self.position = Position(epoch + 1)

    def _order(self, epoch: int, share: slice) -> list[int] | range:
        if not self.shuffle:
            return range(len(self.source))[share]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order: list[int] = torch.randperm(len(self.source), generator=generator)[share].tolist()
        return order

    def _shard(self, shard: int, epoch: int) -> Iterator[Document | CorruptSample]:
        """Read a shard, shuffled, the same each time."""
        documents = self.source.read(shard)
        if not self.shuffle:
            yield from documents
            return
        held = list(islice(documents, self.buffer))
        draw = random.Random(derive_seed(self.seed, epoch, shard))
        for document in documents:
            i = draw.randrange(len(held))
            yield held[i]
            held[i] = document
        draw.shuffle(held)
        yield from held

"""Each document is given once an epoch, to one consumer, and a stream goes on where it stood."""

import tracemalloc
from collections.abc import Iterator
from itertools import islice

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given

from flamingo_blocks.data import CorruptSample, Document, IndexedSource
from flamingo_blocks.data.stream import Position, Stream


class Shards:
    """Shards of so many documents each, named by where they stand."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, shard: int) -> Iterator[Document | CorruptSample]:
        for i in range(self.lengths[shard]):
            key = f"{shard}.{i}"
            yield CorruptSample(key, "a test") if i == 3 else Document((key,), key=key)


lengths = st.lists(st.integers(0, 7), min_size=1, max_size=6)
seeds = st.integers(0, 5)


def epoch_of(stream: Stream, epoch: int) -> list[str]:
    """Read what a consumer is given in an epoch."""
    keys = []
    for sample in stream:
        if stream.position.epoch == epoch:
            keys.append(sample.key)
        elif stream.position.epoch > epoch:
            return keys
    raise AssertionError("a stream has no end")


def share_of(source: Shards, consumer: int, consumers: int, epoch: int, **options: object) -> list[str]:
    try:
        return epoch_of(Stream(source, consumer=consumer, consumers=consumers, **options), epoch)  # type: ignore[arg-type]
    except ValueError:  # nothing for this one in any epoch
        return []


@given(
    lengths=lengths,
    seed=seeds,
    consumers=st.integers(1, 4),
    epoch=st.integers(0, 2),
    shuffle=st.booleans(),
    buffer=st.integers(1, 9),
)
def test_consumers_are_given_each_document_of_an_epoch_once(
    lengths: list[int], seed: int, consumers: int, epoch: int, shuffle: bool, buffer: int
) -> None:
    source = Shards(lengths)
    options = {"seed": seed, "shuffle": shuffle, "buffer": buffer}
    found = [key for c in range(consumers) for key in share_of(source, c, consumers, epoch, **options)]
    everything = [f"{shard}.{i}" for shard, length in enumerate(lengths) for i in range(length)]
    assert sorted(found) == sorted(everything)


@given(
    lengths=lengths,
    seed=seeds,
    consumers=st.integers(1, 3),
    read=st.integers(0, 40),
    shuffle=st.booleans(),
    buffer=st.integers(1, 9),
)
def test_a_stream_goes_on_where_it_stood(
    lengths: list[int], seed: int, consumers: int, read: int, shuffle: bool, buffer: int
) -> None:
    source = Shards(lengths)
    assume(min(lengths) >= consumers)
    for consumer in range(consumers):

        def stream(position: Position | None = None, consumer: int = consumer) -> Stream:
            return Stream(
                source,
                seed=seed,
                consumer=consumer,
                consumers=consumers,
                shuffle=shuffle,
                buffer=buffer,
                position=position,
            )

        first = stream()
        for _ in range(read):
            next(first)
        assert list(islice(stream(first.position), 20)) == list(islice(first, 20))


def test_each_epoch_has_an_order_of_its_own_and_each_seed() -> None:
    source = IndexedSource([Document((str(i),), key=str(i)) for i in range(50)])
    orders = [tuple(epoch_of(Stream(source, seed=seed), epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(orders[0]))}
    assert epoch_of(Stream(source, shuffle=False), 1) == [str(i) for i in range(50)]


def test_a_shard_is_shuffled_within_its_buffer() -> None:
    for buffer in (1, 10, 1000):
        order = [int(key.split(".")[1]) for key in epoch_of(Stream(Shards([100]), buffer=buffer), 0)]
        assert (order == sorted(order)) == (buffer == 1)
        assert all(i < number + buffer for number, i in enumerate(order))


def test_short_shards_are_shared_out_among_all() -> None:
    source = Shards([2, 2])
    shares = [share_of(source, consumer, 3, 0, shuffle=False) for consumer in range(3)]
    assert shares == [["0.0"], ["0.1", "1.0"], ["1.1"]]


def test_two_processes_are_given_what_one_is_given_together() -> None:
    source = IndexedSource([Document((str(i),), key=str(i)) for i in range(20)])
    whole = Stream(source, seed=3)
    parts = [Stream(source, seed=3, consumer=c, consumers=2) for c in range(2)]
    for _ in range(10):
        assert {next(whole).key, next(whole).key} == {next(part).key for part in parts}


@pytest.mark.parametrize("lengths", [[7, 7, 7], [2, 5], [6]])
def test_a_document_has_an_identity_whoever_is_given_it(lengths: list[int]) -> None:
    def identities(consumers: int) -> dict[tuple[int, int, int], str]:
        found = {}
        for consumer in range(consumers):
            stream = Stream(Shards(lengths), consumer=consumer, consumers=consumers, buffer=2)
            for sample in stream:
                if stream.position.epoch > 1:
                    break
                found[stream.identity] = sample.key
        return found

    assert identities(1) == identities(2)
    assert len(identities(1)) == 2 * sum(lengths)


@pytest.mark.parametrize("lengths", [[], [0, 0], [1]])
def test_nothing_to_give_is_an_error_and_no_endless_search(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="no document for consumer 1 of 2"):
        next(Stream(Shards(lengths), consumer=1, consumers=2))


@pytest.mark.parametrize("lengths", [[1, 0, 1], [3, 1]])
def test_an_epoch_with_nothing_for_a_consumer_is_passed_over(lengths: list[int]) -> None:
    consumers = 3 if len(lengths) == 3 else 4
    shares = [[share_of(Shards(lengths), c, consumers, epoch) for epoch in range(8)] for c in range(consumers)]
    assert any([] in epochs for epochs in shares)
    assert all(any(epochs) for epochs in shares)


def test_a_consumer_holds_its_own_share_of_the_order_alone() -> None:
    source, consumers = Shards([1] * 20_000), 10
    tracemalloc.start()
    next(Stream(source, consumers=consumers))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000 * 8  # that of one list of all


def test_numbers_out_of_range_are_errors() -> None:
    with pytest.raises(ValueError, match=r"consumer must be in 0\.\.1"):
        Stream(Shards([1]), consumer=2, consumers=2)
    with pytest.raises(ValueError, match="buffer must be at least 1"):
        Stream(Shards([1]), buffer=0)

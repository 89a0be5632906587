"""A mixture gives a batch of each dataset for every step, and goes on exactly where it stood."""

import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from flamingo_blocks.data import CorruptSample, Document, IndexedSource
from flamingo_blocks.data.examples import Example
from flamingo_blocks.data.mixture import Mixture, MixtureDataset

ROW = 12


def make_example(document: Document, *, generator: torch.Generator) -> Example:
    """Make tokens that tell the document's number, how long it is, and what was drawn for it."""
    number, length = map(int, document.text.split())
    if length == 0:
        raise ValueError(f"{document.key} is empty")
    drawn = torch.randint(1000, (1,), generator=generator)
    input_ids = torch.cat([torch.full((length,), number), drawn])
    return Example(
        input_ids=input_ids,
        labels=input_ids,
        media_ranges=torch.zeros(length + 1, 2, dtype=torch.long),
        media=(),
    )


def collate(rows: Sequence[Sequence[Example]]) -> dict[str, Any]:
    return {"rows": [[example.input_ids.tolist() for example in row] for row in rows]}


def source_of(lengths: Sequence[int], *, first: int = 0) -> IndexedSource:
    return IndexedSource([Document((f"{first + i} {length}",), key=str(first + i)) for i, length in enumerate(lengths)])


def make_mixture(
    lengths: Sequence[int] = (3, 1, 4, 1, 5, 9, 2, 6),
    *,
    row_length: int | None = ROW,
    shuffle: bool = True,
    buffer: int = 1000,
    **options: Any,
) -> Mixture:
    datasets = [
        MixtureDataset(
            name="pages",
            source=source_of(lengths),
            make_example=make_example,
            batch_size=2,
            row_length=row_length,
            shuffle=shuffle,
            buffer=buffer,
        ),
        MixtureDataset(
            name="pairs",
            source=source_of(lengths[::-1], first=100),
            make_example=make_example,
            batch_size=3,
            weight=0.2,
        ),
    ]
    return Mixture(datasets, collate=collate, **options)


def numbers_of(batches: Sequence[dict[str, Any]]) -> list[int]:
    return [example[0] for batch in batches for row in batch["rows"] for example in row]


def test_every_step_takes_a_batch_of_each_dataset() -> None:
    mixture = make_mixture()
    batches = list(islice(mixture, 6))
    assert [batch["dataset"] for batch in batches] == ["pages", "pairs"] * 3
    assert [batch["loss_weight"] for batch in batches] == [1.0, 0.2] * 3
    assert [len(batch["rows"]) for batch in batches] == [2, 3] * 3
    assert mixture.batches_per_step == 2


def test_round_robin_takes_a_step_after_each_batch() -> None:
    plain, in_turn = make_mixture(), make_mixture(round_robin=True)
    assert in_turn.batches_per_step == 1
    assert list(islice(in_turn, 5)) == list(islice(plain, 5))


lengths = st.lists(st.integers(1, ROW - 1), min_size=4, max_size=9)


@given(lengths=lengths, given_out=st.integers(0, 13), row_length=st.sampled_from([None, ROW]), seed=st.integers(0, 3))
def test_a_mixture_goes_on_where_it_stood(
    lengths: list[int], given_out: int, row_length: int | None, seed: int
) -> None:
    first = make_mixture(lengths, seed=seed, row_length=row_length)
    batches = iter(first)
    for _ in range(given_out):
        next(batches)
    state = json.loads(json.dumps(first.state_dict()))
    second = make_mixture(lengths, seed=seed, row_length=row_length)
    second.load_state_dict(state)
    assert second.state_dict() == first.state_dict()
    assert list(islice(second, 6)) == list(islice(batches, 6))


@pytest.mark.parametrize("workers", [0, 1])
def test_torchs_random_numbers_are_left_alone(workers: int) -> None:
    before = torch.get_rng_state()
    next(iter(make_mixture(workers=workers)))
    assert torch.equal(torch.get_rng_state(), before), "else dropout is another one in a run that is resumed"


@pytest.mark.parametrize("given_out", [1, 4, 7])
def test_a_mixture_with_workers_goes_on_where_it_stood(given_out: int) -> None:
    first = make_mixture(workers=2)
    expected = list(islice(first, given_out + 8))
    again = make_mixture(workers=2)
    assert list(islice(again, given_out)) == expected[:given_out]
    assert list(islice(again, 1)) == expected[given_out : given_out + 1], "another iteration goes on, too"
    third = make_mixture(workers=2)
    third.load_state_dict(again.state_dict())
    assert list(islice(third, 7)) == expected[given_out + 1 :]


@given(lengths=lengths, seed=st.integers(0, 3), row_length=st.sampled_from([None, ROW]))
def test_no_document_is_lost_or_given_twice(lengths: list[int], seed: int, row_length: int | None) -> None:
    # Batch by batch, from its state, as if it were interrupted after each.
    mixture = make_mixture(lengths, seed=seed, row_length=row_length)
    numbers: list[int] = []
    while len(numbers) < 2 * len(lengths):
        pages = next(batch for batch in mixture if batch["dataset"] == "pages")
        numbers += numbers_of([pages])
        state, mixture = mixture.state_dict(), make_mixture(lengths, seed=seed, row_length=row_length)
        mixture.load_state_dict(state)
    for epoch in range(2):
        part = numbers[epoch * len(lengths) : (epoch + 1) * len(lengths)]
        assert sorted(part) == list(range(len(lengths)))


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_workers_share_the_documents_of_an_epoch(workers: int) -> None:
    numbers = []
    for rank in range(2):
        mixture = make_mixture([1] * 24, row_length=None, workers=workers, rank=rank, world_size=2)
        batches = islice(mixture, 12)
        numbers += numbers_of([batch for batch in batches if batch["dataset"] == "pages"])
    assert sorted(numbers) == list(range(24))


def test_two_processes_read_what_one_reads_in_batches_of_twice_the_size() -> None:
    def mixture_of(batch_size: int, **place: Any) -> Mixture:
        dataset = MixtureDataset(
            name="pages", source=source_of([3] * 20), make_example=make_example, batch_size=batch_size
        )
        return Mixture([dataset], collate=collate, seed=5, **place)

    whole = mixture_of(4)
    parts = [mixture_of(2, rank=rank, world_size=2) for rank in range(2)]
    for expected, *found in islice(zip(whole, *parts, strict=True), 5):
        rows = [row for batch in found for row in batch["rows"]]
        assert sorted(rows) == sorted(expected["rows"])


def test_the_place_of_a_process_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    mixture = make_mixture()
    assert (mixture.rank, mixture.world_size) == (1, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_samples_are_skipped_counted_and_told(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    mixture = make_mixture([3, 0, 4, 0, 5, 3], row_length=None, workers=workers, max_corrupt=0.5)
    with caplog.at_level(logging.WARNING, logger="flamingo_blocks.data.mixture"):
        batches = list(islice(mixture, 4))
    assert sorted(numbers_of(batches[::2])) == [0, 2, 4, 5]
    told = [record.getMessage() for record in caplog.records]
    for name, count in mixture.corrupt().items():
        of_name = [text for text in told if text.startswith(f"{name}: skipped")]
        assert 1 <= len(of_name) == count <= 2
    assert {"pages: skipped 1: 1 is empty", "pages: skipped 3: 3 is empty"} & set(told)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_corrupt_samples_stop_the_run(workers: int) -> None:
    mixture = make_mixture([3, 0, 4, 5], row_length=None, workers=workers, max_corrupt=0.2)
    with pytest.raises(RuntimeError, match=r"samples of pa\w+ are corrupt, more than .*max_corrupt=0.2.* is empty"):
        for _ in islice(mixture, 200):
            pass
    everything = make_mixture([0, 0, 0], max_corrupt=1.0)
    assert everything.max_corrupt == 1.0


class Unreadable:
    """Shards with nothing but corrupt samples."""

    def __len__(self) -> int:
        return 2

    def read(self, shard: int) -> Iterator[Document | CorruptSample]:
        yield CorruptSample(str(shard), "a test")


def test_a_source_of_which_nothing_can_be_read_stops_the_run() -> None:
    dataset = MixtureDataset(name="none", source=Unreadable(), make_example=make_example, batch_size=1)
    with pytest.raises(RuntimeError, match="100 of 100 samples of none"):
        next(iter(Mixture([dataset], collate=collate)))


def die(document: Document, *, generator: torch.Generator) -> Example:  # noqa: ARG001
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_worker_that_dies_is_a_clear_error() -> None:
    dataset = MixtureDataset(name="deadly", source=source_of([1, 1]), make_example=die, batch_size=1)
    with pytest.raises(RuntimeError, match=r"a data worker died: .*fewer workers.*resumed"):
        next(iter(Mixture([dataset], collate=collate, workers=1)))


def fail(document: Document, *, generator: torch.Generator) -> Example:  # noqa: ARG001
    raise ZeroDivisionError("a defect, not a corrupt sample")


def test_a_defect_is_not_taken_for_a_corrupt_sample() -> None:
    dataset = MixtureDataset(name="bad", source=source_of([1, 1]), make_example=fail, batch_size=1)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        next(iter(Mixture([dataset], collate=collate)))


@pytest.mark.parametrize(
    "options, name",
    [
        ({"seed": 1}, "seed"),
        ({"workers": 1}, "workers"),
        ({"rank": 1, "world_size": 2}, "rank"),
        ({"lengths": [1, 2, 3]}, "datasets"),
        ({"row_length": None}, "row lengths"),
        ({"buffer": 3}, "shuffle buffers"),
        ({"shuffle": False}, "shuffle buffers"),
    ],
)
def test_a_state_of_another_mixture_is_an_error(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"a mixture with {name} .* this one has"):
        make_mixture(**options).load_state_dict(make_mixture().state_dict())


def test_a_state_of_datasets_in_another_order_is_an_error() -> None:
    datasets = [
        MixtureDataset(name=name, source=source_of([1]), make_example=make_example, batch_size=1) for name in "ab"
    ]
    mixture, other = (Mixture(order, collate=collate) for order in (datasets, datasets[::-1]))
    next(iter(mixture))  # of this round, the other one would give the wrong batch again
    with pytest.raises(ValueError, match="a mixture with datasets"):
        other.load_state_dict(mixture.state_dict())


def test_wrong_numbers_are_errors() -> None:
    fields: dict[str, Any] = {"name": "a", "source": source_of([1]), "make_example": make_example, "batch_size": 1}
    one = MixtureDataset(**fields)
    numbers: list[tuple[dict[str, Any], str]] = [
        *(
            ({name: 0}, f"{name} of a must be at least 1, got 0")
            for name in ("batch_size", "row_length", "row_media", "buffer")
        ),
        ({"weight": 0.0}, "weight of a must be positive"),
    ]
    for options, message in numbers:
        with pytest.raises(ValueError, match=message):
            MixtureDataset(**fields | options)
    mixture: dict[str, Any] = {"datasets": [one], "collate": collate}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"datasets": []}, "names that differ"),
        ({"datasets": [one, one]}, "names that differ"),
        ({"rank": 2, "world_size": 2}, r"rank must be in 0\.\.1"),
        ({"rank": 1}, "both rank and world_size"),
        ({"workers": -1}, "workers must be"),
        ({"max_corrupt": 2.0}, "max_corrupt must be"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            Mixture(**mixture | options)


def test_tensors_come_through_workers() -> None:
    def tensors(rows: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
        return {"input_ids": torch.cat([example.input_ids for row in rows for example in row])}

    dataset = MixtureDataset(name="a", source=source_of([2] * 6), make_example=make_example, batch_size=2)
    plain, worker = (Mixture([dataset], collate=tensors, workers=workers) for workers in (0, 1))
    for expected, found in islice(zip(plain, worker, strict=True), 4):
        assert torch.equal(expected["input_ids"], found["input_ids"])

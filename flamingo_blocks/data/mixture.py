"""Mixture: weighted datasets, of which a training step takes a batch each.

Source: Alayrac et al. 2022 (Flamingo), section 2.4 and appendix B.1.1.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flamingo_blocks.data.document import CorruptSample
from flamingo_blocks.data.examples import Example
from flamingo_blocks.data.packing import Packer
from flamingo_blocks.data.source import Source, check_corrupt
from flamingo_blocks.data.stream import Position, Stream, derive_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MixtureDataset:
    """A dataset of a mixture.

    Args:
        name: Stands in logs and reports.
        source: The documents.
        make_example: From a document and a generator of random numbers to an `Example`, e.g. an `ExampleMaker`. A
            `ValueError` or `OSError` of it makes the document a corrupt sample.
        batch_size: Rows of a batch, for each process.
        weight: Of its loss, lambda in the paper.
        row_length: Tokens of a row, into which documents are packed. None: each document is a row of its own.
        row_media: The most media of such a row, which bounds the memory that they take. None: any number.
        shuffle: Whether to shuffle the documents.
        buffer: How many documents of a shard are held for shuffling.

    Raises:
        ValueError: If a number is out of range.
    """

    name: str
    source: Source
    make_example: Callable[..., Example] = field(repr=False)
    batch_size: int
    weight: float = 1.0
    row_length: int | None = None
    row_media: int | None = None
    shuffle: bool = True
    buffer: int = 1000

    def __post_init__(self) -> None:
        for name in ("batch_size", "row_length", "row_media", "buffer"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} of {self.name} must be at least 1, got {value}")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(
                f"weight of {self.name} must be positive, got {self.weight}; leave the dataset out to give it none"
            )


class Mixture:
    """Batches of several datasets in turn, without end: one of each for every step of training.

    It is what a training loop iterates over, or `FlamingoTrainer`. To train as in the paper, add up the gradients of
    `batches_per_step` batches, each loss times its `loss_weight`, and then take a step.

    Documents are read, tokenized, decoded, packed and collated in data workers. No two processes or workers read the
    same document in an epoch, see `Stream`. A sample that is corrupt is skipped, counted and logged.

    Args:
        datasets: What is mixed. A dataset of text alone can be among them.
        collate: Makes a batch of rows of examples, e.g. `functools.partial(collate, ...)`.
        seed: Of everything that is drawn at random. The same in all processes.
        workers: Data workers of each process. 0: read in the process itself.
        prefetch: How many rounds of batches each worker reads ahead.
        round_robin: Take a step after each batch, the datasets in turn. The paper's ablation; it does worse.
        max_corrupt: The share of a dataset's samples that may be corrupt; beyond, reading stops with an error.
        rank: Number of this process. None: as torch.distributed or torchrun have it.
        world_size: Number of processes. None: the same.

    Attributes:
        names: Of the datasets, in the order of their batches.
        batches_per_step: How many batches a step takes: one of each dataset, or one with `round_robin`.

    Raises:
        ValueError: If there is no dataset, two have one name, or a number is out of range.

    Example:
        ```python
        # maker = ExampleMaker(processor)
        # pages = MixtureDataset(name="pages", source=pages, make_example=maker, batch_size=8)
        # pairs = MixtureDataset(
        #     name="pairs", source=pairs, make_example=maker, batch_size=8, row_length=256, weight=0.2
        # )
        # to_batch = functools.partial(collate, pad_token_id=..., media_shape=processor.image_processor.image_shape)
        # for batch in Mixture([pages, pairs], collate=to_batch, workers=4):
        #     name, weight = batch.pop("dataset"), batch.pop("loss_weight")
        #     (weight * model(**batch).loss).backward()
        ```

    Source: Alayrac et al. 2022, section 2.4; its table 3, row (ii) for `round_robin`.
    """

    def __init__(
        self,
        datasets: Sequence[MixtureDataset],
        *,
        collate: Callable[[Sequence[Sequence[Example]]], Mapping[str, Any]],
        seed: int = 0,
        workers: int = 0,
        prefetch: int = 2,
        round_robin: bool = False,
        max_corrupt: float = 0.1,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.datasets = list(datasets)
        self.names = [dataset.name for dataset in self.datasets]
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"datasets must have names that differ, got {self.names}")
        self.rank, self.world_size = _place(rank, world_size)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in 0..{self.world_size - 1}, got {self.rank}")
        if workers < 0 or prefetch < 1:
            raise ValueError(f"workers must be at least 0 and prefetch at least 1, got {workers} and {prefetch}")
        if not 0 <= max_corrupt <= 1:
            raise ValueError(f"max_corrupt must be in 0..1, got {max_corrupt}")
        self.collate = collate
        self.seed = seed
        self.workers = workers
        self.prefetch = prefetch
        self.max_corrupt = max_corrupt
        self.batches_per_step = 1 if round_robin else len(self.datasets)
        self._states = [
            {name: _Progress() for name in self.names} for _ in range(max(1, workers))
        ]  # after the rounds that were given out whole
        self._turn = 0  # the worker whose round is next
        self._given = 0  # batches of that round that were given out

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Go on with the batch after those that were given out.

        Yields:
            What `collate` makes, and with it `dataset`, a name, and `loss_weight`, a number.

        Raises:
            RuntimeError: If too many samples are corrupt, or a data worker dies.
        """
        for batches, progress, corrupt in self._rounds():
            for name, sample in corrupt:
                logger.warning("%s: skipped %s: %s", name, sample.key, sample.error)
            for batch in batches[self._given :]:
                self._given += 1
                if self._given == len(batches):
                    self._states[self._turn] = progress
                    self._turn, self._given = (self._turn + 1) % len(self._states), 0
                yield batch

    def _rounds(self) -> Iterator["_Round"]:
        loader: DataLoader[Any] = DataLoader(
            _Rounds(self),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=self.prefetch if self.workers else None,
            worker_init_fn=_start_worker,
            # Without it, a number is drawn from torch's own generator, also when a run is resumed.
            generator=torch.Generator().manual_seed(derive_seed(self.seed, self.rank)),
            pin_memory=torch.cuda.is_available(),
        )
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker (pid" in str(error):
                raise RuntimeError(
                    f"a data worker died: {error} It may have run out of memory: try fewer workers or a smaller "
                    "prefetch. Training can be resumed from its last checkpoint."
                ) from error
            raise

    def corrupt(self) -> dict[str, int]:
        """Count the samples of each dataset that this process has skipped."""
        return {name: sum(state[name].corrupt for state in self._states) for name in self.names}

    def state_dict(self) -> dict[str, Any]:
        """Tell where the stream of batches stands, after those that were given out, as JSON can hold it."""
        return {
            "arrangement": self._arrangement(),
            "workers": [{name: asdict(progress) for name, progress in state.items()} for state in self._states],
            "turn": self._turn,
            "given": self._given,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another mixture stood, with the batches that it would have given out next.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If that mixture had other datasets, another seed, or other numbers of processes or workers.
        """
        theirs, ours = state["arrangement"], self._arrangement()
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"the state is that of a mixture with {name} {theirs.get(name)}, but this one has {value}; to go "
                    "on exactly, make it as it was, else begin a new stream"
                )
        self._states = [
            {name: _Progress.load(progress) for name, progress in worker.items()} for worker in state["workers"]
        ]
        self._turn, self._given = state["turn"], state["given"]

    def _arrangement(self) -> dict[str, Any]:
        """What decides who reads what."""
        return {
            "datasets": [[dataset.name, len(dataset.source)] for dataset in self.datasets],
            "shuffle buffers": [dataset.buffer if dataset.shuffle else None for dataset in self.datasets],
            "batch sizes": [dataset.batch_size for dataset in self.datasets],
            "row lengths": [[dataset.row_length, dataset.row_media] for dataset in self.datasets],
            "seed": self.seed,
            "workers": self.workers,
            "rank": self.rank,
            "world size": self.world_size,
        }


@dataclass(frozen=True)
class _Progress:
    """How far a worker has come with a dataset."""

    position: Position = field(default_factory=Position)
    read: int = 0
    corrupt: int = 0

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> "_Progress":
        return cls(**{**values, "position": Position(**values["position"])})


# A batch of each dataset, how far the worker has come after it, and what it skipped on the way.
_Round = tuple[list[dict[str, Any]], dict[str, _Progress], list[tuple[str, CorruptSample]]]


class _Rounds(IterableDataset[_Round]):
    """What a data worker makes."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def __iter__(self) -> Iterator[_Round]:
        mixture, info = self.mixture, get_worker_info()
        workers = len(mixture._states)
        # The first of torch's workers is asked first, whichever worker's turn it is.
        worker = ((0 if info is None else info.id) + mixture._turn) % workers
        rows = [
            _Rows(
                dataset,
                mixture._states[worker][dataset.name],
                seed=derive_seed(mixture.seed, dataset.name),
                consumer=mixture.rank * workers + worker,
                consumers=mixture.world_size * workers,
                max_corrupt=mixture.max_corrupt,
            )
            for dataset in mixture.datasets
        ]
        while True:
            batches = [
                {
                    **mixture.collate([one.next_row() for _ in range(one.dataset.batch_size)]),
                    "dataset": one.dataset.name,
                    "loss_weight": one.dataset.weight,
                }
                for one in rows
            ]
            corrupt = [(one.dataset.name, sample) for one in rows for sample in one.take_corrupt()]
            yield batches, {one.dataset.name: one.progress() for one in rows}, corrupt


class _Rows:
    """Rows of one dataset, as one worker reads them."""

    def __init__(
        self,
        dataset: MixtureDataset,
        progress: _Progress,
        *,
        seed: int,
        consumer: int,
        consumers: int,
        max_corrupt: float,
    ) -> None:
        self.dataset = dataset
        self.stream = Stream(
            dataset.source,
            seed=seed,
            consumer=consumer,
            consumers=consumers,
            shuffle=dataset.shuffle,
            buffer=dataset.buffer,
            position=progress.position,
        )
        self.seed = seed
        self.max_corrupt = max_corrupt
        self.packer = None if dataset.row_length is None else Packer(dataset.row_length, max_media=dataset.row_media)
        self.read, self.corrupt = progress.read, progress.corrupt
        self.skipped: list[CorruptSample] = []
        self.before_last = progress  # of the last example that was made
        self.examples = self._examples()

    def next_row(self) -> list[Example]:
        return [next(self.examples)] if self.packer is None else self.packer.next_row(self.examples)

    def progress(self) -> _Progress:
        """Tell from where to go on; an example that waits for the next row will be made again."""
        if self.packer is not None and self.packer.held is not None:
            return self.before_last
        return self._now()

    def take_corrupt(self) -> list[CorruptSample]:
        skipped, self.skipped = self.skipped, []
        return skipped

    def _now(self) -> _Progress:
        return _Progress(self.stream.position, self.read, self.corrupt)

    def _examples(self) -> Iterator[Example]:
        while True:
            before = self._now()
            document = next(self.stream)
            self.read += 1
            if isinstance(document, CorruptSample):
                self._skip(document)
                continue
            seed = derive_seed(self.seed, self.stream.identity)
            try:
                example = self.dataset.make_example(document, generator=torch.Generator().manual_seed(seed))
            except (ValueError, OSError) as error:
                self._skip(CorruptSample(document.key, str(error)))
                continue
            self.before_last = before
            yield example

    def _skip(self, sample: CorruptSample) -> None:
        self.corrupt += 1
        self.skipped.append(sample)
        what = f"samples of {self.dataset.name}"
        check_corrupt(what, self.corrupt, self.read, max_corrupt=self.max_corrupt, last=sample)


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Find out which process this is, also before torch.distributed is initialised, as torchrun's variables tell."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"give both rank and world_size or neither, got {rank} and {world_size}")
    if rank is not None and world_size is not None:
        return rank, world_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _start_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are many already

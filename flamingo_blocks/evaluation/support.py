"""Support: which annotated examples a prompt shows before its query, and in which order.

What is drawn follows from the examples, the seed and the query's key alone, so that it is the same for any size of
batches, number of processes, order of queries and version of Python. The examples of fewer shots are the last ones of
more, those next to the query.

Source: Alayrac et al. 2022 (Flamingo), section 2.5 and appendix A.2.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import count as count_from
from itertools import islice
from operator import index
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from flamingo_blocks.data.stream import derive_seed
from flamingo_blocks.evaluation.prompts import Example

T = TypeVar("T")


@runtime_checkable
class SupportSelector(Protocol):
    """Chooses the support of a query."""

    def __call__(self, query: Example, *, shots: int, seed: int) -> list[Example]:
        """Give support examples in the order of the prompt: the last one stands next to the query.

        Args:
            query: It is never shown itself: neither an example with its key, nor one with its media.
            shots: How many examples.
            seed: Of what is drawn.

        Raises:
            ValueError: If there are fewer examples.
        """
        ...


class RandomSupport:
    """Draw support anew for each query, without replacement.

    Args:
        examples: Those to draw from.
        balanced: Show each answer equally often, as few-shot classification needs: each round of draws takes one
            example of each answer, in an order that is new. An answer that has no more examples is passed over.

    Raises:
        ValueError: If two examples have the same key.

    Example:
        ```python
        from flamingo_blocks.evaluation import Example, RandomSupport

        examples = [Example(str(i), (f"{i}.png",), (answer,)) for i, answer in enumerate(["cat", "dog"] * 50)]
        select = RandomSupport(examples, balanced=True)
        support = select(examples[0], shots=8, seed=0)
        assert [example.shown_answer for example in support].count("cat") == 4
        assert select(examples[0], shots=4, seed=0) == support[-4:]
        ```
    """

    def __init__(self, examples: Sequence[Example], *, balanced: bool = False) -> None:
        check_keys(examples)
        self._groups = _by_answer(examples) if balanced else [list(examples)]

    def __call__(self, query: Example, *, shots: int, seed: int) -> list[Example]:
        """See `SupportSelector`."""
        # What repr shows of a text that is not ASCII depends on the version of Python.
        return nearest_last(_draw(self._groups, query, index(seed), ascii(query.key)), query, shots)


class FixedSupport:
    """Draw support once for each seed: the same examples in the same order for all queries.

    For a query that is among them, what would be drawn next stands at the beginning instead.

    Args:
        examples: Those to draw from.
        balanced: See `RandomSupport`.

    Raises:
        ValueError: If two examples have the same key.
    """

    def __init__(self, examples: Sequence[Example], *, balanced: bool = False) -> None:
        check_keys(examples)
        self._groups = _by_answer(examples) if balanced else [list(examples)]

    def __call__(self, query: Example, *, shots: int, seed: int) -> list[Example]:
        """See `SupportSelector`."""
        return nearest_last(_draw(self._groups, query, index(seed)), query, shots)


def permutations(support: Sequence[T], *, count: int, seed: int) -> list[list[T]]:
    """Give different orders of support, for prompt ensembling.

    Args:
        support: In one order, which is the first of the result.
        count: How many orders. Where there are not so many, as for one example or none, the result has all there are.
        seed: Of the other orders.

    Raises:
        ValueError: If `count` is not positive.

    Source: Alayrac et al. 2022, section 2.5 and appendix A.2.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}; 1 is the given order alone")
    count = min(count, math.factorial(len(support)))
    orders = {tuple(range(len(support))): None}  # a set that keeps its order
    for attempt in count_from():
        if len(orders) == count:
            break
        orders[tuple(_shuffled(range(len(support)), index(seed), attempt))] = None
    return [[support[i] for i in order] for order in orders]


def without_query(examples: Iterable[Example], query: Example) -> Iterator[Example]:
    """Leave out a query, be it by its key or by its media: another question about its image would tell of it, too.

    Args:
        examples: Which may be support.
        query: What is asked.
    """
    media = media_identity(query.media)
    for example in examples:
        if example.key != query.key and (not example.media or media_identity(example.media) != media):
            yield example


def nearest_last(order: Iterable[Example], query: Example, shots: int) -> list[Example]:
    """Take the first examples of an order, and turn them round, so that the first one stands next to the query.

    Args:
        order: The examples, without the query.
        query: What is asked.
        shots: How many to take.

    Raises:
        ValueError: If there are fewer.
    """
    if shots < 0:
        raise ValueError(f"shots must not be negative, got {shots}")
    support = list(islice(order, shots))
    if len(support) < shots:
        raise ValueError(
            f"shots must be at most {len(support)}, as so many examples there are besides the query {query.key!r}, got "
            f"{shots}; give more support examples, or take fewer shots"
        )
    return support[::-1]


def check_keys(examples: Sequence[Example]) -> None:
    """Check that each example has a key of its own.

    Raises:
        ValueError: If two have the same one.
    """
    seen: set[str] = set()
    for example in examples:
        if example.key in seen:
            raise ValueError(f"examples must have a key each, but several have {example.key!r}; give them other keys")
        seen.add(example.key)


def media_identity(medium: Any) -> Hashable:
    """Tell whether media are the same: files by their paths, objects in memory by being one object.

    Args:
        medium: A medium as `FlamingoProcessor` takes it, or several.
    """
    if isinstance(medium, list | tuple):
        return tuple(map(media_identity, medium))
    source = getattr(medium, "source", medium)  # of a VideoFile
    return str(Path(source)) if isinstance(source, str | Path) else id(medium)


def _by_answer(examples: Sequence[Example]) -> list[list[Example]]:
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.shown_answer, []).append(example)
    return list(groups.values())


def _draw(groups: Sequence[Sequence[Example]], query: Example, *seed: int | str) -> Iterator[Example]:
    """Draw one example of each group in turn, until there are no more."""
    pools = [without_query(_shuffled(group, *seed, "group", i), query) for i, group in enumerate(groups)]
    for turn in count_from():
        if not pools:
            return
        for pool in list(_shuffled(pools, *seed, "turn", turn)):
            example = next(pool, None)
            if example is None:
                pools.remove(pool)
            else:
                yield example


def _shuffled(items: Sequence[T], *seed: int | str) -> Iterator[T]:
    """Give items in a random order, each drawn when it is asked for: a few of very many cost little."""
    moved: dict[int, int] = {}
    for left in range(len(items), 0, -1):
        place = derive_seed(*seed, left) % left
        yield items[moved.get(place, place)]
        moved[place] = moved.get(left - 1, left - 1)

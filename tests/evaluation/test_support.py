"""What is drawn follows from the examples, the seed and the query alone."""

import hashlib
import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_blocks.evaluation import Example, FixedSupport, RandomSupport, RicesSupport, SupportSelector, permutations
from flamingo_blocks.video import VideoFile


def make_examples(count: int, *, answers: int = 1) -> list[Example]:
    """Examples with a file and a key each, whose answers are shared out unevenly."""
    generator = random.Random(count)
    return [Example(f"é{i}", (f"{i}.png",), (f"answer {generator.randrange(answers)}",)) for i in range(count)]


def make_vectors(examples: list[Example]) -> dict[str, torch.Tensor]:
    return {
        example.key: torch.randn(4, generator=torch.Generator().manual_seed(i)) for i, example in enumerate(examples)
    }


def rices(examples: list[Example]) -> RicesSupport:
    """Queries are among the examples, or look like the example of the same number."""
    vectors = make_vectors(examples)
    return RicesSupport(examples, vectors, vectors | {f"query {i}": v for i, v in enumerate(vectors.values())})


SELECTORS: dict[str, Any] = {
    "random": RandomSupport,
    "random, balanced": lambda examples: RandomSupport(examples, balanced=True),
    "fixed": FixedSupport,
    "fixed, balanced": lambda examples: FixedSupport(examples, balanced=True),
    "RICES": rices,
}
QUERIES = [Example(f"query {i}", (f"query {i}.png",), ("?",)) for i in range(20)]
every_selector = pytest.mark.parametrize("make", SELECTORS.values(), ids=SELECTORS)


def keys(examples: list[Example]) -> list[str]:
    return [example.key for example in examples]


@every_selector
def test_support_depends_on_seed_query_and_shots_alone(make: Any) -> None:
    """Not on what was asked before, nor in which order or process."""
    examples = make_examples(30, answers=3)
    calls = [(query, shots, seed) for query in QUERIES[:6] for shots in (0, 1, 4, 16) for seed in (0, 1)]
    expected = {(query.key, shots, seed): make(examples)(query, shots=shots, seed=seed) for query, shots, seed in calls}
    random.Random(0).shuffle(calls)
    select: SupportSelector = make(examples)
    for query, shots, seed in calls:
        assert select(query, shots=shots, seed=seed) == expected[query.key, shots, seed]


def slow_draw(examples: list[Example], shots: int, *seed: Any) -> list[Example]:
    """Draw from a list that gets shorter, whose last example takes the place of the drawn one, by hashes alone."""
    left, drawn = list(examples), []
    for _ in range(shots):
        digest = hashlib.blake2b(repr((*seed, "group", 0, len(left))).encode("ascii"), digest_size=7).digest()
        place = int.from_bytes(digest, "big") % len(left)
        drawn.append(left[place])
        left[place] = left[-1]
        left.pop()
    return drawn[::-1]


@settings(max_examples=max(20, settings.default.max_examples // 3))  # type: ignore[union-attr]
@given(st.integers(1, 40), st.integers(0, 2**40), st.text(), st.data())
def test_draws_follow_from_hashes_that_are_the_same_everywhere(count: int, seed: int, key: str, data: Any) -> None:
    """In each process, and in each version of Python, though these print texts that are not ASCII differently."""
    examples, query = make_examples(count), Example(f"query {key}", (), ("?",))
    shots = data.draw(st.integers(0, count))
    expected = slow_draw(examples, shots, seed, ascii(query.key))
    assert RandomSupport(examples)(query, shots=shots, seed=seed) == expected
    assert FixedSupport(examples)(query, shots=shots, seed=seed) == slow_draw(examples, shots, seed)


@pytest.mark.unchecked
def test_a_seed_of_numpy_is_the_same_seed() -> None:
    seed: Any = np.int64(3)
    for make in (RandomSupport, FixedSupport):
        select = make(make_examples(50))
        assert select(QUERIES[0], shots=8, seed=seed) == select(QUERIES[0], shots=8, seed=3)
    assert permutations("abcd", count=5, seed=seed) == permutations("abcd", count=5, seed=3)


@every_selector
@pytest.mark.parametrize("shots", [1, 8, 29])
def test_support_is_drawn_without_replacement_and_never_the_query(make: Any, shots: int) -> None:
    examples = make_examples(30, answers=3)
    select = make(examples)
    for seed, query in itertools.product(range(3), examples):
        support = select(query, shots=shots, seed=seed)
        assert len({*keys(support), query.key}) == shots + 1


@every_selector
@pytest.mark.parametrize("form", ["path", "text", "video", "frames", "object"])
def test_an_example_with_the_media_of_the_query_is_not_its_support(make: Any, form: str) -> None:
    """Whatever its key is, as another question about the image."""
    image = torch.zeros(3, 4, 4)
    media: Any = {
        "path": (("folder/3.png",), (Path("folder/3.png"),)),
        "text": ((Path("3.png"), "4.png"), ("3.png", "./4.png")),
        "video": ((VideoFile("3.bin"),), (VideoFile(Path("3.bin")),)),
        "frames": ((["3.png", "4.png"],), (("3.png", Path("4.png")),)),
        "object": ((image,), (image,)),
    }[form]
    examples = make_examples(8)
    examples[3] = Example("other question", media[0], ("?",))
    query = Example("query 3", media[1], ("?",))
    assert "other question" not in keys(make(examples)(query, shots=7, seed=0))
    with pytest.raises(ValueError, match="shots must be at most 7"):
        make(examples)(query, shots=8, seed=0)


@every_selector
def test_examples_that_share_some_media_or_have_none_are_support(make: Any) -> None:
    examples = [Example("a", (), ("?",)), Example("b", (), ("?",)), Example("c", ("1.png", "2.png"), ("?",))]
    for media in ((), ("1.png",), ("2.png", "1.png"), (torch.zeros(3, 4, 4),)):
        assert len(make(examples)(Example("query 0", media, ("?",)), shots=3, seed=0)) == 3


@every_selector
def test_the_examples_of_fewer_shots_are_those_next_to_the_query(make: Any) -> None:
    examples = make_examples(33, answers=3)
    select = make(examples)
    for query in (QUERIES[0], examples[5]):
        everything = select(query, shots=32, seed=1)
        for shots in range(32):
            assert select(query, shots=shots, seed=1) == everything[32 - shots :]


@pytest.mark.parametrize("make", [RandomSupport, FixedSupport])
def test_each_ordered_pair_is_drawn_equally_often(make: Any) -> None:
    """A law of large numbers, with the bound of five standard deviations."""
    select, times = make(make_examples(6)), 1200
    counts = Counter(
        tuple(keys(select(Example(str(i), (), ("?",)), shots=2, seed=0 if make is RandomSupport else i)))
        for i in range(times)
    )
    share = 1 / 30
    assert len(counts) == 30
    assert all(abs(n - times * share) < 5 * (times * share * (1 - share)) ** 0.5 for n in counts.values())


@pytest.mark.parametrize("balanced", [False, True])
def test_random_support_is_new_for_each_query_and_seed_and_fixed_support_for_each_seed(balanced: bool) -> None:
    examples = make_examples(40, answers=2)

    def draws(select: SupportSelector) -> list[list[str]]:
        return [
            [str(keys(select(query, shots=8, seed=seed))) for query in (*QUERIES, *examples[:5])] for seed in range(10)
        ]

    drawn = draws(RandomSupport(examples, balanced=balanced))
    assert len({support for of_seed in drawn for support in of_seed}) == 250
    of_queries = [set(of_seed[:20]) for of_seed in draws(FixedSupport(examples, balanced=balanced))]
    assert [len(of_seed) for of_seed in of_queries] == [1] * 10
    assert len(set.union(*of_queries)) == 10


def test_fixed_support_puts_the_next_draw_in_front_where_the_query_is_among_it() -> None:
    examples = make_examples(20)
    select = FixedSupport(examples)
    support = select(QUERIES[0], shots=5, seed=0)
    following = select(QUERIES[0], shots=6, seed=0)[0]
    for query in support:
        rest = [example for example in support if example is not query]
        assert select(query, shots=4, seed=0) == rest
        assert select(query, shots=5, seed=0) == [following, *rest]


@pytest.mark.parametrize("make", [RandomSupport, FixedSupport])
@pytest.mark.parametrize("shots", [0, 1, 3, 7, 12, 25])
def test_balanced_support_has_each_answer_as_often_as_it_can(make: Any, shots: int) -> None:
    """Also where an answer has few examples. `level` is how high water stands that fills the answers evenly."""
    examples = [
        Example(f"{name}{i}", (), (name,))
        for name, size in zip("abcd", (20, 2, 9, 7), strict=True)
        for i in range(size)
    ]
    select = make(examples, balanced=True)
    for seed, query in itertools.product(range(4), (QUERIES[0], examples[0], examples[20])):
        sizes = Counter(example.shown_answer for example in examples if example.key != query.key)
        found = Counter(example.shown_answer for example in select(query, shots=shots, seed=seed))
        assert sum(found.values()) == shots
        level = max(found.values(), default=0)
        assert all(found[name] >= min(level - 1, size) for name, size in sizes.items())


def test_balanced_support_does_not_tell_the_answer_by_its_place() -> None:
    examples = [Example(f"{name}{i}", (), (name,)) for name in "abc" for i in range(20)]
    last = Counter(
        RandomSupport(examples, balanced=True)(query, shots=4, seed=seed)[-1].shown_answer
        for query in QUERIES
        for seed in range(30)
    )
    assert len(last) == 3
    assert all(abs(n - 200) < 5 * (600 * 1 / 3 * 2 / 3) ** 0.5 for n in last.values())


@every_selector
def test_more_shots_than_examples_are_refused(make: Any) -> None:
    examples = make_examples(5)
    with pytest.raises(
        ValueError, match=r"shots must be at most 5, as so many examples .* 'query 0', got 6; give more"
    ):
        make(examples)(QUERIES[0], shots=6, seed=0)
    with pytest.raises(ValueError, match="shots must be at most 4"):
        make(examples)(examples[0], shots=5, seed=0)
    with pytest.raises(ValueError, match="shots must not be negative, got -1"):
        make(examples)(QUERIES[0], shots=-1, seed=0)


@every_selector
def test_two_examples_with_one_key_are_refused(make: Any) -> None:
    examples = make_examples(5)
    with pytest.raises(ValueError, match="examples must have a key each, but several have 'é2'; give them other keys"):
        make([*examples, examples[2]])


# ---------------------------------------------------------------- orders for prompt ensembling


@given(st.integers(0, 5), st.integers(1, 130), st.integers(0, 9))
def test_permutations_are_different_orders_of_the_same(size: int, count: int, seed: int) -> None:
    """Or all there are. The given order is the first."""
    support = [f"example {i}" for i in range(size)]
    orders = permutations(support, count=count, seed=seed)
    possible = len(list(itertools.permutations(support)))
    assert len({tuple(order) for order in orders}) == len(orders) == min(count, possible)
    assert all(sorted(order) == support for order in orders)
    assert orders[0] == support
    assert permutations(support, count=max(1, count // 2), seed=seed) == orders[: max(1, count // 2)]


def test_permutations_are_drawn_equally_often_and_anew_for_each_seed() -> None:
    counts = Counter(tuple(permutations("abc", count=2, seed=seed)[1]) for seed in range(1500))
    assert len(counts) == 5
    assert all(abs(n - 300) < 5 * (1500 * 1 / 5 * 4 / 5) ** 0.5 for n in counts.values())


def test_no_permutation_is_refused() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0; 1 is the given order alone"):
        permutations("abc", count=0, seed=0)

import math
from collections import Counter
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_blocks.evaluation import cider, tokenize_caption

WORDS = st.sampled_from(["a", "cat", "dog", "red", "sits", "on", "the", "mat", "isn't"])
CAPTIONS = st.lists(WORDS, max_size=12).map(" ".join)
DATA = st.lists(st.tuples(CAPTIONS, st.lists(CAPTIONS, min_size=1, max_size=3)), min_size=1, max_size=4)


def slow_cider(predictions: list[str], references: list[list[str]]) -> list[float]:
    """Sum over the n-grams of the whole data set, n by n, as the formula has it."""

    @cache
    def grams(caption: str, n: int) -> Counter[tuple[str, ...]]:
        words = tokenize_caption(caption)
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def similar(ours: str, theirs: str, n: int) -> float:
        texts = [ours, *(text for some in references for text in some)]
        vocabulary = {gram for text in texts for gram in grams(text, n)}
        product, norms = 0.0, [0.0, 0.0]
        for gram in vocabulary:
            images = sum(any(gram in grams(text, n) for text in some) for some in references)
            rarity = math.log(len(references) / max(1, images))
            weights = [grams(text, n)[gram] * rarity for text in (ours, theirs)]
            product += min(weights) * weights[1]
            norms = [norm + weight**2 for norm, weight in zip(norms, weights, strict=True)]
        length = [max(0, len(tokenize_caption(text)) - 1) for text in (ours, theirs)]
        penalty = math.exp(-((length[0] - length[1]) ** 2) / 72)
        return penalty * product / math.sqrt(norms[0] * norms[1]) if all(norms) else 0.0

    return [
        10 * sum(similar(ours, text, n) for text in texts for n in range(1, 5)) / 4 / len(texts)
        for ours, texts in zip(predictions, references, strict=True)
    ]


@given(DATA)
@settings(max_examples=15)  # the slow one is slow
def test_scores_are_those_of_the_formula(data: list[tuple[str, list[str]]]) -> None:
    predictions, references = [ours for ours, _ in data], [theirs for _, theirs in data]
    mean, scores = cider(predictions, references)
    assert scores == pytest.approx(slow_cider(predictions, references), abs=1e-10)
    assert mean == pytest.approx(sum(scores) / len(scores))


def test_the_same_words_score_ten_and_others_nothing() -> None:
    captions = ["a red cat sits here", "two dogs run far away"]
    assert cider(captions, [[captions[0]], [captions[1]]])[1] == pytest.approx([10, 10])
    assert cider(captions[::-1], [[captions[0]], [captions[1]]])[1] == pytest.approx([0, 0])


def test_punctuation_and_case_do_not_count() -> None:
    references = [["A red cat, sits here."], ["two dogs run far away"]]
    scores = cider(["a red cat sits here", "Two dogs run far away!"], references)[1]
    assert scores == pytest.approx([10, 10])


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="as many predictions as references, got 1 and 0"):
        cider(["a"], [])
    with pytest.raises(ValueError, match="got 0 and 0"):
        cider([], [])
    with pytest.raises(ValueError, match=r"1 have none, e\.g\. number 1"):
        cider(["a", "b"], [["a"], []])

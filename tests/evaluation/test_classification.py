import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from flamingo_blocks.evaluation import roc_auc, top_1

SCORES = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e3, 1e3), st.sampled_from([-math.inf, math.inf]))


@given(st.lists(st.tuples(SCORES, st.booleans()), min_size=2, max_size=30))
def test_the_area_is_how_often_a_positive_query_wins(pairs: list[tuple[float, bool]]) -> None:
    positive = [score for score, label in pairs if label]
    negative = [score for score, label in pairs if not label]
    if not positive or not negative:
        with pytest.raises(ValueError, match="both classes"):
            roc_auc([score for score, _ in pairs], [label for _, label in pairs])
        return
    wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    found = roc_auc([score for score, _ in pairs], [label for _, label in pairs])
    assert found == pytest.approx(wins / len(positive) / len(negative), abs=1e-12)


@pytest.mark.parametrize("number", [3, 50, 1000])
def test_the_area_is_that_of_scikit_learn(number: int) -> None:
    draw = random.Random(number)
    labels = [True, False, *(draw.random() < 0.3 for _ in range(number))]
    scores = [float(draw.choice([draw.gauss(0, 1), draw.randint(-2, 2)]) + label) for label in labels]
    assert roc_auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_an_answer_is_right_whatever_its_case() -> None:
    assert top_1(["A Cat ", "dog", "owl"], [["a cat"], ["cat", "Dog"], ["bird"]]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "call, arguments, message",
    [
        (top_1, ([], []), "as many predictions as answers, got 0 and 0"),
        (top_1, (["a"], []), "got 1 and 0"),
        (roc_auc, ([0.5], []), "as many scores as labels"),
        (roc_auc, ([math.nan, 1.0], [True, False]), "1 are nan"),
        (roc_auc, ([1.0, 2.0], [True, True]), "got 2 positive and 0 negative"),
    ],
)
def test_what_cannot_be_scored_is_refused(call: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*arguments)

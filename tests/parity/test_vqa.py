"""VQA accuracy, as OpenFlamingo's copy of the official evaluation computes it."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from open_flamingo.eval.vqa_metric import VQAEval

from flamingo_blocks.evaluation import normalize_answer, vqa_accuracy

THEIRS: Any = VQAEval(None, None)
WORDS = [
    *THEIRS.contractions,
    *THEIRS.contractions.values(),
    *THEIRS.manualMap,
    "the",
    "A",
    "an",
    "cats",
    "1,000",
    "2.5",
]
SIGNS = [*THEIRS.punct, ".", "'", ":", "$", " ", "  ", "\n", "\t", ""]
PARTS = st.one_of(st.sampled_from(WORDS), st.sampled_from(SIGNS))
TEXTS = st.one_of(st.lists(PARTS, max_size=8).map("".join), st.lists(PARTS, max_size=8).map(" ".join))


def theirs(text: str) -> str:
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return str(THEIRS.processDigitArticle(THEIRS.processPunctuation(text)))


@given(TEXTS)
def test_answers_are_normalised_alike(text: str) -> None:
    assert normalize_answer(text) == theirs(text)


WITHOUT_APOSTROPHES = [
    word[:i] + word[i + 1 :] for word in THEIRS.contractions.values() for i, sign in enumerate(word) if sign == "'"
]


@pytest.mark.parametrize("word", sorted({*THEIRS.contractions, *WITHOUT_APOSTROPHES}))
def test_each_contraction_is_known_and_no_other(word: str) -> None:
    assert normalize_answer(word) == theirs(word)


def test_no_more_periods_are_taken_out_than_there() -> None:
    assert normalize_answer("x." * 40) == theirs("x." * 40)


@given(
    st.lists(st.sampled_from(["two", "2", "a cat", "cat", "cats."]), min_size=1, max_size=10),
    st.sampled_from(["2", "the cat", "cats"]),
)
def test_accuracies_are_alike(answers: list[str], prediction: str) -> None:
    annotation = {
        "answers": [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers)],
        "question_type": "what",
        "answer_type": "other",
    }
    evaluation: Any = VQAEval(None, None, n=10)
    evaluation.vqa = SimpleNamespace(qa={0: annotation})
    evaluation.vqaRes = SimpleNamespace(qa={0: {"answer": prediction}})
    evaluation.updateProgress = lambda _: None
    evaluation.evaluate([0])
    assert 100 * vqa_accuracy(prediction, answers) == pytest.approx(evaluation.accuracy["overall"])

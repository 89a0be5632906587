"""CIDEr-D, as the scorer that goes with COCO's captions computes it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.cider.cider_scorer import CiderScorer

from flamingo_blocks.evaluation import cider, tokenize_caption
from tests.evaluation.ptb_cases import make_up
from tests.evaluation.test_cider import DATA

Data = list[tuple[str, list[str]]]


def check(data: Data) -> None:
    predictions, references = [ours for ours, _ in data], [theirs for _, theirs in data]
    scorer: Any = CiderScorer(n=4, sigma=6.0)
    for ours, theirs in data:
        scorer += (" ".join(tokenize_caption(ours)), [" ".join(tokenize_caption(text)) for text in theirs])
    if not scorer.crefs or not any(any(reference) for references in scorer.crefs for reference in references):
        return  # their scorer asks for the most frequent of no words
    mean, scores = scorer.compute_score()
    found = cider(predictions, references)
    assert found[0] == pytest.approx(mean, abs=1e-10)
    assert found[1] == pytest.approx(scores.tolist(), abs=1e-10)


@given(DATA)
def test_scores_of_few_words_are_alike(data: Data) -> None:
    check(data)


@given(st.randoms(), st.integers(2, 12))
def test_scores_of_captions_are_alike(draw: Any, images: int) -> None:
    captions = [[make_up(draw) for _ in range(6)] for _ in range(images)]
    # Else hardly a word is common to two captions.
    data = [(f"{some[0]} {some[1][:20]}", [*some[1:], f"{some[0]} too"]) for some in captions]
    check(data)

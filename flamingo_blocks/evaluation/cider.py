"""CIDEr-D: how much of a caption stands in those that people wrote, rare words counting more.

Source: Vedantam et al. 2015 (CIDEr), section 6 for the variant CIDEr-D, which is what is called CIDEr in papers since.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from flamingo_blocks.evaluation.ptb_tokenizer import tokenize_caption

_LONGEST = 4  # words of an n-gram
_SIGMA = 6.0  # of the penalty on lengths that differ

Ngram = tuple[str, ...]


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """Score captions. Both sides are tokenised as in the evaluation of COCO.

    How rare a word is, is counted over the references given: scores of a part of a data set are not comparable with
    those of the whole.

    Args:
        predictions: A caption for each image.
        references: Captions of people for each image.

    Returns:
        The mean, and the score of each image, from 0 to 10. Published figures are a hundred times that.

    Raises:
        ValueError: If they are not as many, there are none, or an image has no references.

    Source: Vedantam et al. 2015. The numbers are those of the scorer that goes with COCO's data (pycocoevalcap), which
    takes the number of bigrams for a caption's length.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"there must be as many predictions as references, got {len(predictions)} and {len(references)}"
        )
    if empty := [i for i, captions in enumerate(references) if not captions]:
        raise ValueError(f"each image must have references, but {len(empty)} have none, e.g. number {empty[0]}")
    counts = [[_count(caption) for caption in captions] for captions in references]
    images = Counter(ngram for captions in counts for ngram in set().union(*captions))
    rarity = {ngram: math.log(len(references)) - math.log(number) for ngram, number in images.items()}
    unknown = math.log(len(references))
    scores = []
    for prediction, captions in zip(predictions, counts, strict=True):
        ours = _Vectors.of(_count(prediction), rarity, unknown)
        similar = (_similarity(ours, _Vectors.of(caption, rarity, unknown)) for caption in captions)
        scores.append(10 * sum(similar) / len(captions))
    return sum(scores) / len(scores), scores


def _count(caption: str) -> Counter[Ngram]:
    words = tokenize_caption(caption)
    return Counter(tuple(words[i : i + n]) for n in range(1, _LONGEST + 1) for i in range(len(words) - n + 1))


class _Vectors(NamedTuple):
    """A caption's n-grams, weighted by how often they come and how rare they are: a vector for each n."""

    weights: list[Mapping[Ngram, float]]
    norms: list[float]
    bigrams: int

    @classmethod
    def of(cls, counts: Mapping[Ngram, int], rarity: Mapping[Ngram, float], unknown: float) -> "_Vectors":
        weights: list[dict[Ngram, float]] = [{} for _ in range(_LONGEST)]
        for ngram, count in counts.items():
            weights[len(ngram) - 1][ngram] = count * rarity.get(ngram, unknown)
        norms = [_norm(vector.values()) for vector in weights]
        return cls(list(weights), norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))


def _norm(values: Iterable[float]) -> float:
    return math.sqrt(sum(value**2 for value in values))


def _similarity(ours: _Vectors, theirs: _Vectors) -> float:
    """Give the mean over n of the cosine, in which nothing counts more often than in the reference."""
    total = 0.0
    for our_weights, their_weights, *norms in zip(ours.weights, theirs.weights, ours.norms, theirs.norms, strict=True):
        both = our_weights.keys() & their_weights.keys()
        product = sum(min(our_weights[ngram], their_weights[ngram]) * their_weights[ngram] for ngram in both)
        total += product / math.prod(norms) if all(norms) else product
    return total / _LONGEST * math.exp(-((ours.bigrams - theirs.bigrams) ** 2) / (2 * _SIGMA**2))

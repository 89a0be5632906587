"""Scores of answers that are classes: top-1 accuracy, and the area under the ROC curve."""

from collections.abc import Sequence

import torch


def top_1(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Give the share of predictions that are one of their right answers, but for case and outer space.

    Args:
        predictions: An answer for each query.
        answers: What is right for each query.

    Raises:
        ValueError: If they are not as many, or none.
    """
    if not predictions or len(predictions) != len(answers):
        raise ValueError(f"there must be as many predictions as answers, got {len(predictions)} and {len(answers)}")
    right = [
        _plain(prediction) in {_plain(answer) for answer in some}
        for prediction, some in zip(predictions, answers, strict=True)
    ]
    return sum(right) / len(right)


def _plain(text: str) -> str:
    return text.strip().casefold()


def roc_auc(scores: Sequence[float], is_positive: Sequence[bool]) -> float:
    """Give the area under the ROC curve: how often a positive query has a higher score than a negative one.

    Args:
        scores: The higher, the more likely the query is positive. Equal scores count half.
        is_positive: What is true.

    Raises:
        ValueError: If they are not as many, a score is no number, or all queries are of one class.

    Source: Hanley and McNeil 1982 (the area is the Mann-Whitney statistic).
    """
    if len(scores) != len(is_positive):
        raise ValueError(f"there must be as many scores as labels, got {len(scores)} and {len(is_positive)}")
    values = torch.tensor(scores, dtype=torch.float64)
    positive = torch.tensor(is_positive, dtype=torch.bool)
    if values.isnan().any():
        raise ValueError(f"scores must be numbers, but {int(values.isnan().sum())} are nan")
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        raise ValueError(
            f"there must be queries of both classes, got {num_positive} positive and {num_negative} negative ones"
        )
    # The rank of a score is the mean over those that are equal.
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1).double() / 2)[which]
    wins = rank[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(wins / (num_positive * num_negative))

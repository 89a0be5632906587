"""What scripts time: layouts of media in a text, and steps, forward alone and with backward."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.measure import Result, medians
from flamingo_blocks.blocks import MediaRuns, media_ranges

Layout = Literal["balanced", "random", "one long run"]


def place_media(layout: Layout, *, text: int, media: int, batch: int = 1, device: str = "cpu") -> Tensor:
    """Say where rows of text have their media, all in the same places.

    Args:
        layout: At equal distances from the first token on; anywhere; or all at the start, so that the last medium is
            seen by all of the text but its beginning.
        text: Number of tokens.
        media: Number of them that stand for a medium.
        batch: Number of rows.
        device: Of the result.

    Returns:
        True where a token stands for a medium, of shape (batch, text).
    """
    if layout == "balanced":
        places = torch.arange(media) * text // media
    elif layout == "random":
        places = torch.randperm(text, generator=torch.Generator().manual_seed(0))[:media]
    else:
        places = torch.arange(media)
    return torch.zeros(batch, text, dtype=torch.bool).index_fill(1, places, True).to(device)


def name_sizes(batch: int, text: int, media: int) -> str:
    """Name sizes as rows of the tables do; a batch of one goes without saying."""
    return f"{f'B={batch} ' if batch > 1 else ''}T={text} M={media}"


def make_runs(is_media: Tensor) -> MediaRuns:
    """Do what a model with our blocks does once a forward for all of them."""
    return MediaRuns.from_ranges(media_ranges(is_media))


@dataclass
class Step:
    """Something to time with and without backward.

    Attributes:
        forward: Takes no arguments; gives one tensor or several.
        trained: What gets a gradient.
    """

    forward: Callable[[], Tensor | tuple[Tensor, ...]]
    trained: Sequence[Tensor]
    _gradients: tuple[Tensor, ...] | None = None

    def without_gradients(self) -> tuple[Tensor, ...]:
        """Run forward as in inference."""
        with torch.no_grad():
            return _as_tuple(self.forward())

    def with_backward(self) -> tuple[Tensor, ...]:
        """Run forward, and backward from arbitrary gradients, which are drawn once."""
        outputs = _as_tuple(self.forward())
        if self._gradients is None:
            generator = torch.Generator().manual_seed(0)
            self._gradients = tuple(torch.randn(x.shape, generator=generator).to(x) for x in outputs)
        return torch.autograd.grad(outputs, self.trained, self._gradients)


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


# Outputs and gradients may differ by so much of their norm. bfloat16 is checked beside float32, not instead.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def check_equal(steps: Mapping[str, Step]) -> None:
    """Refuse to time what does not compute the same.

    Args:
        steps: By name. Their first `trained` tensors should be what goes in; only as many are compared as all have.

    Raises:
        AssertionError: If outputs or gradients differ by more than 1e-5 of their norm; in bfloat16, 5e-2.
    """
    (first, expected), *others = [(name, _everything(step)) for name, step in steps.items()]
    for name, found in others:
        for place, (one, other) in enumerate(zip(expected, found, strict=False)):
            error = ((other.float() - one.float()).norm() / one.float().norm()).item()
            if not (one.shape == other.shape and error <= _TOLERANCES[one.dtype]):
                raise AssertionError(f"{name} differs from {first} by {error:.1e} of the norm, at output {place}")


def _everything(step: Step) -> list[Tensor]:
    return [*step.without_gradients(), *step.with_backward()]


def time_both(
    steps: Mapping[str, Step], *, seconds: float, rounds: int = 7
) -> tuple[dict[str, float], dict[str, float]]:
    """Time forward alone, then forward and backward; see `medians`.

    Args:
        steps: By name.
        seconds: How long each of the two should take, about.
        rounds: The least number of rounds.
    """
    forward = medians({name: step.without_gradients for name, step in steps.items()}, seconds=seconds, rounds=rounds)
    both = medians({name: step.with_backward for name, step in steps.items()}, seconds=seconds, rounds=rounds)
    return forward, both


def speed_ups(
    what: str, against: str, ours: Step, theirs: Step, *, goals: tuple[str, str] = ("", ""), seconds: float = 6.0
) -> Iterator[Result]:
    """Compare two steps: one result for forward, one with backward.

    Args:
        what: See `Result`.
        against: See `Result`.
        ours: Our step.
        theirs: Theirs.
        goals: Without and with backward.
        seconds: For each of the two.
    """
    times = time_both({"ours": ours, "theirs": theirs}, seconds=seconds)
    for direction, found, goal in zip(("forward", "forward and backward"), times, goals, strict=True):
        yield Result.speed_up(f"{what}, {direction}", against, found["ours"], found["theirs"], goal)

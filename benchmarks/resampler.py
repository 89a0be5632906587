"""Perceiver resamplers."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.cases import Step, check_equal, speed_ups
from benchmarks.measure import Result, as_script
from benchmarks.peers import flamingo_pytorch_resampler, open_flamingo_resampler
from flamingo_blocks.blocks import PerceiverResampler

DIM, DEPTH, MEDIA, PATCHES = 1024, 6, 4, 256


def run() -> Iterator[Result]:
    """Compare with OpenFlamingo's and flamingo-pytorch's. Features come from a frozen encoder: no gradient for them."""
    features = torch.randn(1, MEDIA, 1, PATCHES, DIM)
    yield from _compare("OpenFlamingo", open_flamingo_resampler, features, features, ">= 1.0")
    yield from _compare("flamingo-pytorch", flamingo_pytorch_resampler, features, features.squeeze(2), ">= 1.0")


def _compare(
    name: str,
    make: Callable[..., tuple[nn.Module, PerceiverResampler]],
    features: torch.Tensor,
    their_features: torch.Tensor,
    goal: str,
) -> Iterator[Result]:
    torch.manual_seed(0)
    theirs, ours = make(dim=DIM, depth=DEPTH)
    our_step = Step(lambda: ours(features), list(ours.parameters()))
    their_step = Step(lambda: theirs(their_features), list(theirs.parameters()))
    # The order of the weights differs.
    latents: Any = theirs.latents
    check_equal({"ours": Step(our_step.forward, [ours.latents]), name: Step(their_step.forward, [latents])})
    what = f"resampler, {MEDIA} images of {PATCHES} patches, d={DIM}, {DEPTH} layers, float32"
    yield from speed_ups(what, name, our_step, their_step, goals=(goal, goal), seconds=12)


if __name__ == "__main__":
    as_script("resampler", run)

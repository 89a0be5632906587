"""A whole training step over OpenFlamingo's model: forward, loss, backward and AdamW, with a frozen language model."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Result, as_script, medians
from benchmarks.models import both, check_equal, for_open_flamingo, prompt


def step(model: Any, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Make a function that trains what is not frozen by one step, and returns the loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def train() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return train


def compare(ours: Any, theirs: Any, images: int, text: int, goal: str) -> Iterator[Result]:
    """Time steps on one prompt of which every token is to be predicted."""
    input_ids, features = prompt(images, text)
    images_of_theirs = for_open_flamingo(features)
    our_step = step(ours, lambda: ours(input_ids, vision_features=features, labels=input_ids).loss)
    their_step = step(theirs, lambda: theirs(images_of_theirs, input_ids, labels=input_ids).loss)
    # The later losses come from what the earlier steps made of the weights: gradients and updates are compared, too.
    for number in range(2):
        check_equal(f"losses of step {number}", our_step(), their_step(), tolerance=1e-5)
    seconds = medians({"ours": our_step, "theirs": their_step}, seconds=0, rounds=2 if images > 5 else 5)
    what = f"training step, {images} images in {text:,} tokens"
    yield Result.speed_up(what, "OpenFlamingo", seconds["ours"], seconds["theirs"], goal)


def run() -> Iterator[Result]:
    """Compare on the shape of OPT-125M, in float32, with a block before each of 12 layers.

    Images begin as features of 256 patches, and are resampled. Embeddings are frozen in both, but for ours of the two
    new tokens.
    """
    ours, theirs = both()
    ours.train()
    theirs.train()
    yield from compare(ours, theirs, 5, 256, ">= 1.1")
    yield from compare(ours, theirs, 32, 2048, ">= 1.8")


if __name__ == "__main__":
    as_script("training", run)

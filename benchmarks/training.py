"""A whole training step over OpenFlamingo's model: forward, loss, backward and AdamW, with a frozen language model."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Result, as_script, medians
from benchmarks.models import both, check_equal, for_open_flamingo, prompt


def train(model: Any, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Make a function that trains what is not frozen by one step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loss_and_norm(loss: Callable[[], Tensor], *parts: nn.Module) -> Tensor:
    """Give a loss, and the norm of its gradients in each part."""
    value = loss()
    value.backward()
    norms = []
    for part in parts:
        norms.append(nn.utils.get_total_norm([p.grad for p in part.parameters() if p.grad is not None]))
        part.zero_grad()
    return torch.stack([value.detach(), *norms])


def compare(ours: Any, theirs: Any, images: int, text: int, goal: str) -> Iterator[Result]:
    """Time steps on one prompt of which every token is to be predicted."""
    input_ids, features = prompt(images, text)
    images_of_theirs = for_open_flamingo(features)

    def our_loss() -> Tensor:
        loss: Tensor = ours(input_ids, vision_features=features, labels=input_ids).loss
        return loss

    def their_loss() -> Tensor:
        loss: Tensor = theirs(images_of_theirs, input_ids, labels=input_ids).loss
        return loss

    found = loss_and_norm(our_loss, ours.injector, ours.resampler.layers)
    expected = loss_and_norm(their_loss, theirs.lang_encoder.gated_cross_attn_layers, theirs.perceiver.layers)
    for name, our_value, their_value in zip(("losses", "gradients", "gradients"), found, expected, strict=True):
        check_equal(name, our_value, their_value, tolerance=1e-4)
    seconds = medians(
        {"ours": train(ours, our_loss), "theirs": train(theirs, their_loss)}, seconds=0, rounds=1 if images > 5 else 5
    )
    what = f"training step, {images} images in {text:,} tokens"
    yield Result.speed_up(what, "OpenFlamingo", seconds["ours"], seconds["theirs"], goal)


def run() -> Iterator[Result]:
    """Compare on the shape of OPT-125M, in float32, with a block before each of 12 layers.

    Images begin as features of 256 patches, and are resampled. Embeddings are frozen in both, but for ours of the two
    new tokens.
    """
    for images, text, goal in ((5, 256, "> 1.1"), (32, 2048, "> 1.8")):
        ours, theirs = both()  # anew, since steps train them apart
        yield from compare(ours.train(), theirs.train(), images, text, goal)


if __name__ == "__main__":
    as_script("training", run)

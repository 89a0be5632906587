"""A whole training step over OpenFlamingo's model: forward, loss, backward and AdamW, with a frozen language model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Steps:
    """A training step of either model, as a function.

    Attributes:
        ours: Ours.
        theirs: OpenFlamingo's.
    """

    ours: Callable[[], None]
    theirs: Callable[[], None]


def make_steps(
    ours: Any,
    theirs: Any,
    images: int,
    text: int,
    *,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    tolerance: float = 1e-4,
) -> Steps:
    """Make steps on prompts of which every token is to be predicted, where both models agree on loss and gradients.

    Args:
        ours: Our model.
        theirs: OpenFlamingo's, with the same weights.
        images: Number of images.
        text: Number of tokens, of which some are `<image>`.
        batch: Number of prompts.
        dtype: For autocast; None: without. They are compared without it.
        tolerance: By how much losses and norms of gradients may differ, relatively.
    """
    input_ids, features = (x.to(ours.device) for x in prompt(images, text, batch=batch))
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
        check_equal(name, our_value, their_value, tolerance=tolerance)
    cast = torch.autocast(ours.device.type, dtype=dtype, enabled=dtype is not None)
    return Steps(train(ours, cast(our_loss)), train(theirs, cast(their_loss)))


def run() -> Iterator[Result]:
    """Compare on the shape of OPT-125M, in float32, with a block before each of 12 layers.

    Images begin as features of 256 patches, and are resampled. Embeddings are frozen in both, but for ours of the two
    new tokens.
    """
    for images, text, goal in ((5, 256, "> 1.1"), (32, 2048, "> 1.8")):
        ours, theirs = both()  # anew, since steps train them apart
        steps = make_steps(ours.train(), theirs.train(), images, text)
        seconds = medians({"ours": steps.ours, "theirs": steps.theirs}, seconds=0, rounds=1 if images > 5 else 5)
        what = f"training step, {images} images in {text:,} tokens"
        yield Result.speed_up(what, "OpenFlamingo", seconds["ours"], seconds["theirs"], goal)


if __name__ == "__main__":
    as_script("training", run)

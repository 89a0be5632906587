"""Whole gated blocks: cross-attention and feed-forward."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.cases import Step, check_equal, make_runs, place_media, speed_ups, time_both
from benchmarks.measure import Result, as_script
from benchmarks.peers import LATENTS, Peer, flamingo_pytorch, idefics, mllama, open_flamingo

DIM = 1024
# With it, SwiGLU's three matrices have as many weights as the others' two.
SWIGLU_HIDDEN = DIM * 8 // 3


@dataclass(frozen=True)
class BlockSizes:
    """What the blocks are given.

    Attributes:
        text: Number of tokens.
        media: Number of media.
        dtype: Of weights and inputs.
        device: Of weights and inputs.
    """

    text: int
    media: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


def block_steps(make: Callable[[], Peer], sizes: BlockSizes) -> tuple[Step, Step]:
    """Make the steps of our block and theirs, which were seen to be equal in float32.

    Hidden states, media and all weights get gradients. Ours makes the table of runs in each step; masks of theirs that
    are made once a forward are made here.

    Args:
        make: Makes the peer.
        sizes: What the blocks are given.
    """
    torch.manual_seed(0)
    peer = make()
    dim, media_dim = peer.ours.dim, peer.ours.media_dim
    is_media = place_media("balanced", text=sizes.text, media=sizes.media, device=sizes.device)
    hidden_states, media = torch.randn(1, sizes.text, dim), torch.randn(1, sizes.media, LATENTS, media_dim)

    def steps(dtype: torch.dtype) -> tuple[Step, Step]:
        for module in (peer.ours, peer.module):
            module.to(sizes.device, dtype).eval()
        inputs = [x.to(sizes.device, dtype).requires_grad_() for x in (hidden_states, media)]
        theirs = peer.for_layout(is_media)
        return (
            Step(lambda: peer.ours(*inputs, make_runs(is_media)), [*inputs, *peer.ours.parameters()]),
            Step(lambda: theirs(*inputs), [*inputs, *peer.module.parameters()]),
        )

    ours, theirs = steps(torch.float32)
    # The weights' order differs.
    check_equal({"ours": Step(ours.forward, ours.trained[:2]), peer.name: Step(theirs.forward, theirs.trained[:2])})
    return (ours, theirs) if sizes.dtype == torch.float32 else steps(sizes.dtype)


def run() -> Iterator[Result]:
    """Compare with OpenFlamingo where there are many media, with the nearest of all peers where there are few."""
    for dtype, goals in ((torch.float32, (">= 1.9", ">= 1.6")), (torch.bfloat16, (">= 2.8", ">= 2.0"))):
        ours, theirs = block_steps(
            lambda: open_flamingo(dim=DIM, media_dim=DIM), BlockSizes(text=2048, media=32, dtype=dtype)
        )
        what = f"whole gated block with its run table, T=2048 M=32 d={DIM}, {_name(dtype)}"
        yield from speed_ups(what, "OpenFlamingo", ours, theirs, goals=goals)
    for text in (256, 1024):
        for media in (1, 3, 5):
            yield from _few_media(text, media)


def _few_media(text: int, media: int) -> Iterator[Result]:
    peers: dict[str, Callable[[], Peer]] = {
        "OpenFlamingo": lambda: open_flamingo(dim=DIM, media_dim=DIM),
        "flamingo-pytorch": lambda: flamingo_pytorch(dim=DIM),
        "IDEFICS": lambda: idefics(dim=DIM, media_dim=DIM, hidden=SWIGLU_HIDDEN),
        "Mllama": lambda: mllama(dim=DIM, hidden=SWIGLU_HIDDEN),
    }
    steps = {}
    for name, make in peers.items():
        steps[f"ours as {name}"], steps[name] = block_steps(make, BlockSizes(text=text, media=media))
    times = time_both(steps, seconds=6, rounds=5)
    for direction, found in zip(("forward", "forward and backward"), times, strict=True):
        nearest = min(peers, key=lambda name: found[name] / found[f"ours as {name}"])
        what = f"whole gated block with its run table, T={text} M={media} d={DIM}, float32, {direction}"
        against = f"{nearest}, the fastest of {len(peers)} peers against ours with the same weights"
        yield Result.speed_up(what, against, found[f"ours as {nearest}"], found[nearest], ">= 1.0")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    as_script("blocks", run)

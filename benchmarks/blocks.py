"""Whole gated blocks: cross-attention and feed-forward."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Step, check_equal, make_runs, name_sizes, place_media, speed_ups
from benchmarks.measure import Result, as_script, medians
from benchmarks.peers import LATENTS, Peer, flamingo_pytorch, idefics, mllama, open_flamingo

# Makes a peer for a width. With so many hidden units, SwiGLU's three matrices have as many weights as the others' two.
PEERS: dict[str, Callable[[int], Peer]] = {
    "OpenFlamingo": lambda dim: open_flamingo(dim=dim, media_dim=dim),
    "flamingo-pytorch": lambda dim: flamingo_pytorch(dim=dim),
    "IDEFICS": lambda dim: idefics(dim=dim, media_dim=dim, hidden=dim * 8 // 3),
    "Mllama": lambda dim: mllama(dim=dim, hidden=dim * 8 // 3),
}


@dataclass(frozen=True)
class BlockSizes:
    """What the blocks are given.

    Attributes:
        text: Number of tokens.
        media: Number of media.
        dim: Width of text and media.
        dtype: Of weights and inputs.
        device: Of weights and inputs.
        batch: Number of rows.
        layers: How often the block runs, one after the other, as the layers of a model do.
    """

    text: int
    media: int
    dim: int = 1024
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    batch: int = 1
    layers: int = 1

    @property
    def what(self) -> str:
        """Name what is timed."""
        blocks = "whole gated block with its" if self.layers == 1 else f"{self.layers} gated blocks with their one"
        return f"{blocks} run table, {self}"

    def __str__(self) -> str:
        return f"{name_sizes(self.batch, self.text, self.media)} d={self.dim}, {str(self.dtype).removeprefix('torch.')}"


def block_steps(peer_name: str, sizes: BlockSizes) -> tuple[Step, Step]:
    """Make the steps of our block and a peer's, which were seen to be equal, in float32 too.

    Hidden states, media and all weights get gradients. Ours makes the table of runs in each step, once for all layers;
    masks of theirs that are made once a forward are made here.

    Args:
        peer_name: One of `PEERS`.
        sizes: What the blocks are given.
    """
    torch.manual_seed(0)
    peer = PEERS[peer_name](sizes.dim)
    is_media = place_media("balanced", text=sizes.text, media=sizes.media, batch=sizes.batch, device=sizes.device)
    hidden_states = torch.randn(sizes.batch, sizes.text, sizes.dim)
    media = torch.randn(sizes.batch, sizes.media, LATENTS, sizes.dim)
    for dtype in (torch.float32, sizes.dtype):
        for module in (peer.ours, peer.module):
            module.to(sizes.device, dtype).eval()
        inputs = [x.to(sizes.device, dtype).requires_grad_() for x in (hidden_states, media)]
        ours, theirs = _block_pair(peer, is_media, inputs, layers=1)
        # The order of the weights differs.
        check_equal({"ours": Step(ours.forward, inputs), peer_name: Step(theirs.forward, inputs)})
    return _block_pair(peer, is_media, inputs, layers=sizes.layers)


def _block_pair(peer: Peer, is_media: Tensor, inputs: list[Tensor], *, layers: int) -> tuple[Step, Step]:
    theirs = peer.for_layout(is_media)

    def run_ours() -> Tensor:
        hidden_states, media = inputs
        runs = make_runs(is_media)
        for _ in range(layers):
            hidden_states = peer.ours(hidden_states, media, runs)
        return hidden_states

    def run_theirs() -> Tensor:
        hidden_states, media = inputs
        for _ in range(layers):
            hidden_states = theirs(hidden_states, media)
        return hidden_states

    return (
        Step(run_ours, [*inputs, *peer.ours.parameters()]),
        Step(run_theirs, [*inputs, *peer.module.parameters()]),
    )


def run() -> Iterator[Result]:
    """Compare with OpenFlamingo where there are many media, with the nearest of all peers where there are few."""
    for dtype, goals in ((torch.float32, (">= 1.9", ">= 1.6")), (torch.bfloat16, (">= 2.8", ">= 2.0"))):
        sizes = BlockSizes(text=2048, media=32, dtype=dtype)
        ours, theirs = block_steps("OpenFlamingo", sizes)
        yield from speed_ups(sizes.what, "OpenFlamingo", ours, theirs, goals=goals)
    for text in (256, 1024):
        for media in (1, 3, 5):
            yield from over_nearest_peer(BlockSizes(text=text, media=media))


def over_nearest_peer(sizes: BlockSizes, *, goal: str = ">= 1.0") -> Iterator[Result]:
    """Compare our block with each peer's of the same weights, roughly, then well with the one that comes nearest.

    Args:
        sizes: What the blocks are given.
        goal: For the speed-up.
    """
    steps = {name: block_steps(name, sizes) for name in PEERS}
    for direction, run_step in (("forward", Step.without_gradients), ("forward and backward", Step.with_backward)):
        functions = {}
        for name, (ours, theirs) in steps.items():
            functions[f"ours as {name}"], functions[name] = partial(run_step, ours), partial(run_step, theirs)
        rough = medians(functions, seconds=2, rounds=3)
        nearest = min(PEERS, key=lambda name: rough[name] / rough[f"ours as {name}"])
        pair = {"ours": functions[f"ours as {nearest}"], "theirs": functions[nearest]}
        found = medians(pair, seconds=5, rounds=9)
        against = f"{nearest}, the fastest of {len(PEERS)} peers against ours with the same weights"
        yield Result.speed_up(f"{sizes.what}, {direction}", against, found["ours"], found["theirs"], goal)


if __name__ == "__main__":
    as_script("blocks", run)

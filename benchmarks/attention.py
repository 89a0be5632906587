"""Attention of text over media: its core, the module around it, and how near the module is to what it must compute."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Layout, Step, check_equal, make_runs, name_sizes, place_media, speed_ups, time_both
from benchmarks.measure import Result, as_script
from benchmarks.memory import peak_memory
from benchmarks.peers import HEAD_DIM, LATENTS, Peer, open_flamingo
from flamingo_blocks.blocks import Algorithm, GatedCrossAttentionBlock, KeyValues, MediaRuns, attend_to_media

MIB = 2**20


@dataclass(frozen=True)
class AttentionSizes:
    """What attention is given.

    Attributes:
        text: Number of tokens.
        media: Number of media.
        dim: Width of text and media.
        heads: Attention heads.
        dtype: Of weights and inputs.
        device: Of weights and inputs.
        batch: Number of rows.
    """

    text: int = 2048
    media: int = 32
    dim: int = 1024
    heads: int = 8
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    batch: int = 1

    def place_media(self, layout: Layout) -> Tensor:
        """Say where the media are."""
        return place_media(layout, text=self.text, media=self.media, batch=self.batch, device=self.device)

    def __str__(self) -> str:
        return f"{name_sizes(self.batch, self.text, self.media)}, {str(self.dtype).removeprefix('torch.')}"


Attend = Callable[[Tensor, KeyValues, MediaRuns], Tensor]


def core_step(sizes: AttentionSizes, layout: Layout, attend: Attend = attend_to_media) -> Step:
    """Attend with projected queries, keys and values; what is needed once a forward is made in each step.

    Args:
        sizes: What attention is given.
        layout: Where the media are.
        attend: Ours with the algorithm that it chooses, or another.
    """
    inputs, is_media = _core_inputs(sizes, layout)

    def forward() -> Tensor:
        queries, keys_values = inputs
        return attend(
            queries.unflatten(-1, (sizes.heads, HEAD_DIM)),
            KeyValues(*keys_values.unflatten(-1, (2, sizes.heads, HEAD_DIM)).unbind(3)),
            make_runs(is_media),
        ).flatten(2)

    return Step(forward, inputs)


def forced(algorithm: Algorithm) -> Attend:
    """Attend with an algorithm by name.

    Args:
        algorithm: Its name.
    """
    return lambda queries, media, runs: attend_to_media(queries, media, runs, algorithm=algorithm)


def open_flamingo_core_step(sizes: AttentionSizes, layout: Layout) -> Step:
    """The same, with OpenFlamingo's module as it is but for its norm and projections.

    Args:
        sizes: What attention is given.
        layout: Where the media are.
    """
    inputs, is_media = _core_inputs(sizes, layout)
    module: Any = open_flamingo(dim=sizes.dim, media_dim=sizes.dim, heads=sizes.heads).module.attn
    for name in ("norm", "to_q", "to_kv", "to_out"):
        setattr(module, name, nn.Identity())
    return Step(lambda: cast(Tensor, module(*inputs, media_locations=is_media)), inputs)


def _core_inputs(sizes: AttentionSizes, layout: Layout) -> tuple[list[Tensor], Tensor]:
    generator, inner = torch.Generator().manual_seed(0), sizes.heads * HEAD_DIM
    inputs = [
        torch.randn(shape, generator=generator).to(sizes.device, sizes.dtype).requires_grad_()
        for shape in ((sizes.batch, sizes.text, inner), (sizes.batch, sizes.media, LATENTS, 2 * inner))
    ]
    return inputs, sizes.place_media(layout)


def attention_module(block: GatedCrossAttentionBlock, hidden_states: Tensor, media: Tensor, runs: MediaRuns) -> Tensor:
    """What the block does before its first gate, which is what OpenFlamingo has a module of its own for.

    Args:
        block: Our block.
        hidden_states: Of the text.
        media: The media's latents.
        runs: What each token sees.
    """
    queries = block.to_q(block.norm(hidden_states)).unflatten(-1, (block.heads, block.head_dim))
    output: Tensor = block.to_out(attend_to_media(queries, block.project_media(media), runs).flatten(2))
    return output


@dataclass(frozen=True)
class ModuleSteps:
    """The attention module as steps.

    Attributes:
        ours: Norm, projections, attention, and the table of runs.
        theirs: OpenFlamingo's, with the same weights.
        floor: What has to be computed in any case, in parts: norm and projections; and alternatives for the attention
            of all tokens to 64 latents, without a mask.
    """

    ours: Step
    theirs: Step
    floor: dict[str, Step]


def module_steps(sizes: AttentionSizes) -> ModuleSteps:
    """Make the steps; ours and theirs were seen to be equal, in float32 too.

    Args:
        sizes: What attention is given.
    """
    torch.manual_seed(0)
    peer = open_flamingo(dim=sizes.dim, media_dim=sizes.dim, heads=sizes.heads)
    hidden_states = torch.randn(sizes.batch, sizes.text, sizes.dim)
    media = torch.randn(sizes.batch, sizes.media, LATENTS, sizes.dim)
    for dtype in (torch.float32, sizes.dtype):
        for module in (peer.ours, peer.module):
            module.to(sizes.device, dtype).eval()
        inputs = [x.to(sizes.device, dtype).requires_grad_() for x in (hidden_states, media)]
        ours, theirs = _module_pair(peer, sizes, inputs)
        check_equal({"ours": ours, "OpenFlamingo": theirs})
    return ModuleSteps(ours, theirs, _floor(peer.ours, sizes, inputs))


def _module_pair(peer: Peer, sizes: AttentionSizes, inputs: list[Tensor]) -> tuple[Step, Step]:
    is_media = sizes.place_media("balanced")
    hidden_states, media = inputs
    module: Any = peer.module.attn
    return (
        Step(
            lambda: attention_module(peer.ours, hidden_states, media, make_runs(is_media)),
            [*inputs, *_attention_weights(peer.ours)],
        ),
        Step(lambda: module(hidden_states, media, media_locations=is_media), [*inputs, *module.parameters()]),
    )


def _attention_weights(block: GatedCrossAttentionBlock) -> list[Tensor]:
    modules = (block.norm, block.to_q, block.to_kv, block.to_out)
    return [weight for module in modules for weight in module.parameters()]


def _floor(block: GatedCrossAttentionBlock, sizes: AttentionSizes, inputs: list[Tensor]) -> dict[str, Step]:
    hidden_states, media = inputs

    def projections() -> tuple[Tensor, Tensor]:
        return block.to_out(block.to_q(block.norm(hidden_states))), block.to_kv(media)

    shape = (sizes.batch, sizes.heads, sizes.text, HEAD_DIM)
    queries = torch.randn(shape, device=sizes.device, dtype=sizes.dtype, requires_grad=True)
    keys, values = (
        torch.randn((*shape[:2], LATENTS, HEAD_DIM), device=sizes.device, dtype=sizes.dtype, requires_grad=True)
        for _ in range(2)
    )

    def matmuls() -> Tensor:
        scores = queries @ (keys * HEAD_DIM**-0.5).transpose(-1, -2)
        return scores.softmax(-1) @ values

    return {
        "projections": Step(projections, [*inputs, *_attention_weights(block)]),
        "fused attention": Step(lambda: F.scaled_dot_product_attention(queries, keys, values), [queries, keys, values]),
        "attention as matmuls": Step(matmuls, [queries, keys, values]),
    }


def run() -> Iterator[Result]:
    """Compare core, module and memory with OpenFlamingo's, the module with its floor, and ours with itself."""
    sizes = AttentionSizes()
    for layout in get_args(Layout):
        ours, theirs = core_step(sizes, layout), open_flamingo_core_step(sizes, layout)
        check_equal({"ours": ours, "OpenFlamingo": theirs})
        what = f"attention core with its run table, {layout}, {sizes}"
        yield from speed_ups(what, "OpenFlamingo", ours, theirs, goals=(">= 50", ">= 30"))
    yield from same_tokens(sizes, 1, 32, "<= 1.3")
    yield from same_tokens(sizes, 32, 256, "<= 1.5")
    yield from one_call(sizes, 32, 256)
    for dtype, goals, floor_goals in (
        (torch.float32, (">= 5.5", ">= 4.3"), ("<= 1.07", "<= 1.15")),
        (torch.bfloat16, (">= 9", ">= 5"), ("<= 1.30", "<= 1.30")),
    ):
        sizes = replace(sizes, dtype=dtype)
        steps = module_steps(sizes)
        what = f"attention module with its run table, {sizes} d={sizes.dim}"
        yield from speed_ups(what, "OpenFlamingo", steps.ours, steps.theirs, goals=goals)
        yield from over_floor(what, steps, floor_goals)
        if dtype == torch.float32:
            yield Result.speed_up(
                f"peak memory of the {what}, forward and backward",
                "OpenFlamingo",
                peak_memory(steps.ours.with_backward) / MIB,
                peak_memory(steps.theirs.with_backward) / MIB,
                ">= 7",
                "MiB",
            )


def same_tokens(
    sizes: AttentionSizes, fewer: int, more: int, goal: str, layout: Layout = "balanced"
) -> Iterator[Result]:
    """Compare ours with itself on the same number of tokens.

    Args:
        sizes: What attention is given, but for the number of media.
        fewer: Number of media.
        more: Number of media.
        goal: For the cost at `more` over that at `fewer`.
        layout: Where the media are.
    """
    steps = {str(media): core_step(replace(sizes, media=media), layout) for media in (fewer, more)}
    what = f"attention core with its run table, {layout}, {replace(sizes, media=more)}"
    for direction, found in zip(("forward", "forward and backward"), time_both(steps, seconds=4), strict=True):
        yield Result.cost(f"{what}, {direction}", f"ours at M={fewer}", found[str(more)], found[str(fewer)], goal)


def one_call(sizes: AttentionSizes, fewer: int, more: int) -> Iterator[Result]:
    """Compare torch's attention with itself: all runs, of equal length, in one call, with nothing around it.

    So much more do keys and values of more media cost by themselves.

    Args:
        sizes: What attention is given, but for the number of media.
        fewer: Number of media.
        more: Number of media.
    """

    def step(media: int) -> Step:
        lengths = (sizes.text // media, LATENTS, LATENTS)
        inputs = [
            torch.randn(media, length, sizes.heads, HEAD_DIM, device=sizes.device, dtype=sizes.dtype).requires_grad_()
            for length in lengths
        ]
        queries, keys, values = (x.transpose(1, 2) for x in inputs)
        return Step(lambda: F.scaled_dot_product_attention(queries, keys, values), inputs)

    steps = {str(media): step(media) for media in (fewer, more)}
    what = f"torch's attention of {more} runs in one call, {replace(sizes, media=more)}"
    for direction, found in zip(("forward", "forward and backward"), time_both(steps, seconds=4), strict=True):
        yield Result.cost(f"{what}, {direction}", f"the same with M={fewer}", found[str(more)], found[str(fewer)])


def over_floor(what: str, steps: ModuleSteps, goals: tuple[str, str]) -> Iterator[Result]:
    """Compare the module with its floor.

    Args:
        what: See `Result`.
        steps: As `module_steps` gives them.
        goals: Without and with backward.
    """
    for direction, found, goal in zip(
        ("forward", "forward and backward"),
        time_both({"ours": steps.ours} | steps.floor, seconds=6),
        goals,
        strict=True,
    ):
        attention = min("fused attention", "attention as matmuls", key=lambda name: found[name])
        against = f"its floor: norm and projections, {attention} of all tokens to {LATENTS} latents"
        yield Result.cost(f"{what}, {direction}", against, found["ours"], found["projections"] + found[attention], goal)


if __name__ == "__main__":
    as_script("attention", run)

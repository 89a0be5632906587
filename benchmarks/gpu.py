"""The same on a CUDA device in bfloat16: all algorithms, modules, blocks, training, and decoding with CUDA graphs."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.attention import (
    MIB,
    Attend,
    AttentionSizes,
    core_step,
    forced,
    module_steps,
    open_flamingo_core_step,
    over_floor,
    same_tokens,
)
from benchmarks.blocks import BlockSizes, block_steps, over_nearest_peer
from benchmarks.cases import Layout, check_equal, speed_ups
from benchmarks.measure import Result, medians, report
from benchmarks.memory import peak_memory
from benchmarks.models import both
from benchmarks.peers import HEAD_DIM, LATENTS, open_flamingo
from benchmarks.training import make_steps
from flamingo_blocks import LMLayerInjector
from flamingo_blocks.blocks import Algorithm, KeyValues, MediaRuns


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        batch: Number of rows, enough to keep a large device busy.
        text: Number of tokens.
        media: Number of media.
        many_media: Number of media, where the cost of more media is measured.
        dim: Width of text and media.
        few: Pairs of text and media where there are few media.
        blocks: How many blocks share a table of runs; Flamingo-9B has ten.
        layers: Decoder layers of the language models that are trained and that decode, each with a block.
        prompts: Rows, images and tokens of the batches on which whole models are trained.
        vocab: The vocabulary of the language model that decodes.
        tokens: Number of tokens decoded.
        seconds: How long each core of attention is measured, forward, and with backward.
        dtype: Of weights and inputs.
    """

    batch: int = 8
    text: int = 2048
    media: int = 32
    many_media: int = 256
    dim: int = 2048
    few: tuple[tuple[int, int], ...] = ((256, 1), (1024, 5))
    blocks: int = 4
    layers: int = 12
    prompts: tuple[tuple[int, int, int], ...] = ((32, 5, 256), (4, 32, 2048))
    vocab: int = 32_000
    tokens: int = 32
    seconds: float = 1.0
    dtype: torch.dtype = torch.bfloat16


def run(device: str = "cuda", sizes: Sizes | None = None) -> Iterator[Result]:
    """Compare with OpenFlamingo and other peers.

    Args:
        device: Where everything runs. Other than "cuda" is for trying this script out.
        sizes: How large everything is.
    """
    sizes = Sizes() if sizes is None else sizes
    common: dict[str, Any] = {"dim": sizes.dim, "dtype": sizes.dtype, "device": device}
    attention = AttentionSizes(text=sizes.text, media=sizes.media, batch=sizes.batch, **common)
    for layout in get_args(Layout):
        yield from _cores(attention, layout, sizes.seconds)
    yield from same_tokens(attention, 1, sizes.media, "")
    yield from same_tokens(attention, sizes.media, sizes.many_media, "")
    yield from _module(attention)
    for batch, layers in ((sizes.batch, sizes.blocks), (1, 1)):
        block = BlockSizes(text=sizes.text, media=sizes.media, batch=batch, layers=layers, **common)
        yield from speed_ups(block.what, "OpenFlamingo", *block_steps("OpenFlamingo", block))
    for text, media in sizes.few:
        few = BlockSizes(text=text, media=media, batch=sizes.batch, layers=sizes.blocks, **common)
        yield from over_nearest_peer(few, goal="")
    yield from _training(sizes, device)
    yield from _decoding(sizes, device)


def _cores(sizes: AttentionSizes, layout: Layout, seconds: float) -> Iterator[Result]:
    theirs = open_flamingo_core_step(sizes, layout)
    attends: dict[str, Attend] = {"flex_attention, compiled": _flex}
    for algorithm in get_args(Algorithm):
        attends[f"ours, {algorithm}"] = forced(algorithm)
    for name, attend in attends.items():
        step = core_step(sizes, layout, attend)
        try:
            step.with_backward()
        except (NotImplementedError, RuntimeError, ValueError) as error:
            sys.stderr.write(f"{name} does not run here: {str(error).splitlines()[0]}\n")
            continue
        check_equal({"OpenFlamingo": theirs, name: step})
        what = f"attention core by {name}, with its run table, {layout}, {sizes}"
        yield from speed_ups(what, "OpenFlamingo", step, theirs, seconds=seconds)
    ours = core_step(sizes, layout)
    check_equal({"OpenFlamingo": theirs, "ours": ours})
    what = f"attention core with its run table, {layout}, {sizes}"
    yield from speed_ups(what, "OpenFlamingo", ours, theirs, seconds=seconds)


def _flex(queries: Tensor, media: KeyValues, runs: MediaRuns) -> Tensor:
    text, latents = queries.shape[1], media.keys.shape[2]
    start, stop = runs.ranges.unbind(-1)

    def sees(batch: Tensor, _: Tensor, token: Tensor, latent: Tensor) -> Tensor:
        medium = latent // latents
        return (start[batch, token] <= medium) & (medium < stop[batch, token])

    is_cuda = queries.is_cuda
    mask = create_block_mask(
        sees, queries.shape[0], None, text, media.keys.shape[1] * latents, device=str(queries.device), _compile=is_cuda
    )
    output = (_compiled_flex() if is_cuda else flex_attention)(
        queries.transpose(1, 2),
        media.keys.flatten(1, 2).transpose(1, 2),
        media.values.flatten(1, 2).transpose(1, 2),
        block_mask=mask,
    )
    assert isinstance(output, Tensor)
    return output.transpose(1, 2)


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


def _module(sizes: AttentionSizes) -> Iterator[Result]:
    steps = module_steps(sizes)
    what = f"attention module with its run table, {sizes} d={sizes.dim}"
    yield from speed_ups(what, "OpenFlamingo", steps.ours, steps.theirs)
    yield from over_floor(what, steps, ("", ""))
    ours, theirs = (peak_memory(step.with_backward, device=sizes.device) / MIB for step in (steps.ours, steps.theirs))
    yield Result.speed_up(f"peak memory of the {what}, forward and backward", "OpenFlamingo", ours, theirs, unit="MiB")


def _training(sizes: Sizes, device: str) -> Iterator[Result]:
    """Train whole models, their float32 weights under autocast."""
    for batch, images, text in sizes.prompts:
        with torch.device(device):
            ours, theirs = both(dim=sizes.dim, layers=sizes.layers)  # anew, since steps train them apart
        # Rounding, of which a GPU's kernels have more, grows from layer to layer.
        options: dict[str, Any] = {"batch": batch, "dtype": sizes.dtype, "tolerance": 1e-3}
        steps = make_steps(ours.train(), theirs.train(), images, text, **options)
        seconds = medians({"ours": steps.ours, "theirs": steps.theirs})
        what = (
            f"training step under autocast, {batch} rows of {images} images in {text:,} tokens, {sizes.layers} layers "
            f"each with a block, d={sizes.dim}"
        )
        yield Result.speed_up(what, "OpenFlamingo", seconds["ours"], seconds["theirs"])
        our_memory, their_memory = (peak_memory(step, device=device) / MIB for step in (steps.ours, steps.theirs))
        what = f"peak memory of a {what}, beside weights and optimizer"
        yield Result.speed_up(what, "OpenFlamingo", our_memory, their_memory, unit="MiB")


class _InPlace(nn.Module):
    """OpenFlamingo's block with our block's arguments, for text whose media are all before it."""

    def __init__(self, block: nn.Module, is_media: Tensor) -> None:
        super().__init__()
        self.block = block
        self.is_media = is_media

    def forward(self, hidden_states: Tensor, media: Tensor, _: MediaRuns) -> Tensor:
        output: Tensor = self.block(hidden_states, media, media_locations=self.is_media, use_cached_media=True)
        return output


def _decoding(sizes: Sizes, device: str) -> Iterator[Result]:
    """Decode token by token, with a static cache and the language model compiled for CUDA graphs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.dim,
        intermediate_size=4 * sizes.dim,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.dim // HEAD_DIM,
        vocab_size=sizes.vocab,
    )
    peers = [open_flamingo(dim=sizes.dim, media_dim=sizes.dim) for _ in range(sizes.layers)]
    media = torch.randn(1, sizes.media, LATENTS, sizes.dim, device=device)
    is_media = torch.ones(1, sizes.media, dtype=torch.bool, device=device)
    blocks: dict[str, dict[int, nn.Module]] = {
        "text only": {},
        "ours": {i: peer.ours for i, peer in enumerate(peers)},
        "OpenFlamingo": {i: _InPlace(peer.module, is_media) for i, peer in enumerate(peers)},
    }
    decoders = {name: _Decoder(config, its_blocks, media, sizes.tokens) for name, its_blocks in blocks.items()}
    logits = {name: decoder.decode(1) for name, decoder in decoders.items()}
    _check_logits(logits["ours"], logits["OpenFlamingo"], relative=1e-4)
    for name, decoder in decoders.items():
        decoder.compile(sizes.dtype)
        # Rough, for the rounding of all layers; without blocks the logits would be others altogether.
        _check_logits(decoder.decode(1).float(), logits[name], relative=0.1)
    times = medians({name: decoder.decode for name, decoder in decoders.items()})
    ours, theirs, text_only = (times[name] / sizes.tokens for name in ("ours", "OpenFlamingo", "text only"))
    what = (
        f"decode step compiled for CUDA graphs, {sizes.layers} layers each with a block, M={sizes.media} d={sizes.dim}"
    )
    yield Result.cost(what, "the same language model on text only", ours, text_only)
    yield Result.speed_up(what, "OpenFlamingo's blocks in the same place", ours, theirs)


def _check_logits(found: Tensor, expected: Tensor, *, relative: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * expected.abs().max().item())


class _Decoder:
    """A language model with blocks that decodes one token again and again, which is the same work for all tokens.

    Args:
        config: The language model's.
        blocks: By the indices of decoder layers; may be empty.
        media: The media's latents; the text sees the last medium.
        tokens: How many to decode.
    """

    def __init__(self, config: LlamaConfig, blocks: dict[int, nn.Module], media: Tensor, tokens: int) -> None:
        torch.manual_seed(0)
        lm: Any = LlamaForCausalLM(config)
        self.lm: Any = lm.to(media.device).eval()
        self.injector = LMLayerInjector(blocks).inject(lm.model.layers).to(media.device).eval() if blocks else None
        self.runs = MediaRuns.from_ranges(torch.tensor([[[0, 1]]], device=media.device))
        self.media = media
        self.tokens = tokens
        self.token = torch.zeros(1, 1, dtype=torch.long, device=media.device)
        self.cache_name = "cache" if "cache" in signature(self.lm.forward).parameters else "past_key_values"
        self._prepare()

    def _prepare(self) -> None:
        self.run: Any = self.lm
        self.cache = StaticCache(config=self.lm.config, max_cache_len=self.tokens)
        self.seen: Any = self.media
        if self.injector is not None and not isinstance(next(iter(self.injector.blocks.values())), _InPlace):
            with torch.no_grad():
                # Once, and of the newest medium alone; OpenFlamingo's do it for each token and all media.
                self.seen = self.injector.project_media(self.media[:, -1:])
        self.decode(1)  # the cache allocates its tensors at the first token, which is not to be compiled

    def compile(self, dtype: torch.dtype) -> None:
        """Go over to another dtype, and to compiled code.

        Args:
            dtype: Of everything.
        """
        for module in (self.lm, self.injector):
            if module is not None:
                module.to(dtype)
        self.media = self.media.to(dtype)
        self._prepare()
        self.run = torch.compile(self.lm, mode="reduce-overhead", fullgraph=True)

    def decode(self, tokens: int | None = None) -> Tensor:
        """Decode with an empty cache.

        Args:
            tokens: How many; None: all.

        Returns:
            The last token's logits.
        """
        self.cache.reset()
        scope = nullcontext() if self.injector is None else self.injector.scope(self.seen, self.runs)
        with torch.no_grad(), scope:
            for _ in range(self.tokens if tokens is None else tokens):
                torch.compiler.cudagraph_mark_step_begin()
                output = self.run(self.token, **{self.cache_name: self.cache}, use_cache=True)
        logits: Tensor = output.logits
        return logits


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a CUDA device, and torch finds none here; the other scripts run on CPU")
    report("gpu", run(), device="cuda")

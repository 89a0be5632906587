import copy
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from flamingo_blocks import GatedCrossAttentionBlock, LMLayerInjector, MediaRuns, media_ranges
from flamingo_blocks.injection import select_layers
from flamingo_blocks.language import find_decoder_layers
from flamingo_blocks.residual_stream import LAYOUTS, StreamLayout
from tests.strategies import Layout, layouts, randomize, seeds
from tests.tiny_language_models import CONFIGS, DEPTH, VOCAB, WIDTH, make_lm

MEDIA_DIM, LATENTS = 12, 3
every_lm = pytest.mark.parametrize("name", CONFIGS)


@dataclass
class Inputs:
    """Text with two media, and what the blocks need of them."""

    input_ids: Tensor
    media: Tensor
    runs: MediaRuns

    @classmethod
    def make(cls, seed: int = 0, *, text: int = 9) -> "Inputs":
        generator = torch.Generator().manual_seed(seed)
        is_image = torch.zeros(2, text, dtype=torch.bool)
        is_image[0, [1, 5]] = is_image[1, [0, 3]] = True
        media = torch.randn(2, 2, LATENTS, MEDIA_DIM, generator=generator)
        input_ids = torch.randint(3, VOCAB, (2, text), generator=generator)
        return cls(input_ids, media, MediaRuns.from_ranges(media_ranges(is_image)))


def make_injector(*indices: int, gate: float = 0.0) -> LMLayerInjector:
    torch.manual_seed(1)
    indices = indices or tuple(range(DEPTH))
    return LMLayerInjector(
        {i: GatedCrossAttentionBlock(dim=WIDTH, media_dim=MEDIA_DIM, heads=4, gate_init=gate) for i in indices}
    )


def inject(lm: nn.Module, *indices: int, gate: float = 0.0) -> LMLayerInjector:
    return make_injector(*indices, gate=gate).inject(find_decoder_layers(lm)[1])


def outputs(lm: Any, inputs: Inputs, **arguments: Any) -> tuple[Tensor, ...]:
    result = lm(input_ids=inputs.input_ids, output_hidden_states=True, use_cache=False, **arguments)
    return result.logits, *result.hidden_states


# ---------------------------------------------------------------- gate zero


@every_lm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_zero_is_the_base_lm_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    lm, inputs = make_lm(name, dtype=dtype), Inputs.make()
    base = outputs(lm, inputs)
    injector = inject(lm)
    with injector.scope(inputs.media, inputs.runs):
        injected = outputs(lm, inputs)
    assert all(map(torch.equal, base, injected))


@every_lm
def test_gate_zero_leaves_the_gradients_to_the_inputs_bit_for_bit(name: str) -> None:
    lm, inputs = make_lm(name), Inputs.make()
    embeddings = lm.get_input_embeddings()(inputs.input_ids).detach().requires_grad_()

    def gradient() -> Tensor:
        return torch.autograd.grad(lm(inputs_embeds=embeddings, use_cache=False).logits.square().sum(), embeddings)[0]

    base = gradient()
    injector = inject(lm)
    with injector.scope(inputs.media, inputs.runs):
        assert torch.equal(gradient(), base)


@every_lm
def test_open_gates_change_the_output_of_every_layer_from_the_block_on(name: str) -> None:
    lm, inputs = make_lm(name), Inputs.make()
    layers = find_decoder_layers(lm)[1]
    seen: list[Tensor] = []
    for layer in layers:
        layer.register_forward_hook(
            lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
    lm(input_ids=inputs.input_ids)
    base = seen.copy()
    for index in range(DEPTH):
        injector = inject(lm, index, gate=1.0)
        seen.clear()
        with injector.scope(inputs.media, inputs.runs):
            lm(input_ids=inputs.input_ids)
        injector.eject()
        assert [torch.equal(after, before) for after, before in zip(seen, base, strict=True)] == [
            layer < index for layer in range(DEPTH)
        ]


# ---------------------------------------------------------------- what a token sees, through the whole model


@settings(max_examples=15)
@given(layouts(packed=False, max_batch=2, max_text=8), seeds, st.sampled_from(sorted(CONFIGS)))
def test_no_token_depends_on_a_later_medium(layout: Layout, seed: int, name: str) -> None:
    if layout.attend == "next":
        layout = Layout(layout.media_locations, layout.document_ids, "last")
    lm = make_lm(name)
    injector = inject(lm)
    for block in injector.blocks.values():
        randomize(block, seed)
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (layout.batch, layout.text), generator=generator)
    media = torch.randn(layout.batch, layout.media, LATENTS, MEDIA_DIM, generator=generator)
    with torch.no_grad(), injector.scope(media, layout.runs):
        before = lm(input_ids=input_ids).logits
    for changed in range(layout.media):
        other = media.clone()
        other[:, changed] += 1
        with torch.no_grad(), injector.scope(other, layout.runs):
            after = lm(input_ids=input_ids).logits
        comes_before = layout.media_locations.cumsum(1) <= changed
        torch.testing.assert_close(after[comes_before], before[comes_before])


@every_lm
def test_rows_are_independent_and_right_padding_changes_nothing(name: str) -> None:
    lm, inputs = make_lm(name), Inputs.make()
    injector = inject(lm, gate=1.0)
    with torch.no_grad(), injector.scope(inputs.media, inputs.runs):
        together = lm(input_ids=inputs.input_ids).logits
    for row in range(2):
        runs = MediaRuns.from_ranges(inputs.runs.ranges[row, None, :6])
        with torch.no_grad(), injector.scope(inputs.media[row, None], runs):
            alone = lm(input_ids=inputs.input_ids[row, None, :6]).logits
        torch.testing.assert_close(alone[0], together[row, :6], atol=1e-5, rtol=1e-5)


def test_projected_media_give_the_same_as_media() -> None:
    lm, inputs = make_lm("llama"), Inputs.make()
    injector = inject(lm, gate=1.0)
    with injector.scope(inputs.media, inputs.runs):
        expected = lm(inputs.input_ids).logits
    with injector.scope(injector.project_media(inputs.media), inputs.runs):
        assert torch.equal(lm(inputs.input_ids).logits, expected)


@pytest.mark.parametrize("rows", [2, 3])
def test_rows_that_share_media_give_what_copies_of_the_media_give(rows: int) -> None:
    lm, inputs = make_lm("llama"), Inputs.make()
    injector = inject(lm, gate=1.0)
    input_ids = torch.randint(3, VOCAB, (2 * rows, 9))
    copies = MediaRuns.from_ranges(inputs.runs.ranges.repeat_interleave(rows, dim=0))
    with injector.scope(inputs.media.repeat_interleave(rows, dim=0), copies):
        expected = lm(input_ids).logits
    shared = MediaRuns.from_ranges(inputs.runs.ranges.repeat(1, rows, 1))
    for media in (inputs.media, injector.project_media(inputs.media)):
        with injector.scope(media, shared, rows_per_media=rows):
            torch.testing.assert_close(lm(input_ids).logits, expected)


# ---------------------------------------------------------------- in and out again


@every_lm
def test_inject_then_eject_restores_the_lm(name: str) -> None:
    lm, inputs = make_lm(name), Inputs.make()

    def identity() -> list[object]:
        hooks = [dict(hooks) for m in lm.modules() for key, hooks in vars(m).items() if key.endswith("_hooks")]
        flags = [dict(flags) for m in lm.modules() for key, flags in vars(m).items() if "hooks_with" in key]
        own = ["forward" in vars(m) for m in lm.modules()]
        return [list(lm.state_dict()), [type(m) for m in lm.modules()], hooks, flags, own]

    base = outputs(lm, inputs)  # first: transformers adds hooks of its own when hidden states are asked for
    before = identity()
    injector = inject(lm, gate=1.0)
    assert injector.is_injected
    assert list(lm.state_dict()) == before[0]
    assert [type(m) for m in lm.modules()] == before[1]
    assert all(map(torch.equal, outputs(lm, inputs), base)), "outside of a scope the LM is what it was"
    injector.eject()
    assert not injector.is_injected
    assert identity() == before
    assert all(map(torch.equal, outputs(lm, inputs), base))
    injector.inject(find_decoder_layers(lm)[1])


@every_lm
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_whole_and_separate(name: str, how: str) -> None:
    lm, inputs = make_lm(name), Inputs.make()
    injector = inject(lm, gate=1.0)
    with injector.scope(inputs.media, inputs.runs):
        expected = lm(input_ids=inputs.input_ids).logits
        if how == "deepcopy":
            lm_copy, injector_copy = copy.deepcopy((lm, injector))
        else:
            file = io.BytesIO()
            torch.save((lm, injector), file)
            file.seek(0)
            lm_copy, injector_copy = torch.load(file, weights_only=False)
    for block in injector.blocks.values():
        nn.init.zeros_(block.gate.alpha)  # type: ignore[union-attr, arg-type]
    with injector_copy.scope(inputs.media, inputs.runs):
        assert torch.equal(lm_copy(input_ids=inputs.input_ids).logits, expected)
    injector_copy.eject()
    assert injector.is_injected
    with injector.scope(inputs.media, inputs.runs):
        assert not torch.equal(lm(input_ids=inputs.input_ids).logits, expected)


def test_a_copy_of_the_injector_alone_is_in_place_nowhere() -> None:
    lm = make_lm("llama")
    injector = inject(lm, 0)
    alone = copy.deepcopy(injector)
    assert not alone.is_injected
    assert injector.is_injected
    alone.inject(make_lm("llama").model.layers)


def test_hooks_that_someone_else_removed_are_not_in_place() -> None:
    lm = make_lm("llama")
    injector = inject(lm, 0)
    lm.model.layers[0]._forward_pre_hooks.clear()
    assert not injector.is_injected
    injector.inject(lm.model.layers)


def test_hidden_states_may_come_by_position_or_by_keyword() -> None:
    class Layer(nn.Module):
        def forward(self, mask: None, hidden_states: Tensor) -> Tensor:
            assert mask is None
            return 2 * hidden_states

    layers = nn.ModuleList([Layer(), Layer()])
    injector = LMLayerInjector({1: GatedCrossAttentionBlock(dim=8, media_dim=MEDIA_DIM, heads=2, gate_init=1.0)})
    injector.inject(layers)
    hidden_states, media = torch.randn(1, 4, 8), torch.randn(1, 1, LATENTS, MEDIA_DIM)
    runs = MediaRuns.from_ranges(media_ranges(torch.tensor([[True, False, False, False]])))
    with injector.scope(media, runs):
        by_position = layers[1](None, layers[0](None, hidden_states))
        by_keyword = layers[1](None, hidden_states=layers[0](None, hidden_states=hidden_states))
    expected = 2 * injector.blocks["1"](2 * hidden_states, media, runs)
    assert torch.equal(by_position, expected)
    assert torch.equal(by_keyword, expected)


# ---------------------------------------------------------------- scopes


def test_scopes_nest_and_exceptions_end_them() -> None:
    lm, outer, inner = make_lm("llama"), Inputs.make(0), Inputs.make(1)
    injector = inject(lm, gate=1.0)
    base = lm(outer.input_ids).logits

    def seen(inputs: Inputs) -> Tensor:
        with injector.scope(inputs.media, inputs.runs):
            return lm(outer.input_ids).logits

    with_outer, with_inner = seen(outer), seen(inner)
    with injector.scope(outer.media, outer.runs):
        assert torch.equal(lm(outer.input_ids).logits, with_outer)
        with injector.scope(inner.media, inner.runs):
            assert torch.equal(lm(outer.input_ids).logits, with_inner)
        with pytest.raises(ValueError, match="runs must be"), injector.scope(inner.media, inner.runs):
            lm(outer.input_ids[:, :4])
        assert torch.equal(lm(outer.input_ids).logits, with_outer)
    assert torch.equal(lm(outer.input_ids).logits, base)


def test_a_scope_that_is_held_over_a_yield_is_an_error_and_leaves_nothing_open() -> None:
    lm, first, second = make_lm("llama"), Inputs.make(0), Inputs.make(1)
    injector = inject(lm, gate=1.0)
    base = lm(first.input_ids).logits

    def stream(inputs: Inputs) -> Iterator[None]:
        with injector.scope(inputs.media, inputs.runs):
            yield

    streams = stream(first), stream(second)
    for one in streams:
        next(one)
    with pytest.raises(RuntimeError, match=r"must end in the reverse order .* not be held over an await or a yield"):
        next(streams[0], None)
    assert torch.equal(lm(first.input_ids).logits, base)
    with pytest.raises(RuntimeError, match="must end in the reverse order"):
        next(streams[1], None)


def test_one_scope_may_be_entered_again_and_by_several_threads() -> None:
    lm, outer, inner = make_lm("llama"), Inputs.make(0), Inputs.make(1)
    injector = inject(lm, gate=1.0)
    scope = injector.scope(inner.media, inner.runs)
    barrier = threading.Barrier(2)

    def enter_and_wait() -> None:
        with scope:
            barrier.wait()
            barrier.wait()

    with injector.scope(outer.media, outer.runs):
        expected = lm(outer.input_ids).logits
        thread = threading.Thread(target=enter_and_wait)
        thread.start()
        barrier.wait()
        with scope, scope:
            pass
        assert torch.equal(lm(outer.input_ids).logits, expected)
        barrier.wait()
        thread.join()


def test_two_threads_do_not_see_each_others_media() -> None:
    lm = make_lm("llama")
    injector = inject(lm, gate=1.0)
    inputs = [Inputs.make(seed) for seed in range(4)]
    barrier = threading.Barrier(len(inputs))

    def run(i: int, results: dict[int, Tensor], wait: Callable[[], object]) -> None:
        with injector.scope(inputs[i].media, inputs[i].runs):
            wait()
            with torch.no_grad():
                results[i] = lm(inputs[i].input_ids).logits
            wait()

    alone: dict[int, Tensor] = {}
    together: dict[int, Tensor] = {}
    for i in range(len(inputs)):
        run(i, alone, lambda: None)
    threads = [threading.Thread(target=run, args=(i, together, barrier.wait)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[i], together[i]) for i in range(len(inputs)))


# ---------------------------------------------------------------- gradient checkpointing


def train_step(lm: Any, injector: LMLayerInjector, *, nested: bool = False) -> dict[str, Tensor]:
    """Two forwards with different media, then one backward: what a step over several datasets does."""
    first, second = Inputs.make(0), Inputs.make(1)
    media = [inputs.media.clone().requires_grad_() for inputs in (first, second)]
    lm.zero_grad()
    injector.zero_grad()
    with ExitStack() as scopes:
        losses = []
        for inputs, latents in zip((first, second), media, strict=True):
            scope = injector.scope(latents, inputs.runs)
            if nested:  # then the last scope is still open in backward
                scopes.enter_context(scope)
                losses.append(lm(inputs.input_ids, use_cache=False).logits.square().sum())
            else:
                with scope:
                    losses.append(lm(inputs.input_ids, use_cache=False).logits.square().sum())
        sum(losses).backward()
    tensors = {**dict(injector.named_parameters()), **dict(lm.named_parameters())}
    tensors |= {f"media {i}": latents for i, latents in enumerate(media)}
    return {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


def enable_checkpointing(lm: Any, **options: object) -> None:
    enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
    enable(options)


def make_lm_for_training(name: str) -> Any:
    lm = make_lm(name).train()
    for module in lm.modules():  # dropout would draw anew
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return lm


@every_lm
@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}, {"context_fn": ...}])
def test_checkpointing_by_transformers_gives_equal_gradients(name: str, options: dict[str, Any]) -> None:
    lm = make_lm_for_training(name)
    injector = inject(lm, gate=0.5)
    expected = train_step(lm, injector)
    if "context_fn" in options:
        options = {"use_reentrant": False, "context_fn": injector.checkpoint_context}
    enable_checkpointing(lm, **options)
    injector.gradient_checkpointing = True
    # Older versions checkpoint a layer together with its hooks, and need the context.
    hooks_are_recomputed = "__init_subclass__" not in vars(GradientCheckpointingLayer)
    if hooks_are_recomputed and "context_fn" not in options:
        with pytest.raises(RuntimeError, match=r"pass context_fn=injector\.checkpoint_context"):
            train_step(lm, injector)
    else:
        result = train_step(lm, injector)
        assert result.keys() == expected.keys()
        torch.testing.assert_close(result, expected)


def test_a_checkpointed_block_in_a_frozen_lm_learns_the_same_and_keeps_less() -> None:
    lm, inputs = make_lm("llama").requires_grad_(False), Inputs.make()
    injector = inject(lm, DEPTH - 1, gate=0.5)
    assert injector.gradient_checkpointing is False
    found = []
    for injector.gradient_checkpointing in (False, True):
        kept: list[int] = []

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        injector.zero_grad()
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with injector.scope(inputs.media, inputs.runs), hooks:
            lm(inputs.input_ids, use_cache=False).logits.square().sum().backward()
        gradients = [parameter.grad for parameter in injector.parameters() if parameter.grad is not None]
        assert len(gradients) == len(list(injector.parameters()))
        found.append((gradients, sum(kept)))
    (gradients, kept_without), (other_gradients, kept_with) = found
    torch.testing.assert_close(other_gradients, gradients)
    assert kept_with < kept_without


def test_checkpointing_of_a_whole_model_reaches_the_blocks() -> None:
    lm = make_lm("llama")
    lm.injector = inject(lm)
    enable_checkpointing(lm, use_reentrant=False)
    assert lm.injector.gradient_checkpointing


@pytest.mark.parametrize("nested", [False, True])
def test_checkpointing_around_the_hooks_gives_equal_gradients_with_the_context(nested: bool) -> None:
    lm = make_lm("llama").train()
    injector = inject(lm, gate=0.5)
    expected = train_step(lm, injector)
    checkpoint_fn = partial(checkpoint, use_reentrant=False, context_fn=injector.checkpoint_context)
    for i, layer in enumerate(lm.model.layers):
        lm.model.layers[i] = CheckpointWrapper(layer, checkpoint_fn=checkpoint_fn)
    result = {
        key.replace("_checkpoint_wrapped_module.", ""): value
        for key, value in train_step(lm, injector, nested=nested).items()
    }
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputing_without_the_context_is_an_error_not_a_wrong_gradient(nested: bool, use_reentrant: bool) -> None:
    lm = make_lm("llama").train()
    injector = inject(lm, gate=0.5)

    def checkpoint_fn(function: Callable[..., object], *args: object, **kwargs: object) -> object:
        return checkpoint(partial(function, **kwargs), *args, use_reentrant=use_reentrant)

    for i, layer in enumerate(lm.model.layers):
        lm.model.layers[i] = CheckpointWrapper(layer, checkpoint_fn=checkpoint_fn)
    with pytest.raises(RuntimeError, match=r"pass context_fn=injector\.checkpoint_context"):
        train_step(lm, injector, nested=nested)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_scope_that_is_opened_inside_a_checkpoint_is_opened_again_in_backward(use_reentrant: bool) -> None:
    lm, inputs = make_lm("llama").train(), Inputs.make()
    injector = inject(lm, gate=0.5)

    def loss(media: Tensor) -> Tensor:
        with injector.scope(media, inputs.runs):
            return lm(inputs.input_ids, use_cache=False).logits.square().sum()

    media = inputs.media.requires_grad_()
    (expected,) = torch.autograd.grad(loss(media), media)
    checkpoint(loss, media, use_reentrant=use_reentrant).backward()
    assert media.grad is not None
    torch.testing.assert_close(media.grad, expected)


def test_backward_twice_through_a_checkpoint() -> None:
    lm, inputs = make_lm("llama").train(), Inputs.make()
    injector = inject(lm, gate=0.5)
    checkpoint_fn = partial(checkpoint, use_reentrant=False, context_fn=injector.checkpoint_context)
    for i, layer in enumerate(lm.model.layers):
        lm.model.layers[i] = CheckpointWrapper(layer, checkpoint_fn=checkpoint_fn)
    media = inputs.media.requires_grad_()
    with injector.scope(media, inputs.runs):
        loss = lm(inputs.input_ids, use_cache=False).logits.square().sum()
    (once,) = torch.autograd.grad(loss, media, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, media)
    assert torch.equal(once, twice)


# ---------------------------------------------------------------- which layers


@given(st.integers(1, 40), st.data())
def test_every_nth_layer_counts_from_the_first(num_layers: int, data: st.DataObject) -> None:
    every = data.draw(st.integers(1, num_layers))
    assert select_layers(num_layers, every=every) == tuple(i for i in range(num_layers) if i % every == 0)


def test_the_papers_intervals_give_the_papers_counts() -> None:
    assert len(select_layers(24)) == 24
    assert len(select_layers(40, every=4)) == 10
    assert select_layers(80, every=7) == (0, 7, 14, 21, 28, 35, 42, 49, 56, 63, 70, 77)
    assert select_layers(24, layers="middle") == select_layers(25, layers="middle") == (12,)
    assert select_layers(24, layers=[5, 2]) == (2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, r"every must be in 1\.\.4, the number of decoder layers, got 0"),
        ({"every": 5}, r"every must be in 1\.\.4, .* got 5"),
        ({"layers": [1, 4]}, r"there are decoder layers 0\.\.3, got \[4\]"),
        ({"layers": [-1]}, r"there are decoder layers 0\.\.3, got \[-1\]"),
        ({"layers": [1, 1]}, r"must not name a layer twice, got \[1, 1\]"),
        ({"layers": []}, "at least one decoder layer must get a block"),
        ({"layers": [1], "every": 2}, "give either every or layers"),
    ],
)
def test_impossible_choices_of_layers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_layers(4, **options)


# ---------------------------------------------------------------- bad input


def test_a_layer_that_is_not_there_is_refused() -> None:
    lm = make_lm("llama")
    with pytest.raises(ValueError, match=r"there are decoder layers 0\.\.2, got \[3\]"):
        inject(lm, 3)
    with pytest.raises(ValueError, match="blocks must hold at least one block"):
        LMLayerInjector({})


def test_injecting_twice_is_refused() -> None:
    lm = make_lm("llama")
    injector = inject(lm, 0)
    with pytest.raises(ValueError, match=r"this injector is already in place; call eject\(\) first"):
        injector.inject(lm.model.layers)
    with pytest.raises(ValueError, match="this language model already has blocks injected"):
        inject(lm, 1)
    injector.eject()
    with pytest.raises(ValueError, match=r"this injector is not in place; call inject\(\) first"):
        injector.eject()
    inject(lm, 1)


def test_a_layer_shared_between_places_is_refused() -> None:
    layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH)] * 2)
    with pytest.raises(ValueError, match="decoder layer 0 stands in the list more than once"):
        make_injector(0).inject(layers)


def test_media_projected_for_some_blocks_only_are_refused() -> None:
    injector, inputs = make_injector(0, 1), Inputs.make()
    projected = injector.project_media(inputs.media)
    del projected[1]
    with pytest.raises(ValueError, match=r"media must be projected for every block by project_media, not so for \[1\]"):
        injector.scope(projected, inputs.runs)


def test_a_layer_called_without_hidden_states_is_an_error() -> None:
    class Wrapper(nn.Module):
        def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
            return (*args, *kwargs.values())[0]

    layers = nn.ModuleList([Wrapper()])
    injector, inputs = make_injector(0, gate=1.0).inject(layers), Inputs.make()
    hidden_states = torch.randn(2, 9, WIDTH)
    with injector.scope(inputs.media, inputs.runs):
        assert torch.equal(layers[0](hidden_states), layers[0](hidden_states=hidden_states))
        with pytest.raises(ValueError, match="decoder layer 0 must be called with hidden_states, got no such argument"):
            layers[0](x=hidden_states)


@pytest.mark.unchecked
def test_a_residual_stream_of_another_form_is_refused() -> None:
    layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
    injector, inputs = make_injector(0).inject(layers), Inputs.make()
    for shape in ((2, 9, 2, WIDTH), (2, 9, WIDTH + 1)):
        with (
            injector.scope(inputs.media, inputs.runs),
            pytest.raises(ValueError, match=r"hidden_states must have shape \(batch, text, dim=32\)"),
        ):
            layers[0](torch.zeros(shape))
    with (
        injector.scope(inputs.media, inputs.runs),
        pytest.raises(ValueError, match=r"runs must be built for \(batch=2, text=4\), got \(2, 9\)"),
    ):
        layers[0](torch.zeros(2, 4, WIDTH))


# ---------------------------------------------------------------- language models from elsewhere


class PlainLM(nn.Module):
    """A language model of nobody's library: it has no config, and its layers are in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.stack = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 48, dropout=0.0, batch_first=True) for _ in range(DEPTH)
        )
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states = self.embedding(input_ids)
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        for layer in self.stack:
            hidden_states = layer(hidden_states, src_mask=mask, is_causal=True)
        return self.head(hidden_states)


def test_a_language_model_that_is_not_from_transformers_takes_blocks_too() -> None:
    torch.manual_seed(0)
    lm, inputs = PlainLM().eval(), Inputs.make()
    keys = list(lm.state_dict())
    base = lm(inputs.input_ids)
    _, layers = find_decoder_layers(lm, "stack")
    injector = make_injector().inject(layers)
    assert list(lm.state_dict()) == keys
    with injector.scope(inputs.media, inputs.runs):
        assert torch.equal(lm(inputs.input_ids), base)
        for block in injector.blocks.values():
            randomize(block, 0)
        opened = lm(inputs.input_ids)
        opened.sum().backward()
    assert all(p.grad is not None for p in injector.parameters())
    other = inputs.media.clone()
    other[0, 1] += 1
    with injector.scope(other, inputs.runs):
        changed = lm(inputs.input_ids)
    torch.testing.assert_close(changed[0, :5], opened[0, :5])
    assert not torch.allclose(changed[0, 5:], opened[0, 5:])
    injector.eject()
    assert torch.equal(lm(inputs.input_ids), base)


class Double(nn.Module):
    """A layer of the simplest kind, that takes more than hidden states."""

    def forward(self, hidden_states: Tensor, *others: object) -> Any:
        return (2 * hidden_states, *others) if others else 2 * hidden_states


def test_any_module_can_be_a_block_and_what_else_a_layer_is_called_with_stays() -> None:
    class AddMean(nn.Module):
        def forward(self, hidden_states: Tensor, media: Tensor, runs: MediaRuns) -> Tensor:
            return hidden_states + media.mean() * runs.sees_something[..., None]

    inputs, layer, hidden_states = Inputs.make(), Double(), torch.randn(2, 9, 4)
    injector = LMLayerInjector({0: AddMean()}).inject([layer])
    with injector.scope(inputs.media, inputs.runs):
        doubled, *others = layer(hidden_states, "one", "two")
    torch.testing.assert_close(doubled, 2 * AddMean()(hidden_states, inputs.media, inputs.runs))
    assert others == ["one", "two"]


def test_a_forward_of_its_own_stays_with_its_layer() -> None:
    """Layers with a block have one while it is in place: it is by it that torch.compile tells them from others."""
    layers: list[Any] = [Double(), Double(), Double()]
    own = layers[0].forward = Double().forward
    injector = make_injector(0, 1).inject(layers)
    assert ["forward" in vars(layer) for layer in layers] == [True, True, False]
    injector.eject()
    assert [vars(layer).get("forward") for layer in layers] == [own, None, None]


def test_blocks_stand_in_a_stream_that_is_time_major() -> None:
    block = GatedCrossAttentionBlock(dim=8, media_dim=MEDIA_DIM, heads=2, gate_init=1.0)
    layer = Double()
    injector = LMLayerInjector({0: block}, stream="text batch dim").inject([layer])
    hidden_states, media = torch.randn(4, 2, 8), torch.randn(2, 1, LATENTS, MEDIA_DIM)
    runs = MediaRuns.from_ranges(media_ranges(torch.tensor([[True, False, False, False]] * 2)))
    with injector.scope(media, runs):
        found = layer(hidden_states)
    torch.testing.assert_close(found, 2 * block(hidden_states.transpose(0, 1), media, runs).transpose(0, 1))
    shared = MediaRuns.from_ranges(runs.ranges[:1].repeat(1, 2, 1))
    with injector.scope(media[:1], shared, rows_per_media=2):
        found = layer(hidden_states)
    expected = block(hidden_states.transpose(0, 1), media[:1].repeat(2, 1, 1, 1), runs).transpose(0, 1)
    torch.testing.assert_close(found, 2 * expected)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "streams" in layout])
def test_blocks_read_the_mean_of_several_streams_and_write_to_each(layout: StreamLayout) -> None:
    block = GatedCrossAttentionBlock(dim=8, media_dim=MEDIA_DIM, heads=2, gate_init=1.0)
    layer = Double()
    injector = LMLayerInjector({0: block}, stream=layout).inject([layer])
    streams, media = torch.randn(3, 2, 4, 8), torch.randn(1, 1, LATENTS, MEDIA_DIM)
    runs = MediaRuns.from_ranges(media_ranges(torch.tensor([[True, False, False, False]] * 2)).view(1, 8, 2))
    with injector.scope(media, runs, rows_per_media=2):
        found = layer(rearrange(streams, f"streams batch text dim -> {layout}"))
    mean = streams.mean(0)
    added = block(mean.view(1, 8, 8), media, runs).view(2, 4, 8) - mean
    torch.testing.assert_close(found, rearrange(2 * (streams + added), f"streams batch text dim -> {layout}"))


@pytest.mark.unchecked
def test_what_stands_for_no_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="layers must be a sequence of indices or \"middle\", got 'first'"):
        select_layers(4, layers="first")  # type: ignore[arg-type]


@pytest.mark.unchecked
def test_a_layout_that_is_not_known_is_refused() -> None:
    block = GatedCrossAttentionBlock(dim=8, media_dim=MEDIA_DIM, heads=2)
    with pytest.raises(ValueError, match=r"stream must be one of 'batch text dim', .* got 'time batch dim'"):
        LMLayerInjector({0: block}, stream="time batch dim")  # type: ignore[arg-type]

"""torch.compile and torch.export: one graph, whatever the layout. The run-time shape checks would break both."""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from flamingo_blocks import (
    GatedCrossAttentionBlock,
    LMLayerInjector,
    MediaRuns,
    PerceiverResampler,
    media_ranges,
)
from flamingo_blocks.blocks import KeyValues, attend_to_media, choose_algorithm, dense_media_mask
from tests.strategies import random_tensor
from tests.tiny_flamingo import Prompt, make_flamingo
from tests.tiny_language_models import VOCAB, WIDTH, make_lm

pytestmark = pytest.mark.unchecked
MEDIA_DIM, LATENTS, TEXT = 12, 3, 8


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def media_locations(*positions: int) -> Tensor:
    is_image = torch.zeros(2, TEXT, dtype=torch.bool)
    is_image[:, list(positions)] = True
    return is_image


def make_block() -> GatedCrossAttentionBlock:
    return GatedCrossAttentionBlock(dim=WIDTH, media_dim=MEDIA_DIM, heads=4, gate_init=1.0)


@pytest.mark.parametrize("in_order", [None, True])
def test_a_block_compiles_to_one_graph_that_serves_every_layout(in_order: bool | None) -> None:
    block, compiler = make_block(), CompileCounter()

    @torch.compile(backend=compiler, fullgraph=True)
    def run(hidden_states: Tensor, media: Tensor, is_image: Tensor) -> Tensor:
        return block(hidden_states, media, MediaRuns.from_ranges(media_ranges(is_image), in_order=in_order))

    hidden_states, media = torch.randn(2, TEXT, WIDTH), torch.randn(2, 3, LATENTS, MEDIA_DIM)
    for positions in ((0, 3), (5,), (1, 2, 7), ()):
        is_image = media_locations(*positions)
        expected = block(hidden_states, media, MediaRuns.from_ranges(media_ranges(is_image)))
        torch.testing.assert_close(run(hidden_states, media, is_image), expected)
    assert compiler.frame_count == 1


def test_one_graph_serves_every_mask() -> None:
    """Also masks that are ranges, since nobody can look; and those of which only some tokens see anything."""
    block, compiler = make_block(), CompileCounter()

    @torch.compile(backend=compiler, fullgraph=True)
    def run(hidden_states: Tensor, media: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        runs = MediaRuns.from_mask(mask)
        return block(hidden_states, media, runs), runs.sees_something

    hidden_states, media = torch.randn(2, TEXT, WIDTH), torch.randn(2, 3, LATENTS, MEDIA_DIM)
    in_order = dense_media_mask(media_ranges(media_locations(1, 3, 4)), 3)
    for mask in (in_order, in_order.flip(2), in_order ^ in_order.roll(2, 2), in_order & False):
        output, sees_something = run(hidden_states, media, mask)
        torch.testing.assert_close(output, block(hidden_states, media, MediaRuns.from_mask(mask)))
        assert torch.equal(sees_something, mask.any(-1))
    assert compiler.frame_count == 1


def test_runs_built_beforehand_do_not_recompile_when_media_move() -> None:
    block, compiler = make_block(), CompileCounter()
    run: Any = torch.compile(block, backend=compiler, fullgraph=True)
    hidden_states, media = torch.randn(2, TEXT, WIDTH), torch.randn(2, 3, LATENTS, MEDIA_DIM)
    for positions in ((0, 3), (5,), (1, 2, 7)):
        runs = MediaRuns.from_ranges(media_ranges(media_locations(*positions)))
        torch.testing.assert_close(run(hidden_states, media, runs), block(hidden_states, media, runs))
    assert compiler.frame_count == 1


def test_compiled_attention_in_tiles_equals_the_loop_gradients_included() -> None:
    """With inductor's own code, over more tokens than a tile has; in float32, since older versions mix up float64."""
    text, media = 80, 7

    def attention(queries: Tensor, keys: Tensor, values: Tensor, is_image: Tensor) -> Tensor:
        runs = MediaRuns.from_ranges(media_ranges(is_image), in_order=True)
        assert choose_algorithm(queries, KeyValues(keys, values), runs) == "tiles"
        return attend_to_media(queries, KeyValues(keys, values), runs)

    run: Any = torch.compile(attention, fullgraph=True)
    for positions in ((0, 1, 40, 41, 75), (3, 79), tuple(range(7))):
        is_image = torch.zeros(1, text, dtype=torch.bool).index_fill(1, torch.tensor(positions), True)
        shapes = (1, text, 2, 5), (1, media, LATENTS, 2, 5), (1, media, LATENTS, 2, 5)
        inputs = [random_tensor(i, *shape).float().requires_grad_() for i, shape in enumerate(shapes)]
        found = run(*inputs, is_image)
        queries, *key_values = inputs
        runs = MediaRuns.from_ranges(media_ranges(is_image))
        expected = attend_to_media(queries, KeyValues(*key_values), runs, algorithm="loop")
        torch.testing.assert_close(found, expected)
        weights = random_tensor(9, *found.shape).float()
        torch.testing.assert_close(
            torch.autograd.grad((found * weights).sum(), inputs),
            torch.autograd.grad((expected * weights).sum(), inputs),
        )
    too_many = torch.arange(text)[None] <= media
    assert torch.equal(run(*inputs, too_many).isnan().any(-1).any(-1), torch.arange(text)[None] >= media)


def test_the_resampler_compiles_to_one_graph() -> None:
    resampler, compiler = PerceiverResampler(dim=16, heads=2, depth=2, max_frames=2), CompileCounter()
    run: Any = torch.compile(resampler, backend=compiler, fullgraph=True)
    features = torch.randn(1, 2, 3, 4, 16)
    for num_frames in ([[1, 3]], [[2, 0]]):
        arguments = features, torch.tensor(num_frames)
        torch.testing.assert_close(run(*arguments), resampler(*arguments))
    assert compiler.frame_count == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("scope_is_compiled", [False, True])
def test_an_injected_lm_compiles_to_one_graph(name: str, scope_is_compiled: bool) -> None:
    lm, compiler = make_lm(name), CompileCounter()
    injector = LMLayerInjector({0: make_block(), 2: make_block()}).inject(lm.base_model.get_submodule(_layers(name)))

    def forward(input_ids: Tensor, media: Tensor, is_image: Tensor) -> Tensor:
        with injector.scope(media, MediaRuns.from_ranges(media_ranges(is_image))):
            return lm(input_ids, use_cache=False).logits

    compiled_lm: Any = torch.compile(lm, backend=compiler, fullgraph=True)

    def forward_around(input_ids: Tensor, media: Tensor, is_image: Tensor) -> Tensor:
        with injector.scope(media, MediaRuns.from_ranges(media_ranges(is_image))):
            return compiled_lm(input_ids, use_cache=False).logits

    run: Any = torch.compile(forward, backend=compiler, fullgraph=True) if scope_is_compiled else forward_around
    input_ids, media = torch.randint(3, VOCAB, (2, TEXT)), torch.randn(2, 3, LATENTS, MEDIA_DIM)
    with torch.no_grad():
        for positions in ((0, 3), (5,), (1, 2, 7)):
            is_image = media_locations(*positions)
            torch.testing.assert_close(run(input_ids, media, is_image), forward(input_ids, media, is_image))
    assert compiler.frame_count == 1


def test_injection_and_ejection_reach_an_lm_that_is_compiled_already() -> None:
    lm = make_lm("llama")
    compiled: Any = torch.compile(lm, backend="eager")
    input_ids, media = torch.randint(3, VOCAB, (2, TEXT)), torch.randn(2, 2, LATENTS, MEDIA_DIM)
    runs = MediaRuns.from_ranges(media_ranges(media_locations(0, 3)))
    with torch.no_grad():
        base = compiled(input_ids, use_cache=False).logits
        for _ in range(2):
            injector = LMLayerInjector({0: make_block()}).inject(lm.model.layers)
            with injector.scope(media, runs):
                expected = lm(input_ids, use_cache=False).logits
                torch.testing.assert_close(compiled(input_ids, use_cache=False).logits, expected)
            assert not torch.allclose(expected, base)
            injector.eject()
            torch.testing.assert_close(compiled(input_ids, use_cache=False).logits, base)


def test_compiled_code_of_one_lm_is_not_run_for_another_with_other_blocks() -> None:
    """One has none, one has blocks before two layers, one before a single layer; all are compiled in turns."""
    lms = [make_lm("llama") for _ in range(3)]
    injectors = [
        LMLayerInjector({i: make_block() for i in layers}).inject(lm.model.layers)
        for lm, layers in zip(lms[1:], ((0, 2), (2,)), strict=True)
    ]
    compiled: list[Any] = [torch.compile(lm, backend="eager") for lm in lms]
    input_ids, media = torch.randint(3, VOCAB, (2, TEXT)), torch.randn(2, 2, LATENTS, MEDIA_DIM)
    runs = MediaRuns.from_ranges(media_ranges(media_locations(0, 3)))
    with torch.no_grad(), injectors[0].scope(media, runs), injectors[1].scope(media, runs):
        for order in ((0, 1, 2), (2, 1, 0)):
            for i in order:
                expected = lms[i](input_ids, use_cache=False).logits
                torch.testing.assert_close(compiled[i](input_ids, use_cache=False).logits, expected)


def test_so_it_is_in_another_thread_and_for_copies() -> None:
    """What torch.compile is configured to do holds in the thread that configures it."""
    plain, seeing = make_lm("llama"), make_lm("llama")
    injector = LMLayerInjector({0: make_block()}).inject(seeing.model.layers)
    seeing, injector = copy.deepcopy((seeing, injector))
    input_ids, media = torch.randint(3, VOCAB, (2, TEXT)), torch.randn(2, 2, LATENTS, MEDIA_DIM)
    runs = MediaRuns.from_ranges(media_ranges(media_locations(0, 3)))

    @torch.no_grad()
    def differences() -> tuple[float, float]:
        def logits(lm: Any) -> Tensor:
            found: Tensor = lm(input_ids, use_cache=False).logits
            return found

        run: Any = torch.compile(logits, backend="eager")
        base = run(plain)
        with injector.scope(media, runs):
            expected = seeing(input_ids, use_cache=False).logits
            seen = float((run(seeing) - expected).abs().max())
            injector.eject()
            return seen, float((run(seeing) - base).abs().max())

    with ThreadPoolExecutor(1) as thread:
        seen, ejected = thread.submit(differences).result()
    assert max(seen, ejected) < 1e-5


def _layers(name: str) -> str:
    return "h" if name == "gpt2" else "layers"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_whole_model_compiles_to_one_graph_that_serves_every_layout(name: str) -> None:
    model, compiler = make_flamingo(name)[0], CompileCounter()
    run: Any = torch.compile(model, backend=compiler, fullgraph=True)
    prompt = Prompt.make(model)
    for shift in (0, 1, 3):
        prompt.input_ids = prompt.input_ids.roll(shift, dims=1)
        output = run(prompt.input_ids, prompt.pixel_values, prompt.num_frames, use_cache=False)
        torch.testing.assert_close(output.logits, model(**prompt.inputs).logits)
    assert compiler.frame_count == 1


def test_a_whole_model_compiles_to_one_graph_that_serves_every_mask() -> None:
    model, compiler = make_flamingo()[0], CompileCounter()
    run: Any = torch.compile(model, backend=compiler, fullgraph=True)
    prompt = Prompt.make(model)
    prompt.num_frames = torch.ones(2, 3, dtype=torch.long)
    prompt.pixel_values = torch.cat([prompt.pixel_values, prompt.pixel_values[:, :1]], dim=1)
    in_order = dense_media_mask(media_ranges(prompt.is_image), 3)
    for mask in (in_order, in_order | in_order.flip(2), in_order.flip(2)):
        expected = model(**prompt.inputs, media_mask=mask)
        torch.testing.assert_close(run(**prompt.inputs, media_mask=mask).logits, expected.logits)
    assert compiler.frame_count == 1


def _media_at(prompt: Prompt, *positions: int) -> dict[str, Any]:
    """The prompt's inputs with an `<image>` at other places of both rows."""
    input_ids = torch.where(prompt.is_image, 50, prompt.input_ids)
    for position in positions:
        input_ids[:, position] = prompt.image_token_id
    num_frames = torch.ones_like(prompt.num_frames) * (torch.arange(2) < len(positions))
    return prompt.inputs | {"input_ids": input_ids, "num_frames": num_frames}


def _gradients(model: Any, run: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    run(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_compiles_to_one_graph_for_all_layouts_and_one_more_for_all_lengths(name: str) -> None:
    model: Any = make_flamingo(name)[0]
    model.train()
    model.language_model.eval()  # no dropout
    compiler = CompileCounter()
    run: Any = torch.compile(model, backend=compiler, fullgraph=True)
    # Layouts, then lengths of text, then numbers of rows: what changes for the first time becomes dynamic.
    for text, positions, frames in ((8, (1, 4), 1), (8, (2,), 1), (8, (0, 7), 1), (9, (1, 4), 2), (12, (5,), 2)):
        inputs = _media_at(Prompt.make(model, text=text), *positions)
        found, expected = _gradients(model, run, inputs), _gradients(model, model, inputs)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, msg=key)
        assert compiler.frame_count == frames


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_inductors_code_trains_as_the_model_itself(name: str) -> None:
    model: Any = make_flamingo(name)[0]
    model.train()
    model.language_model.eval()
    run: Any = torch.compile(model, fullgraph=True)
    for positions in ((1, 4), (2,)):
        inputs = _media_at(Prompt.make(model), *positions)
        with torch.no_grad():
            expected = model(**inputs, use_cache=False).logits
            torch.testing.assert_close(run(**inputs, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        found, gradients = _gradients(model, run, inputs), _gradients(model, model, inputs)
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_whole_model_is_exported_for_every_batch_text_and_layout(name: str, tmp_path: Path) -> None:
    model, _ = make_flamingo(name)
    any_size = torch.export.Dim.DYNAMIC
    shapes = {
        "input_ids": {0: any_size, 1: any_size},
        "pixel_values": {0: any_size, 1: any_size},
        "num_frames": {0: any_size, 1: any_size},
        "use_cache": None,
    }

    def inputs(rows: int, text: int, media: int) -> dict[str, Any]:
        prompt = Prompt.make(model, text=text, seed=text)
        order = torch.arange(rows) % 2
        return {
            "input_ids": prompt.input_ids[order],
            "pixel_values": F.pad(prompt.pixel_values, (0, 0) * 4 + (0, media - 2))[order],
            "num_frames": F.pad(prompt.num_frames, (0, media - 2))[order],
            "use_cache": False,
        }

    with torch.no_grad():
        program = torch.export.export(model, (), inputs(3, 8, 2), dynamic_shapes=shapes, strict=False)
        torch.export.save(program, tmp_path / "model.pt2")
        exported: Any = torch.export.load(tmp_path / "model.pt2").module()
        for size in ((3, 8, 2), (2, 13, 3), (5, 9, 2)):
            given = inputs(*size)
            torch.testing.assert_close(exported(**given).logits, model(**given).logits)

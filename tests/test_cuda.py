"""What only a CUDA device can show: its own kernels, and that nothing is left on the wrong device."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from flamingo_blocks import MediaCache, MediaRuns, media_ranges
from flamingo_blocks.blocks import Algorithm, KeyValues, attend_to_media, choose_algorithm
from tests.strategies import random_tensor
from tests.tiny_flamingo import Prompt, make_flamingo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TEXT, MEDIA, LATENTS, HEADS, KV_HEADS, HEAD_DIM = 130, 6, 64, 4, 2, 64
# Each row has text before its first image; row 1 has fewer images; one run has a single token.
PLACES = ((3, 4, 40, 90, 91, 129), (7, 60))
# What each algorithm is for.
CASES = [
    (algorithm, attend, dtype)
    for algorithm in (None, *get_args(Algorithm))
    for attend in ("last", "next", "all_previous")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not (algorithm in ("tiles", "varlen") and attend == "all_previous")
    and not (algorithm == "varlen" and dtype == torch.float32)
]


def make_inputs(attend: Any, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    is_image = torch.zeros(2, TEXT, dtype=torch.bool)
    for row, places in enumerate(PLACES):
        is_image[row, list(places)] = True
    shapes = (
        (2, TEXT, HEADS, HEAD_DIM),
        (2, MEDIA, LATENTS, KV_HEADS, HEAD_DIM),
        (2, MEDIA, LATENTS, KV_HEADS, HEAD_DIM),
    )
    return [random_tensor(i, *shape).to(dtype) for i, shape in enumerate(shapes)], media_ranges(is_image, attend=attend)


def run(inputs: list[Tensor], ranges: Tensor, algorithm: Algorithm | None) -> list[Tensor]:
    queries, keys, values = leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = attend_to_media(queries, KeyValues(keys, values), MediaRuns.from_ranges(ranges), algorithm=algorithm)
    weights = random_tensor(9, *output.shape).to(output)
    return [output, *torch.autograd.grad((output * weights).sum(), leaves)]


@pytest.mark.parametrize(("algorithm", "attend", "dtype"), CASES)
def test_every_algorithm_equals_attention_in_float64_gradients_included(
    algorithm: Algorithm | None, attend: str, dtype: torch.dtype
) -> None:
    inputs, ranges = make_inputs(attend, dtype)
    expected = run([tensor.double() for tensor in inputs], ranges, "dense")
    found = run([tensor.cuda() for tensor in inputs], ranges.cuda(), algorithm)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(found, expected, strict=True):
        assert (one.double().cpu() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize(("dtype", "algorithm"), [(torch.bfloat16, "varlen"), (torch.float32, "tiles")])
def test_the_choice_on_cuda(dtype: torch.dtype, algorithm: Algorithm) -> None:
    (queries, keys, values), ranges = make_inputs("last", dtype)
    media = KeyValues(keys.cuda(), values.cuda())
    assert choose_algorithm(queries.cuda(), media, MediaRuns.from_ranges(ranges.cuda())) == algorithm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_model_gives_the_logits_that_it_gives_on_cpu(dtype: torch.dtype) -> None:
    model: Any = make_flamingo(dtype=dtype)[0]
    prompt = Prompt.make(model)
    on_cuda = {name: tensor.cuda() for name, tensor in prompt.inputs.items()}
    expected = model(**prompt.inputs).logits
    model.to("cuda")
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(model(**on_cuda).logits.cpu(), expected, atol=tolerance, rtol=tolerance)


def test_cached_generation_equals_generation_without_caches() -> None:
    model: Any = make_flamingo()[0]
    prompt = Prompt.make(model)
    inputs = {name: tensor.cuda() for name, tensor in prompt.inputs.items()}
    model.to("cuda")
    media_cache = MediaCache()
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    found = model.generate(**inputs, media_cache=media_cache, **options)
    assert torch.equal(found, model.generate(**inputs, use_cache=False, **options))
    assert media_cache.key_values[0].keys.shape[1] == 1

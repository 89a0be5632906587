"""What only a CUDA device can show: its own kernels, and that nothing is left on the wrong device."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from torch import Tensor

from flamingo_blocks import GatedCrossAttentionBlock, MediaCache, MediaRuns, media_ranges
from flamingo_blocks.blocks import Algorithm, KeyValues, attend_to_media, choose_algorithm
from flamingo_blocks.data import FeatureCache, Medium, write_feature_cache
from flamingo_blocks.evaluation import Example, generate_answers, media_vectors, score_candidates
from flamingo_blocks.evaluation import Prompt as Question
from tests.strategies import random_tensor
from tests.tiny_flamingo import Prompt, make_flamingo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROOT = Path(__file__).parents[1]
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


def test_gradients_are_those_on_cpu_with_and_without_checkpointing() -> None:
    model: Any = make_flamingo()[0]
    prompt = Prompt.make(model)

    def gradients(device: str) -> dict[str, Tensor]:
        model.to(device).zero_grad()
        inputs = {name: tensor.to(device) for name, tensor in prompt.inputs.items()}
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients("cpu")
    for checkpointing in (False, True):
        if checkpointing:
            model.train().gradient_checkpointing_enable()
        found = gradients("cuda")
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.unchecked
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_block_equals_one_that_is_not_gradients_included(dtype: torch.dtype) -> None:
    block = GatedCrossAttentionBlock(dim=64, media_dim=32, heads=2, gate_init=0.5).to("cuda", dtype)
    is_image = torch.zeros(2, TEXT, dtype=torch.bool, device="cuda")
    for row, places in enumerate(PLACES):
        is_image[row, list(places)] = True
    inputs = [random_tensor(0, 2, TEXT, 64), random_tensor(1, 2, MEDIA, 8, 32)]

    def step(hidden_states: Tensor, media: Tensor) -> Tensor:
        output: Tensor = block(hidden_states, media, MediaRuns.from_ranges(media_ranges(is_image), in_order=True))
        return output

    found = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaves = [tensor.to("cuda", dtype).requires_grad_() for tensor in inputs]
        output = function(*leaves)
        found.append([output, *torch.autograd.grad(output.float().square().sum(), [*leaves, *block.parameters()])])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for eager, compiled in zip(*found, strict=True):
        assert (compiled - eager).float().norm() <= tolerance * eager.float().norm()


@pytest.mark.unchecked
def test_generation_with_a_static_cache_equals_generation_with_a_dynamic_one() -> None:
    """transformers compiles the forward by itself there, with CUDA graphs."""
    model: Any = make_flamingo()[0]
    prompt = Prompt.make(model)
    inputs = {name: tensor.cuda() for name, tensor in prompt.inputs.items()}
    model.to("cuda")
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = model.generate(**inputs, **options)
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), expected)


def test_evaluation_gives_on_cuda_what_it_gives_on_cpu(tmp_path: Path) -> None:
    model: Any
    model, processor = make_flamingo("gpt_neox")
    picture = Image.new("RGB", (40, 30), (200, 30, 90))
    question = Question("<image>w11 w12", (picture,), space=" ", end="<EOC>")
    file = tmp_path / "picture.png"
    picture.save(file)
    answers, scores, vectors, features = [], [], [], []
    for device in ("cpu", "cuda"):
        model.to(device)
        answers.append(generate_answers(model, processor, [question], max_new_tokens=6))
        scores.append(score_candidates(model, processor, question, ["w20", "w21 w22"]).cpu())
        vectors.append(media_vectors(model, processor, [Example("1", (file,), ("w20",))], progress=False)["1"])
        parts: dict[str, Any] = {"vision_encoder": model.vision_encoder, "image_processor": processor.image_processor}
        medium = Medium("image", file)
        write_feature_cache(tmp_path / device, [medium], **parts, dtype=torch.float32, progress=False)
        features.append(FeatureCache(tmp_path / device, **parts)(medium))
    assert answers[0] == answers[1]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vectors[1].cpu(), vectors[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(features[1].cpu(), features[0], rtol=1e-3, atol=1e-4)


WORDS = ["--max_steps", "4", "--logging_steps", "1", "--disable_tqdm", "true", "--data_workers", "1"]
LAUNCH = ["accelerate.commands.launch", "--num_processes", "1", "--config_file"]


def losses_of(folder: Path, launcher: list[str], *words: str) -> list[float]:
    command = [sys.executable, "-m", *launcher] if launcher else [sys.executable]
    command += ["examples/train.py", *WORDS, *words, "--output_dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    history = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def losses_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses_of(tmp_path_factory.mktemp("cpu"), [], "--use_cpu")


@pytest.mark.parametrize(
    ("launcher", "words", "close"),
    [
        ([], [], 1e-3),
        ([], ["--bf16", "--gradient_checkpointing"], 3e-2),
        ([*LAUNCH, "examples/launch/ddp.yaml"], [], 3e-2),
        ([*LAUNCH, "examples/launch/fsdp2.yaml"], [], 3e-2),
    ],
    ids=["float32", "bfloat16 with checkpointing", "DDP", "FSDP2"],
)
def test_training_on_cuda_has_the_losses_that_it_has_on_cpu(
    launcher: list[str], words: list[str], close: float, losses_on_cpu: list[float], tmp_path: Path
) -> None:
    """DDP and FSDP2 with one process, over NCCL."""
    found = losses_of(tmp_path / "run", launcher, *words)
    assert len(found) == len(losses_on_cpu) == 4
    assert found == pytest.approx(losses_on_cpu, rel=close)

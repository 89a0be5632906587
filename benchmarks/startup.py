"""What users wait for before anything runs: imports, building, compiling.

Some rows are no ratios but what their goals are about: seconds, MiB, or counts.
"""

import subprocess
import sys
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Result, as_script
from flamingo_blocks import FlamingoConfig, FlamingoForConditionalGeneration
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig

ROUNDS = 5
IMPORTS = ("import flamingo_blocks", "from flamingo_blocks import GatedCrossAttentionBlock, PerceiverResampler")
# Prints the seconds that the code takes in a Python of its own, and the most memory that this Python ever had.
TIMED = """
import resource, sys, time
{before}
start = time.perf_counter()
{code}
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(time.perf_counter() - start, memory / 2 ** (20 if sys.platform == "darwin" else 10))
"""
PRESET = """
import torch
from flamingo_blocks import FlamingoForConditionalGeneration, flamingo_80b
with torch.device("meta"):
    model = FlamingoForConditionalGeneration(flamingo_80b())
"""
BUILD = """
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from flamingo_blocks import build_flamingo, flamingo_80b
config = flamingo_80b()
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.text_config.vocab_size)}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1")
with torch.device("meta"):
    model, processor = build_flamingo(
        config.text_config, config.vision_config, tokenizer=tokenizer, cross_attention_every=7,
        cross_attention_head_dim=128, resampler_dim=1536, resampler_head_dim=96,
    )
"""
CHECK = "\nassert sum(p.numel() for p in model.parameters()) > 70e9 and model.device.type == 'meta'\n"
# Of the text that a tiny model is compiled for, one after another.
LENGTHS = (16, 17, 24, 40, 64)


def run_alone(code: str, *, before: str = "") -> tuple[float, float]:
    """Run code in a Python of its own.

    Args:
        code: What is timed.
        before: What runs first, and is not timed.

    Returns:
        Seconds, and the most memory in MiB.
    """
    command = [sys.executable, "-W", "ignore", "-c", TIMED.format(before=before, code=code)]
    last = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    seconds, memory = map(float, last.split())
    return seconds, memory


def imports() -> Iterator[Result]:
    """Time imports where torch is imported already. A Python of its own each time; the first warms up the disk."""
    torch_alone = median([run_alone("import torch")[0] for _ in range(ROUNDS + 1)][1:])
    for code in IMPORTS:
        seconds = median([run_alone(code, before="import torch")[0] for _ in range(ROUNDS + 1)][1:])
        yield Result(f"{code}: seconds beyond torch", "import torch", seconds, "<= 0.15", seconds, torch_alone)


def building() -> Iterator[Result]:
    """Build the largest preset without its weights. Imports count."""
    for name, code in (("its class", PRESET), ("build_flamingo", BUILD)):
        what = f"Flamingo-80B made by {name} on the meta device, imports included"
        seconds, memory = run_alone(code + CHECK)
        yield Result(f"{what}: seconds", "nothing", seconds, "<= 20", seconds, 0.0)
        yield Result(f"{what}: GiB of memory at most", "nothing", memory / 2**10, "<= 2", memory, 0.0, "MiB")


def compiling() -> Iterator[Result]:
    """Count what torch.compile does with the forward of a whole model, a vision encoder and a Llama included."""
    model = make_tiny()

    def inputs(text: int, *images: int) -> dict[str, Any]:
        input_ids = torch.randint(5, 90, (1, text))
        input_ids[:, list(images)] = model.config.image_token_id
        pixel_values = torch.randn(1, len(images), 1, 3, 32, 32)
        return {"input_ids": input_ids, "pixel_values": pixel_values, "use_cache": False}

    def counted(what: str, count: float, goal: str) -> Result:
        return Result(f"torch.compile of a whole forward, a count: {what}", "nothing", count, goal, count, 0.0, "times")

    explained: Any = torch._dynamo.explain(model)(**inputs(16, 0, 5))
    yield counted("breaks of the graph", explained.graph_break_count, "<= 0")
    torch._dynamo.reset()
    compiler = CompileCounter()
    compiled: Any = torch.compile(model, backend=compiler, fullgraph=True)

    def compilations(*calls: dict[str, Any]) -> int:
        before = compiler.frame_count
        for arguments in calls:
            torch.testing.assert_close(compiled(**arguments).logits, model(**arguments).logits)
        return compiler.frame_count - before

    if compilations(inputs(LENGTHS[0], 0, 5)) != 1:
        raise RuntimeError("the first call must compile once")
    moved = compilations(*(inputs(LENGTHS[0], *images) for images in ((1, 5), (0, 15), (7, 8))))
    yield counted("more compilations when images move to 3 other layouts", moved, "<= 0")
    each = [compilations(inputs(text, 0, 5)) for text in LENGTHS[1:]]
    yield counted("most compilations for a new length of text, of 4 lengths", max(each), "<= 1")
    yield counted("compilations for 4 new lengths of text together", sum(each), "")


def make_tiny() -> Any:
    """Make a tiny Flamingo."""
    torch.manual_seed(0)
    lm = LlamaForCausalLM(
        LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    )
    config = FlamingoConfig(
        text_config=lm.config,
        vision_config=FlamingoVisionConfig(architecture="test_vit", image_size=32),
        gate_init=0.5,
        resampler_depth=1,
        resampler_heads=2,
        num_latents=3,
    )
    model: Any = FlamingoForConditionalGeneration(config, language_model=lm)
    return model.eval()


@torch.no_grad()
def run() -> Iterator[Result]:
    """Measure imports, building and compiling."""
    yield from imports()
    yield from building()
    yield from compiling()


if __name__ == "__main__":
    as_script("startup", run)

"""Peak memory of a computation, and, as a script, of a training step: with and without gradient checkpointing.

What is measured of a step is what it needs beside parameters, gradients and optimizer state, which
`flamingo_blocks.memory_plan` adds up: activations, and autocast's copies of what is trained.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import GPTNeoXConfig

from benchmarks.cases import place_media
from benchmarks.measure import Result, as_script
from flamingo_blocks import FlamingoConfig, FlamingoForConditionalGeneration
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig

# As wide and as deep as OPT-125M, with the presets' vocabulary and CLIP ViT-L/14's features. To blocks of this width, a
# resampler of 512 is what the paper's is to those of Flamingo-3B.
VOCAB, DIM, LAYERS = 32_000, 768, 12
VISION_DIM, PATCHES = 1024, 256
IMAGE = VOCAB
MIB = 2**20


def peak_memory(function: Callable[[], Any], *, device: str = "cpu") -> int:
    """Measure by how much memory rises at most while a function runs.

    On CPU, what the allocator tells torch's profiler is added up, which gives the same number each time; the scratch
    memory of BLAS libraries does not go through it.

    Args:
        function: Takes no arguments. It is called once beforehand, for what is made only once.
        device: "cpu" or "cuda".

    Returns:
        Bytes.
    """
    function()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events: Any = profiler.profiler
    changes = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        allocated += change.nbytes()
        peak = max(peak, allocated)
    return peak


def make_model() -> Any:
    """Make a Flamingo with a block before each layer, in the paper's precision, with random weights."""
    torch.manual_seed(0)
    vision: dict[str, Any] = {"embed_dim": VISION_DIM, "depth": 1, "num_heads": 16}
    config = FlamingoConfig(
        text_config=GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=DIM,
            num_hidden_layers=LAYERS,
            num_attention_heads=12,
            intermediate_size=4 * DIM,
            dtype="bfloat16",
        ),
        vision_config=FlamingoVisionConfig(architecture="vit_tiny_patch16_224", model_args=vision, image_size=32),
        cross_attention_heads=12,
        resampler_dim=512,
        resampler_heads=8,
        trained_dtype="float32",
    )
    model: Any = FlamingoForConditionalGeneration(config)
    return model.train()


def training_step(model: Any, input_ids: Tensor, features: Tensor, *, checkpointed: bool) -> Callable[[], None]:
    """Make a function that runs forward and backward of one batch. Gradients stay, and add up.

    Args:
        model: In training mode.
        input_ids: The text, with `<image>` tokens.
        features: What a vision encoder has made of the images. A frozen one keeps nothing for backward.
        checkpointed: Whether layers are recomputed in backward.
    """

    def step() -> None:
        # The older name is all that older versions of transformers know.
        names = [
            f"{kind}_checkpointing_{'enable' if checkpointed else 'disable'}" for kind in ("activation", "gradient")
        ]
        getattr(model, names[0], getattr(model, names[1]))()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids, vision_features=features, labels=input_ids).loss
        loss.backward()

    return step


def run() -> Iterator[Result]:
    """Measure one row of text, by its length and its number of images."""
    model, generator = make_model(), torch.Generator().manual_seed(0)
    for text in (256, 1024):
        for images in (1, 5, 20):
            input_ids = torch.randint(5, VOCAB, (1, text), generator=generator)
            input_ids[place_media("balanced", text=text, media=images)] = IMAGE
            features = torch.randn(1, images, 1, PATCHES, VISION_DIM, generator=generator)
            kept, recomputed = (
                peak_memory(training_step(model, input_ids, features, checkpointed=checkpointed)) / MIB
                for checkpointed in (False, True)
            )
            what = (
                f"memory of a training step beside the plan, gradient checkpointing, {text:,} tokens, images: {images}"
            )
            yield Result.speed_up(what, "without checkpointing", recomputed, kept, unit="MiB")


if __name__ == "__main__":
    as_script("memory", run)

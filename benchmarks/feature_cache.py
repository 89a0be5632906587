"""Training from cached features over encoding the images in each step, and what an image takes on disk."""

import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.cases import Step, check_equal
from benchmarks.measure import Result, as_script, medians
from flamingo_blocks import FlamingoConfig, FlamingoForConditionalGeneration
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig
from flamingo_blocks.data import FeatureCache, Medium, write_feature_cache
from flamingo_blocks.processing_flamingo import FlamingoImageProcessor

IMAGES, TEXT, VOCAB = 8, 32, 1000
KIB = 2**10
WHAT = f"training step of {IMAGES} images, ViT-S/16, from the cache"


def flamingo() -> Any:
    """Make a small language model with blocks beside ViT-S/16, with random weights."""
    torch.manual_seed(0)
    lm = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
    )
    config = FlamingoConfig(
        text_config=lm,
        vision_config=FlamingoVisionConfig(architecture="vit_small_patch16_224"),
        gate_init=0.5,
        cross_attention_heads=4,
        cross_attention_head_dim=64,
        resampler_depth=2,
        resampler_heads=4,
        resampler_head_dim=64,
    )
    return FlamingoForConditionalGeneration(config).train()


def photographs() -> list[Medium]:
    """Cut pieces of 320x320 out of a photograph, as JPEG."""
    pixels, media = load_sample_image("china.jpg"), []
    for i in range(IMAGES):
        file = io.BytesIO()
        Image.fromarray(pixels[10 * i : 10 * i + 320, 40 * i : 40 * i + 320]).save(file, format="JPEG", quality=90)
        media.append(Medium("image", file.getvalue()))
    return media


def steps_of(
    model: Any, media: list[Medium], image_processor: Any, caches: dict[str, FeatureCache]
) -> dict[str, Callable[[], Tensor]]:
    """Give the loss of one batch, by where it has its images from."""
    input_ids = torch.randint(5, VOCAB, (IMAGES, TEXT), generator=torch.Generator().manual_seed(0))
    input_ids[:, 0] = model.config.image_token_id

    def loss(**inputs: Tensor) -> Tensor:
        found: Tensor = model(input_ids, labels=input_ids, **inputs).loss
        return found

    def pixels() -> Tensor:
        found: Tensor = image_processor.transform(("image", medium.open()) for medium in media)
        return found[:, None, None]

    def from_cache(cache: FeatureCache) -> Callable[[], Tensor]:
        return lambda: loss(vision_features=torch.stack([cache(medium) for medium in media])[:, None])

    ready = pixels()
    return {
        "pixels": lambda: loss(pixel_values=ready),
        "files": lambda: loss(pixel_values=pixels()),
        **{name: from_cache(cache) for name, cache in caches.items()},
    }


def train(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Make a function that trains by one step."""

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def run() -> Iterator[Result]:
    """Compare steps whose images come as pixels, as files, and as features."""
    model, media = flamingo(), photographs()
    encoder = model.vision_encoder
    image_processor = FlamingoImageProcessor.from_timm(encoder.backbone, image_size=encoder.image_size)
    parts = {"vision_encoder": encoder, "image_processor": image_processor}
    with tempfile.TemporaryDirectory() as folder:
        caches, sizes = {}, {}
        for dtype in (torch.float32, torch.bfloat16):
            path, name = Path(folder, str(dtype)), str(dtype).removeprefix("torch.")
            write_feature_cache(path, media, dtype=dtype, batch_size=IMAGES, progress=False, **parts)
            caches[name] = FeatureCache(path, **parts)
            sizes[name] = sum(file.stat().st_size for file in path.iterdir()) / IMAGES / KIB
        losses = steps_of(model, media, image_processor, caches)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        check_equal({name: Step(losses[name], trained) for name in ("pixels", "files", "float32")})
        with torch.no_grad():
            torch.testing.assert_close(losses["bfloat16"](), losses["pixels"](), rtol=2**-8, atol=0)
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
        seconds = medians(
            {name: train(optimizer, losses[name]) for name in ("pixels", "files", "bfloat16")}, seconds=40
        )
    yield Result.speed_up(WHAT, "encoding them", seconds["bfloat16"], seconds["pixels"])
    yield Result.speed_up(WHAT, "reading JPEG files and encoding them", seconds["bfloat16"], seconds["files"])
    jpeg = sum(len(medium.read()) for medium in media) / IMAGES / KIB
    yield Result.cost(
        "an image in the cache, ViT-S/16, bfloat16", "its JPEG of 320x320", sizes["bfloat16"], jpeg, unit="KiB"
    )
    yield Result.cost(
        "an image in the cache, ViT-S/16, bfloat16", "in float32", sizes["bfloat16"], sizes["float32"], unit="KiB"
    )


if __name__ == "__main__":
    as_script("feature_cache", run)

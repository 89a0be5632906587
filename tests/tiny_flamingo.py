"""Tiny Flamingos with random weights, their tokenizers, and prompts with media."""

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AddedToken, PreTrainedTokenizerFast

from flamingo_blocks import FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig
from tests.strategies import randomize
from tests.tiny_language_models import VOCAB, make_lm

VISION: dict[str, dict[str, Any]] = {
    "vit": {"architecture": "test_vit", "image_size": 32},
    "nfnet": {"architecture": "test_nfnet", "image_size": 64},
    "resnet": {"architecture": "test_resnet", "image_size": 64},
    "convnext": {"architecture": "test_convnext", "image_size": 64},
    "swin": {
        "architecture": "swin_tiny_patch4_window7_224",
        "model_args": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]},
        "image_size": 224,
    },
    "eva02": {
        "architecture": "eva02_tiny_patch14_224",
        "model_args": {"depth": 2, "embed_dim": 48, "num_heads": 3},
        "image_size": 56,
    },
}
SIZES: dict[str, Any] = {"resampler_depth": 1, "resampler_heads": 2, "resampler_dim": 16, "num_latents": 3}


def make_tokenizer(*, size: int = VOCAB, specials: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` tokens: bos, eos, pad, those special tokens, words named by their ids, unk."""
    words = ["<bos>", "<eos>", "<pad>", *specials]
    words += [f"w{i}" for i in range(len(words), size - 1)] + ["<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.add_tokens([AddedToken(token, special=True, normalized=False) for token in specials], special_tokens=True)
    return fast


def make_flamingo(
    lm: str = "llama",
    vision: str = "vit",
    *,
    open_gates: bool = True,
    image_token_is_new: bool = True,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Build a Flamingo.

    With open gates, everything that is trained is random. Where `<image>` is not new, the same ids run with and without
    blocks; `<EOC>` is new in any case.
    """
    specials = () if image_token_is_new else ("<image>",)
    # Building takes longer than copying what was built before.
    return copy.deepcopy(_build(lm, vision, open_gates, specials, dtype, tuple(sorted(options.items()))))


@cache
def _build(
    lm: str,
    vision: str,
    open_gates: bool,
    specials: tuple[str, ...],
    dtype: torch.dtype,
    options: tuple[tuple[str, Any], ...],
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    language_model = make_lm(lm, dtype=dtype).requires_grad_(False)
    torch.manual_seed(0)
    model, processor = build_flamingo(
        language_model,
        FlamingoVisionConfig(**VISION[vision]),
        tokenizer=make_tokenizer(specials=specials),
        **SIZES | dict(options),
    )
    if open_gates:
        for part in (model.resampler, model.injector, model.new_tokens):
            if part is not None:
                randomize(part, 0)
    return model, processor


@dataclass
class Prompt:
    """Two rows of text: the first has two media, the second one; the second medium of the first is a video."""

    input_ids: Tensor
    pixel_values: Tensor
    num_frames: Tensor
    image_token_id: int

    @classmethod
    def make(cls, model: FlamingoForConditionalGeneration, *, seed: int = 0, text: int = 8) -> "Prompt":
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(10, VOCAB - 5, (2, text), generator=generator)
        image: Any = model.config.image_token_id
        input_ids[0, 1] = input_ids[0, 4] = input_ids[1, 3] = image
        encoder = model.vision_encoder
        pixel_values = torch.randn(2, 2, 2, encoder.channels, *encoder.image_size, generator=generator)
        return cls(input_ids, pixel_values, torch.tensor([[1, 2], [1, 0]]), image)

    @property
    def inputs(self) -> dict[str, Any]:
        return {
            "input_ids": self.input_ids,
            "attention_mask": torch.ones_like(self.input_ids),
            "pixel_values": self.pixel_values,
            "num_frames": self.num_frames,
        }

    @property
    def is_image(self) -> Tensor:
        return torch.as_tensor(self.input_ids == self.image_token_id)

    def row(self, row: int) -> "Prompt":
        """One row as a batch of its own."""
        rows = slice(row, row + 1)
        return Prompt(self.input_ids[rows], self.pixel_values[rows], self.num_frames[rows], self.image_token_id)

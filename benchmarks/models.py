"""A Flamingo of ours and OpenFlamingo's, with the same weights.

Neither has a vision encoder here: it is frozen and would cost both the same. Both start at the same features, and
resample them.
"""

import copy
from types import SimpleNamespace
from typing import Any

import torch
from open_flamingo.src.flamingo import Flamingo as OpenFlamingo
from open_flamingo.src.flamingo_lm import FlamingoLMMixin
from open_flamingo.src.utils import extend_instance
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from flamingo_blocks import FlamingoConfig, FlamingoForConditionalGeneration
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig
from flamingo_blocks.convert.flamingo_pytorch import BLOCK, resampler_table
from flamingo_blocks.convert.renaming import to_theirs

# The shape of OPT-125M, which is also that of the smallest GPT-2 and of Pythia-160M.
VOCAB, DIM, LAYERS = 50_272, 768, 12
# OpenFlamingo's vision encoder is CLIP ViT-L/14.
VISION_DIM, PATCHES = 1024, 256
IMAGE = VOCAB  # both models get two tokens beyond the language model's own, as their builders give them


def language_model(*, dim: int = DIM, layers: int = LAYERS) -> Any:
    """Make a language model with random weights."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=dim,
        word_embed_proj_dim=dim,
        num_hidden_layers=layers,
        num_attention_heads=dim // 64,
        ffn_dim=4 * dim,
        max_position_embeddings=4096,
        dropout=0.0,  # else the two would differ in training
    )
    return OPTForCausalLM(config).eval()


def flamingo(lm: Any) -> Any:
    """Put blocks before every layer of a language model, of OpenFlamingo's sizes and with open gates."""
    vision: dict[str, Any] = {"embed_dim": VISION_DIM, "depth": 1, "num_heads": 16}
    config = FlamingoConfig(
        text_config=lm.config,
        vision_config=FlamingoVisionConfig(architecture="vit_tiny_patch16_224", model_args=vision, image_size=32),
        cross_attention_heads=8,
        cross_attention_head_dim=64,
        gate_init=0.5,
        cross_attention_activation="gelu",
        resampler_heads=8,
        resampler_head_dim=64,
        resampler_activation="gelu",
        max_frames=0,
    )
    model: Any = FlamingoForConditionalGeneration(config, language_model=lm)
    with torch.no_grad():
        # In OPT, a token is read and predicted with the same row.
        model.new_tokens.embeddings.weight.normal_(std=0.02)
        model.new_tokens.head.weight.copy_(model.new_tokens.embeddings.weight)
        model.new_tokens.head.bias.zero_()
    return model.eval()


def _as_encoded(features: Tensor) -> tuple[None, Tensor]:
    """Stand where OpenFlamingo has its vision encoder, and get features instead of images."""
    return None, features.squeeze(1)


def open_flamingo(lm: Any, ours: Any) -> Any:
    """Make OpenFlamingo's model around a language model that has no blocks yet, with the weights of ours."""
    extend_instance(lm, FlamingoLMMixin)
    lm.set_decoder_layers_attr_name("model.decoder.layers")
    lm.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    theirs: Any = OpenFlamingo(
        SimpleNamespace(visual=_as_encoded), lm, eoc_token_id=IMAGE + 1, media_token_id=IMAGE, vis_dim=VISION_DIM
    )
    with torch.no_grad():
        lm.get_input_embeddings().weight[VOCAB:] = ours.new_tokens.embeddings.weight
    for block, of_ours in zip(lm.gated_cross_attn_layers, ours.injector.blocks.values(), strict=True):
        block.load_state_dict(to_theirs(BLOCK, of_ours.state_dict()))
    theirs.perceiver.load_state_dict(
        to_theirs(resampler_table(len(ours.resampler.layers)), ours.resampler.state_dict())
    )
    # Trained is what ours trains, all but the two new rows, which cannot be trained here without the other 50,272.
    theirs.requires_grad_(False)
    theirs.perceiver.requires_grad_(True)
    lm.gated_cross_attn_layers.requires_grad_(True)
    return theirs.eval()


def both(*, dim: int = DIM, layers: int = LAYERS) -> tuple[Any, Any]:
    """Make both models with the same weights, each with a language model of its own."""
    lm = language_model(dim=dim, layers=layers)
    copied = copy.deepcopy(lm)
    ours = flamingo(lm)
    return ours, open_flamingo(copied, ours)


def prompt(images: int, text: int, *, patches: int = PATCHES, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Make rows of text with images at regular distances, from the first token on, and their features; on CPU."""
    generator = torch.Generator("cpu").manual_seed(0)
    input_ids = torch.randint(5, VOCAB, (batch, text), generator=generator)
    input_ids[:, torch.arange(images) * text // images] = IMAGE
    return input_ids, torch.randn(batch, images, 1, patches, VISION_DIM, generator=generator)


def for_open_flamingo(features: Tensor) -> Tensor:
    """Shape features as the images that OpenFlamingo expects: batch, media, one frame, channels, height, width."""
    return features[:, :, :, None]


def check_equal(what: str, ours: Tensor, theirs: Tensor, *, tolerance: float) -> None:
    """Compare by the largest difference, relative to the largest value.

    Raises:
        RuntimeError: If they differ by more than the tolerance.
    """
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference <= tolerance:
        raise RuntimeError(f"{what} must be equal up to {tolerance}, but differ by {difference:.1e}")

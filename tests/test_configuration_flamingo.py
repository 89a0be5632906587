from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from flamingo_blocks import FlamingoConfig
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig


def make_config(**options: Any) -> FlamingoConfig:
    return FlamingoConfig(text_config=LlamaConfig(vocab_size=99), **options)


def test_save_and_load_give_the_same(tmp_path: Path) -> None:
    config = make_config(
        vision_config={"architecture": "test_vit", "image_size": 32, "model_args": {"depth": 1}},
        cross_attention_layers=[0, 2],
        gating="none",
        attend="next",
        freeze=[],
    )
    config.save_pretrained(tmp_path)
    loaded = FlamingoConfig.from_pretrained(tmp_path)
    assert (
        loaded.to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)} or loaded.to_dict() == config.to_dict()
    )
    assert isinstance(loaded.text_config, LlamaConfig)
    assert isinstance(loaded.vision_config, FlamingoVisionConfig)
    assert loaded.vision_config.image_size == [32, 32]


def test_new_tokens_follow_the_vocabulary_by_default() -> None:
    config = make_config()
    assert (config.image_token_id, config.end_of_chunk_token_id) == (99, 100)
    assert config.new_token_ids == [99, 100]
    assert make_config(image_token_id=5, end_of_chunk_token_id=6, new_token_ids=[]).new_token_ids == []


def test_the_language_models_own_configuration_is_left_alone() -> None:
    text_config = LlamaConfig(vocab_size=99)
    text_config._attn_implementation = "eager"
    config = FlamingoConfig(text_config=text_config)
    assert text_config._attn_implementation == "eager"
    assert config.text_config is not text_config


@pytest.mark.parametrize(
    ("option", "value", "nearest"),
    [
        ("gatting", "tanh", "gating"),
        ("num_latent", 3, "num_latents"),
        ("cross_attention_layer", [0], "cross_attention_layers"),
        ("heads", 4, "cross_attention_heads or cross_attention_kv_heads or resampler_heads"),
        ("media_token_id", 4, "image_token_id"),
    ],
)
def test_a_misspelt_option_names_the_nearest(option: str, value: Any, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"FlamingoConfig has no option '{option}'; did you mean {nearest}"):
        make_config(**{option: value})


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("arch", "architecture"), ("model_name", "model_args"), ("img_size", "image_size"), ("in_chans", "channels")],
)
def test_a_misspelt_option_of_the_vision_encoder_names_the_nearest(option: str, nearest: str) -> None:
    vision_config: Any = FlamingoVisionConfig
    with pytest.raises(ValueError, match=f"FlamingoVisionConfig has no option '{option}'; did you mean .*{nearest}"):
        vision_config(**{option: 3})


@pytest.mark.parametrize("option", ["gating", "attend", "resampler"])
def test_an_impossible_choice_is_refused(option: str) -> None:
    with pytest.raises(Exception, match=rf"(?s){option}.*expected one of"):
        make_config(**{option: "nonsense"})
    with pytest.raises(ValueError, match="text_config must be the configuration of a language model"):
        FlamingoConfig()


def test_other_names_of_transformers_are_accepted() -> None:
    assert make_config(dtype="bfloat16").dtype == torch.bfloat16
    make_config(pad_token_id=3, max_new_tokens=7, auto_map={}, quantization_config={})
    make_config(attn_implementation="eager", architectures=["FlamingoForConditionalGeneration"])

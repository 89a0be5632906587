from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from flamingo_blocks.language import find_decoder_layers, find_hidden_size
from tests.tiny_language_models import CONFIGS, DEPTH, PATHS, WIDTH, make_lm


@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_layers_and_width_are_found(name: str) -> None:
    lm = make_lm(name)
    path, layers = find_decoder_layers(lm)
    assert path == PATHS[name]
    assert layers is lm.get_submodule(path)
    assert len(layers) == DEPTH
    assert find_hidden_size(lm) == WIDTH


def test_the_text_decoder_of_a_vision_language_model_is_found_beside_a_vision_tower_of_the_same_depth() -> None:
    size = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**size, "vocab_size": 99, "num_key_value_heads": 2, "head_dim": 8}
    vision = {**size, "hidden_size": 16, "image_size": 28, "patch_size": 14}
    with torch.device("meta"):
        lm = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    assert find_decoder_layers(lm)[0] == "model.language_model.layers"
    assert find_hidden_size(lm) == WIDTH


def test_an_explicit_path_wins_over_the_search() -> None:
    lm = make_lm("llama")
    lm.other = nn.ModuleList(nn.Identity() for _ in range(DEPTH))
    assert find_decoder_layers(lm, "other") == ("other", lm.other)
    anything = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})
    assert find_decoder_layers(anything, "layers")[1] is anything["layers"]


@pytest.mark.parametrize("path", ["model.blocks", "model.embed_tokens", ""])
def test_a_path_to_something_else_is_refused_and_lists_what_there_is(path: str) -> None:
    with pytest.raises(
        ValueError, match=r"is not a list of layers in LlamaForCausalLM; its module lists: model\.layers"
    ):
        find_decoder_layers(make_lm("llama"), path)


def test_an_encoder_decoder_is_refused() -> None:
    lm = T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        find_decoder_layers(lm)


def test_no_list_of_that_length_is_an_error_that_lists_the_candidates() -> None:
    lm = make_lm("llama")
    lm.model.layers.append(nn.Identity())
    with pytest.raises(ValueError, match=r"speaks of \[3\] layers; .*: model.layers \(4\). Name the right one"):
        find_decoder_layers(lm)


def test_equally_good_lists_are_an_error_that_names_them() -> None:
    lm = make_lm("llama")
    lm.model.twins = nn.ModuleList(lm.model.layers)
    with pytest.raises(ValueError, match=r"several lists that may be its decoder layers: model\.layers, model\.twins"):
        find_decoder_layers(lm)


def test_a_module_without_a_config_is_told_to_name_its_layers() -> None:
    with pytest.raises(ValueError, match=r"Linear has no transformers config .* name the list of its decoder layers"):
        find_decoder_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear has no transformers config"):
        find_hidden_size(nn.Linear(2, 2))


def test_the_width_falls_back_to_the_input_embedding() -> None:
    lm = make_lm("llama")
    lm.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(is_decoder=decoder))
    assert find_hidden_size(lm) == WIDTH

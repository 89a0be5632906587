from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from flamingo_blocks.language import find_decoder_layers, find_hidden_size, find_residual_stream, ordinary_token
from tests.coverage.tiny_configs import architectures
from tests.coverage.tiny_configs import make_lm as make_any_lm
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
    with pytest.raises(ValueError, match=r"speaks of \[3\] layers; .*: model.layers \(4\). Name the right one by"):
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


@pytest.mark.parametrize("architecture", ["BltForCausalLM", "HrmTextForCausalLM", "XLMWithLMHeadModel"])
def test_an_explicit_path_wins_over_a_known_exception_too(architecture: str) -> None:
    lm = make_any_lm(architecture)
    known, layers = find_decoder_layers(lm)
    assert layers is lm.get_submodule(known)
    other = next(name for name, m in lm.named_modules() if isinstance(m, nn.ModuleList) and name != known)
    assert find_decoder_layers(lm, other)[0] == other


# ---------------------------------------------------------------- the residual stream


@pytest.mark.parametrize(
    ("architecture", "layout"),
    [
        ("LlamaForCausalLM", "batch text dim"),
        ("XLNetLMHeadModel", "text batch dim"),
        ("DeepseekV4ForCausalLM", "batch text streams dim"),
        ("Gemma3nForCausalLM", "streams batch text dim"),
        ("Qwen4ExpForCausalLM", "batch text (streams dim)"),
        ("ProphetNetForCausalLM", "batch (streams text) dim"),
    ],
)
def test_the_layout_of_the_residual_stream_is_found(architecture: str, layout: str) -> None:
    if architecture not in architectures():
        pytest.skip("this version of transformers does not have it")
    lm = make_any_lm(architecture)
    layers = dict(enumerate(find_decoder_layers(lm)[1]))
    assert find_residual_stream(lm, layers) == layout
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_a_residual_stream_of_unknown_shape_is_refused() -> None:
    lm = make_lm("llama")

    def widen(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.cat([args[0], args[0][..., :5]], dim=-1), *args[1:])

    lm.model.layers[0].register_forward_pre_hook(widen)
    lm.model.layers[0].forward = lambda hidden_states, **_: hidden_states[..., :WIDTH]
    with pytest.raises(
        ValueError, match=r"residual stream has no layout .* hidden states were \[\(2, 7, 37\), \(3, 5, 37\)\]"
    ):
        find_residual_stream(lm, {0: lm.model.layers[0]})


def test_layers_that_text_alone_skips_are_named() -> None:
    lm = make_any_lm("MllamaForCausalLM")
    with pytest.raises(
        ValueError, match=r"does not run its decoder layers \[3\] on text alone; leave them out by layers="
    ):
        find_residual_stream(lm, dict(enumerate(find_decoder_layers(lm)[1])))


def test_an_ordinary_token_is_none_with_a_meaning() -> None:
    lm = make_lm("llama")
    middle = ordinary_token(lm)
    assert middle == 99 // 2
    lm.config.pad_token_id, lm.config.eos_token_id = middle, [middle + 1, 1]
    assert ordinary_token(lm) == middle + 2
    assert ordinary_token(lm, besides=(middle + 2, None)) == middle + 3

"""A frozen language model may be quantised: by torchao, or by bitsandbytes where it runs."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig, TorchAoConfig

from flamingo_blocks import FlamingoForConditionalGeneration, build_flamingo, parameter_groups
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig
from tests.strategies import randomize
from tests.tiny_flamingo import SIZES, VISION, Prompt, make_tokenizer
from tests.tiny_language_models import VOCAB

_tokens: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
# bitsandbytes' blocks are 64 wide.
CONFIGS = {
    "llama": LlamaConfig(**_tokens, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128),
    "gpt2": GPT2Config(**_tokens, n_embd=64, n_layer=2, n_head=4),
}
KINDS = ["torchao", "quantize_", "bitsandbytes"]


def make_float_lm(name: str = "llama") -> Any:
    torch.manual_seed(0)
    auto_model: Any = AutoModelForCausalLM
    return auto_model.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.bfloat16).eval().requires_grad_(False)


def make_lm(kind: str, path: Path, *, name: str = "llama") -> Any:
    """Quantise a tiny language model: by transformers, while it is loaded, or by torchao in place, head included."""
    lm, auto_model = make_float_lm(name), AutoModelForCausalLM
    if kind == "quantize_":
        quantize_(lm, Int8WeightOnlyConfig())
        return lm
    if kind == "torchao":
        config: Any = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        config = BitsAndBytesConfig(load_in_8bit=kind == "bitsandbytes", load_in_4bit=kind == "bitsandbytes 4-bit")
    lm.save_pretrained(path)
    quantised = auto_model.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config)
    return quantised.eval().requires_grad_(False)


def build(lm: Any, **options: Any) -> FlamingoForConditionalGeneration:
    torch.manual_seed(0)
    vision = FlamingoVisionConfig(**VISION["vit"])
    return build_flamingo(lm, vision, tokenizer=make_tokenizer(), **SIZES | options)[0]


def is_small(lm: Any) -> bool:
    """Whether some weights are integers, or tensors of torchao's own kind."""
    return any(type(p).__module__.startswith("torchao.") or not p.is_floating_point() for p in lm.parameters())


@torch.no_grad()
def logits_of(model: Any, *args: Any, **inputs: Any) -> Tensor:
    return torch.as_tensor(model(*args, **inputs).logits)


@pytest.mark.parametrize("kind", [*KINDS, "bitsandbytes 4-bit"])
def test_gate_zero_is_the_quantised_lm_bit_for_bit(kind: str, tmp_path: Path) -> None:
    lm = make_lm(kind, tmp_path)
    assert is_small(lm)
    input_ids = torch.randint(10, VOCAB, (2, 8))
    expected = logits_of(lm, input_ids)
    assert not torch.equal(expected, logits_of(make_float_lm(), input_ids))
    model = build(lm)
    assert model.language_model is lm
    assert is_small(lm)
    assert torch.equal(logits_of(model, input_ids)[..., :VOCAB], expected)
    generated = model.generate(input_ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, lm.generate(input_ids, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_what_is_trained_and_nothing_else(kind: str, tmp_path: Path) -> None:
    lm = make_lm(kind, tmp_path)
    input_ids = torch.randint(10, VOCAB, (2, 8))
    expected = logits_of(lm, input_ids)
    model: Any = build(lm)
    model.train()
    prompt = Prompt.make(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in before} == {"resampler", "injector", "new_tokens"}
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
    for _ in range(2):
        model(**prompt.inputs, labels=prompt.input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(torch.equal(model.get_parameter(name), tensor) for name, tensor in before.items())
    assert torch.equal(logits_of(model.eval().eject(), input_ids), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_the_quantised_layers(kind: str, tmp_path: Path) -> None:
    def gradient(lm: Any) -> Tensor:
        model = build(lm, trained_dtype=torch.float32)
        randomize(model.injector, 0)
        randomize(model.resampler, 0)
        prompt = Prompt.make(model)
        model(**prompt.inputs, labels=prompt.input_ids).loss.backward()
        # Of the first block: everything that the language model does lies behind it.
        grad = model.injector.blocks["0"].to_out.weight.grad  # type: ignore[union-attr]
        return torch.as_tensor(grad).flatten()

    expected, found = gradient(make_float_lm()), gradient(make_lm(kind, tmp_path))
    assert torch.cosine_similarity(expected, found, dim=0) > 0.99
    torch.testing.assert_close(found.norm(), expected.norm(), rtol=0.1, atol=0.0)


def test_new_tokens_start_from_the_mean_also_of_a_quantised_head(tmp_path: Path) -> None:
    lm = make_lm("quantize_", tmp_path)
    assert type(lm.lm_head.weight) is not type(lm.get_input_embeddings().weight)
    model = build(lm)
    assert model.new_tokens is not None
    mean = make_float_lm().lm_head.weight.float().mean(0)
    torch.testing.assert_close(model.new_tokens.head.weight, mean.expand(2, -1), atol=1e-4, rtol=0.05)


def test_copies_are_quantised_too(tmp_path: Path) -> None:
    model = build(make_lm("torchao", tmp_path))
    copied = copy.deepcopy(model)
    assert is_small(copied.language_model)
    prompt = Prompt.make(model)
    assert torch.equal(logits_of(copied, **prompt.inputs), logits_of(model, **prompt.inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_not_saved_as_a_whole_nor_cast(kind: str, tmp_path: Path) -> None:
    model = build(make_lm(kind, tmp_path / "lm"))
    with pytest.raises(ValueError, match=r"is quantised.*save_adapter"):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"is quantised and cannot be brought to torch\.float32; leave dtype out"):
        build(model.eject(), dtype=torch.float32)


def test_a_quantised_checkpoint_is_loaded_as_it_is(tmp_path: Path) -> None:
    lm = make_lm("torchao", tmp_path / "float")
    lm.save_pretrained(tmp_path / "quantised")
    model = build(tmp_path / "quantised")
    assert is_small(model.language_model)
    input_ids = torch.randint(10, VOCAB, (2, 8))
    assert torch.equal(logits_of(model, input_ids)[..., :VOCAB], logits_of(lm, input_ids))


def test_lora_on_a_quantised_language_model(tmp_path: Path) -> None:
    lm = make_lm("torchao", tmp_path / "lm")
    model = build(lm)
    prompt = Prompt.make(model)
    expected = logits_of(model, **prompt.inputs)
    config = peft.LoraConfig(
        target_modules=r"language_model\..*\.(q_proj|v_proj)", modules_to_save=model.trained_module_names()
    )
    wrapped = peft.get_peft_model(model, config)
    assert torch.equal(logits_of(wrapped, **prompt.inputs), expected)
    optimizer = torch.optim.AdamW(parameter_groups(wrapped), lr=1e-2)
    for _ in range(2):
        wrapped(**prompt.inputs, labels=prompt.input_ids).loss.backward()
        optimizer.step()
    trained = logits_of(wrapped, **prompt.inputs)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(build(make_lm("torchao", tmp_path / "lm")), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded, **prompt.inputs), trained)

"""PEFT's LoRA in the language model, together with what a Flamingo trains."""

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from flamingo_blocks import FlamingoForConditionalGeneration, build_flamingo, parameter_groups
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig
from tests.strategies import randomize
from tests.tiny_flamingo import SIZES, VISION, Prompt, make_flamingo, make_tokenizer
from tests.tiny_language_models import VOCAB, make_lm
from tests.tiny_training import collate, make_examples, make_trainer

# Linear layers, and GPT-2's own kind, which are stored the other way round.
TARGETS = {"llama": r"language_model\..*\.(q_proj|v_proj)", "gpt2": r"language_model\..*\.c_attn"}
every_lm = pytest.mark.parametrize("name", TARGETS)
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")


def add_lora(model: FlamingoForConditionalGeneration, name: str = "llama", **options: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=TARGETS[name], modules_to_save=model.trained_module_names(), **options)
    return peft.get_peft_model(model, config)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def take_steps(model: Any, prompt: Prompt, *, count: int = 2) -> None:
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
    for _ in range(count):
        model(**prompt.inputs, labels=prompt.input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def logits_of(model: Any, prompt: Prompt) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(**prompt.inputs).logits)


@every_lm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_training_lora_and_closed_gates_change_nothing(name: str, dtype: torch.dtype) -> None:
    model, _ = make_flamingo(name, open_gates=False, image_token_is_new=False, dtype=dtype)
    prompt = Prompt.make(model)
    base = make_lm(name, dtype=dtype)(prompt.input_ids).logits
    assert torch.equal(logits_of(add_lora(model, name), prompt)[..., :VOCAB], base)


@every_lm
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_lora_and_our_parts_are_trained_and_nothing_else(name: str, task_type: Any) -> None:
    model, _ = make_flamingo(name)
    ours = {key for key in trained(model) if not key.startswith("language_model")}
    wrapped, prompt = add_lora(model, name, task_type=task_type), Prompt.make(model)
    before = {key: parameter.detach().clone() for key, parameter in wrapped.named_parameters()}
    take_steps(wrapped, prompt)
    moved = {key for key, parameter in wrapped.named_parameters() if not torch.equal(parameter, before[key])}
    assert moved == trained(wrapped)
    prefix, copies = re.compile(r"^base_model\.model\."), re.compile(r"\.modules_to_save\.default")
    names = {copies.sub("", prefix.sub("", key)) for key in moved}
    assert {key for key in names if ".lora_" not in key} == ours
    assert all(key.startswith("language_model") for key in names - ours)
    assert names - ours


def test_weight_decay_is_where_it_was_and_on_lora() -> None:
    model, _ = make_flamingo()
    wrapped = add_lora(model)
    of = {id(parameter): name for name, parameter in wrapped.named_parameters()}
    decayed, others = ([of[id(p)] for p in group["params"]] for group in parameter_groups(wrapped))
    assert {name for name in of.values() if ".lora_" in name} < set(decayed)
    assert any("injector.blocks.0" in name and "to_q" in name for name in decayed)
    assert all(any(part in name for part in (".lora_", "injector")) for name in decayed)
    assert any(name.endswith("gate.alpha") for name in others)
    assert sorted(decayed + others) == sorted(trained(wrapped))


@every_lm
def test_what_is_saved_is_what_was_trained_and_loads_onto_a_fresh_base(name: str, tmp_path: Path) -> None:
    model, _ = make_flamingo(name, open_gates=False)
    fresh, prompt = copy.deepcopy(model), Prompt.make(model)
    wrapped = add_lora(model, name)
    randomize(wrapped.base_model.model.injector, 0)
    take_steps(wrapped, prompt)
    expected = logits_of(wrapped, prompt)
    assert not torch.allclose(expected, logits_of(fresh, prompt))
    wrapped.save_pretrained(tmp_path)
    size = sum(parameter.numel() * 4 for parameter in wrapped.parameters() if parameter.requires_grad)
    assert size < (tmp_path / "adapter_model.safetensors").stat().st_size < size + 10_000, "nothing that is frozen"
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits_of(loaded, prompt), expected)
    assert not trained(loaded)
    again = peft.PeftModel.from_pretrained(make_flamingo(name, open_gates=False)[0], tmp_path, is_trainable=True)
    assert trained(again) == trained(wrapped)


@every_lm
def test_merged_it_is_a_flamingo_again_with_the_same_logits(name: str, tmp_path: Path) -> None:
    model, _ = make_flamingo(name)
    keys, prompt = set(model.state_dict()), Prompt.make(model)
    wrapped = add_lora(model, name)
    take_steps(wrapped, prompt)
    expected = logits_of(wrapped, prompt)
    merged = wrapped.merge_and_unload()
    assert type(merged) is FlamingoForConditionalGeneration
    assert set(merged.state_dict()) == keys
    torch.testing.assert_close(logits_of(merged, prompt), expected, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, prompt), logits_of(merged, prompt))
    # Its language model, taken out, has the merged weights too.
    lm = merged.eject()
    assert torch.isfinite(lm(torch.tensor([[5, 6]])).logits).all()


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_it_generates_by_the_logits_of_its_forward(task_type: Any) -> None:
    model, _ = make_flamingo()
    wrapped, prompt = add_lora(model, task_type=task_type), Prompt.make(model)
    take_steps(wrapped, prompt)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    output = wrapped.generate(**prompt.inputs, **options, output_logits=True, return_dict_in_generate=True)
    inputs = prompt.inputs | {"input_ids": output.sequences[:, :-1], "attention_mask": None}
    with torch.no_grad():
        full = wrapped(**inputs, use_cache=False).logits[:, 7:]
    torch.testing.assert_close(torch.stack(output.logits, 1), full, atol=2e-5, rtol=1e-5)
    with wrapped.disable_adapter():
        base = wrapped.generate(**prompt.inputs, **options)
    assert torch.equal(base, make_flamingo()[0].generate(**prompt.inputs, **options))


@every_lm
def test_checkpointing_gives_equal_gradients(name: str) -> None:
    def gradients(*, checkpointed: bool) -> dict[str, Tensor]:
        model, _ = make_flamingo(name)
        wrapped, prompt = add_lora(model, name), Prompt.make(model)
        wrapped.train()
        # B starts at zero, and A would have no gradient.
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        if checkpointed:
            getattr(wrapped, "activation_checkpointing_enable", wrapped.gradient_checkpointing_enable)()
            assert any(
                module.gradient_checkpointing
                for module in wrapped.modules()
                if type(module).__name__ == "LMLayerInjector"
            )
        wrapped(**prompt.inputs, labels=prompt.input_ids).loss.backward()
        return {key: parameter.grad for key, parameter in wrapped.named_parameters() if parameter.grad is not None}

    expected, found = gradients(checkpointed=False), gradients(checkpointed=True)
    assert expected.keys() == found.keys()
    assert any("lora_A" in key for key in found)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, msg=key)


def test_lora_everywhere_leaves_the_blocks_to_themselves() -> None:
    model, _ = make_flamingo()
    names = model.trained_module_names()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", modules_to_save=names))
    with_lora = {key for key, _ in wrapped.named_modules() if key.endswith("lora_A")}
    assert with_lora
    assert {key.split(".")[2] for key in with_lora} == {"language_model", "vision_encoder"}


@pytest.mark.parametrize(("part", "message"), [("injector", "injector"), ("new_tokens", "new_tokens")])
def test_parts_that_peft_would_copy_away_from_the_language_model_are_an_error(part: str, message: str) -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=TARGETS["llama"], modules_to_save=["resampler", part])
    )
    with pytest.raises(RuntimeError, match=rf'modules_to_save=\["{message}"\].*trained_module_names'):
        wrapped(**prompt.inputs)


@pytest.mark.parametrize("unwrap", [pytest.param(False, marks=pytest.mark.unchecked), True])
def test_a_language_model_with_lora_is_refused_until_it_is_merged(unwrap: bool) -> None:
    lora: Any = peft.get_peft_model(make_lm("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    lm = lora.get_base_model() if unwrap else lora
    vision, tokenizer = FlamingoVisionConfig(**VISION["vit"]), make_tokenizer()
    with pytest.raises(ValueError, match=r"merge_and_unload\(\) first, or add LoRA to the Flamingo"):
        build_flamingo(lm, vision, tokenizer=tokenizer, **SIZES)
    model, _ = build_flamingo(lora.merge_and_unload(), vision, tokenizer=tokenizer, **SIZES)
    assert torch.isfinite(model(torch.tensor([[5, 6]])).logits).all()


def test_lora_on_the_language_model_alone_leaves_the_flamingo_what_it_is() -> None:
    model, _ = make_flamingo()
    ours, prompt = trained(model), Prompt.make(model)
    before = logits_of(model, prompt)
    lora = peft.get_peft_model(model.language_model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert torch.equal(logits_of(model, prompt), before)
    assert trained(model) > ours
    assert all("lora_" in name for name in trained(model) - ours)
    take_steps(model, prompt)
    expected = logits_of(model, prompt)
    lora.merge_and_unload()
    torch.testing.assert_close(logits_of(model, prompt), expected, atol=1e-5, rtol=1e-5)


def test_the_trainer_trains_saves_and_resumes_it(tmp_path: Path) -> None:
    def make() -> Any:
        saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}
        return make_trainer(tmp_path, model=add_lora(make_flamingo("gpt2")[0], "gpt2", lora_dropout=0.2), **saving)

    whole = make()
    assert whole.label_names == ["labels"]
    whole.train()
    files = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trained(resumed.model) == trained(whole.model)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), parameter), name
    batch = collate(make_examples(5, seed=1))
    assert whole.evaluate()["eval_loss"] == pytest.approx(whole.model(**batch).loss.item(), rel=2e-2)

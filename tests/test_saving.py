"""Whole checkpoints: what transformers' savers and loaders do with a Flamingo."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from flamingo_blocks import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig
from flamingo_blocks.processing_flamingo import FlamingoImageProcessor
from tests.coverage.language_checks import saved
from tests.tiny_flamingo import SIZES, VISION, Prompt, make_flamingo, make_tokenizer
from tests.tiny_language_models import CONFIGS, VOCAB, make_lm

Auto: Any = AutoModelForImageTextToText


def assert_same_bits(one: Any, other: Any) -> None:
    tensors, expected = one.state_dict(), other.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    prompt = Prompt.make(other)
    with torch.no_grad():
        assert torch.equal(one(**prompt.inputs).logits, other(**prompt.inputs).logits)
    assert {n for n, p in one.named_parameters() if p.requires_grad} == {
        n for n, p in other.named_parameters() if p.requires_grad
    }


def is_tied(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lm", "vision"), itertools.product(CONFIGS, ["vit", "nfnet", "swin", "eva02"]))
def test_every_language_model_with_every_backbone_round_trips_in_shards(
    lm: str, vision: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, _ = make_flamingo(lm, vision, dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert_same_bits(FlamingoForConditionalGeneration.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    ("lm", "tied", "dtype"),
    [
        ("llama", True, torch.bfloat16),
        ("gpt2", False, torch.float32),
        ("opt", True, torch.float32),
        ("opt", False, torch.bfloat16),
        ("gemma3", True, torch.float32),
        ("mamba", False, torch.float32),
    ],
)
def test_heads_are_tied_after_loading_if_they_were_before(
    lm: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = CONFIGS[lm]()
    config.tie_word_embeddings = tied
    language_model: Any = AutoModelForCausalLM
    model, _ = build_flamingo(
        language_model.from_config(config, dtype=dtype),
        FlamingoVisionConfig(**VISION["vit"]),
        tokenizer=make_tokenizer(),
        **SIZES,
    )
    assert is_tied(model) == tied
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert is_tied(loaded) == tied
    assert_same_bits(loaded, model)


@pytest.mark.parametrize(
    "architecture",
    [
        "FalconH1ForCausalLM",  # has buffers that no file holds, and that a module without parameters fills
        "Emu3ForCausalLM",  # is not the class that AutoModelForCausalLM makes of its configuration
    ],
)
def test_language_models_with_ways_of_their_own_round_trip(architecture: str) -> None:
    saved(architecture)


def test_what_was_frozen_by_hand_is_frozen_again(tmp_path: Path) -> None:
    model, _ = make_flamingo()
    model.resampler.requires_grad_(False)
    model.language_model.model.norm.requires_grad_(True)
    model.save_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert_same_bits(loaded, model)
    assert not loaded.resampler.latents.requires_grad
    loaded.requires_grad_(True)
    loaded.freeze()
    assert not loaded.resampler.latents.requires_grad


def test_what_was_loaded_can_be_saved_again(tmp_path: Path) -> None:
    model, _ = make_flamingo("gpt2", "swin")
    model.save_pretrained(tmp_path / "first")
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "generation_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    for config in (first, second):
        config["vision_config"].pop("dtype")  # transformers writes down what it has loaded
    assert first == second


# ---------------------------------------------------------------- transformers' own doors


def test_auto_classes_know_the_model(tmp_path: Path) -> None:
    model, processor = make_flamingo()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is FlamingoConfig
    loaded = Auto.from_pretrained(tmp_path)
    assert type(loaded) is FlamingoForConditionalGeneration
    assert_same_bits(loaded, model)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is FlamingoProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is FlamingoImageProcessor
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == processor.tokenizer.get_vocab()


def test_a_configuration_alone_makes_a_model_with_random_weights() -> None:
    model, _ = make_flamingo(open_gates=False)
    made: Any = Auto.from_config(model.config)
    assert type(made) is FlamingoForConditionalGeneration
    prompt = Prompt.make(made)
    torch.nn.Module.eval(made)
    # Its gates are closed.
    logits = made(**prompt.inputs).logits
    prompt.pixel_values += 1
    assert torch.equal(made(**prompt.inputs).logits, logits)
    assert logits.isfinite().all()


def test_a_model_on_the_meta_device_takes_no_memory() -> None:
    model, _ = make_flamingo("gemma3", "swin")
    with torch.device("meta"):
        skeleton = Auto.from_config(model.config)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in skeleton.state_dict().items()} == expected


def test_options_of_loading_are_transformers(tmp_path: Path) -> None:
    model, _ = make_flamingo()
    model.save_pretrained(tmp_path)
    loaded, info = FlamingoForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_bits(loaded, model)
    assert not any(info.values())
    eager = FlamingoForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.language_model.config._attn_implementation == "eager"
    prompt = Prompt.make(model)
    torch.testing.assert_close(eager(**prompt.inputs).logits, model(**prompt.inputs).logits)
    every = FlamingoForConditionalGeneration.from_pretrained(tmp_path, attend="all_previous")
    assert every.config.attend == "all_previous"


def test_what_a_checkpoint_lacks_starts_as_in_a_new_model(tmp_path: Path) -> None:
    model, _ = make_flamingo(image_token_is_new=False)
    model.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if n.startswith(("language_model", "vision_encoder"))}
    assert len(kept) < len(tensors)
    safetensors.torch.save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    fresh, _ = make_flamingo(image_token_is_new=False, open_gates=False)
    for name, parameter in fresh.named_parameters():
        found = loaded.get_parameter(name)
        if name in kept or parameter.unique().numel() == 1:  # gates, norms, biases
            assert torch.equal(found, parameter), name
        elif not name.startswith("new_tokens"):
            assert 0.5 < found.std() / parameter.std() < 2, name
    prompt = Prompt.make(loaded)
    base = make_lm("llama").requires_grad_(False)
    assert torch.equal(loaded(**prompt.inputs).logits[..., :VOCAB], base(prompt.input_ids).logits)


def test_what_is_pushed_to_the_hub_is_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a folder here: what would be uploaded is copied there."""
    import huggingface_hub

    hub = tmp_path / "hub"

    def create_commit(_: Any, repo_id: str, operations: Any, **__: Any) -> str:
        for operation in operations:
            target = hub / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as content:
                target.write_bytes(content.read())
        return f"commit of {repo_id}"

    def create_repo(_: Any, repo_id: str, **__: Any) -> Any:
        return huggingface_hub.RepoUrl(f"{huggingface_hub.constants.ENDPOINT}/{repo_id}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model: Any
    model, processor = make_flamingo("gpt2")
    model.push_to_hub("somebody/flamingo")
    processor.push_to_hub("somebody/flamingo")
    assert_same_bits(Auto.from_pretrained(hub / "somebody" / "flamingo"), model)
    AutoProcessor.from_pretrained(hub / "somebody" / "flamingo")


class HouseConfig(LlamaConfig):
    """A kind that transformers does not know, as where code comes with a model."""

    model_type = "house_llama"


class HouseForCausalLM(LlamaForCausalLM):
    config_class = HouseConfig


def test_a_language_model_that_transformers_does_not_know_is_loaded_once_it_is_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    lm: Any = HouseForCausalLM(HouseConfig(**CONFIGS["llama"]().to_dict() | {"model_type": "house_llama"}))
    model, _ = build_flamingo(lm, FlamingoVisionConfig(**VISION["vit"]), tokenizer=make_tokenizer(), **SIZES)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"type 'house_llama', .* AutoConfig\.register\('house_llama', type\(lm\."):
        FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {**CONFIG_MAPPING._extra_content})
    mapping: Any = AutoModelForCausalLM._model_mapping
    monkeypatch.setattr(mapping, "_extra_content", {**mapping._extra_content})
    AutoConfig.register("house_llama", type(lm.config))
    AutoModelForCausalLM.register(type(lm.config), type(lm))
    assert_same_bits(FlamingoForConditionalGeneration.from_pretrained(tmp_path), model)

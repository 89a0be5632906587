import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlamaModel,
)

from flamingo_blocks import (
    FlamingoForConditionalGeneration,
    FlamingoProcessor,
    MediaCache,
    VisionEncoder,
    build_flamingo,
)
from flamingo_blocks.builder import choose_decoding
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig
from tests.coverage.tiny_configs import make_lm as make_any_lm
from tests.tiny_flamingo import SIZES, VISION, Prompt, make_flamingo, make_tokenizer
from tests.tiny_language_models import CONFIGS, VOCAB, make_lm

VIT = FlamingoVisionConfig(**VISION["vit"])


def build(lm: Any = None, vision: Any = VIT, **options: Any) -> tuple[FlamingoForConditionalGeneration, Any]:
    lm = make_lm("llama") if lm is None else lm
    return build_flamingo(lm, vision, **{"tokenizer": make_tokenizer()} | SIZES | options)


@pytest.fixture
def local_lm(tmp_path: Path) -> Path:
    path = tmp_path / "lm"
    make_lm("gpt2").save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def local_backbone(tmp_path: Path) -> Path:
    path = tmp_path / "backbone"
    backbone: Any = timm.create_model("test_vit", num_classes=0, depth=2)
    timm.models.save_for_hf(backbone, str(path), model_args={"depth": 2}, safe_serialization=True)
    return path


# ---------------------------------------------------------------- what may be passed


def test_local_paths_are_loaded_with_their_weights_and_their_tokenizer(local_lm: Path, local_backbone: Path) -> None:
    model, processor = build_flamingo(local_lm, str(local_backbone), **SIZES)
    base = AutoModelForCausalLM.from_pretrained(local_lm)
    expected = base.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.language_model.state_dict().items())
    backbone = safetensors.torch.load_file(local_backbone / "model.safetensors")
    assert all(torch.equal(t, backbone[name]) for name, t in model.vision_encoder.backbone.state_dict().items())
    assert processor.tokenizer.get_vocab()["<image>"] == VOCAB
    assert model.vision_encoder.image_size == (160, 160)
    vision_config: Any = model.config.vision_config
    assert vision_config.architecture == "test_vit"
    assert vision_config.model_args["depth"] == 2


def test_a_model_is_taken_as_it_is_and_a_configuration_is_made_anew() -> None:
    lm, backbone = make_lm("gpt2"), timm.create_model("test_resnet", num_classes=0)
    model, _ = build(lm, backbone, image_size=64)
    assert model.language_model is lm
    assert model.vision_encoder.backbone is backbone
    assert model.config.vision_config.architecture == "test_resnet"  # type: ignore[union-attr]
    encoder = VisionEncoder(backbone, image_size=64)
    assert build(make_lm("gpt2"), encoder)[0].vision_encoder is encoder
    first, second = (build(CONFIGS["llama"](), freeze=("vision_encoder",))[0] for _ in range(2))
    assert all(p.requires_grad for p in first.language_model.parameters())
    weights = [m.language_model.model.layers[0].mlp.up_proj.weight for m in (first, second)]
    assert not torch.equal(*weights)


def test_heads_are_as_asked() -> None:
    model, _ = build(cross_attention_heads=6, cross_attention_head_dim=8, cross_attention_kv_heads=2, gate_init=1)
    block: Any = model.injector.blocks["0"]
    assert (block.heads, block.head_dim, block.kv_heads) == (6, 8, 2)


def test_a_backbone_with_its_classifier_and_another_output_dtype_is_loaded_again(tmp_path: Path) -> None:
    encoder = VisionEncoder(timm.create_model("test_resnet"), image_size=64, output_dtype=torch.bfloat16)
    model, _ = build(vision=encoder, gate_init=0.5)
    model.save_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    prompt = Prompt.make(model)
    assert torch.equal(loaded(**prompt.inputs).logits, model(**prompt.inputs).logits)


def test_the_tokenizer_is_copied_and_gets_what_it_lacks() -> None:
    tokenizer = make_tokenizer()
    _, processor = build(tokenizer=tokenizer)
    assert len(tokenizer) == VOCAB
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<EOC>"]) == [VOCAB, VOCAB + 1]
    assert processor.tokenizer.tokenize("w5<image> w6 <EOC>") == ["w5", "<image>", "w6", "<EOC>"]


def test_the_tokenizer_of_an_earlier_processor_will_do() -> None:
    _, earlier = build()
    model, processor = build(tokenizer=earlier.tokenizer)
    assert model.config.new_token_ids == [VOCAB, VOCAB + 1]
    assert len(processor.tokenizer) == VOCAB + 2


def test_an_existing_special_token_is_used_again() -> None:
    model, processor = build(tokenizer=make_tokenizer(specials=("<image>",)), end_of_chunk_token="<eos>")
    assert (model.config.image_token_id, model.config.end_of_chunk_token_id) == (3, 1)
    assert model.config.new_token_ids == []
    assert model.new_tokens is None
    prompt = Prompt.make(model)
    assert model(**prompt.inputs).logits.shape[-1] == VOCAB
    assert processor.end_of_chunk_token == "<eos>"


def test_ids_within_a_padded_vocabulary_are_overlaid() -> None:
    model, _ = build(tokenizer=make_tokenizer(size=97))
    assert model.config.new_token_ids == [97, 98]
    base = make_lm("llama")
    input_ids = torch.randint(5, 90, (2, 6))
    logits, expected = model(input_ids).logits, base(input_ids).logits
    assert logits.shape == expected.shape
    assert torch.equal(logits[..., :97], expected[..., :97])
    assert not torch.equal(logits[..., 97:], expected[..., 97:])


def test_dtypes_are_as_asked() -> None:
    model, _ = build(dtype="bfloat16")
    assert model.language_model.dtype == torch.bfloat16
    assert next(model.vision_encoder.parameters()).dtype == torch.bfloat16
    parts: list[Any] = [model.resampler, model.injector, model.new_tokens]
    for part in parts:
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    assert next(build(trained_dtype=torch.bfloat16)[0].resampler.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "indices"),
    [({}, (0, 1, 2)), ({"cross_attention_every": 2}, (0, 2)), ({"layers": [1]}, (1,)), ({"layers": "middle"}, (1,))],
)
def test_blocks_stand_where_they_were_asked_for(options: dict[str, Any], indices: tuple[int, ...]) -> None:
    assert build(**options)[0].injector.layer_indices == indices
    assert build(decoder_layers="model.layers", **options)[0].injector.layer_indices == indices


def test_model_processor_and_their_copies_on_disk_work_together(tmp_path: Path) -> None:
    """From text and images to text, and once more from disk."""
    from PIL import Image

    model, processor = make_flamingo("gpt2", "resnet")
    images = [[Image.new("RGB", (40, 30), color) for color in ("red", "blue")], []]
    text = ["w5 <image> w6 <EOC> <image>", "w7 w8"]
    inputs = processor(images, text, padding_side="left")
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    inputs = FlamingoProcessor.from_pretrained(tmp_path)(images, text, padding_side="left")
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=4, do_sample=False), generated)
    auto_model: Any = AutoModelForImageTextToText
    assert type(auto_model.from_pretrained(tmp_path)) is FlamingoForConditionalGeneration
    decoded: Any = processor.batch_decode(generated)  # type: ignore[no-untyped-call]
    assert len(decoded) == 2


def test_a_model_on_the_meta_device_is_built_without_being_run() -> None:
    with torch.device("meta"):
        model, _ = build(LlamaConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    assert all(p.is_meta for p in model.parameters())


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("cross_attention_evry", "cross_attention_every"),
        ("num_latent", "num_latents"),
        ("resampler_layers", "resampler_"),
        ("freez", "freeze"),
        ("img_size", "image_size"),
    ],
)
def test_an_unknown_option_names_the_nearest_right_one(option: str, nearest: str) -> None:
    with pytest.raises(TypeError, match=f"build_flamingo has no option '{option}'; did you mean '{nearest}"):
        build(**{option: 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_attention_every": 4}, r"every must be in 1\.\.3"),
        ({"layers": [3]}, r"there are decoder layers 0\.\.2, got \[3\]"),
        ({"layers": [1], "cross_attention_every": 2}, "give either every or layers"),
        ({"decoder_layers": "model.nonsense"}, "'model.nonsense' is not a list of layers in LlamaForCausalLM"),
        ({"image_token": "w5"}, "'w5' is an ordinary word of the tokenizer, not a special token"),
        ({"end_of_chunk_token": "w7"}, "'w7' is an ordinary word of the tokenizer"),
        ({"image_token": "<EOC>"}, "image_token and end_of_chunk_token must differ, got '<EOC>' for both"),
        ({"tokenizer": make_tokenizer(size=VOCAB + 1)}, "tokens up to 99, but the language model only 99 of them"),
        ({"tokenizer": None}, "does not say where its tokenizer is; give tokenizer="),
        ({"resampler_heads": 0}, "heads must be at least 1, got 0"),
        ({"cross_attention_heads": 5}, "heads must divide dim=32, got 5; or give head_dim"),
        ({"cross_attention_heads": 0}, "heads must divide dim=32, got 0"),
        ({"channels": 4}, "channels=4 was asked for, but the given vision_encoder has 3; give it only once"),
        ({"image_size": 64}, r"image_size=\[64, 64\] was asked for, but the given vision_encoder has \[32, 32\]"),
        ({"dtype": "bogus"}, "dtype must be a floating-point dtype of torch, e.g. torch.bfloat16, got 'bogus'"),
        ({"trained_dtype": torch.int8}, "trained_dtype must be a floating-point dtype of torch"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.unchecked
@pytest.mark.parametrize("freeze", ["language_model", ["lm"]])
def test_parts_to_freeze_that_are_not_there_are_refused(freeze: Any) -> None:
    with pytest.raises(ValueError, match='freeze must be a collection of "language_model" and "vision_encoder"'):
        build(freeze=freeze)


@pytest.mark.unchecked
def test_things_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="language_model must be an id, a path, a configuration or a causal language"):
        build(5)
    with pytest.raises(ValueError, match="with a head, got Linear"):
        build(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="vision_encoder must be a name of timm, a path"):
        build(vision=5)
    with pytest.raises(ValueError, match="tokenizer must be an id, a path or a tokenizer, got int"):
        build(tokenizer=5)


def test_what_is_no_causal_language_model_is_refused() -> None:
    with pytest.raises(ValueError, match="with a head, got LlamaModel; load it with AutoModelForCausalLM"):
        build(LlamaModel(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)))


def test_code_that_comes_with_a_model_is_left_to_whoever_loads_it() -> None:
    with pytest.raises(TypeError, match="load the model with AutoModelForCausalLM, and trust_remote_code=True there"):
        build(trust_remote_code=True)


def test_a_backbone_without_a_grid_is_refused() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward_features(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)) * self.weight

    with pytest.raises(ValueError, match="does not return a grid of tokens"):
        build(vision=Pooled(), image_size=32)


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("argument", ["language_model", "vision_encoder", "tokenizer"])
def test_an_id_without_network_says_so_and_how_to_use_a_local_path(argument: str) -> None:
    arguments: dict[str, Any] = {
        "language_model": make_lm("llama"),
        "vision_encoder": VIT,
        "tokenizer": make_tokenizer(),
    }
    arguments[argument] = "resnet18" if argument == "vision_encoder" else "nobody/has-this"
    with pytest.raises(OSError, match=f"(?s){argument}='.*could not be loaded.*give the path of a local copy"):
        build_flamingo(**arguments)


def test_a_directory_that_holds_no_backbone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"has no model\.safetensors and no config\.json; a local copy .*save_for_hf"):
        build(vision=tmp_path)


@pytest.mark.parametrize("path", ["/no/such/backbone", Path("backbone")])
def test_a_path_that_is_not_there_is_no_name_of_timm(path: Any) -> None:
    with pytest.raises(OSError, match=f"(?s)vision_encoder='{path}' could not be loaded.*FileNotFoundError"):
        build(vision=path)


def test_an_unknown_backbone_is_named() -> None:
    with pytest.raises(OSError, match=r"(?s)vision_encoder='resnet1800' could not be loaded.*Unknown model"):
        build(vision="resnet1800")


def test_a_language_model_that_runs_its_layers_in_another_order_is_found_out() -> None:
    lm = make_lm("llama")
    layers = lm.model.layers

    def run_the_last_layer_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layers[2](*args, **kwargs)

    layers[0].register_forward_pre_hook(run_the_last_layer_first, with_kwargs=True)
    with pytest.raises(
        ValueError, match=r"should run its decoder layers \[0, 1, 2\] in this order.* but ran \[2, 0, 1, 2\]"
    ):
        build(lm)


def test_a_language_model_that_loops_over_its_layers_takes_blocks() -> None:
    lm = make_lm("llama")
    lm.model.layers[0].register_forward_pre_hook(  # layers 0 and 1 run twice
        lambda _, args, kwargs: (
            (lm.model.layers[1](lm.model.layers[0].forward(*args, **kwargs), **kwargs), *args[1:]),
            kwargs,
        ),
        with_kwargs=True,
    )
    model, _ = build(lm, layers=[1, 2])
    called: list[int] = []
    for block in model.injector.blocks.values():
        block.register_forward_pre_hook(lambda *_: called.append(1))
    model(torch.tensor([[5, 6]]))
    assert len(called) == 3


def test_a_language_model_that_learns_from_some_of_its_loops_only_is_refused() -> None:
    lm = make_lm("llama")
    layers = lm.model.layers
    original = layers[0].forward

    def twice(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        with torch.no_grad():
            hidden_states = layers[1](hidden_states, **kwargs)
        return original(hidden_states, **kwargs)

    layers[0].forward = twice
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM runs decoder layers several times, but some .* without grad"
    ):
        build(lm, layers=[1])


def forget_positions(lm: Any) -> None:
    """Let a Llama give other logits with its cache."""
    original = lm.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if (kwargs.get("cache") or kwargs.get("past_key_values")) is not None:
            kwargs["position_ids"] = torch.zeros_like(kwargs["input_ids"])
        return original(*args, **kwargs)

    lm.model.forward = forward


def test_a_cache_that_gives_other_logits_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lm = make_lm("llama")
    model, _ = build(lm)
    assert model.config.decoding == "cached"
    model.eject()
    original = lm.model.forward
    forget_positions(lm)
    assert "text is generated with the language model's cache" in model.summary()
    assert not caplog.messages
    model, _ = build(lm)
    assert model.config.decoding == "uncached"
    assert "text is generated without a cache" in model.summary()
    (message,) = [record.message for record in caplog.records if record.name == "flamingo_blocks.builder"]
    assert message.startswith(
        "LlamaForCausalLM generates without its cache: its logits differ from those of its forward"
    )
    prompt = Prompt.make(model)
    ids = model.generate(**prompt.inputs, max_new_tokens=3, do_sample=False, min_new_tokens=3)
    logits = model(ids, prompt.pixel_values, prompt.num_frames).logits[:, prompt.input_ids.shape[1] - 1 : -1]
    allowed = logits.index_fill(-1, torch.tensor([1, VOCAB, VOCAB + 1]), -torch.inf)
    assert torch.equal(allowed.argmax(-1), ids[:, -3:])
    # Tools such as lm-eval ask for the cache in any case.
    assert torch.equal(
        ids, model.generate(**prompt.inputs, max_new_tokens=3, do_sample=False, min_new_tokens=3, use_cache=True)
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM gives other logits with its cache than for the whole text"):
        model.generate(**prompt.inputs, past_key_values=DynamicCache(), media_cache=MediaCache())
    with pytest.raises(ValueError, match="pass use_cache=False and the whole text"):
        model(**prompt.inputs, use_cache=True)
    lm.model.forward = original
    model.save_pretrained(tmp_path)
    assert FlamingoForConditionalGeneration.from_pretrained(tmp_path).config.decoding == "uncached"


def test_logits_that_no_token_is_to_have_hide_no_wrong_cache() -> None:
    model: Any = build(make_lm("llama"))[0]
    with torch.no_grad():
        model.new_tokens.head.weight.zero_()
        model.new_tokens.head.bias.fill_(-1e4)
    choose_decoding(model)
    assert model.config.decoding == "cached"
    forget_positions(model.language_model)
    choose_decoding(model)
    assert model.config.decoding == "uncached"


def test_a_language_model_without_one_head_keeps_its_own_tokens() -> None:
    lm = make_any_lm("MusicgenForCausalLM")
    with pytest.raises(
        ValueError, match="new tokens cannot be added to MusicgenForCausalLM, whose head is a ModuleList"
    ):
        build(lm, tokenizer=make_tokenizer())
    model, _ = build(lm, tokenizer=make_tokenizer(specials=("<image>", "<EOC>")))
    with pytest.raises(ValueError, match=r"MusicgenForCausalLM has a generate\(\) of its own, which knows no media"):
        model.generate(torch.tensor([[5, 6]]))


def test_the_language_model_of_a_vision_language_model_takes_new_tokens() -> None:
    model, _ = build(make_any_lm("Gemma3ForConditionalGeneration"), tokenizer=make_tokenizer(size=160))
    prompt = Prompt.make(model)
    ids = model.generate(**prompt.inputs, max_new_tokens=2, min_new_tokens=2, num_beams=2)
    assert ids.shape == (2, 10)


def test_a_language_model_that_sees_later_tokens_is_found_out() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = BertConfig(vocab_size=VOCAB, is_decoder=False, **sizes)
    with pytest.raises(ValueError, match="BertLMHeadModel lets a token see later ones"):
        build(BertLMHeadModel(config))
    build(BertLMHeadModel(BertConfig(vocab_size=VOCAB, is_decoder=True, **sizes)))
    with pytest.raises(ValueError, match=r"must be a causal language model of transformers, .* got BertForMaskedLM"):
        build(BertForMaskedLM(config))


def test_a_time_major_language_model_is_found_out() -> None:
    lm = make_lm("gpt2")

    def time_first(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].transpose(0, 1), *args[1:])

    lm.transformer.h[0].register_forward_pre_hook(time_first)
    with pytest.raises(ValueError, match="GPT2LMHeadModel lets a token see later ones"):
        build(lm)
    assert not any(layer._forward_pre_hooks for layer in lm.transformer.h[1:]), "the blocks were taken out again"
    assert not lm.lm_head._forward_hooks


def test_a_language_model_that_has_blocks_is_refused() -> None:
    lm = make_lm("llama")
    model, _ = build(lm)
    with pytest.raises(ValueError, match="this language model already has blocks injected"):
        build(lm)
    model.eject()
    build(lm)


def test_importing_the_builder_is_the_only_way_to_pay_for_transformers() -> None:
    import subprocess

    code = "import sys, flamingo_blocks; assert 'transformers' not in sys.modules; flamingo_blocks.build_flamingo"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_saved_configuration_is_plain_json(tmp_path: Path) -> None:
    build(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2))[0].config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "flamingo"
    assert config["vision_config"]["architecture"] == "test_vit"

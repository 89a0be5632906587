"""IDEFICS against the original, which transformers has."""

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import AddedToken, IdeficsConfig, IdeficsForVisionText2Text, IdeficsProcessor, PreTrainedTokenizerFast
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids,
    incremental_to_binary_attention_mask,
)

from flamingo_blocks import FlamingoForConditionalGeneration, FlamingoProcessor, MediaRuns
from flamingo_blocks.convert import idefics
from tests.strategies import random_tensor, randomize

VOCAB, END, MEDIA = 40, 2, 2
VISION = {
    "embed_dim": 24,
    "image_size": 16,
    "patch_size": 8,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PERCEIVER = {"resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 8}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "vision_config": VISION,
    "perceiver_config": PERCEIVER,
}
# As idefics-9b, as idefics-9b-instruct, and what neither of them has.
CASES: dict[str, dict[str, Any]] = {
    "base": {
        "additional_vocab_size": 2,
        "cross_layer_interval": 2,
        "qk_layer_norms": True,
        "use_resampler": True,
        "perceiver_config": {**PERCEIVER, "qk_layer_norms_perceiver": True},
    },
    "instruct": {"additional_vocab_size": 3, "cross_layer_interval": 2, "qk_layer_norms": True, "use_resampler": True},
    "vector gates, no resampler": {"additional_vocab_size": 2, "alpha_type": "vector", "alpha_initializer": "ones"},
    "no additional tokens": {"cross_layer_interval": 4, "use_resampler": True, "rms_norm_eps": 1e-2},
    "tied": {"additional_vocab_size": 3, "tie_word_embeddings": True, "rope_theta": 500.0},
    "tied, no additional tokens": {
        "tie_word_embeddings": True,
        "alpha_type": "vector",
        "use_resampler": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
    },
}
SPECIALS = (idefics.FAKE_TOKEN, idefics.IMAGE_TOKEN, idefics.END_OF_UTTERANCE)


@cache
def make_tokenizer(additional: int) -> PreTrainedTokenizerFast:
    """Llama's special tokens, words, and those of IDEFICS, behind the vocabulary or, if there is no place, in it."""
    specials = SPECIALS[: additional or 3]
    words = ["<unk>", "<s>", "</s>", *(specials if additional == 0 else ())]
    words += [f"w{i}" for i in range(len(words), VOCAB - 2)] + ["User:", "Assistant:"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        additional_special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
    )


def make_config(case: str, **options: Any) -> IdeficsConfig:
    config: Any = IdeficsConfig(**{**SIZES, **CASES[case], **options})
    return config


@cache
def original_of(case: str) -> Any:
    """The original with random weights and open gates. It is shared: do not change it."""
    original: Any = IdeficsForVisionText2Text(make_config(case))
    randomize(original, 0)
    return original.eval()


def load(original: Any, **options: Any) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    options = {"tokenizer": make_tokenizer(original.config.additional_vocab_size), **options}
    return idefics.load_flamingo(original.state_dict(), original.config, **options)


@cache
def loaded(case: str) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """What is loaded of `original_of`. It is shared: do not change it."""
    return load(original_of(case))


@cache
def exact_pair(case: str) -> tuple[Any, FlamingoForConditionalGeneration]:
    """The original and what is loaded of it, in float64 throughout. They are shared: do not change them."""
    original = copy.deepcopy(original_of(case)).double()
    model, _ = load(original)
    exactly(original)
    exactly(model)
    return original, model


def exactly(model: nn.Module) -> None:
    """Let RMSNorms compute in float64, too: transformers' go through float32, ours do not."""
    for module in [*model.modules()]:
        children: list[tuple[str, Any]] = [*module.named_children()]
        for name, norm in children:
            if type(norm).__name__ in ("IdeficsRMSNorm", "LlamaRMSNorm"):
                exact = nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(module, name, exact)


@dataclass
class Prompt:
    """Three rows: two images with text before, between and behind them; no image; one image. Rows are padded."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    pixel_values: torch.Tensor
    image_attention_mask: torch.Tensor
    num_frames: torch.Tensor

    @classmethod
    def make(cls, additional: int, *, side: str = "left", packed: bool = False) -> "Prompt":
        tokenizer = make_tokenizer(additional)
        image = "".join(SPECIALS[i] for i in (0, 1, 0))
        end = "</s>" if packed else "w20"
        texts = [
            f"w9 w10 {image} w11 w12 {end} w13 w14 {image} w15 w16 {end} w17",
            f"w21 w22 w23 {end} w24 w25",
            f"{image} w30 w31 {end} w32",
        ]
        encoded: Any = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        ids = encoded["input_ids"]
        incremental, _ = image_attention_mask_for_packed_input_ids(ids, tokenizer, "pt")
        mask = incremental_to_binary_attention_mask(incremental, "pt", num_classes=MEDIA)
        is_real = torch.arange(MEDIA) < (ids == tokenizer.convert_tokens_to_ids(idefics.IMAGE_TOKEN)).sum(1)[:, None]
        pixel_values = random_tensor(1, len(texts), MEDIA, 3, 16, 16) * is_real[..., None, None, None]
        return cls(ids, encoded["attention_mask"], pixel_values, mask, is_real.long())

    @property
    def theirs(self) -> dict[str, Any]:
        names = ("input_ids", "attention_mask", "pixel_values", "image_attention_mask")
        return {name: getattr(self, name) for name in names}

    @property
    def ours(self) -> dict[str, Any]:
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "pixel_values": self.pixel_values[:, :, None],
            "num_frames": self.num_frames,
        }

    @property
    def positions_and_documents(self) -> dict[str, Any]:
        is_end = self.input_ids == END
        return {
            "position_ids": (self.attention_mask.cumsum(-1) - 1).clamp(min=0),
            "document_ids": is_end.cumsum(1) - is_end.long(),
        }


def largest_difference(ours: Any, theirs: Any, prompt: Prompt) -> float:
    is_text = prompt.attention_mask.bool()
    return float((ours.logits[is_text] - theirs.logits[is_text]).abs().max())


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_the_original_s(case: str) -> None:
    original, model = exact_pair(case)
    for side, packed in itertools.product(["left", "right"], [False, True]):
        prompt = Prompt.make(original.config.additional_vocab_size, side=side, packed=packed)
        theirs = original(**prompt.theirs)
        ours = model(**prompt.ours, **prompt.positions_and_documents)
        assert ours.logits.shape == theirs.logits.shape
        assert largest_difference(ours, theirs, prompt) < 1e-12


@torch.no_grad()
def test_a_batch_without_images_gives_the_original_s_logits() -> None:
    original, model = exact_pair("base")
    ids = torch.tensor([[1, 9, 10, 11]])
    nothing = {"pixel_values": torch.zeros(1, 1, 3, 16, 16), "image_attention_mask": torch.zeros(1, 4, 1)}
    assert (model(ids).logits - original(ids, **nothing).logits).abs().max() < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_the_original_s(case: str) -> None:
    original, (model, processor) = original_of(case), loaded(case)
    prompt = Prompt.make(original.config.additional_vocab_size)
    kept_apart: Any = processor.tokenizer.convert_tokens_to_ids([idefics.IMAGE_TOKEN, idefics.FAKE_TOKEN])
    length: dict[str, Any] = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
    options = {"suppress_tokens": kept_apart, "eos_token_id": model.generation_config.eos_token_id}
    theirs = original.generate(**prompt.theirs, **options, **length)
    prompt.pixel_values = prompt.pixel_values.float()
    ours = model.generate(**prompt.ours, **length)
    assert torch.equal(ours, theirs)
    assert len({tuple(row) for row in ours[:, -8:].tolist()}) > 1


def test_generated_text_ends_with_an_utterance_and_holds_no_image() -> None:
    for case, additional, end in (("base", 2, 2), ("instruct", 3, VOCAB + 2)):
        model, processor = loaded(case)
        assert model.config.end_of_chunk_token_id == end
        assert processor.end_of_chunk_token == ("</s>" if additional == 2 else idefics.END_OF_UTTERANCE)
        generation: Any = model.generation_config
        assert sorted(generation.suppress_tokens) == [VOCAB, VOCAB + 1]
        assert set(np.atleast_1d(generation.eos_token_id)) == {END, end}


def test_the_end_of_chunk_can_be_chosen() -> None:
    model, processor = load(original_of("instruct"), end_of_chunk_token="</s>")
    assert model.config.end_of_chunk_token_id == END
    assert processor.end_of_chunk_token == "</s>"


# ------------------------------------------------------------ parts


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_blocks_give_the_original_s_output_and_are_those_of_the_whole_model(case: str) -> None:
    original, model = exact_pair(case)
    blocks = idefics.load_blocks(original.state_dict(), original.config.to_dict())
    assert [str(index) for index in blocks] == list(model.injector.blocks)
    see = torch.tensor([[[False, False], [True, False], [True, True], [False, True]]])
    hidden_states, media = random_tensor(0, 1, 4, 32), random_tensor(1, 1, 2, 3, 24)
    mask = torch.zeros(1, 1, 4, 6, dtype=torch.float64)
    mask.masked_fill_(~see.repeat_interleave(3, -1)[:, None], torch.finfo(torch.float64).min)
    ranges = torch.tensor([[[0, 0], [0, 1], [0, 2], [1, 2]]])
    for n, (index, block) in enumerate(blocks.items()):
        assert index == n * original.config.cross_layer_interval
        whole = model.injector.blocks[str(index)].state_dict()
        assert all(torch.equal(tensor, whole.pop(name)) for name, tensor in block.state_dict().items())
        assert not whole
        assert not block.training
        theirs = original.model.gated_cross_attn_layers[n](
            hidden_states,
            image_hidden_states=media.flatten(1, 2),
            image_attention_mask=mask,
            cross_attention_gate=see.any(-1).double(),
        )
        assert (block(hidden_states, media, MediaRuns.from_ranges(ranges)) - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_resampler_gives_the_original_s_output_and_is_that_of_the_whole_model(case: str) -> None:
    original, model = exact_pair(case)
    resampler: Any = idefics.load_resampler(original.state_dict(), original.config)
    if not original.config.use_resampler:
        assert resampler is None
        return
    whole = model.resampler.state_dict()
    assert all(torch.equal(tensor, whole.pop(name)) for name, tensor in resampler.state_dict().items())
    assert not whole
    assert not resampler.training
    features = random_tensor(0, 2, 5, 24)
    theirs = original.model.perceiver_resampler(features)
    assert (resampler(features[:, None, None])[:, 0] - theirs).abs().max() < 1e-12


# ------------------------------------------------------------ files


def write(original: Any, path: Path) -> None:
    original.save_pretrained(path, max_shard_size="20KB")
    make_tokenizer(original.config.additional_vocab_size).save_pretrained(path)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_sharded_directory_is_loaded_by_its_path_and_written_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    original = original_of(case)
    write(original, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    model, _ = idefics.load_flamingo(tmp_path)
    prompt = Prompt.make(original.config.additional_vocab_size, packed=True)
    theirs, ours = original(**prompt.theirs), model(**prompt.ours, **prompt.positions_and_documents)
    assert largest_difference(ours, theirs, prompt) < 1e-4
    written, expected = idefics.to_idefics(model), original.state_dict()
    assert set(written) == set(index)
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("case", ["instruct", "tied"])
@torch.no_grad()
def test_the_original_loads_what_is_written_here(case: str, tmp_path: Path) -> None:
    original, (model, _) = original_of(case), loaded(case)
    save_file(idefics.to_idefics(model), tmp_path / "model.safetensors", metadata={"format": "pt"})
    original.config.save_pretrained(tmp_path)
    again: Any = IdeficsForVisionText2Text.from_pretrained(tmp_path)
    prompt = Prompt.make(original.config.additional_vocab_size)
    assert torch.equal(again.eval()(**prompt.theirs).logits, original(**prompt.theirs).logits)


@pytest.mark.unchecked  # see tests/test_processing_flamingo.py::test_a_processor_round_trips
@pytest.mark.parametrize("case", ["instruct", "vector gates, no resampler", "tied"])
@torch.no_grad()
def test_a_loaded_model_is_saved_and_loaded_as_any_other(case: str, tmp_path: Path) -> None:
    model, processor = load(copy.deepcopy(original_of(case)).bfloat16())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    prompt = Prompt.make(CASES[case].get("additional_vocab_size", 0))
    assert torch.equal(again(**prompt.ours).logits, model(**prompt.ours).logits)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w9"}]}]
    template = FlamingoProcessor.from_pretrained(tmp_path).apply_chat_template(chat)
    assert template == processor.apply_chat_template(chat)


@torch.no_grad()
def test_what_was_trained_of_a_loaded_model_is_saved_as_an_adapter(tmp_path: Path) -> None:
    original, (model, _) = original_of("instruct"), loaded("instruct")
    model.save_adapter(tmp_path)
    backbones, _ = load(original)
    parts: dict[str, Any] = {"language_model": backbones.eject(), "vision_encoder": backbones.vision_encoder}
    again = FlamingoForConditionalGeneration.from_adapter(tmp_path, **parts)
    prompt = Prompt.make(3)
    prompt.pixel_values = prompt.pixel_values.float()
    assert torch.equal(again(**prompt.ours).logits, model(**prompt.ours).logits)


def test_a_loaded_model_can_be_brought_to_another_dtype() -> None:
    model, _ = load(original_of("instruct"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_buffers_of_older_checkpoints_are_dropped() -> None:
    original = original_of("base")
    state_dict = original.state_dict()
    state_dict |= {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.gated_cross_attn_layers.1.cross_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    model, _ = idefics.load_flamingo(state_dict, original.config, tokenizer=make_tokenizer(2))
    assert set(idefics.to_idefics(model)) == set(original.state_dict())
    assert len(idefics.load_blocks(state_dict, original.config)) == 2


# ------------------------------------------------------------ what is refused


# Some names there, and how they end here.
NAMES = {
    "model.layers.0.self_attn.q_proj.weight": "layers.0.self_attn.q_proj.weight",
    "model.gated_cross_attn_layers.1.mlp.up_proj.weight": "feed_forward.to_hidden.weight",
    "model.perceiver_resampler.blocks.0.1.fc.weight": "layers.0.feed_forward.to_hidden.weight",
    "model.vision_model.encoder.layers.0.mlp.fc1.bias": "blocks.0.mlp.fc1.bias",
    "model.embed_tokens.additional_embedding.weight": "new_tokens.embeddings.weight",
}


def test_tensors_that_are_missing_left_over_or_of_another_shape_are_named() -> None:
    original = original_of("base")
    whole, names = original.state_dict(), [*NAMES]
    broken = {
        "missing": {name: tensor for name, tensor in whole.items() if name not in names},
        "no place": {**whole, **{f"{name}.extra": torch.zeros(1) for name in names}},
        "shape": {**whole, **{name: whole[name][:-1] for name in names}},
    }
    for problem, tensors in broken.items():
        arguments = (tensors, original.config)
        calls: list[tuple[Callable[[], Any], list[str]]] = [
            (partial(idefics.load_flamingo, *arguments, tokenizer=make_tokenizer(2)), names),
            (partial(idefics.load_blocks, *arguments), names[1:2]),
            (partial(idefics.load_resampler, *arguments), names[2:3]),
        ]
        for call, affected in calls:
            with pytest.raises(ValueError, match=problem) as error:
                call()
            for name in affected:
                end = ".".join(name.split(".")[-3:]) + ".extra" if problem == "no place" else NAMES[name]
                assert end in str(error.value)


def test_parts_that_the_configuration_does_not_know_are_refused() -> None:
    original = original_of("base")
    state_dict, config = original.state_dict(), original.config.to_dict()
    with pytest.raises(ValueError, match="use_resampler=False, but"):
        idefics.load_resampler(state_dict, {**config, "use_resampler": False})
    with pytest.raises(ValueError, match=r"there are 1 blocks, but .* 1\.alpha_cross_attn"):
        idefics.load_blocks(state_dict, {**config, "cross_layer_interval": 4})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_type": "idefics2"}, "model_type 'idefics2'"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu"),
        ({"alpha_type": "matrix"}, "alpha_type must be float or vector"),
        ({"vision_config": {**VISION, "hidden_act": "silu"}}, "gelu or quick_gelu"),
    ],
)
def test_other_configurations_are_refused(options: dict[str, Any], message: str) -> None:
    original = original_of("base")
    with pytest.raises(ValueError, match=message):
        idefics.load_flamingo(
            original.state_dict(), {**original.config.to_dict(), **options}, tokenizer=make_tokenizer(2)
        )


def test_layers_that_the_interval_does_not_divide_fail_in_the_original_and_are_refused_here() -> None:
    config: Any = make_config("base", num_hidden_layers=3)
    original: Any = IdeficsForVisionText2Text(config)
    with pytest.raises(IndexError):
        original(**Prompt.make(2).theirs)
    with pytest.raises(ValueError, match="multiple of cross_layer_interval=2, got 3"):
        load(original)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"<image> has the id 41 in the tokenizer, but the model has 40 tokens"):
        load(original_of("no additional tokens"), tokenizer=make_tokenizer(2))
    original = original_of("base")
    with pytest.raises(ValueError, match="tokenizer must be given"):
        idefics.load_flamingo(original.state_dict(), original.config)


@torch.no_grad()
def test_a_tied_head_that_differs_is_refused() -> None:
    original = original_of("tied")
    state_dict = original.state_dict()
    state_dict["lm_head.weight"] = state_dict["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"tie_word_embeddings=True, but lm_head\.weight"):
        idefics.load_flamingo(state_dict, original.config, tokenizer=make_tokenizer(3))


@pytest.mark.parametrize("case", ["base", "tied"])
def test_what_was_trained_here_is_the_original_s(case: str) -> None:
    original = original_of(case)
    model: Any = load(original)[0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    prompt = Prompt.make(original.config.additional_vocab_size, side="right")
    prompt.pixel_values = prompt.pixel_values.float()
    model(**prompt.ours, labels=prompt.input_ids).loss.backward()
    optimizer.step()
    original.load_state_dict(idefics.to_idefics(model), strict=False)
    original.tie_weights()
    with torch.no_grad():
        ours = model(**prompt.ours, **prompt.positions_and_documents)
        assert largest_difference(ours, original(**prompt.theirs), prompt) < 1e-4


def test_options_of_other_families_are_not_written() -> None:
    model: Any = load(original_of("base"))[0]
    model.config.attend = "all_previous"
    with pytest.raises(ValueError, match="attend must be 'last'"):
        idefics.to_idefics(model)


# ------------------------------------------------------------ text and images


def make_image(seed: int, mode: str = "RGB", size: tuple[int, int] = (30, 20)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
@pytest.mark.parametrize("size", [(16, 16), (30, 20), (9, 60)])
def test_pixels_are_those_of_the_original_s_processor(mode: str, size: tuple[int, int]) -> None:
    _, processor = loaded("base")
    image = make_image(0, mode, size)
    theirs = torch.as_tensor(IdeficsImageProcessorPil(image_size=16)([image], return_tensors="pt"))
    ours = processor.image_processor([image])["pixel_values"]
    assert (ours - theirs).abs().max() < 1e-5


# As on the page of idefics-9b-instruct, and two images in a row.
DIALOGUE: list[list[Any]] = [
    ["User: w9 w10", make_image(1), f"{SPECIALS[2]}", f"\nAssistant: w11{SPECIALS[2]}", "\nUser:", make_image(2)],
    ["User:", make_image(3), make_image(4), f"w12 w13{SPECIALS[2]}", "\nAssistant:"],
]
DIALOGUE[0] += [f"w14 w15{SPECIALS[2]}", "\nAssistant:"]
MESSAGES: list[list[dict[str, Any]]] = [
    [
        {"role": "user", "content": [{"type": "text", "text": "w9 w10"}, {"type": "image", "image": make_image(1)}]},
        {"role": "assistant", "content": "w11"},
        {"role": "user", "content": [{"type": "image", "image": make_image(2)}, {"type": "text", "text": "w14 w15"}]},
    ],
    [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": make_image(3)},
                {"type": "image", "image": make_image(4)},
                {"type": "text", "text": "w12 w13"},
            ],
        }
    ],
]


def test_a_chat_is_written_as_the_original_s_processor_writes_it_and_sees_the_same_images() -> None:
    original, (model, processor) = original_of("instruct"), loaded("instruct")
    tokenizer = make_tokenizer(3)
    their_processor: Any = IdeficsProcessor(IdeficsImageProcessorPil(image_size=16), tokenizer)
    theirs = their_processor(
        text=DIALOGUE, add_end_of_utterance_token=False, add_special_tokens=False, padding=True, padding_side="left"
    )
    ours = processor.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=True, padding_side="left"
    )
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    assert (ours["pixel_values"][:, :, 0] - theirs["pixel_values"]).abs().max() < 1e-5
    assert ours["num_frames"].tolist() == [[1, 1], [1, 1]]
    with torch.no_grad():
        difference = model(**ours).logits - original(**theirs).logits
    assert difference[ours["attention_mask"].bool()].abs().max() < 1e-4


def test_a_chat_without_end_of_utterance_and_with_a_system_message_is_plain_text() -> None:
    _, processor = loaded("base")
    image = f"{SPECIALS[0]}{SPECIALS[1]}{SPECIALS[0]}"
    messages = [{"role": "system", "content": "w8"}, *MESSAGES[0]]
    assert processor.apply_chat_template(messages) == (f"w8\nUser: w9 w10{image}\nAssistant: w11\nUser:{image}w14 w15")


def test_a_tokenizer_s_own_chat_template_is_kept() -> None:
    tokenizer = copy.deepcopy(make_tokenizer(2))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    _, processor = load(original_of("base"), tokenizer=tokenizer)
    assert processor.apply_chat_template([{"role": "user", "content": "w9"}]) == "w9"

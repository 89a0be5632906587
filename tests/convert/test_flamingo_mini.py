"""flamingo-mini's formulas, restated in tests/reference.py, its tensors' names, and its way of marking media."""

import copy
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2Tokenizer,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from flamingo_blocks import FlamingoForConditionalGeneration, FlamingoProcessor, MediaRuns, media_ranges
from flamingo_blocks.backbones import make_vision_encoder
from flamingo_blocks.convert import flamingo_mini
from flamingo_blocks.convert.flamingo_mini import load_blocks, load_flamingo, load_resampler, to_flamingo_mini
from tests.reference import flamingo_mini_block, flamingo_mini_logits, flamingo_mini_resampler
from tests.strategies import random_tensor, randomize

WIDTH, VISION_WIDTH, SIZE = 32, 24, 16
CLIP: dict[str, Any] = {
    "hidden_size": VISION_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "patch_size": 8,
    "image_size": SIZE,
    "hidden_act": "quick_gelu",
}
CONFIG: dict[str, Any] = {
    "lm": "none",
    "clip_model_type": "none",
    "dim": WIDTH,
    "dim_visual": VISION_WIDTH,
    "xattn_every": 2,
    "xattn_dim_head": 8,
    "xattn_heads": 3,
    "xattn_ff_mult": 2,
    "xattn_act": "sqrelu",
    "resampler_depth": 2,
    "resampler_dim_head": 5,
    "resampler_heads": 2,
    "resampler_num_latents": 3,
    "resampler_num_time_embeds": 2,
    "resampler_ff_mult": 3,
    "resampler_act": "gelu",
}
# Text first; media one right after the other; none; a medium behind the end of a chunk.
TEXTS = ["the cat sat\n<image>A cat<EOC><image>the mat", "<image>on<EOC>\n<image>", "no mat", "A\n<image>cat<EOC>the"]


@cache
def tokenizer() -> GPT2Tokenizer:
    """GPT-2's kind of tokenizer, for another language."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    text = "a <b> A cat. <image><image></a> on the mat.<image>\n\nthe cat sat no </b></a>\n\n"
    backend.train_from_iterator([text] * 5, trainer)
    model = json.loads(backend.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]
    return GPT2Tokenizer(vocab=model["vocab"], merges=merges)


def their_tokenizer() -> GPT2Tokenizer:
    """flamingo_processor.py: <EOC> is added, as an ordinary token."""
    theirs = copy.deepcopy(tokenizer())
    theirs.add_tokens("<EOC>")
    theirs.pad_token = theirs.eos_token
    return theirs


def their_image_token_ids() -> list[int]:
    """flamingo_processor.py: the last token of `<` and of ` <`."""
    return [tokenizer()("<")["input_ids"][-1], tokenizer()(" <")["input_ids"][-1]]


@dataclass
class Original:
    """A model there: its tensors, and the modules of transformers that they come from."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    lm: Any
    clip: Any
    layers: str
    head_is_tied: bool

    @property
    def theirs(self) -> dict[str, Tensor]:
        """The tensors as the formulas take them."""
        head = {"lm_head.weight": self.lm.get_output_embeddings().weight.detach()}
        return {name.removeprefix("flamingo."): tensor for name, tensor in self.weights.items()} | head

    @property
    def options(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "tokenizer": tokenizer(),
            "language_model": self.lm.config,
            "vision_config": CLIP,
        }

    def load(self, **changes: Any) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
        return load_flamingo(self.weights, **self.options | changes)

    def logits(
        self, input_ids: Tensor, media: Any, *, attention_mask: Tensor | None = None, prompt: int | None = None
    ) -> Tensor:
        """Logits there, of a text of which the first so many tokens are the prompt."""
        media_locations = torch.isin(input_ids, torch.tensor(their_image_token_ids()))
        if prompt is not None:
            media_locations[:, prompt:] = False
        return flamingo_mini_logits(
            self.theirs,
            self.config,
            self.lm.base_model,
            self.layers,
            lambda frames: self.clip(frames).last_hidden_state,
            input_ids,
            media,
            attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            media_locations=media_locations,
        )


def lm_config(kind: str, vocab_size: int) -> PreTrainedConfig:
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "gpt2":
        return GPT2Config(**sizes, n_embd=WIDTH, n_layer=3, n_head=4)
    sizes |= {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48}
    if kind == "opt":
        return OPTConfig(**sizes)
    # As OPT-350m: a narrower table, and norms behind the sub-layers.
    return OPTConfig(**sizes, word_embed_proj_dim=16, do_layer_norm_before=False)


@cache
def _original(kind: str, head_is_tied: bool, act: str) -> Original:
    # OPT's tables have more rows than its tokenizer has tokens; in both cases, one is added.
    rows = len(tokenizer()) + (0 if kind == "gpt2" else 6) + 1
    config = CONFIG | {"xattn_act": act, "xattn_every": 2 if kind == "gpt2" else 1}
    lm_of_original = lm_config(kind, rows)
    lm_of_original.tie_word_embeddings = head_is_tied
    torch.manual_seed(0)
    auto_model: Any = AutoModelForCausalLM
    lm: Any = auto_model.from_config(lm_of_original).double().eval()
    clip: Any = CLIPVisionModel(CLIPVisionConfig(**CLIP)).double().eval()
    randomize(lm, 1)
    randomize(clip, 2)
    clip.float().double()  # timm keeps pretrained weights in float32
    layers = "h" if kind == "gpt2" else "decoder.layers"
    indices = range(0, 3, config["xattn_every"])
    weights = {}
    for name, tensor in lm.base_model.state_dict().items():
        for i in indices:
            name = name.replace(f"{layers}.{i}.", f"{layers}.{i}.lm_block.")
        weights[f"lm.{name}"] = tensor
    if not head_is_tied:
        weights["lm_head.weight"] = lm.lm_head.weight.detach()
    for name, tensor in clip.state_dict().items():
        weights[f"vision_encoder.vision_model.{name.removeprefix('vision_model.')}"] = tensor
    inner, hidden = config["xattn_heads"] * config["xattn_dim_head"], config["xattn_ff_mult"] * WIDTH
    block = {
        "alpha_attn": (1,),
        "alpha_ffw": (1,),
        "attn.norm.weight": (WIDTH,),
        "attn.norm.bias": (WIDTH,),
        "attn.to_q.weight": (inner, WIDTH),
        "attn.to_kv.weight": (2 * inner, VISION_WIDTH),
        "attn.to_out.weight": (WIDTH, inner),
        **feed_forward_shapes("ffw", WIDTH, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"lm.{layers}.{i}.xattn_block.{name}": shape for i in indices for name, shape in block.items()
    }
    inner, dim = config["resampler_heads"] * config["resampler_dim_head"], VISION_WIDTH
    shapes |= {"resampler.latents": (config["resampler_num_latents"], dim)}
    shapes |= {"resampler.time_pos_emb": (config["resampler_num_time_embeds"], 1, dim)}
    shapes |= {"resampler.norm.weight": (dim,), "resampler.norm.bias": (dim,)}
    for i in range(config["resampler_depth"]):
        for name in ("norm_media", "norm_latents"):
            shapes |= {f"resampler.layers.{i}.0.{name}.{kind}": (dim,) for kind in ("weight", "bias")}
        shapes |= {f"resampler.layers.{i}.0.{name}.weight": (inner, dim) for name in ("to_q", "to_k", "to_v")}
        shapes |= {f"resampler.layers.{i}.0.to_out.weight": (dim, inner)}
        shapes |= feed_forward_shapes(f"resampler.layers.{i}.1", dim, config["resampler_ff_mult"] * dim)
    weights |= {name: 0.5 * random_tensor(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    return Original(
        config, {f"flamingo.{name}": tensor for name, tensor in weights.items()}, lm, clip, layers, head_is_tied
    )


def feed_forward_shapes(name: str, dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.0.weight": (dim,), f"{name}.0.bias": (dim,)}
    return shapes | {f"{name}.1.weight": (hidden, dim), f"{name}.3.weight": (dim, hidden)}


def make_original(kind: str = "gpt2", *, head_is_tied: bool = False, act: str = "sqrelu") -> Original:
    return copy.deepcopy(_original(kind, head_is_tied, act))


@cache
def _loaded(kind: str, head_is_tied: bool) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    return make_original(kind, head_is_tied=head_is_tied).load()


def make_loaded(kind: str = "gpt2", *, head_is_tied: bool = False) -> tuple[Original, Any, FlamingoProcessor]:
    """A model there and here. Loading takes longer than copying what was loaded before."""
    return make_original(kind, head_is_tied=head_is_tied), *copy.deepcopy(_loaded(kind, head_is_tied))


KINDS = pytest.mark.parametrize("kind", ["gpt2", "opt", "opt-350m"])


def make_media() -> list[list[Tensor]]:
    """Media for TEXTS: (frames, channels, height, width). One is a video."""
    frames = [[1, 2], [2, 1], [], [1]]
    return [
        [random_tensor(10 * row + i, number, 3, SIZE, SIZE) for i, number in enumerate(numbers)]
        for row, numbers in enumerate(frames)
    ]


def pad_media(media: list[list[Tensor]]) -> dict[str, Tensor]:
    num_frames = torch.zeros(len(media), max(map(len, media)), dtype=torch.long)
    pixel_values = torch.zeros(*num_frames.shape, 2, 3, SIZE, SIZE, dtype=torch.float64)
    for row, of_row in enumerate(media):
        for i, frames in enumerate(of_row):
            num_frames[row, i] = len(frames)
            pixel_values[row, i, : len(frames)] = frames
    return {"pixel_values": pixel_values, "num_frames": num_frames}


def is_close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------ what is computed


@pytest.mark.parametrize("act", ["gelu", "relu", "sqrelu"])
def test_blocks_and_resampler_compute_what_theirs_do(act: str) -> None:
    original = make_original(act=act)
    config = original.config | {"resampler_act": act}
    media_locations = torch.tensor([[0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    y, media = random_tensor(1, 3, 6, WIDTH), random_tensor(2, 3, 2, 3, VISION_WIDTH)
    runs = MediaRuns.from_ranges(media_ranges(media_locations))
    blocks = load_blocks(original.weights, config)
    assert list(blocks) == [0, 2]
    for index, block in blocks.items():
        expected = flamingo_mini_block(
            original.theirs, f"lm.h.{index}.xattn_block", y, media, media_locations, original.config
        )
        assert is_close(block(y, media, runs), expected)
    resampler = load_resampler(original.weights, config)
    features = random_tensor(3, 2, 5, VISION_WIDTH)
    assert is_close(resampler(features[None, None])[0, 0], flamingo_mini_resampler(original.theirs, features, config))


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head_is_tied", [False, True])
def test_logits_are_theirs(kind: str, side: str, head_is_tied: bool) -> None:
    original, model, processor = make_loaded(kind, head_is_tied=head_is_tied)
    text = processor.tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")
    media = make_media()
    found = model(**text, **pad_media(media)).logits
    expected = original.logits(text["input_ids"], media, attention_mask=text["attention_mask"])
    real = text["attention_mask"].bool()
    assert is_close(found[real], expected[real])
    assert expected.std() > 1e-2


@KINDS
@pytest.mark.parametrize("head_is_tied", [False, True])
def test_greedy_tokens_are_theirs(kind: str, head_is_tied: bool) -> None:
    """Padding on the left does not count as text here, so each row is compared with what it gives alone there."""
    original, model, processor = make_loaded(kind, head_is_tied=head_is_tied)
    media = make_media()
    batch = processor.tokenizer(TEXTS, padding=True, padding_side="left", return_tensors="pt")
    found = greedy(model, **batch, **pad_media(media))
    for row, text in enumerate(TEXTS):
        ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
        prompt = ids.shape[1]
        for _ in range(STEPS):
            logits = original.logits(ids, media[row : row + 1], prompt=prompt)
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        assert found[row, -STEPS:].tolist() == ids[0, prompt:].tolist()


def test_the_sign_of_a_medium_can_be_generated_and_is_a_word_then() -> None:
    original, model, processor = make_loaded()
    ids, media = processor.tokenizer(TEXTS[1], return_tensors="pt")["input_ids"], make_media()[1:2]
    first, image = int(original.logits(ids, media)[0, -1].argmax()), model.config.image_token_id
    head = original.weights["flamingo.lm_head.weight"]
    head[[first, image]] = head[[image, first]]
    original.lm.lm_head.weight.data.copy_(head)
    model, _ = original.load()
    found = greedy(model, input_ids=ids, **pad_media(media))
    assert found[0, ids.shape[1]] == image
    logits = original.logits(found, media, prompt=ids.shape[1])
    assert logits[0, ids.shape[1] - 1 : -1].argmax(-1).tolist() == found[0, ids.shape[1] :].tolist()


STEPS = 6


def greedy(model: Any, **inputs: Tensor) -> Tensor:
    result: Tensor = model.generate(**inputs, do_sample=False, max_new_tokens=STEPS, eos_token_id=-1)
    return result


def test_a_clip_of_more_frames_than_embeddings_is_no_error() -> None:
    original, model, processor = make_loaded()
    clip = random_tensor(5, 1, 1, 4, 3, SIZE, SIZE)
    ids = processor.tokenizer(TEXTS[3], return_tensors="pt")["input_ids"]
    with pytest.raises(RuntimeError, match="must match the size"):
        original.logits(ids, list(clip))
    assert model(ids, clip).logits.isfinite().all()


def test_a_sign_without_a_medium_sees_all_media_there_and_is_an_error_here() -> None:
    original, model, processor = make_loaded()
    ids = processor.tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    one, other = random_tensor(1, 1, 3, SIZE, SIZE), random_tensor(2, 1, 3, SIZE, SIZE)
    sign = ids[0].tolist().index(model.config.image_token_id, 1)
    assert not is_close(original.logits(ids, [[one]])[:, sign:], original.logits(ids, [[other]])[:, sign:])
    with pytest.raises(ValueError, match="media"):
        model(ids, one[None, None])


def test_generating_ends_with_the_chunk() -> None:
    _, model, processor = make_loaded()
    end = processor.tokenizer.convert_tokens_to_ids("<EOC>")
    assert model.generation_config.eos_token_id == [model.config.text_config.eos_token_id, end]


# ------------------------------------------------------------ what is loaded and written


@KINDS
@pytest.mark.parametrize("head_is_tied", [False, True])
def test_a_whole_checkpoint_comes_back(kind: str, head_is_tied: bool) -> None:
    original, model, _ = make_loaded(kind, head_is_tied=head_is_tied)
    assert_same(to_flamingo_mini(model), original.weights)


def test_a_checkpoint_keeps_its_dtype_or_gets_the_one_that_is_asked_for() -> None:
    original = make_original()
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in original.weights.items()}
    model, _ = load_flamingo(halves, **original.options)
    assert_same(to_flamingo_mini(model), halves)
    model, _ = load_flamingo(halves, **original.options, dtype=torch.float32)
    assert_same(to_flamingo_mini(model), {name: tensor.float() for name, tensor in halves.items()})


@KINDS
@pytest.mark.parametrize("head_is_tied", [False, True])
def test_what_was_trained_alone_is_loaded_around_a_language_model_and_comes_back(kind: str, head_is_tied: bool) -> None:
    original, model, processor = make_loaded(kind, head_is_tied=head_is_tied)
    trained = trained_of(original)
    # The published one has a row less, and any head.
    lm = copy.deepcopy(original.lm)
    lm.resize_token_embeddings(lm.config.vocab_size - 1)
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    again, _ = load_flamingo(
        trained,
        original.config,
        tokenizer=tokenizer(),
        language_model=lm,
        vision_encoder=copy.deepcopy(model.vision_encoder),
    )
    assert_same(to_flamingo_mini(again, trained_only=True), trained)
    assert_same(to_flamingo_mini(again), original.weights)
    assert_same(to_flamingo_mini(model, trained_only=True), trained)
    assert lm.config.vocab_size == model.config.text_config.vocab_size - 1
    ids = processor.tokenizer(TEXTS[3], return_tensors="pt")["input_ids"]
    media = pad_media(make_media()[3:])
    assert torch.equal(again(ids, **media).logits, model(ids, **media).logits)
    with torch.no_grad():
        for parameter in again.language_model.parameters():
            parameter.zero_()
    assert_same(lm.state_dict(), before)


def trained_of(original: Original) -> dict[str, Tensor]:
    """modeling_flamingo.py, state_dict_trainable: resampler, blocks, table of embeddings and head."""
    trained = ("resampler.", "xattn_block.", "wte.", "embed_tokens.", "lm_head.")
    weights = {name.removeprefix("flamingo."): tensor for name, tensor in original.weights.items()}
    return {name: tensor for name, tensor in weights.items() if any(part in name for part in trained)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_what_is_frozen_there_is_frozen_here() -> None:
    original = make_original()
    for frozen in (True, False):
        flags = {"freeze_language_model": frozen, "freeze_vision_model": frozen}
        model, _ = original.load(config=original.config | flags)
        # The norm behind the last layer of CLIP is part of it, though nothing passes it.
        expected = trained_of(original) if frozen else original.weights
        expected = {name.removeprefix("flamingo."): tensor for name, tensor in expected.items()}
        assert_same(to_flamingo_mini(model, trained_only=True), expected)


def test_tensors_that_follow_from_the_configuration_are_left_out() -> None:
    original = make_original()
    derived = {
        "flamingo.lm.h.0.lm_block.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "flamingo.lm.h.0.lm_block.attn.masked_bias": torch.tensor(-1e4),
        "flamingo.lm.h.1.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "flamingo.vision_encoder.vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    model, _ = load_flamingo(original.weights | derived, **original.options)
    assert_same(to_flamingo_mini(model), original.weights)


@KINDS
def test_a_checkpoint_of_older_code_has_no_vision_encoder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the pretrained one that the configuration names. Here, a name stands for a local copy."""
    original, model, processor = make_loaded(kind)
    backbone = model.vision_encoder.backbone.float()
    arguments = {**model.config.vision_config.model_args, "img_size": [SIZE, SIZE]}
    timm.models.save_for_hf(backbone, str(tmp_path), model_args=arguments, safe_serialization=True)
    monkeypatch.setitem(flamingo_mini.CLIP, "none", (str(tmp_path), {}))
    weights = {name: tensor for name, tensor in original.weights.items() if "vision_encoder" not in name}
    older, _ = load_flamingo(weights, original.config, tokenizer=tokenizer(), language_model=original.lm.config)
    text, media = processor.tokenizer(TEXTS[:2], padding=True, return_tensors="pt"), make_media()[:2]
    expected = original.logits(text["input_ids"], media, attention_mask=text["attention_mask"])
    real = text["attention_mask"].bool()
    assert is_close(older(**text, **pad_media(media)).logits[real], expected[real])
    assert_same(to_flamingo_mini(older), weights)
    assert_same(to_flamingo_mini(older, vision_encoder=True), original.weights)  # as newer code has it
    assert_same(to_flamingo_mini(model, vision_encoder=False), weights)


@KINDS
def test_single_parts_are_those_of_the_whole(kind: str) -> None:
    original, model, _ = make_loaded(kind)
    blocks: Any = model.injector.blocks
    for state_dict in (original.weights, trained_of(original)):
        loaded = load_blocks(state_dict, original.config)
        assert list(loaded) == list(model.injector.layer_indices)
        for index, block in loaded.items():
            assert_same(block.state_dict(), blocks[str(index)].state_dict())
            assert repr(block) == repr(blocks[str(index)])
            assert not block.training
        resampler = load_resampler(state_dict, original.config)
        assert_same(resampler.state_dict(), model.resampler.state_dict())
        assert repr(resampler) == repr(model.resampler)
        assert not resampler.training


@pytest.mark.unchecked  # see tests/test_processing_flamingo.py::test_a_processor_round_trips
@KINDS
@pytest.mark.parametrize("head_is_tied", [False, True])
def test_a_saved_model_gives_the_same_logits(kind: str, head_is_tied: bool, tmp_path: Path) -> None:
    original, model, processor = make_loaded(kind, head_is_tied=head_is_tied)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = FlamingoForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    processor_again: Any = FlamingoProcessor.from_pretrained(tmp_path)
    inputs = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(
        processor_again.tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"], inputs.input_ids
    )
    inputs |= pad_media(make_media())
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert torch.equal(greedy(again, **inputs), greedy(model, **inputs))
    assert_same(to_flamingo_mini(again), original.weights)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_files_are_found_beside_the_checkpoint_and_where_it_names_them(kind: str, tmp_path: Path) -> None:
    original = make_original(kind)
    checkpoint, lm, clip = tmp_path / "checkpoint", tmp_path / "lm", tmp_path / "clip.json"
    checkpoint.mkdir()
    torch.save(original.weights, checkpoint / "pytorch_model.bin")
    (checkpoint / "config.json").write_text(json.dumps(original.config | {"lm": str(lm), "model_type": "flamingo"}))
    original.lm.config.save_pretrained(lm)
    clip.write_text(json.dumps({"text_config": {}, "vision_config": CLIP}))
    tokenizer().save_pretrained(lm)
    model, processor = load_flamingo(checkpoint, vision_config=clip)
    assert_same(to_flamingo_mini(model), original.weights)
    # Its own tokenizer comes first: this one has a token of its own.
    own = copy.deepcopy(tokenizer())
    own.add_tokens("<EOC>")
    own.add_tokens("mat no" if kind == "opt" else "<EOC>")
    own.save_pretrained(checkpoint)
    _, processor_again = load_flamingo(checkpoint / "pytorch_model.bin", vision_config=clip)
    assert processor_again.tokenizer.get_vocab() == own.get_vocab()
    assert processor.tokenizer.get_vocab() == their_tokenizer().get_vocab()
    # What was trained alone needs the language model's weights, too.
    torch.save({"model": trained_of(original), "step": 3}, checkpoint / "checkpoint.pth")
    original.lm.save_pretrained(lm)
    again, _ = load_flamingo(checkpoint / "checkpoint.pth", vision_encoder=model.vision_encoder)
    assert_same(to_flamingo_mini(again), original.weights)


# ------------------------------------------------------------ what cannot be loaded


@pytest.mark.parametrize("load", [load_blocks, load_resampler, load_flamingo])
def test_tensors_that_are_left_over_or_missing_or_of_another_shape_are_named(load: Any) -> None:
    original = make_original()
    options = original.options if load is load_flamingo else {"config": original.config}
    names = {
        load_blocks: "flamingo.lm.h.2.xattn_block.attn.to_q.",
        load_resampler: "flamingo.resampler.layers.1.0.to_v.",
        load_flamingo: "flamingo.lm.h.1.ln_1.",
    }
    known, unknown = names[load] + "weight", "flamingo.lm.h.0.xattn_block.attn.scale"
    if load is load_resampler:
        unknown = "flamingo.resampler.scale"
    with pytest.raises(ValueError, match=f"no place: {unknown.removeprefix('flamingo.')}"):
        load(original.weights | {unknown: torch.ones(1)}, **options)
    with pytest.raises(ValueError, match="missing: .*" + "(to_q|to_v|ln_1)"):
        load({name: tensor for name, tensor in original.weights.items() if name != known}, **options)
    with pytest.raises(ValueError, match="other shapes"):
        load(original.weights | {known: torch.ones(7, *original.weights[known].shape[1:])}, **options)


def test_blocks_stand_where_the_configuration_says() -> None:
    original = make_original()
    weights = {name.replace("h.2.xattn", "h.1.xattn"): tensor for name, tensor in original.weights.items()}
    with pytest.raises(ValueError, match=r"no place: .*h\.1\.xattn_block"):
        load_blocks(weights, original.config)
    with pytest.raises(ValueError, match=r"no place: .*h\.1\.xattn_block"):
        load_flamingo(weights, **original.options)
    with pytest.raises(ValueError, match="no gated cross-attention blocks"):
        load_blocks({"flamingo.lm.h.0.ln_1.weight": torch.ones(2)}, original.config)


def test_what_does_not_fit_is_said() -> None:
    original = make_original()
    load, trained = original.load, trained_of(original)

    def load_trained(**changes: Any) -> Any:
        return load_flamingo(
            trained, original.config, **{"tokenizer": tokenizer(), "language_model": original.lm} | changes
        )

    with pytest.raises(ValueError, match="config must be given"):
        load_resampler(original.weights)
    with pytest.raises(ValueError, match=r"config\['xattn_act'\] must be gelu or relu or sqrelu, got 'tanh'"):
        load(config=original.config | {"xattn_act": "tanh"})
    with pytest.raises(ValueError, match="must be a GPT-2 or an OPT, got a 'llama'"):
        load(language_model=LlamaConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"no tensor lm\.wte\.weight"):
        load_flamingo({n: t for n, t in original.weights.items() if "wte" not in n}, **original.options)
    with pytest.raises(ValueError, match="dim_visual=48, but the vision encoder gives 24"):
        load(config=original.config | {"dim_visual": 48})
    with pytest.raises(ValueError, match="give vision_config: that of 'none' is not on record"):
        load(vision_config=None)
    with pytest.raises(ValueError, match="vision_encoder is for checkpoints that have none"):
        load(vision_encoder="vit_base_patch32_clip_quickgelu_224.openai")
    with pytest.raises(ValueError, match="give vision_encoder: there is no timm model on record for 'none'"):
        load_trained()
    with pytest.raises(ValueError, match="must be one with weights, its id or path, got a GPT2Config"):
        load_trained(language_model=original.lm.config)
    with pytest.raises(OSError, match="language_model='/nowhere' could not be loaded"):
        load(language_model="/nowhere")
    more = copy.deepcopy(tokenizer())
    more.add_tokens("more")
    with pytest.raises(ValueError, match="<EOC> would be token"):
        load(tokenizer=more)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="has no token '<'"):
        load(tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a"))


# ------------------------------------------------------------ media in the text


@given(
    st.lists(st.sampled_from(["<image>", "A cat", "\n", "<EOC>", "<|endoftext|>", " the mat", "no", "3"]), max_size=9)
)
def test_texts_become_the_tokens_that_they_are_there(pieces: list[str]) -> None:
    text = "".join(pieces)
    if "><" not in text.replace("<EOC>", "E").replace("<|endoftext|>", "E") and "\n\n" not in text:
        processor, theirs = loaded_processor(), their_tokenizer()
        ids = theirs(text)["input_ids"]
        number = pieces.count("<image>")
        inputs = processor(text=text, images=[Image.new("RGB", (20, 16))] * number, return_tensors=None)
        assert inputs["input_ids"][0] == ids
        assert sum(i in their_image_token_ids() for i in ids) == number


@cache
def loaded_processor() -> FlamingoProcessor:
    return make_loaded()[2]


@pytest.mark.parametrize(
    ("text", "theirs", "ours"),
    [
        # The same media, but other tokens.
        ("a <image>", ["a", "Ġ<", "image", ">"], ["a", "Ġ", "<", "image", ">"]),
        ("a\n\n<image>", ["a", "Ċ", "Ċ", "<", "image", ">"], ["a", "ĊĊ", "<", "image", ">"]),
        # Media that are not seen there.
        ("<image><image>", ["<", "image", "><", "image", ">"], ["<", "image", ">", "<", "image", ">"]),
        ("mat.<image>", ["mat", ".<", "image", ">"], ["mat", ".", "<", "image", ">"]),
        ("</a>", ["</", "a", ">"], ["<", "/", "a", ">"]),
    ],
)
def test_texts_become_other_tokens_only_as_told(text: str, theirs: list[str], ours: list[str]) -> None:
    tokenizers = their_tokenizer(), loaded_processor().tokenizer
    assert [one.convert_ids_to_tokens(one(text)["input_ids"]) for one in tokenizers] == [theirs, ours]


def test_a_conversation_has_the_whole_tag() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "A cat"}]
    text = loaded_processor().apply_chat_template([{"role": "user", "content": parts}])
    assert text == "User: <image>A cat"


def test_images_are_prepared_as_for_clip() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8))
    found = loaded_processor()(text="<image>", images=[image])["pixel_values"][0, 0, 0]
    size: dict[str, Any] = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    expected = CLIPImageProcessorPil(**size)(image, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", flamingo_mini.CLIP)
def test_clips_of_openai_are_the_same_in_timm(name: str) -> None:
    timm_name, numbers = flamingo_mini.CLIP[name]
    with torch.device("meta"):
        found = timm.create_model(timm_name, num_classes=0)
        expected = make_vision_encoder(flamingo_mini._describe(CLIPVisionConfig(**numbers)))
        theirs = CLIPVisionModel(CLIPVisionConfig(**numbers))
    assert repr(found) == repr(expected.backbone)
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in theirs.parameters())

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    MaxLengthCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

from flamingo_blocks import FlamingoForConditionalGeneration, MediaCache, media_ranges
from flamingo_blocks.blocks import dense_media_mask
from tests.strategies import attends
from tests.tiny_flamingo import Prompt, make_flamingo, make_tokenizer
from tests.tiny_language_models import CONFIGS, VOCAB, make_lm

every_lm = pytest.mark.parametrize("name", CONFIGS)
with_attention = pytest.mark.parametrize("name", [name for name in CONFIGS if name != "mamba"])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}
LONG: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


def cache_of(output: Any) -> Any:
    """Get the language model's cache, whose name depends on the version of transformers."""
    return next(output[name] for name in ("cache", "past_key_values", "cache_params") if name in output)


def left_padded(prompt: Prompt, *, padding: int = 3) -> dict[str, Any]:
    """The prompt, with its second row cut at the end and shifted to the right."""
    input_ids, mask = prompt.input_ids.clone(), torch.ones_like(prompt.input_ids)
    input_ids[1] = F.pad(input_ids[1, : -padding or None], (padding, 0), value=2)
    mask[1, :padding] = 0
    return {**prompt.inputs, "input_ids": input_ids, "attention_mask": mask}


# ---------------------------------------------------------------- the law


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "chunks": {"prefill_chunk_size": 3},
    "static": {"cache_implementation": "static"},
    "static in chunks": {"cache_implementation": "static", "prefill_chunk_size": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
NOT_RECURRENT = {"chunks", "static in chunks", "prompt lookup"}
OF_THE_CACHE = ("prefill_chunk_size", "cache_implementation", "prompt_lookup_num_tokens")


@settings(max_examples=max(8, settings.default.max_examples // 20))  # type: ignore[union-attr]
@given(st.data(), st.sampled_from(sorted(CONFIGS)), st.sampled_from(sorted(MODES)), attends)
def test_cached_generation_equals_the_full_recompute(data: Any, lm: str, mode: str, attend: Any) -> None:
    """For rows with any number of images and videos, left padding, and with `<image>` among what may be generated."""
    if lm == "mamba" and mode in NOT_RECURRENT:
        mode = "greedy"
    model, _ = make_flamingo(lm, attend=attend)
    rows = 1 if mode == "prompt lookup" else data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    image: Any = model.config.image_token_id
    counts = data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    padding = data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    padding = [cells - min(padding) for cells in padding]
    input_ids = torch.randint(10, VOCAB - 5, (rows, 8), generator=generator)
    for row in range(rows):
        places = padding[row] + torch.randperm(8 - padding[row], generator=generator)[: counts[row]]
        input_ids[row, : padding[row]] = 2
        input_ids[row, places] = image
    is_real = torch.arange(3) < torch.tensor(counts)[:, None]
    num_frames = torch.randint(1, 3, (rows, 3), generator=generator) * is_real
    inputs: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(8) >= torch.tensor(padding)[:, None]).long(),
        "pixel_values": torch.randn(rows, 3, 2, 3, 32, 32, generator=generator),
        "num_frames": num_frames,
    }
    options: dict[str, Any] = {**LONG, "max_new_tokens": 5, **MODES[mode]}
    if data.draw(st.booleans(), label="image tokens may be generated"):
        options["suppress_tokens"] = None
    torch.manual_seed(0)
    cached = model.generate(**inputs, **options)
    torch.manual_seed(0)
    plain = {name: value for name, value in options.items() if name not in OF_THE_CACHE}
    assert torch.equal(cached, model.generate(**inputs, **plain, use_cache=False))


@every_lm
@pytest.mark.parametrize("mode", ["greedy", "beams", "chunks", "static"])
def test_a_row_generates_what_it_generates_alone_and_without_padding(name: str, mode: str) -> None:
    if name == "mamba" and mode in NOT_RECURRENT:
        pytest.skip("the language model has no chunked prefill")
    model, _ = make_flamingo(name)
    prompt = Prompt.make(model)
    together = model.generate(**left_padded(prompt), **LONG | MODES[mode])
    for row, padding in ((0, 0), (1, 3)):
        alone = prompt.row(row)
        inputs: dict[str, Any] = {"pixel_values": alone.pixel_values, "num_frames": alone.num_frames}
        options = {name: value for name, value in (LONG | MODES[mode]).items() if name not in OF_THE_CACHE}
        expected = model.generate(alone.input_ids[:, : 8 - padding], **inputs, **options)
        assert torch.equal(together[row, padding:], expected[0])


@pytest.mark.unchecked
def test_a_forward_compiled_for_a_static_cache_gives_the_same() -> None:
    """As transformers compiles it by itself on accelerators, and in one graph, though media were dropped."""
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    config: Any = CompileConfig(mode="default", fullgraph=True)
    config._compile_all_devices = True
    compiled = model.generate(**prompt.inputs, **LONG, cache_implementation="static", compile_config=config)
    assert hasattr(model, "_compiled_call")
    assert torch.equal(compiled, model.generate(**prompt.inputs, **LONG))


@pytest.mark.parametrize("mode", [m for m in MODES if m != "prompt lookup"])
def test_media_are_encoded_and_projected_once_however_text_is_generated(mode: str) -> None:
    model, _ = make_flamingo()
    counts = count_encodings(model)
    model.generate(**Prompt.make(model).inputs, **LONG | MODES[mode])
    assert counts() == (1, len(model.injector.blocks))


@pytest.mark.parametrize("mode", [m for m in MODES if m != "prompt lookup"])
@pytest.mark.parametrize(("attend", "form"), [("last", "ranges"), ("all_previous", "mask"), ("next", "ranges")])
def test_ranges_that_are_those_of_the_rule_change_nothing(mode: str, attend: Any, form: str) -> None:
    model, _ = make_flamingo(attend=attend)
    prompt = Prompt.make(model)
    inputs = left_padded(prompt)
    ranges = media_ranges(inputs["input_ids"] == prompt.image_token_id, attend=attend)
    seen: Any = {"media_ranges": ranges} if form == "ranges" else {"media_mask": dense_media_mask(ranges, 2)}
    torch.manual_seed(0)
    expected = model.generate(**inputs, **LONG | MODES[mode])
    torch.manual_seed(0)
    assert torch.equal(model.generate(**inputs, **LONG | MODES[mode], **seen), expected)


def tiles(model: FlamingoForConditionalGeneration) -> tuple[dict[str, Any], Tensor]:
    """A left-padded prompt with an `<image>` a row: three tiles in row 0, two in row 1, which see another text each."""
    prompt, later = Prompt.make(model), Prompt.make(model, seed=1)
    prompt.input_ids[0, 4] = 50
    inputs = left_padded(prompt)
    inputs["pixel_values"] = torch.cat([prompt.pixel_values, later.pixel_values[:, :1]], dim=1)
    inputs["num_frames"] = torch.tensor([[1, 1, 1], [1, 2, 0]])
    ranges = torch.zeros(2, 8, 2, dtype=torch.long)
    ranges[0, 1:4], ranges[0, 4:] = torch.tensor([0, 3]), torch.tensor([1, 3])
    ranges[1, 6:] = torch.tensor([0, 2])
    return inputs, ranges


@pytest.mark.parametrize(
    "name, mode",
    [
        (name, mode)
        for name in CONFIGS
        for mode in ("greedy", "chunks", "static", "beams", "prompt lookup", "draft")
        if name != "mamba" or mode not in (*NOT_RECURRENT, "draft")
    ],
)
def test_what_is_generated_sees_what_the_last_token_of_its_prompt_sees(name: str, mode: str) -> None:
    """An `<image>` may have several media, as an image in tiles. The law is the greedy choice of full forwards."""
    model, _ = make_flamingo(name)
    inputs, ranges = tiles(model)
    options: dict[str, Any] = {**LONG, **MODES.get(mode, {}), "suppress_tokens": None}
    if mode in ("prompt lookup", "draft"):
        inputs, ranges = {key: value[:1] for key, value in inputs.items()}, ranges[:1]
    if mode == "draft":
        options["assistant_model"] = make_flamingo("gpt2")[0]
    text = model.generate(**inputs, **options, media_ranges=ranges)
    seen = torch.cat([ranges, ranges[:, -1:].expand(-1, 8, -1)], dim=1)
    mask = F.pad(inputs.pop("attention_mask"), (0, 8), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given_positions = {"position_ids": positions} if model.config.decoding_position_ids else {}
    inputs |= {"input_ids": text, "attention_mask": mask, **given_positions, "media_ranges": seen}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, 7:-1]
    if mode == "beams":  # as good as what is found without the cache
        inputs = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "position_ids")}
        plain: dict[str, Any] = {**options, "use_cache": False, "attention_mask": mask[:, :8]}
        assert torch.equal(text, model.generate(text[:, :8], **plain, **inputs | {"media_ranges": ranges}))
    else:
        assert torch.equal(logits.argmax(-1), text[:, 8:])


@pytest.mark.parametrize("given", ["whole text", "new text"])
def test_a_conversation_goes_on_with_ranges(given: str) -> None:
    """They count all media; the second turn's are looked at again in the third, which has none of its own."""
    model, _ = make_flamingo()
    inputs, ranges = tiles(model)
    later = Prompt.make(model, seed=2)
    caches: dict[str, Any] = {"cache": DynamicCache(), "media_cache": MediaCache()}
    mask, num_new = inputs["attention_mask"], torch.tensor([[1, 1], [1, 0]])
    text = model.generate(**inputs, **LONG, **caches, media_ranges=ranges)
    turns: list[tuple[dict[str, Any], list[list[int]]]] = [
        ({"pixel_values": later.pixel_values, "num_frames": num_new}, [[2, 5], [1, 3]]),
        ({}, [[3, 4], [2, 3]]),
    ]
    for media, see in turns:
        text = torch.cat([text, torch.tensor([[50, 51], [52, 53]])], dim=1)
        mask = F.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)
        generated = ranges[:, -1:].expand(-1, text.shape[1] - 2 - ranges.shape[1], -1)
        ranges = torch.cat([ranges, generated, torch.tensor(see)[:, None].expand(-1, 2, -1)], dim=1)
        new = ranges[:, caches["cache"].get_seq_length() :] if given == "new text" else ranges
        before, text = text, model.generate(text, attention_mask=mask, **media, **LONG, **caches, media_ranges=new)
    pixel_values = F.pad(inputs["pixel_values"], (0, 0) * 4 + (0, 2))
    pixel_values[0, 3:], pixel_values[1, 2] = later.pixel_values[0], later.pixel_values[1, 0]
    num_frames = torch.tensor([[1, 1, 1, 1, 1], [1, 2, 1, 0, 0]])
    all_media: dict[str, Any] = {"pixel_values": pixel_values, "num_frames": num_frames}
    assert torch.equal(text, model.generate(before, attention_mask=mask, **all_media, **LONG, media_ranges=ranges))


@pytest.mark.unchecked
def test_ranges_that_do_not_fit_the_text_are_refused() -> None:
    model, _ = make_flamingo()
    inputs, ranges = tiles(model)
    caches: dict[str, Any] = {"cache": DynamicCache(), "media_cache": MediaCache()}
    with pytest.raises(ValueError, match=r"\(2, 8, 2\), got \(2, 7, 2\)"):
        model.generate(**inputs, **LONG, **caches, media_ranges=ranges[:, 1:])
    text = model.generate(**inputs, **LONG, **caches, media_ranges=ranges)
    for wrong in (ranges[:1], ranges[..., 0], ranges):
        with pytest.raises(ValueError, match=r"of the new text, .* = \(2, 1, 2\) or \(2, 16, 2\), got \("):
            model.generate(text, **LONG, **caches, media_ranges=wrong)


def count_encodings(model: FlamingoForConditionalGeneration) -> Any:
    """Count calls of the vision encoder, and of the blocks' projections of media."""
    encoded, projected = [], []
    model.vision_encoder.register_forward_pre_hook(lambda *_: encoded.append(1))
    for block in model.injector.blocks.values():
        block.to_kv.register_forward_pre_hook(lambda *_: projected.append(1))  # type: ignore[union-attr]
    return lambda: (len(encoded), len(projected))


# ---------------------------------------------------------------- drafts


@with_attention
@pytest.mark.parametrize("draft", ["Flamingo", "language model", "prompt lookup"])
def test_drafts_change_nothing(name: str, draft: str) -> None:
    model, _ = make_flamingo(name)
    prompt = Prompt.make(model)
    padded = left_padded(prompt)
    inputs = {key: value[1:] for key, value in padded.items()}
    helper = {
        "Flamingo": {"assistant_model": make_flamingo("gpt2")[0]},
        "language model": {"assistant_model": make_lm("gpt2")},
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
    }[draft]
    for options in ({}, {"suppress_tokens": None}):
        expected = model.generate(**inputs, **LONG | options)
        assert torch.equal(model.generate(**inputs, **LONG | options, **helper), expected)


def test_a_flamingo_that_drafts_sees_the_media_encoded_once_by_itself() -> None:
    """So a copy of the model is always right, and the model itself needs few steps."""
    model, _ = make_flamingo()
    draft, _ = make_flamingo()
    draft.generation_config.assistant_confidence_threshold = 0.0
    prompt = Prompt.make(model).row(0)
    counts = count_encodings(draft), count_encodings(model)
    steps: list[int] = []
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    model.generate(**prompt.inputs, **LONG, assistant_model=draft)
    assert len(steps) == 1
    assert [count() for count in counts] == [(1, 3), (1, 3)]
    blind, _ = make_flamingo()
    blind.generation_config.assistant_confidence_threshold = 0.0
    blind.encode_media = lambda *_, **__: torch.zeros(1, 2, 3, 16)  # type: ignore[method-assign]
    steps.clear()
    model.generate(**prompt.inputs, **LONG, assistant_model=blind)
    assert len(steps) > 1


@pytest.mark.parametrize("draft", ["Flamingo", "language model"])
def test_sampling_with_drafts_draws_from_all_tokens(draft: str) -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model).row(0)
    assert model.new_tokens is not None
    with torch.no_grad():
        model.new_tokens.head.bias[1] = 1e3
    helper = make_flamingo("gpt2")[0] if draft == "Flamingo" else make_lm("gpt2")
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 4, "assistant_model": helper}
    text = model.generate(**prompt.inputs, **options, eos_token_id=None)
    assert text[0, 8:].tolist() == [model.config.end_of_chunk_token_id] * 4


def test_a_language_model_that_drafted_is_as_it_was() -> None:
    model, _ = make_flamingo()
    draft, prompt = make_lm("gpt2"), Prompt.make(model).row(0)
    before = set(vars(draft)), draft.config.to_dict()
    model.generate(**prompt.inputs, **LONG, assistant_model=draft)
    assert (set(vars(draft)), draft.config.to_dict()) == before
    assert draft(torch.tensor([[5, 6]])).logits.shape[-1] == VOCAB


def test_a_candidate_that_prompt_lookup_finds_may_be_an_image_token() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model).row(0)
    prompt.input_ids[0, 7] = prompt.input_ids[0, 0]  # `<image>` follows the first one
    for options in ({}, {"suppress_tokens": None}):
        expected = model.generate(**prompt.inputs, **LONG | options)
        found = model.generate(**prompt.inputs, **LONG | options, prompt_lookup_num_tokens=3)
        assert torch.equal(found, expected)


def test_drafts_that_cannot_be_right_are_refused() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model).row(0)
    other, _ = make_flamingo("gpt2")
    with pytest.raises(ValueError, match="a cache that can be cropped, but MambaForCausalLM has states"):
        model.generate(**prompt.inputs, **LONG, assistant_model=make_lm("mamba"))
    features = torch.zeros(1, 2, 2, 4, 64)
    with pytest.raises(ValueError, match="must encode all media itself; pass pixel_values instead of vision_features"):
        model.generate(prompt.input_ids, vision_features=features, **LONG, assistant_model=other)
    cache, media_cache = DynamicCache(), MediaCache()
    text = model.generate(**prompt.inputs, **LONG, cache=cache, media_cache=media_cache)
    drafts: list[dict[str, Any]]
    drafts = [{"assistant_model": other}, {"assistant_model": make_lm("llama")}, {"prompt_lookup_num_tokens": 3}]
    for draft in drafts:
        with pytest.raises(ValueError, match="whole text and all its media without caches, or generate without drafts"):
            model.generate(text, **LONG, cache=cache, media_cache=media_cache, **draft)
    words: dict[str, Any] = {"tokenizer": make_tokenizer(), "assistant_tokenizer": make_tokenizer()}
    with pytest.raises(ValueError, match="must have the same tokens; leave out assistant_tokenizer"):
        model.generate(**prompt.inputs, **LONG, assistant_model=other, **words)
    other.config.image_token_id = 7
    with pytest.raises(ValueError, match="must have the same <image> token, 99, got 7"):
        model.generate(**prompt.inputs, **LONG, assistant_model=other)
    recurrent, _ = make_flamingo("mamba")
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        recurrent.generate(**Prompt.make(recurrent).row(0).inputs, **LONG, prompt_lookup_num_tokens=3)


# ---------------------------------------------------------------- guidance


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("attend", [None, "all_previous"])
def test_guidance_leads_away_from_the_text_without_media(use_cache: bool, negative: bool, attend: Any) -> None:
    """Whether what the prompt sees follows from the model's rule, or is told by ranges."""
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    prompt.input_ids[:, [3, 4, 7]] = torch.tensor([[60, 61, prompt.image_token_id], [60, 61, prompt.image_token_id]])
    options: dict[str, Any] = {**LONG, "guidance_scale": 1.5, "use_cache": use_cache, "suppress_tokens": None}
    if negative:
        options["negative_prompt_ids"] = prompt.input_ids
    ranges = None if attend is None else media_ranges(prompt.is_image, attend=attend)
    text = model.generate(**prompt.inputs, **options, media_ranges=ranges)
    start = 0 if negative else 7
    if ranges is not None:
        ranges = torch.cat([ranges, ranges[:, -1:].expand(-1, 8, -1)], dim=1)
    with torch.no_grad():
        seen = model(text, **media_of(prompt), media_ranges=ranges, use_cache=False).logits[:, 7:-1].log_softmax(-1)
        nothing = torch.zeros(*text[:, start:].shape, 2, dtype=torch.long)
        unseen = model(text[:, start:], media_ranges=nothing, use_cache=False).logits.log_softmax(-1)
    unseen = unseen[:, 7 - start : -1]
    assert torch.equal((1.5 * seen - 0.5 * unseen).argmax(-1), text[:, 8:])


# ---------------------------------------------------------------- caches between calls


@with_attention
def test_a_conversation_goes_on_with_its_caches(name: str) -> None:
    """A new image in the third turn; in row 1 it stands first."""
    model, _ = make_flamingo(name)
    prompt, later = Prompt.make(model), Prompt.make(model, seed=1)
    cache, media_cache = DynamicCache(config=model.config.get_text_config()), MediaCache()
    caches: dict[str, Any] = {"cache": cache, "media_cache": media_cache}
    inputs = left_padded(prompt)
    mask = inputs["attention_mask"]
    text = model.generate(**inputs, **caches, **LONG)
    image = prompt.image_token_id
    for turn, new in enumerate(([[50, 51], [52, 53]], [[50, image, 52], [image, 53, 54]])):
        text = torch.cat([text, torch.tensor(new)], dim=1)
        mask = F.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)
        media: dict[str, Any] = {"pixel_values": later.pixel_values[:, :1, :1]} if turn else {}
        options: dict[str, Any] = {**LONG, "attention_mask": mask}
        if turn:
            options["prefill_chunk_size"] = 2
        before, text = text, model.generate(text, **media, **options, **caches)
    pixel_values = torch.cat([prompt.pixel_values, later.pixel_values[:, :1]], dim=1)
    pixel_values[1, 1] = later.pixel_values[1, 0]
    num_frames = torch.tensor([[1, 2, 1], [1, 1, 0]])
    one_shot = model.generate(before, attention_mask=mask, pixel_values=pixel_values, num_frames=num_frames, **LONG)
    assert torch.equal(text, one_shot)


def test_a_recurrent_model_says_that_it_cannot_go_on() -> None:
    model, _ = make_flamingo("mamba")
    prompt, media_cache = Prompt.make(model), MediaCache()
    output = model.generate(**prompt.inputs, **LONG, media_cache=media_cache, return_dict_in_generate=True)
    text = torch.cat([output.sequences, torch.full((2, 2), 50)], dim=1)
    with pytest.raises(ValueError, match="pass both to every call, or neither, as for recurrent models"):
        model.generate(text, **LONG, cache=cache_of(output), media_cache=media_cache)
    with pytest.raises(ValueError, match=r"get_seq_length|without a cache"):  # the language model's own words
        model.generate(**prompt.inputs, **LONG, prefill_chunk_size=3)


@pytest.mark.parametrize("by", ["generate", "forward"])
def test_many_questions_about_one_image_encode_it_once(by: str) -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model).row(0)
    counts = count_encodings(model)
    cache, media_cache = DynamicCache(), MediaCache()
    if by == "generate":
        model.generate(**prompt.inputs, **LONG | {"max_new_tokens": 1}, cache=cache, media_cache=media_cache)
    else:
        with torch.no_grad():
            model(**prompt.inputs, cache=cache, media_cache=media_cache)
    answers = []
    questions = torch.tensor([[50, 51, 52], [53, 54, 55]])
    for question in questions.split(1):
        text = torch.cat([prompt.input_ids, question], dim=1)
        caches: dict[str, Any] = {"cache": copy.deepcopy(cache), "media_cache": copy.deepcopy(media_cache)}
        answers.append(model.generate(text, **LONG, **caches))
        assert caches["media_cache"].key_values[0].keys is media_cache.key_values[0].keys
    together = torch.cat([prompt.input_ids.expand(2, -1), questions], dim=1)
    cache.batch_repeat_interleave(2)
    assert torch.equal(torch.cat(answers), model.generate(together, **LONG, cache=cache, media_cache=media_cache))
    assert counts()[0] == 1
    for question, answer in zip(questions.split(1), answers, strict=True):
        inputs = {**prompt.inputs, "input_ids": torch.cat([prompt.input_ids, question], dim=1)}
        inputs.pop("attention_mask")
        assert torch.equal(answer, model.generate(**inputs, **LONG))


@pytest.mark.parametrize("by", ["generate", "forward"])
def test_media_follow_a_cache_that_is_cropped(by: str) -> None:
    """Back behind the second image of row 0, and on with another one for each row."""
    model, _ = make_flamingo()
    prompt, later = Prompt.make(model), Prompt.make(model, seed=1)
    cache, media_cache = DynamicCache(), MediaCache(keep_all=True)
    model.generate(**prompt.inputs, **LONG, cache=cache, media_cache=media_cache)
    length = cache.get_seq_length()
    cache.crop(4 - length)
    new = torch.tensor([[50, prompt.image_token_id], [51, prompt.image_token_id]])
    text = torch.cat([prompt.input_ids[:, :4], new], dim=1)
    caches: dict[str, Any] = {"cache": cache, "media_cache": media_cache}
    pixel_values = torch.cat([prompt.pixel_values[:, :1], later.pixel_values[:, :1]], dim=1)
    one_shot: dict[str, Any] = {"pixel_values": pixel_values, "num_frames": torch.tensor([[1, 2], [1, 2]])}
    with torch.no_grad():
        if by == "generate":
            found = model.generate(text, pixel_values=later.pixel_values[:, :1], **caches, **LONG)
            assert torch.equal(found, model.generate(text, **one_shot, **LONG))
        else:
            logits = model(new, later.pixel_values[:, :1], **caches).logits
            torch.testing.assert_close(logits, model(text, **one_shot).logits[:, 4:], atol=2e-5, rtol=1e-5)
    assert media_cache.num_media is not None
    assert media_cache.num_media.tolist() == [2, 2]


def test_rows_of_the_caches_must_be_those_of_the_text() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    cache, media_cache = DynamicCache(), MediaCache()
    options: dict[str, Any] = {**LONG, "do_sample": True, "num_return_sequences": 2}
    text = model.generate(**prompt.inputs, **options, cache=cache, media_cache=media_cache)
    more = torch.cat([text, torch.full((4, 2), 50)], dim=1)
    caches: dict[str, Any] = {"cache": copy.deepcopy(cache), "media_cache": copy.deepcopy(media_cache)}
    with pytest.raises(ValueError, match=r"has 4 rows, but the text 2; where rows shall share"):
        model.generate(more[::2], **LONG, **caches)
    generated = model.generate(more, **LONG, cache=cache, media_cache=media_cache)
    media: dict[str, Any] = {
        "pixel_values": prompt.pixel_values.repeat_interleave(2, 0),
        "num_frames": prompt.num_frames.repeat_interleave(2, 0),
    }
    assert torch.equal(generated, model.generate(more, **media, **LONG))


def test_a_beam_search_closes_the_caches() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    cache, media_cache = DynamicCache(), MediaCache()
    options: dict[str, Any] = {**LONG, "num_beams": 2, "num_return_sequences": 2}
    text = model.generate(**prompt.inputs, **options, cache=cache, media_cache=media_cache)
    with pytest.raises(ValueError, match="media_cache was used in a beam search, which leaves other text"):
        model.generate(text, **LONG, cache=cache, media_cache=media_cache)


# ---------------------------------------------------------------- manners of transformers


@pytest.mark.parametrize("streamed", ["at once", "by iterator in a thread"])
def test_streamed_text_is_the_text(streamed: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = make_flamingo()
    tokenizer: Any = processor.tokenizer
    prompt = Prompt.make(model).row(0)
    expected = tokenizer.decode(model.generate(**prompt.inputs, **LONG)[0, 8:])
    if streamed == "at once":
        model.generate(**prompt.inputs, **LONG, streamer=TextStreamer(tokenizer, skip_prompt=True))
        assert capsys.readouterr().out.strip() == expected
        return
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options: dict[str, Any] = {**prompt.inputs, **LONG, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_generation_is_configured_as_in_transformers() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    expected = model.generate(**prompt.inputs, **LONG)
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, max_length=16, eos_token_id=None)
    assert torch.equal(model.generate(**prompt.inputs, generation_config=config), expected)
    assert torch.equal(model.generate(prompt.input_ids, config, **media_of(prompt)), expected)
    stop: Any = [MaxLengthCriteria(11)]
    assert torch.equal(model.generate(**prompt.inputs, **LONG, stopping_criteria=stop), expected[:, :11])

    def first_token_twice(self: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        for name in ("logits_processor", "stopping_criteria", "generation_config"):
            kwargs.pop(name)
        kwargs.pop("logits_to_keep", None)
        inputs = self.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        token = self(**inputs).logits[:, -1:].argmax(-1)
        return torch.cat([input_ids, token, token], dim=1)

    custom: Any = model.generate(**prompt.inputs, custom_generate=first_token_twice, suppress_tokens=None)
    assert torch.equal(custom[:, 8:], expected[:, 8:9].expand(-1, 2))


def media_of(prompt: Prompt) -> dict[str, Any]:
    return {"pixel_values": prompt.pixel_values, "num_frames": prompt.num_frames}


def test_hidden_states_and_attentions_are_those_of_the_forward() -> None:
    model, _ = make_flamingo()
    model.language_model.set_attn_implementation("eager")
    prompt = Prompt.make(model)
    asked: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    output = model.generate(**prompt.inputs, **LONG, **asked, return_dict_in_generate=True)
    full = model(output.sequences[:, :-1], **media_of(prompt), **asked, use_cache=False)
    for layer in range(4):
        states = torch.cat([step[layer] for step in output.hidden_states], dim=1)
        torch.testing.assert_close(states, full.hidden_states[layer], atol=2e-5, rtol=1e-5)
    last = output.attentions[-1][0][:, :, 0]
    torch.testing.assert_close(last, full.attentions[0][:, :, -1], atol=2e-5, rtol=1e-5)


def test_embeddings_may_come_beside_the_ids() -> None:
    model, _ = make_flamingo(image_token_is_new=False)
    prompt = Prompt.make(model)
    embeddings = model.get_input_embeddings()(prompt.input_ids)
    expected = model.generate(**prompt.inputs, **LONG)
    assert torch.equal(model.generate(**prompt.inputs, inputs_embeds=embeddings, **LONG), expected)
    seen = model.generate(
        inputs_embeds=embeddings, **media_of(prompt), **LONG, media_ranges=media_ranges(prompt.is_image)
    )
    assert torch.equal(seen, expected[:, 8:])
    with pytest.raises(ValueError, match="inputs_embeds do not tell where the <image> tokens are; pass input_ids or"):
        model.generate(inputs_embeds=embeddings, **media_of(prompt), **LONG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_healing": True}, "token_healing cannot be used here: it changes the prompt"),
        ({"assistant_early_exit": 1}, "assistant_early_exit cannot be used here"),
        ({"guidance_scale": 2.0, "num_beams": 2}, "guidance_scale cannot be used with beams"),
        ({"cache_implementation": "paged"}, "batches text alone; choose another one"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search requires `trust_remote_code=True`"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "Group Beam Search requires"),
        ({"num_beams": 4, "force_words_ids": [[5]]}, "Constrained Beam Search requires"),
    ],
)
def test_ways_to_generate_that_are_not_here_say_so(options: dict[str, Any], message: str) -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    with pytest.raises(ValueError, match=message):
        model.generate(**prompt.inputs, **LONG | options)
    with pytest.raises(ValueError, match=message):
        model.generate(**prompt.inputs, generation_config=GenerationConfig(**LONG | options))


# ---------------------------------------------------------------- one thing at a time


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_share_media_and_cached_equals_uncached(options: dict[str, int]) -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    media_cache = MediaCache()
    cached = model.generate(**prompt.inputs, **GREEDY | options, media_cache=media_cache)
    assert media_cache.rows == 2
    assert torch.equal(cached, model.generate(**prompt.inputs, **GREEDY | options, use_cache=False))
    for row in range(2):
        alone = model.generate(**prompt.row(row).inputs, **GREEDY | options)
        n = options.get("num_return_sequences", 1)
        assert torch.equal(cached[row * n : row * n + n, : alone.shape[1]], alone)


def test_a_generated_image_token_is_a_word_and_leaves_the_other_rows_alone() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    image: Any = model.config.image_token_id

    def second_row_writes_an_image(row: int, text: Tensor) -> list[int]:
        return [image] if row == 1 and len(text) == 9 else list(range(10, VOCAB))

    options: dict[str, Any] = {
        **GREEDY,
        "suppress_tokens": None,
        "prefix_allowed_tokens_fn": second_row_writes_an_image,
    }
    generated = model.generate(**prompt.inputs, **options)
    assert generated[1, 9] == image
    assert torch.equal(generated, model.generate(**prompt.inputs, **options, use_cache=False))
    alone = model.generate(**prompt.row(0).inputs, **options)
    assert torch.equal(generated[:1], alone)


def test_image_tokens_are_not_generated_and_the_end_of_a_chunk_ends_the_text() -> None:
    model, _ = make_flamingo()
    assert model.new_tokens is not None
    prompt = Prompt.make(model)
    with torch.no_grad():
        model.new_tokens.head.bias.copy_(torch.tensor([1e3, 1e2]))
    generated = model.generate(**prompt.inputs, **GREEDY)
    assert generated[:, 8:].tolist() == [[model.config.end_of_chunk_token_id]] * 2


@pytest.mark.parametrize("attend", ["last", "all_previous"])
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_conversation_with_caches_equals_the_prompt_in_one_piece(attend: Any, name: str) -> None:
    """Three turns; the rows have different numbers of images, the second turn has none, the third a new one each."""
    model, _ = make_flamingo(attend=attend)
    prompt, later = Prompt.make(model), Prompt.make(model, seed=1)
    image: Any = model.config.image_token_id
    media_cache = MediaCache()
    caches: dict[str, Any] = {name: DynamicCache(), "media_cache": media_cache}
    options: dict[str, Any] = {**GREEDY, "eos_token_id": None}
    text = model.generate(**prompt.inputs, **caches, **options)
    text = torch.cat([text, torch.full((2, 2), 50)], dim=1)
    text = model.generate(text, **caches, **options)
    text = torch.cat([text, torch.tensor([[51, image, 52], [image, 53, 54]])], dim=1)
    new_media = later.pixel_values[:, :1, :1]
    generated = model.generate(text, pixel_values=new_media, **caches, **options)
    # In one piece: row 0 has three images, row 1 two and a padding medium.
    frames = F.pad(new_media[:, 0], (0, 0, 0, 0, 0, 0, 0, 1))
    pixel_values = torch.stack(
        [
            torch.stack([prompt.pixel_values[0, 0], prompt.pixel_values[0, 1], frames[0]]),
            torch.stack([prompt.pixel_values[1, 0], frames[1], torch.zeros_like(frames[1])]),
        ]
    )
    num_frames = torch.tensor([[1, 2, 1], [1, 1, 0]])
    expected = model.generate(text, pixel_values=pixel_values, num_frames=num_frames, **options)
    assert torch.equal(generated, expected)
    assert media_cache.num_media is not None
    assert media_cache.num_media.tolist() == [3, 2]


def test_steps_by_hand_equal_the_full_forward() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    with torch.no_grad():
        full = model(**prompt.inputs, use_cache=False).logits
        first = model(prompt.input_ids[:, :4], prompt.pixel_values[:, :1], prompt.num_frames[:, :1])
        # The second image of row 0 comes with its token; row 1 has none.
        num_frames = torch.tensor([[2], [0]])
        caches = {"cache": cache_of(first), "media_cache": first.media_cache}
        second = model(prompt.input_ids[:, 4:6], prompt.pixel_values[:, 1:], num_frames, **caches)
        caches = {"cache": cache_of(second), "media_cache": second.media_cache}
        third = model(prompt.input_ids[:, 6:], **caches)
    found = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(found, full, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_scores_of_what_was_generated_count_new_tokens_too(options: dict[str, int]) -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    output = model.generate(
        **prompt.inputs, **GREEDY | options, eos_token_id=None, output_scores=True, return_dict_in_generate=True
    )
    beams = output.beam_indices if options else None
    score: Any = model.compute_transition_scores  # type: ignore[misc]
    scores = score(output.sequences, output.scores, beams, normalize_logits=not options)
    logits = model(output.sequences[:, :-1], prompt.pixel_values, prompt.num_frames).logits[:, 7:]
    if not options:
        logits[..., model.config.image_token_id] = -torch.inf  # it is not generated
    expected = logits.log_softmax(-1).gather(2, output.sequences[:, 8:, None])[..., 0]
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    if options:
        torch.testing.assert_close(output.sequences_scores, expected.mean(1), atol=1e-4, rtol=1e-4)


def test_new_text_alone_may_follow_the_caches() -> None:
    model, _ = make_flamingo()
    prompt, later = Prompt.make(model), Prompt.make(model, seed=1)
    options: dict[str, Any] = {**GREEDY, "eos_token_id": None}
    new = torch.tensor([[51, prompt.image_token_id, 52], [prompt.image_token_id, 53, 54]])
    generated = {}
    for form in ("whole", "new"):
        cache, media_cache = DynamicCache(), MediaCache()
        text = model.generate(**prompt.inputs, cache=cache, media_cache=media_cache, **options)
        whole = torch.cat([text, new], dim=1)
        # The last generated token is not in the cache yet.
        input_ids = whole if form == "whole" else whole[:, cache.get_seq_length() :]
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(whole),
            pixel_values=later.pixel_values[:, :1, :1],
            cache=cache,
            media_cache=media_cache,
            **options,
        )
        generated[form] = output[:, -5:]
    assert torch.equal(generated["whole"], generated["new"])


def test_generation_without_any_prompt_or_from_embeddings_works() -> None:
    model, _ = make_flamingo()
    assert model.generate(**GREEDY, eos_token_id=None).shape == (1, 6)
    embeddings = model.get_input_embeddings()(torch.full((2, 3), 9))
    expected = model.generate(torch.full((2, 3), 9), **GREEDY)[:, 3:]
    assert torch.equal(model.generate(inputs_embeds=embeddings, **GREEDY), expected)

"""Closed-ended answers: however they are run, scores are what the model says of each whole text on its own."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, normalizers
from torch import Tensor, nn
from transformers import (
    AddedToken,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from flamingo_blocks import FlamingoProcessor
from flamingo_blocks.blocks import Attend
from flamingo_blocks.evaluation import CLASSIFICATION, Example, Prompt, score_candidates, write_prompt
from tests.coverage import tiny_configs
from tests.strategies import attends, randomize
from tests.tiny_flamingo import make_flamingo, make_tokenizer
from tests.tiny_language_models import CONFIGS, VOCAB, make_lm

ANSWERS = ["w20", "w21 w22", "w20 w21", "w20 w21 w22 w23", "w20"]


@cache
def flamingo(lm: str = "gpt_neox", *, image_token_is_new: bool = True, merges: bool = False) -> tuple[Any, Any]:
    model, processor = make_flamingo(lm, image_token_is_new=image_token_is_new)
    model.double()
    randomize(model.language_model, 0)  # at its start, a language model hardly sees what stands before a token
    if merges:
        processor = FlamingoProcessor(processor.image_processor, merging_tokenizer("<image>", "<EOC>"))
    return model, processor


def merging_tokenizer(*specials: str) -> PreTrainedTokenizerFast:
    """A tokenizer that joins letters across spaces; its special tokens come behind the language model's vocabulary."""
    merges = [("a", " "), ("a ", "b"), (" ", "b"), ("b", "c"), ("c", "c"), ("a b", "c"), (" b", "a")]
    tokens = [*"abc ", *(first + second for first, second in merges)]
    tokens += [f"unused {i}" for i in range(VOCAB - len(tokens))]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe))
    fast.add_tokens([AddedToken(token, special=True, normalized=False) for token in specials], special_tokens=True)
    fast.pad_token = specials[-1]
    return fast


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8))


def make_prompt(media: Sequence[int] = (), *, words: str = "w9 w10", space: str = " ") -> Prompt:
    """A prompt with media, one after the other with words behind each: that many frames, or an image."""
    frames = [[picture(10 * i + j) for j in range(count)] for i, count in enumerate(media)]
    text = words + "".join(f"{space}<image>{words}" for _ in media)
    return Prompt(text, tuple(found if len(found) > 1 else found[0] for found in frames), space, "<EOC>")


def tokens_of(processor: Any, text: str) -> list[int]:
    ids: list[int] = getattr(processor, "tokenizer", processor)(text)["input_ids"]
    return ids


@torch.no_grad()
def expected_scores(
    model: Any,
    processor: Any,
    prompt: Prompt,
    candidates: Sequence[str],
    end: str = "<EOC>",
    *,
    per_token: bool = False,
) -> Tensor:
    """Each whole text on its own, without caches, token by token."""

    def inputs_of(text: str) -> dict[str, Tensor]:
        if not hasattr(processor, "tokenizer"):
            return dict(processor(text=[text], return_tensors="pt", return_token_type_ids=False))
        media = [list(prompt.media)] if isinstance(processor, FlamingoProcessor) else list(prompt.media) or None
        return dict(processor(text=[text], images=media, return_tensors="pt"))

    inputs = [inputs_of(prompt.text + prompt.space + candidate + end) for candidate in candidates]
    rows = [row["input_ids"][0].tolist() for row in (inputs_of(prompt.text), *inputs)]
    start = 0
    while start < min(map(len, rows)) and all(row[start] == rows[0][start] for row in rows):
        start += 1
    scores = []
    for row, ids in zip(inputs, rows[1:], strict=True):
        logits = model(**row, use_cache=False).logits[0]
        found = [logits[i - 1].double().softmax(0)[ids[i]].log() for i in range(start, len(ids))]
        scores.append(torch.stack(found).sum() / (len(found) if per_token else 1))
    return torch.stack(scores)


def assert_scores(found: Tensor, expected: Tensor, *, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def count(module: nn.Module, number: Callable[[Any, Any], int], run: Callable[[], Any]) -> list[int]:
    """Run something, and note a number of each call of a module by what goes in and what comes out."""
    numbers: list[int] = []
    with module.register_forward_hook(lambda _, inputs, output: numbers.append(number(inputs, output))):
        run()
    return numbers


layouts_of_media = st.lists(st.integers(1, 3), max_size=3)
many_answers = st.lists(
    st.lists(st.sampled_from(("w20", "w21", "<EOC>")), min_size=1, max_size=4), min_size=1, max_size=6
)
shared_or_not = st.sampled_from((None, True, False))


@pytest.mark.parametrize(("lm", "image_token_is_new"), [("gpt_neox", True), ("gpt2", False)])
@settings(max_examples=8)
@given(layouts_of_media, many_answers, attends, st.integers(1, 4), shared_or_not, st.booleans())
def test_scores_are_those_of_each_text_alone(
    lm: str,
    image_token_is_new: bool,
    media: list[int],
    answers: list[list[str]],
    attend: Attend,
    batch_size: int,
    share_prompt: bool | None,
    with_end: bool,
) -> None:
    model, processor = flamingo(lm, image_token_is_new=image_token_is_new)
    model.config.attend = attend
    prompt, candidates = make_prompt(media), [" ".join(answer) for answer in answers]
    found = score_candidates(
        model, processor, prompt, candidates, batch_size=batch_size, with_end=with_end, share_prompt=share_prompt
    )
    assert_scores(found, expected_scores(model, processor, prompt, candidates, prompt.end if with_end else ""))


@settings(max_examples=8)
@given(
    st.lists(st.text("abc ", min_size=1, max_size=5).filter(str.strip), min_size=1, max_size=5),
    st.text("abc", min_size=1, max_size=4),
    layouts_of_media,
    shared_or_not,
)
def test_prompt_and_answer_may_share_a_token(
    candidates: list[str], words: str, media: list[int], share_prompt: bool | None
) -> None:
    model, processor = flamingo(merges=True)
    model.config.attend = "last"
    prompt = make_prompt(media, words=f"c {words}")
    found = score_candidates(model, processor, prompt, candidates, share_prompt=share_prompt)
    assert_scores(found, expected_scores(model, processor, prompt, candidates))


@pytest.mark.parametrize("share_prompt", [True, False])
def test_answers_compare_as_whole_texts_where_one_shares_a_token_with_the_prompt(share_prompt: bool) -> None:
    model, processor = flamingo(merges=True)
    prompt = make_prompt([1], words="ca")
    text = prompt.text + prompt.space
    assert tokens_of(processor, text + "bc")[-2:-1] != tokens_of(processor, prompt.text)[-1:]
    first, second = score_candidates(model, processor, prompt, ["bc", "c"], share_prompt=share_prompt)
    whole = []
    with torch.no_grad():
        for answer in ("bc", "c"):
            inputs = processor(text=[text + answer + "<EOC>"], images=list(prompt.media))
            ids = inputs["input_ids"][0]
            found = model(**inputs, use_cache=False).logits[0, :-1].log_softmax(1)
            whole.append(found[range(len(ids) - 1), ids[1:]].sum())
    assert_scores(first - second, whole[0] - whole[1])


@pytest.mark.parametrize("lm", ["llama", "gpt2", "gpt_neox", "gemma3", "mamba"])
def test_a_language_model_and_its_tokenizer_score_text(lm: str) -> None:
    model, tokenizer = make_lm(lm, dtype=torch.float64), make_tokenizer()
    if lm != "mamba":  # whose states would grow without end
        randomize(model, 0)
    prompt = Prompt("w9 w10 w11 w12", (), " ", "")
    expected = expected_scores(model, tokenizer, prompt, ANSWERS, "")
    is_recurrent = lm == "mamba"
    tolerance = {"gpt2": 1e-10, "gpt_neox": 1e-10}.get(lm, 1e-4)  # others have steps in float32
    for share_prompt in (None, False) if is_recurrent else (None, True, False):
        found = score_candidates(model, tokenizer, prompt, ANSWERS, batch_size=2, share_prompt=share_prompt)
        assert_scores(found, expected, tolerance=tolerance)
    forwards = count(model, lambda *_: 1, lambda: score_candidates(model, tokenizer, prompt, ["w20"]))
    assert len(forwards) == (1 if is_recurrent else 4), "three small ones on trial come first"


def test_a_cache_that_gives_other_logits_is_not_shared() -> None:
    model = tiny_configs.make_lm("BltForCausalLM", dtype=torch.float64)
    prompt = Prompt("w9 w10 w11 w12", (), " ", "")
    found = score_candidates(model, make_tokenizer(), prompt, ANSWERS)
    assert_scores(found, expected_scores(model, make_tokenizer(), prompt, ANSWERS, ""), tolerance=1e-4)
    with pytest.raises(ValueError, match=r"BltForCausalLM with a .* cannot share the prompt among candidates"):
        score_candidates(model, make_tokenizer(), prompt, ANSWERS, share_prompt=True)


def test_a_flamingo_that_generates_without_its_cache_does_not_share() -> None:
    model, processor = flamingo()
    prompt = make_prompt([1, 1])
    expected = score_candidates(model, processor, prompt, ANSWERS)
    model.config.decoding = "uncached"
    try:
        assert_scores(score_candidates(model, processor, prompt, ANSWERS), expected)
        with pytest.raises(ValueError, match="cannot share the prompt among candidates"):
            score_candidates(model, processor, prompt, ANSWERS, share_prompt=True)
    finally:
        model.config.decoding = "cached"


class _AsDouble:
    """A model in float64 that brings images to it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        return self.model(**inputs)


def test_a_vision_language_model_of_transformers_scores_in_full() -> None:
    tokenizer = make_tokenizer(specials=("<image>", "<EOC>"))
    image_id = tokenizer.get_vocab()["<image>"]
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config: Any = LlavaConfig(vision_config=vision, text_config=CONFIGS["llama"](), image_token_index=image_id)
    model: Any = LlavaForConditionalGeneration(config).double().eval()
    randomize(model, 0)
    processor: Any = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    for media in ([], [1], [1, 1]):
        prompt = make_prompt(media)
        processed = processor(text=[prompt.text], images=list(prompt.media) or None, return_tensors="pt")
        assert (processed["input_ids"] == image_id).sum() == 4 * len(media), "an image is four tokens"
        found = score_candidates(model, processor, prompt, ANSWERS)
        assert_scores(found, expected_scores(_AsDouble(model), processor, prompt, ANSWERS), tolerance=1e-5)
    with pytest.raises(ValueError, match="has a processor; leave share_prompt out"):
        score_candidates(model, processor, prompt, ANSWERS, share_prompt=True)


def test_scores_are_divided_by_the_tokens_that_are_scored() -> None:
    model, processor = flamingo()
    prompt = make_prompt([1])
    found = score_candidates(model, processor, prompt, ANSWERS, length_normalization="tokens")
    assert_scores(found, expected_scores(model, processor, prompt, ANSWERS, per_token=True))


def test_several_prompts_give_the_mean_of_their_log_likelihoods() -> None:
    model, processor = flamingo()
    support = [Example(f"{i}", (picture(i),), (f"w{30 + i}",)) for i in range(3)]
    query = Example("q", (picture(7),), ("w20",))
    prompts = [write_prompt(CLASSIFICATION, [support[i] for i in order], query) for order in ((0, 1, 2), (2, 0, 1))]
    found = score_candidates(model, processor, prompts, ANSWERS)
    each = [expected_scores(model, processor, prompt, ANSWERS) for prompt in prompts]
    assert (each[0] - each[1]).abs().min() > 0.01, "orders differ"
    assert_scores(found, (each[0] + each[1]) / 2)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_the_prompt_runs_once_and_only_the_logits_that_are_needed_are_computed(share_prompt: bool) -> None:
    model, processor = flamingo()
    prompt = make_prompt([1, 2, 1])
    length, ends = len(tokens_of(processor, prompt.text)), [len(tokens_of(processor, f"{a}<EOC>")) for a in ANSWERS]

    def run() -> None:
        score_candidates(model, processor, prompt, ANSWERS, batch_size=2, share_prompt=share_prompt)

    tokens = count(model.language_model.gpt_neox.embed_in, lambda inputs, _: inputs[0].numel(), run)
    logits = count(model.language_model.lm_head, lambda _, output: output.shape[:-1].numel(), run)
    if share_prompt:
        assert sum(tokens) == length + sum(ends) - len(ends)
        assert sum(logits) == 1 + sum(ends) - len(ends)
        assert len(count(model.resampler, lambda *_: 1, run)) == 1
    else:
        assert sum(tokens) == length * len(ends) + sum(ends)
        assert sum(logits) == sum(ends) + len(ends)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_a_model_with_lora_is_scored_as_the_one_that_it_was_merged_into() -> None:
    model, processor = make_flamingo("gpt_neox")
    targets = r"language_model\..*\.query_key_value"
    with_lora: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    with_lora = with_lora.double().eval()
    prompt = make_prompt([1, 1])
    found = score_candidates(with_lora, processor, prompt, ANSWERS, share_prompt=True)
    assert_scores(found, score_candidates(with_lora.merge_and_unload(), processor, prompt, ANSWERS))


def test_half_precision_is_summed_in_float32() -> None:
    model, processor = make_flamingo("gpt_neox", dtype=torch.bfloat16)
    prompt = make_prompt([1])
    found = score_candidates(model, processor, prompt, ["w20 w21"], share_prompt=False)
    assert found.dtype == torch.float32
    expected = expected_scores(model, processor, prompt, ["w20 w21"])  # of logits in bfloat16, in float64
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("candidates", "options", "message"),
    [
        ([], {}, r"candidates must be a list of at least one answer, got \[\]"),
        ("yes", {}, "candidates must be a list of at least one answer, got 'yes'"),
        (["w20", " "], {}, "each of candidates must hold text, got ' '"),
        (["w20", "w20 <image>"], {}, "candidate 'w20 <image>' holds an <image> token; media belong to the prompt"),
        (["w20"], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(candidates: Any, options: dict[str, Any], message: str) -> None:
    model, processor = flamingo()
    with pytest.raises(ValueError, match=message):
        score_candidates(model, processor, make_prompt([1]), candidates, **options)


def test_prompts_that_cannot_be_scored_are_refused() -> None:
    model, processor = flamingo()
    with pytest.raises(ValueError, match="prompt must be a prompt, or several, got none"):
        score_candidates(model, processor, [], ["w20"])
    with pytest.raises(ValueError, match="the prompt must have at least one token"):
        score_candidates(model, processor, Prompt("", (), "", ""), ["w20"])
    limit = model.config.text_config.max_position_embeddings
    long = make_prompt(words=" ".join(["w9"] * (limit - 2)))
    assert score_candidates(model, processor, long, ["w20"]).shape == (1,), "as long as can be"
    with pytest.raises(ValueError, match=f"'w20 w21' have {limit + 1} tokens, but the model has {limit} positions"):
        score_candidates(model, processor, long, ["w20", "w20 w21"])
    with pytest.raises(ValueError, match=r"the prompt has 1 media, but processor is a .*; pass the model's processor"):
        score_candidates(model, processor.tokenizer, make_prompt([1]), ["w20"])


def test_a_candidate_that_adds_no_token_is_refused() -> None:
    model, tokenizer = make_lm("llama"), make_tokenizer()
    silent = "\u200b"
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(silent, "")
    with pytest.raises(ValueError, match="adds no token to the prompt, so that there is nothing to score"):
        score_candidates(model, tokenizer, Prompt("w9 w10", (), " ", ""), ["w20", silent])


def test_scores_that_are_no_numbers_are_refused() -> None:
    model, tokenizer = make_lm("llama").eval(), make_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="scores are nan; try another dtype"):
        score_candidates(model, tokenizer, Prompt("w9 w10", (), " ", ""), ["w20", "w21"])


def test_a_model_in_training_mode_is_refused() -> None:
    model = make_lm("llama").train()
    with pytest.raises(ValueError, match=r"model must be in eval mode, .* call model.eval\(\)"):
        score_candidates(model, make_tokenizer(), Prompt("w9", (), " ", ""), ["w20"])


@pytest.mark.unchecked
def test_an_unknown_length_normalization_is_refused() -> None:
    model, tokenizer = make_lm("llama"), make_tokenizer()
    unknown: Any = "words"
    with pytest.raises(ValueError, match=r"length_normalization must be one of \('none', 'tokens'\), got 'words'"):
        score_candidates(model, tokenizer, Prompt("w9", (), " ", ""), ["w20"], length_normalization=unknown)

"""Closed-ended answers: candidates scored by their log-likelihood after a prompt that is run once for all of them.

Source: Alayrac et al. 2022 (Flamingo), section 2.5.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from flamingo_blocks.evaluation.prompts import Prompt

LengthNormalization = Literal["none", "tokens"]
# What the language model's cache is called in outputs, by version of transformers.
_CACHE_NAMES = ("cache", "past_key_values")


@torch.no_grad()
def score_candidates(
    model: Any,
    processor: Any,
    prompt: Prompt | Sequence[Prompt],
    candidates: Sequence[str],
    *,
    batch_size: int = 32,
    with_end: bool = True,
    length_normalization: LengthNormalization = "none",
    share_prompt: bool | None = None,
) -> Float[Tensor, " candidates"]:
    """Score answers to a prompt; the best one has the highest score.

    Prompt and answer are tokenized as one text, and scored are the tokens behind those that all these texts and the
    prompt alone begin with. So every answer is scored after the same tokens, also where a tokenizer joins the end of
    the prompt and the beginning of some answers to one token.

    Args:
        model: A Flamingo, a causal language model of transformers, or another vision-language model of it, in eval
            mode.
        processor: Its processor, or a tokenizer for text alone.
        prompt: What is to be answered. Several are one question, as with the support in other orders: scores are the
            means of their scores.
        candidates: The answers, without the prompt's `space` and `end`.
        batch_size: How many candidates are run together. Each takes a copy of the language model's cache of the prompt.
        with_end: Whether to score `prompt.end` behind an answer, too. Without, an answer is at least as likely as any
            that it is the beginning of.
        length_normalization: `"none"` (the paper), or `"tokens"`: divide by the number of tokens that are scored.
        share_prompt: Whether to run the prompt once for all candidates, not each text in full. Scores are the same.
            None: where that is so, that is for a Flamingo that generates with its cache, and for a causal language
            model with a tokenizer, unless it is recurrent or a trial with a few tokens gives other scores.

    Returns:
        Log-likelihoods in nats, on the model's device; in float32, or in float64 if the model's logits are.

    Raises:
        ValueError: If there are no candidates or no prompts, a candidate is blank, adds no token or holds an `<image>`
            token, the prompt has no token, a text has more tokens than the model has positions, there are media but
            only a tokenizer, the model is in training mode or cannot share the prompt, scores are nan, or an option is
            none of these.

    Example:
        ```python
        # prompt = write_prompt(CLASSIFICATION, support=support, query=query)
        # scores = score_candidates(model, processor, prompt, ["a cat", "a dog"])
        # answer = ["a cat", "a dog"][scores.argmax()]
        ```

    Source: Alayrac et al. 2022, section 2.5; for several prompts, prompt ensembling in appendix A.2. Differs from the
        paper: no; length normalization is not in it.
    """
    prompts = [prompt] if isinstance(prompt, Prompt) else list(prompt)
    _check_options(prompts, candidates, batch_size=batch_size, length_normalization=length_normalization)
    if model.training:
        raise ValueError("model must be in eval mode, else dropout makes scores random; call model.eval()")
    scores = []
    for one in prompts:
        texts = [one.text + one.space + candidate + (one.end if with_end else "") for candidate in candidates]
        encoded = _encode(model, processor, one, texts)
        _check_texts(model, encoded, candidates)
        shared = share_prompt is not False and _can_share(model, encoded)
        if share_prompt and not shared:
            raise ValueError(
                f"{type(model).__name__} with a {type(processor).__name__} cannot share the prompt among candidates: "
                "it is recurrent, gives other logits with its cache, or is no Flamingo and has a processor; leave "
                "share_prompt out"
            )
        score = (_score_behind_prompt if shared else _score_in_full)(model, encoded, batch_size)
        if length_normalization == "tokens":
            score = score / torch.tensor([len(answer) for answer in encoded.answers], device=score.device)
        scores.append(score)
    found = torch.stack(scores).mean(0)
    if found.isnan().any():
        raise ValueError("the model's logits must be numbers, but scores are nan; try another dtype, such as float32")
    return found


@dataclass(frozen=True)
class _Encoded:
    """Texts that begin alike.

    Attributes:
        beginning: Tokens that all texts and the prompt begin with.
        answers: The tokens of each text behind these.
        media: What goes into the model beside each text, with a row axis of one.
        inputs: Instead, all that goes in for each text, where only the processor knows.
    """

    beginning: list[int]
    answers: list[list[int]]
    media: Mapping[str, Tensor]
    inputs: Sequence[Mapping[str, Tensor]] | None


def _encode(model: Any, processor: Any, prompt: Prompt, texts: Sequence[str]) -> _Encoded:
    tokenizer = getattr(processor, "tokenizer", None)
    media: dict[str, Tensor] = {}
    inputs = None
    if tokenizer is None or _is_flamingo(model):
        if tokenizer is None and prompt.media:
            raise ValueError(
                f"the prompt has {len(prompt.media)} media, but processor is a {type(processor).__name__}, which takes "
                "text alone; pass the model's processor"
            )
        if tokenizer is not None:
            encoded = processor(text=[prompt.text], images=[prompt.images], return_tensors="pt")
            media = {name: encoded[name] for name in ("pixel_values", "num_frames") if name in encoded}
        prompt_ids, *rows = (tokenizer or processor)([prompt.text, *texts])["input_ids"]
    else:
        # What stands for a medium may be many tokens, and other inputs belong to them.
        of_prompt, *inputs = (
            processor(text=[text], images=prompt.images or None, return_tensors="pt") for text in (prompt.text, *texts)
        )
        prompt_ids, *rows = ([int(i) for i in row["input_ids"][0]] for row in (of_prompt, *inputs))
    columns = zip(prompt_ids, *rows, strict=False)
    start = next((i for i, column in enumerate(columns) if len({*column}) > 1), min(map(len, (prompt_ids, *rows))))
    return _Encoded(prompt_ids[:start], [row[start:] for row in rows], media, inputs)


def _can_share(model: Any, encoded: _Encoded) -> bool:
    """Whether answers can be scored behind the prompt. Of a Flamingo it is known; other models are tried out."""
    if encoded.inputs is not None or getattr(model, "_is_stateful", True):
        return False
    if _is_flamingo(model):
        return bool(model.config.decoding == "cached")
    tokens = (encoded.beginning + max(encoded.answers, key=len))[-8:]
    half = len(tokens) // 2
    few = _Encoded(tokens[:half], [tokens[half:], tokens[half:][::-1]], {}, None)
    try:
        scores = _score_behind_prompt(model, few, 2)
    except Exception:  # whatever it says: this cache is not for sharing
        return False
    tolerance = 0.5 if model.dtype in (torch.bfloat16, torch.float16) else 1e-2
    return bool((scores - _score_in_full(model, few, 2)).abs().max() <= tolerance)


def _score_behind_prompt(model: Any, encoded: _Encoded, batch_size: int) -> Float[Tensor, " candidates"]:
    """Run what all texts begin with once, and the rest of each behind it."""
    beginning = torch.tensor([encoded.beginning], device=model.device)
    media = {name: value.to(model.device) for name, value in encoded.media.items()}
    output = _run(model, beginning, torch.ones_like(beginning), use_cache=True, keep=1, **media)
    cache_name = next(name for name in _CACHE_NAMES if getattr(output, name, None) is not None)
    first = torch.tensor([answer[0] for answer in encoded.answers], device=model.device)
    scores = _in_float32(output.logits[0, -1]).log_softmax(0)[first]
    for chosen in _batches(encoded.answers, batch_size):
        answers = torch.tensor([encoded.answers[i] for i in chosen], device=model.device)
        start, more = beginning.shape[1], answers.shape[1] - 1
        if not more:
            continue
        cache = copy.deepcopy(output[cache_name])
        cache.batch_repeat_interleave(len(chosen))
        caches = {cache_name: cache}
        if _is_flamingo(model):  # rows share what is kept of the media
            caches |= {"media_cache": output.media_cache, "media_ranges": output.media_cache.ranges_at(start, more)}
        mask = answers.new_ones(len(chosen), start + more)
        logits = _run(model, answers[:, :-1], mask, use_cache=True, keep=0, **caches).logits
        scores[chosen] += _log_probabilities(logits, answers[:, 1:]).sum(1)
    return scores


def _score_in_full(model: Any, encoded: _Encoded, batch_size: int) -> Float[Tensor, " candidates"]:
    """Run each text from its first token on."""
    scores: dict[int, Tensor] = {}
    for chosen in _batches(encoded.answers, batch_size if encoded.inputs is None else 1):
        answers = torch.tensor([encoded.answers[i] for i in chosen], device=model.device)
        if encoded.inputs is None:
            beginning = torch.tensor([encoded.beginning], device=model.device)
            input_ids = torch.cat([beginning.expand(len(chosen), -1), answers], dim=1)
            media = {
                name: value.to(model.device).expand(len(chosen), *value.shape[1:])
                for name, value in encoded.media.items()
            }
            inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **media}
        else:
            inputs = {
                name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
                for name, value in encoded.inputs[chosen[0]].items()
            }
        logits = _run(model, **inputs, use_cache=False, keep=answers.shape[1] + 1).logits
        found = _log_probabilities(logits[:, -answers.shape[1] - 1 : -1], answers).sum(1)
        scores.update(zip(chosen, found, strict=True))
    return torch.stack([scores[i] for i in range(len(encoded.answers))])


def _run(model: Any, input_ids: Tensor, attention_mask: Tensor, *, use_cache: bool, keep: int, **others: Any) -> Any:
    """Call a model with what it knows of these; `keep` last logits are enough, 0 for all."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT hides the arguments
    known = inspect.signature(whole.forward).parameters
    options = {"use_cache": use_cache, "logits_to_keep": keep}
    options = {name: value for name, value in options.items() if name in known}
    return model(input_ids=input_ids, attention_mask=attention_mask, **options, **others, return_dict=True)


def _log_probabilities(
    logits: Float[Tensor, "rows text vocab"], targets: Int[Tensor, "rows text"]
) -> Float[Tensor, "rows text"]:
    losses = F.cross_entropy(_in_float32(logits).flatten(0, 1), targets.flatten(), reduction="none")
    return -losses.view(targets.shape)


def _in_float32(logits: Tensor) -> Tensor:
    """In float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _batches(answers: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Group answers of one length: there is no padding that a model could mistake for text."""
    by_length: dict[int, list[int]] = {}
    for i, answer in enumerate(answers):
        by_length.setdefault(len(answer), []).append(i)
    return [group[i : i + batch_size] for group in by_length.values() for i in range(0, len(group), batch_size)]


def _is_flamingo(model: Any) -> bool:
    return bool(model.config.model_type == "flamingo")


def _check_options(
    prompts: Sequence[Prompt], candidates: Sequence[str], *, batch_size: int, length_normalization: str
) -> None:
    if not prompts:
        raise ValueError("prompt must be a prompt, or several, got none")
    if isinstance(candidates, str) or not candidates:
        raise ValueError(f"candidates must be a list of at least one answer, got {candidates!r}")
    for candidate in candidates:
        if not candidate.strip():
            raise ValueError(f"each of candidates must hold text, got {candidate!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if length_normalization not in get_args(LengthNormalization):
        raise ValueError(
            f"length_normalization must be one of {get_args(LengthNormalization)}, got {length_normalization!r}"
        )


def _check_texts(model: Any, encoded: _Encoded, candidates: Sequence[str]) -> None:
    if not encoded.beginning:
        raise ValueError(
            "the prompt must have at least one token before any answer's first, else there is nothing to predict that "
            "one from; let the tokenizer put a token for the beginning of text in front, or write something"
        )
    config = model.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    for candidate, answer in zip(candidates, encoded.answers, strict=True):
        length = len(encoded.beginning) + len(answer)
        if not answer:
            raise ValueError(f"candidate {candidate!r} adds no token to the prompt, so that there is nothing to score")
        if _is_flamingo(model) and model.config.image_token_id in answer:
            raise ValueError(f"candidate {candidate!r} holds an <image> token; media belong to the prompt")
        if isinstance(positions, int) and length > positions:
            raise ValueError(
                f"prompt and candidate {candidate!r} have {length} tokens, but the model has {positions} positions; "
                "take fewer shots or shorter texts"
            )

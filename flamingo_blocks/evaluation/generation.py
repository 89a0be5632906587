"""Open-ended answers: what a model writes after a prompt, until the end of a chunk.

Source: Alayrac et al. 2022 (Flamingo), section 2.5 and appendix A.2.
"""

from collections.abc import Sequence
from typing import Any

import torch

from flamingo_blocks.evaluation.prompts import Prompt


def generate_answers(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 32,
    num_beams: int = 3,
    batch_size: int = 8,
) -> list[str]:
    """Let a model answer prompts, by beam search.

    An answer ends where the model ends its text or writes the prompts' `end`, be that one of its special tokens or just
    text to it; else after `max_new_tokens`. It does not depend on which prompts are answered beside it.

    Args:
        model: A Flamingo, or any model of transformers with `generate`, in eval mode.
        processor: Its processor, which takes text and images; or its tokenizer, for prompts without media.
        prompts: What to answer. All have the same `end`.
        max_new_tokens: The most tokens of an answer.
        num_beams: Width of the beam search; 1 is greedy.
        batch_size: How many prompts are answered at once.

    Returns:
        The answers, without special tokens and the space around.

    Raises:
        ValueError: If a number is not positive, the model is in training mode, prompts have different ends, there are
            media for a tokenizer, or the tokenizer cannot pad.

    Source: Alayrac et al. 2022, section 2.5: beam search with three beams. Differs from the paper: longer beams are
    scored by the mean, not the sum, of their log-likelihoods, which is the default of transformers.
    """
    for name, number in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not prompts:
        return []
    if model.training:
        raise ValueError("model must be in eval mode, as dropout changes answers, but is in training mode; call eval()")
    ends = sorted({prompt.end for prompt in prompts})
    if len(ends) > 1:
        raise ValueError(f"prompts must have the same end, got {ends}; answer them apart")
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} must have a padding token for batches, but has none; set "
            "tokenizer.pad_token = tokenizer.eos_token"
        )
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "pad_token_id": tokenizer.pad_token_id,
        # A model may come with other habits.
        "do_sample": False,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
    }
    end_ids = _own_ends(model)
    end_id = _special_token_id(tokenizer, ends[0])
    if end_id is None:
        options |= {"stop_strings": ends, "tokenizer": tokenizer}
    else:
        end_ids |= {end_id}
        options["eos_token_id"] = sorted(end_ids)
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        inputs = _prepare(processor, prompts[start : start + batch_size]).to(model.device)
        with torch.no_grad():
            text = model.generate(**inputs, **options)
        for ids in text[:, inputs["input_ids"].shape[1] :].tolist():
            length = next((i for i, token in enumerate(ids) if token in end_ids), len(ids))
            answer = tokenizer.decode(ids[:length], skip_special_tokens=True)
            answers.append(answer.partition(ends[0])[0].strip())
    return answers


def _prepare(processor: Any, prompts: Sequence[Prompt]) -> Any:
    texts = [prompt.text for prompt in prompts]
    options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    is_tokenizer = not hasattr(processor, "tokenizer")
    if is_tokenizer:
        for prompt in prompts:
            if prompt.media:
                raise ValueError(
                    f"processor must take images, as a prompt has {len(prompt.media)} media, got "
                    f"{type(processor).__name__}; pass the model's processor, or prompts without media"
                )
        return processor(texts, return_token_type_ids=False, **options)
    has_media = any(prompt.media for prompt in prompts)
    return processor(text=texts, images=[prompt.images for prompt in prompts] if has_media else None, **options)


def _own_ends(model: Any) -> set[int]:
    """Look up where the model itself ends a text."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(torch.as_tensor(ends).tolist())


def _special_token_id(tokenizer: Any, text: str) -> int | None:
    """Look up a special token. None: to this tokenizer, it is just text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    is_known = tokenizer.convert_ids_to_tokens(ids) == [text]
    return ids[0] if is_known and not tokenizer.decode(ids, skip_special_tokens=True) else None

"""An answer is what the model writes after its prompt alone, until the first end."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from flamingo_blocks.evaluation import Prompt, generate_answers
from tests.tiny_flamingo import make_flamingo, make_tokenizer
from tests.tiny_language_models import make_lm
from tests.tiny_videos import picture

TOKENS = 7  # the most of an answer
END = "<EOC>"


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8))


def make_prompt(text: str, media: tuple[Any, ...] = (), *, end: str = END) -> Prompt:
    return Prompt(text, media, space=" ", end=end)


VIDEO = [Image.fromarray(picture(i, (32, 24))) for i in (3, 9)]
PROMPTS = [
    make_prompt("<image>w10 w11<EOC><image>w12", (image(0), image(1))),
    make_prompt("w13 w14 w15"),
    make_prompt("<image>w16", (image(2),)),
    make_prompt("w17<EOC>" * 4 + "<image><image><image>w18 w19", (image(3), VIDEO, image(0))),
    make_prompt("w26<image>w27 w28 w29", (VIDEO,)),
]
TEXTS = [make_prompt(text) for text in ("w20 w21", "w22", "w23 w24 w25 w26 w27 w28", "w29 w30", "w31")]


def flamingo(*, likely_end: float = 4.0) -> tuple[Any, Any]:
    """A Flamingo in float64 with open gates, that writes this and that, and may end its answers anywhere."""
    model: Any
    model, processor = make_flamingo(dtype=torch.float64)
    assert model.new_tokens is not None
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.mul_(20 if parameter.ndim == 2 else 1)
        model.new_tokens.head.bias.copy_(torch.tensor([0.0, likely_end]))
    return model.eval(), processor


def ids_alone(model: Any, processor: Any, prompt: Prompt, num_beams: int, **options: Any) -> Tensor:
    """What `generate` gives for one prompt without padding."""
    media = [list(prompt.media)] if prompt.media else None
    inputs = processor(text=[prompt.text], images=media) if media else processor(text=[prompt.text])
    options = {"do_sample": False, "num_beams": num_beams, "max_new_tokens": TOKENS} | options
    text: Tensor = model.generate(**inputs, **options)
    return text[0, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_answer_does_not_depend_on_the_batch(num_beams: int) -> None:
    """With media or without, and any number of them; answers end after different numbers of tokens, or never."""
    model, processor = flamingo()
    options: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": TOKENS}
    expected = []
    for prompt in PROMPTS:
        words = processor.tokenizer.convert_ids_to_tokens(ids_alone(model, processor, prompt, num_beams))
        ends = [i for i, word in enumerate(words) if word in (END, "<eos>")]
        expected.append(" ".join(words[: ends[0]] if ends else words))
    lengths = {len(answer.split()) for answer in expected}
    assert len(lengths) > 2, "else this tests little"
    assert TOKENS in lengths
    for batch_size in (2, len(PROMPTS)):
        assert generate_answers(model, processor, PROMPTS, batch_size=batch_size, **options) == expected
    assert generate_answers(model, processor, PROMPTS[::-1], batch_size=3, **options) == expected[::-1]


@torch.no_grad()
def test_one_beam_takes_the_likeliest_token_until_the_end() -> None:
    """The law is that of full forwards, one token after the other; `<image>` is not generated."""
    model, processor = flamingo()
    stops = {processor.tokenizer.convert_tokens_to_ids(END), model.language_model.generation_config.eos_token_id}
    expected = []
    for prompt in PROMPTS:
        inputs = processor(text=[prompt.text], images=[list(prompt.media)])
        ids: list[int] = []
        while len(ids) < TOKENS:
            logits = model(**inputs).logits[0, -1]
            logits[model.config.image_token_id] = -torch.inf
            token = int(logits.argmax())
            if token in stops:
                break
            ids.append(token)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        expected.append(processor.tokenizer.decode(ids))
    assert generate_answers(model, processor, PROMPTS, num_beams=1, max_new_tokens=TOKENS) == expected


def test_three_beams_are_the_default_and_differ_from_one() -> None:
    model, processor = flamingo()
    answers = generate_answers(model, processor, PROMPTS, max_new_tokens=TOKENS)
    assert answers == generate_answers(model, processor, PROMPTS, max_new_tokens=TOKENS, num_beams=3)
    assert answers != generate_answers(model, processor, PROMPTS, max_new_tokens=TOKENS, num_beams=1)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_end_at_the_end_of_a_chunk_where_the_model_does_not_know_of_it(num_beams: int) -> None:
    """As models do whose generation_config was not made by this library."""
    model, processor = flamingo()
    expected = generate_answers(model, processor, PROMPTS, num_beams=num_beams, max_new_tokens=TOKENS)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    assert generate_answers(model, processor, PROMPTS, num_beams=num_beams, max_new_tokens=TOKENS) == expected


def test_answers_end_at_each_of_the_ends_that_the_model_has() -> None:
    model, processor = flamingo()
    options: dict[str, Any] = {"num_beams": 1, "max_new_tokens": TOKENS}
    answers = [answer.split() for answer in generate_answers(model, processor, PROMPTS, **options)]
    ends = [next(answer[2] for answer in answers if len(answer) > 2), next(answer[0] for answer in answers if answer)]
    expected = [
        " ".join(answer[: min([i for i, word in enumerate(answer) if word in ends], default=len(answer))])
        for answer in answers
    ]
    model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids(["<eos>", *ends])
    assert generate_answers(model, processor, PROMPTS, **options) == expected
    assert len({*map(len, expected)}) > 1


def test_a_model_that_never_ends_is_cut_off() -> None:
    model, processor = flamingo(likely_end=-1e3)
    model.generation_config.eos_token_id = None
    for tokens in (1, 4):
        answers = generate_answers(model, processor, PROMPTS, max_new_tokens=tokens)
        assert [len(answer.split()) for answer in answers] == [tokens] * len(PROMPTS)


def test_a_model_that_ends_at_once_answers_nothing() -> None:
    model, processor = flamingo(likely_end=1e3)
    assert generate_answers(model, processor, PROMPTS) == [""] * len(PROMPTS)


def test_habits_of_the_model_do_not_make_answers_random() -> None:
    model, processor = flamingo()
    expected = generate_answers(model, processor, PROMPTS, max_new_tokens=TOKENS)
    model.generation_config.update(
        do_sample=True, temperature=2.0, num_return_sequences=2, return_dict_in_generate=True, num_beams=4, max_length=3
    )
    assert generate_answers(model, processor, PROMPTS, max_new_tokens=TOKENS) == expected


# ---------------------------------------------------------------- language models


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_language_model_answers_with_its_tokenizer(name: str, num_beams: int) -> None:
    """To which the end is a special token that it can write."""
    model, tokenizer = make_lm(name, dtype=torch.float64), make_tokenizer(specials=(END,))
    expected = []
    for prompt in TEXTS:
        inputs = tokenizer(prompt.text, return_tensors="pt")
        ends = [model.generation_config.eos_token_id, tokenizer.convert_tokens_to_ids(END)]
        ids = model.generate(
            **{k: inputs[k] for k in ("input_ids", "attention_mask")},
            do_sample=False,
            num_beams=num_beams,
            max_new_tokens=TOKENS,
            eos_token_id=ends,
        )
        expected.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    for batch_size in (1, 2, 5):
        options: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": TOKENS, "batch_size": batch_size}
        assert generate_answers(model, tokenizer, TEXTS, **options) == expected


def letters() -> tuple[Any, Any]:
    """A language model that writes letter by letter, and its tokenizer, which knows no end of a chunk."""
    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    model: Any = AutoModelForCausalLM
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    lm = model.from_config(config, dtype=torch.float64).eval()
    letters_alone = torch.tensor([len(token) > 1 or not (token.isascii() and token.isalpha()) for token in tokens])
    lm.generation_config.suppress_tokens = letters_alone.nonzero()[:, 0].tolist()
    return lm, fast


def test_an_end_that_is_just_text_ends_the_answer() -> None:
    """Of one letter or several, wherever it comes first. The letter behind must not change what is before."""
    model, tokenizer = letters()
    texts = ["Question: what? Answer:", "And who?", "Q"]
    whole = generate_answers(model, tokenizer, [make_prompt(text) for text in texts], num_beams=1, max_new_tokens=14)
    assert all(len(answer) == 14 for answer in whole)
    for end in (whole[0][5], whole[1][3:6], whole[2][10:12], END):
        prompts = [make_prompt(text, end=end) for text in texts]
        expected = [answer.partition(end)[0] for answer in whole]
        for batch_size in (1, 3):
            options: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 14, "batch_size": batch_size}
            assert generate_answers(model, tokenizer, prompts, **options) == expected


def test_beams_end_at_an_end_that_is_just_text() -> None:
    """They are ranked as they are where they end, so that they need not be the beginning of a longer one."""
    model, tokenizer = letters()
    texts = ["Question: what? Answer:", "And who?", "Q"]
    whole = generate_answers(model, tokenizer, [make_prompt(text) for text in texts], max_new_tokens=12)
    end = whole[0][-1]
    prompts = [make_prompt(text, end=end) for text in texts]
    expected = []
    for prompt in prompts:
        inputs = tokenizer(prompt.text, return_tensors="pt")
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            num_beams=3,
            max_new_tokens=12,
            eos_token_id=[1, tokenizer.convert_tokens_to_ids(end)],
        )[0, inputs["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(ids, skip_special_tokens=True).partition(end)[0])
    assert expected != [answer.partition(end)[0] for answer in whole], "else this tests nothing"
    for batch_size in (1, 3):
        assert generate_answers(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size) == expected


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["max_new_tokens", "num_beams", "batch_size"])
def test_numbers_that_are_not_positive_are_refused(name: str) -> None:
    model, processor = flamingo()
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        generate_answers(model, processor, PROMPTS, **{name: 0})


def test_what_cannot_be_answered_is_refused() -> None:
    model, processor = flamingo()
    assert generate_answers(model, processor, []) == []
    with pytest.raises(ValueError, match=r"prompts must have the same end, got \['</s>', '<EOC>'\]; answer them apart"):
        generate_answers(model, processor, [*PROMPTS, make_prompt("w9", end="</s>")])
    with pytest.raises(ValueError, match=r"processor must take images, as a prompt has 2 media, got .*; pass the mod"):
        generate_answers(model, processor.tokenizer, PROMPTS)
    model.train()
    with pytest.raises(ValueError, match=r"model must be in eval mode, .* call eval\(\)"):
        generate_answers(model, processor, PROMPTS)
    model.eval()
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"must have a padding token for batches, but has none; set tokenizer.pad"):
        generate_answers(model, processor, PROMPTS)

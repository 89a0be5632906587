"""transformers' pipeline gives what processor and model give by hand."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import pipeline

from tests.test_processing_flamingo import picture
from tests.tiny_flamingo import make_flamingo
from tests.tiny_videos import write_video

CAT, DOG, EEL = picture(0, 48, 40), picture(1, 48, 40), picture(2, 48, 40)
DIALOGUE: list[dict[str, Any]] = [
    {"role": "system", "content": "w11 w12"},
    {"role": "user", "content": [{"type": "image", "image": CAT}, {"type": "text", "text": " w13 w14"}]},
    {"role": "assistant", "content": "w15"},
    {
        "role": "user",
        "content": [
            {"type": "video", "video": [DOG, EEL]},
            {"type": "text", "text": " w16 "},
            {"type": "image", "image": EEL},
        ],
    },
]


@cache
def make_pipeline() -> Any:
    model, processor = make_flamingo()
    processor.tokenizer.padding_side = "left"
    return pipeline("image-text-to-text", model=model, processor=processor)


def by_hand(inputs: Any, **options: Any) -> list[str]:
    """Generate, and decode what is new."""
    pipe = make_pipeline()
    generated = pipe.model.generate(**inputs, max_new_tokens=6, **options)
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in pipe.processor.batch_decode(new, skip_special_tokens=True)]


def new_texts(outputs: Any) -> list[str]:
    """Flatten what a pipeline gives."""
    flat = [one for output in outputs for one in (output if isinstance(output, list) else [output])]
    return [output["generated_text"].strip() for output in flat]


PROMPTS: dict[str, tuple[Any, Any]] = {
    "an image": ("<image> w5 w6", CAT),
    "two images": ("<image> w5 <image> w6", [CAT, DOG]),
    "texts with an image each": (["<image> w5 w6", "w7 <image> w8 w9"], [CAT, DOG]),
    "texts with images": (["<image> w5 <image> w6", "w7", "<image> w8"], [[CAT, DOG], [], [EEL]]),
    "text alone": ("w5 w6", None),
    "a few-shot prompt": ("<image> w5 <EOC> <image> w6 <EOC> <image>", [CAT, DOG, EEL]),
}


several = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="the pipeline of older transformers loses some"
)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, pytest.param({"num_beams": 3, "num_return_sequences": 2}, marks=several)]
)
@pytest.mark.parametrize("kind", PROMPTS)
def test_texts_with_images(kind: str, options: dict[str, Any]) -> None:
    text, images = PROMPTS[kind]
    pipe = make_pipeline()
    found = pipe(images=images, text=text, max_new_tokens=6, return_full_text=False, generate_kwargs=dict(options))
    expected = by_hand(pipe.processor(text=text, images=images), **options)
    assert any(expected)
    assert new_texts(found) == expected


def test_a_text_is_returned_with_its_prompt_unless_asked_otherwise() -> None:
    pipe = make_pipeline()
    (full,) = pipe(images=CAT, text="<image> w5 w6", max_new_tokens=6)
    (new,) = pipe(images=CAT, text="<image> w5 w6", max_new_tokens=6, return_full_text=False)
    (ids,) = pipe(images=CAT, text="<image> w5 w6", max_new_tokens=6, return_tensors=True)
    assert full["input_text"] == "<image> w5 w6"
    assert full["generated_text"] == "<image> w5 w6" + new["generated_text"]
    inputs = pipe.processor(text="<image> w5 w6", images=CAT)
    assert torch.equal(ids["generated_token_ids"], pipe.model.generate(**inputs, max_new_tokens=6)[0])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_a_dialogue(options: dict[str, Any]) -> None:
    pipe = make_pipeline()
    inputs = pipe.processor.apply_chat_template(DIALOGUE, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert inputs["num_frames"].tolist() == [[1, 2, 1]]
    expected = by_hand(inputs, **options)
    found = pipe(text=DIALOGUE, max_new_tokens=6, generate_kwargs=dict(options), return_full_text=False)
    assert new_texts(found) == expected
    (full,) = pipe(text=DIALOGUE, max_new_tokens=6, generate_kwargs=dict(options))
    assert full["generated_text"][:-1] == DIALOGUE
    assert full["generated_text"][-1]["role"] == "assistant"
    assert full["generated_text"][-1]["content"].strip() == expected[0]


def test_a_dialogue_goes_on_with_its_last_message() -> None:
    pipe = make_pipeline()
    messages = DIALOGUE[:3]
    inputs = pipe.processor.apply_chat_template(messages, continue_final_message=True, tokenize=True, return_dict=True)
    assert pipe.processor.decode(inputs["input_ids"][0]).endswith("w15")
    assert new_texts(pipe(text=messages, max_new_tokens=6, return_full_text=False)) == by_hand(inputs)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_several_dialogues(batch_size: int) -> None:
    """In batches, transformers wants the same number of media in each."""
    pipe = make_pipeline()
    dialogues = [DIALOGUE, [*DIALOGUE, {"role": "assistant", "content": "w17"}, {"role": "user", "content": "w18 w19"}]]
    inputs = pipe.processor.apply_chat_template(
        dialogues, add_generation_prompt=True, tokenize=True, return_dict=True, padding_side="left"
    )
    found = pipe(text=dialogues, max_new_tokens=6, return_full_text=False, batch_size=batch_size)
    assert new_texts(found) == by_hand(inputs)


@pytest.mark.parametrize("where", ["directly", "in processor_kwargs"])
def test_options_of_the_processor(where: str, tmp_path: Path) -> None:
    pipe = make_pipeline()
    path = write_video(tmp_path / "clip.mp4", 25)
    messages = [{"role": "user", "content": [{"type": "video", "path": str(path)}, {"type": "text", "text": " w5"}]}]
    settings = {"num_frames": 2}
    inputs = pipe.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, **settings
    )
    assert inputs["num_frames"].tolist() == [[2]]
    options: Any = settings if where == "directly" else {"processor_kwargs": settings}
    assert new_texts(pipe(text=messages, max_new_tokens=6, return_full_text=False, **options)) == by_hand(inputs)
    with pytest.raises(TypeError, match="did you mean num_frames"):
        pipe(text=messages, max_new_tokens=6, num_frame=2)


# transformers reads the names of a constructor's arguments in its code, which older jaxtyping hides behind its checks.
@pytest.mark.unchecked
def test_a_saved_model_is_found_by_its_path(tmp_path: Path) -> None:
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path)
    pipe.processor.save_pretrained(tmp_path)
    CAT.save(tmp_path / "cat.png")
    loaded: Any = pipeline("image-text-to-text", model=str(tmp_path))
    assert type(loaded.model) is type(pipe.model)
    options: dict[str, Any] = {"max_new_tokens": 6}
    expected = pipe(images=CAT, text="<image> w5 w6", **options)
    assert loaded(images=str(tmp_path / "cat.png"), text="<image> w5 w6", **options) == expected
    assert loaded(text=DIALOGUE, **options) == pipe(text=DIALOGUE, **options)

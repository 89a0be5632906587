import base64
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast, ProcessorMixin

from flamingo_blocks import FlamingoProcessor
from tests.test_processing_flamingo import CAT, DOG, EEL, SPECIAL, assert_same, make_image_processor, picture
from tests.tiny_videos import write_video

# What chat models that know text only come with, in short: Llama trims the content, Qwen adds it to other text.
TEXT_TEMPLATES = {
    "trims": "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "adds": "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "takes the first away": "{% set messages = messages[0:] %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}"
    "{{ m.content + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
}
# As vision-language models have it: parts only, images before text.
PARTS_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% endif %}{% endfor %}{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def make_tokenizer(special: tuple[str, ...] = SPECIAL, **settings: Any) -> PreTrainedTokenizerFast:
    """One token a byte, with a start of text, so that nothing is lost."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers.decoders import ByteLevel

    tokens.decoder = ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **settings
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def make_processor(**settings: Any) -> FlamingoProcessor:
    return FlamingoProcessor(make_image_processor(), make_tokenizer(), **settings)


PROCESSOR = make_processor()


def say(role: str, *parts: Any) -> dict[str, Any]:
    """Write a message: text, images, and videos as lists."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "video", "video": part}
        if isinstance(part, list)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": role, "content": content}


def encode(conversation: Any, processor: FlamingoProcessor = PROCESSOR, **options: Any) -> Any:
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, **options)


DIALOGUE = [
    {"role": "system", "content": "Be kind."},
    say("user", CAT, "Who is this?", [DOG, EEL], "And this?", EEL),
    {"role": "assistant", "content": "Friends."},
    say("user", [CAT, DOG, EEL], DOG),
]
AS_TEXT = (
    "Be kind.\nUser: <image>Who is this?<image>And this?<image>\nFlamingo: Friends.<EOC>\n"
    "User: <image><image>\nFlamingo:"
)
MEDIA = [CAT, [DOG, EEL], EEL, [CAT, DOG, EEL], DOG]


def test_a_dialogue_is_written_as_in_the_paper() -> None:
    assert PROCESSOR.apply_chat_template(DIALOGUE, add_generation_prompt=True) == AS_TEXT


def test_a_tokenized_dialogue_is_its_text_and_media() -> None:
    assert_same(encode(DIALOGUE, add_generation_prompt=True), PROCESSOR(text=AS_TEXT, images=[MEDIA]))
    arrays = encode(DIALOGUE, add_generation_prompt=True, return_tensors="np")
    assert isinstance(arrays["pixel_values"], np.ndarray)
    ids = PROCESSOR.apply_chat_template(DIALOGUE, add_generation_prompt=True, tokenize=True)
    assert torch.equal(ids, PROCESSOR(text=AS_TEXT, images=[MEDIA])["input_ids"])


media = st.one_of(st.just("text"), st.just("image"), st.integers(1, 3))


@given(conversations=st.lists(st.lists(st.lists(media, max_size=4), min_size=1, max_size=3), min_size=1, max_size=3))
def test_the_kth_image_token_gets_the_kth_medium(conversations: list[list[list[str | int]]]) -> None:
    seeds = iter(range(200))

    def part(kind: str | int) -> Any:
        if isinstance(kind, int):
            return [picture(next(seeds)) for _ in range(kind)]
        return picture(next(seeds)) if kind == "image" else "words"

    chats = [[say("user", *map(part, parts)) for parts in messages] for messages in conversations]
    values = [[part.get("image", part.get("video")) for m in chat for part in m["content"]] for chat in chats]
    rows = [[value for value in row if value is not None] for row in values]
    texts = PROCESSOR.apply_chat_template(chats)
    assert [text.count("<image>") for text in texts] == [len(row) for row in rows]
    assert_same(encode(chats), PROCESSOR(text=texts, images=rows))


@pytest.mark.parametrize("name", TEXT_TEMPLATES)
def test_a_template_that_knows_text_only_sees_media_as_text(name: str) -> None:
    template = TEXT_TEMPLATES[name]
    tokenizer = make_tokenizer(chat_template=template)
    processor = FlamingoProcessor(make_image_processor(), tokenizer)
    flat = [
        DIALOGUE[0],
        {"role": "user", "content": "<image>Who is this?<image>And this?<image>"},
        DIALOGUE[2],
        {"role": "user", "content": "<image><image>"},
    ]
    expected = tokenizer.apply_chat_template(flat, tokenize=False, add_generation_prompt=True)
    assert "Who is this?" in expected
    assert processor.apply_chat_template(DIALOGUE, add_generation_prompt=True) == expected
    assert processor.apply_chat_template(flat, add_generation_prompt=True) == expected
    assert_same(encode(DIALOGUE, processor, add_generation_prompt=True), processor(text=expected, images=[MEDIA]))
    assert tokenizer.chat_template == template, "the tokenizer keeps its own"


def test_a_template_that_writes_images_is_taken_as_it_is() -> None:
    tokenizer = make_tokenizer(chat_template=PARTS_TEMPLATE)
    processor = FlamingoProcessor(make_image_processor(), tokenizer)
    assert processor.chat_template == PARTS_TEMPLATE
    assert processor.apply_chat_template([DIALOGUE[1]]) == "user:<image><image><image>Who is this?And this?"
    assert encode([DIALOGUE[1]], processor)["num_frames"].tolist() == [[1, 2, 1]]


def test_several_templates_of_a_tokenizer_are_kept_by_name() -> None:
    tokenizer = make_tokenizer(chat_template={"default": TEXT_TEMPLATES["adds"], "parts": PARTS_TEMPLATE})
    processor = FlamingoProcessor(make_image_processor(), tokenizer)
    messages = [say("user", CAT, "Who?")]
    assert processor.apply_chat_template(messages) == "<|user|><image>Who?</s>"
    assert processor.apply_chat_template(messages, chat_template="parts") == "user:<image>Who?"


def test_a_template_that_is_given_wins() -> None:
    tokenizer = make_tokenizer(chat_template=TEXT_TEMPLATES["adds"])
    processor = FlamingoProcessor(make_image_processor(), tokenizer, chat_template=PARTS_TEMPLATE)
    messages = [say("user", CAT, "Who?")]
    assert processor.apply_chat_template(messages) == "user:<image>Who?"
    assert processor.apply_chat_template(messages, chat_template="{{ messages[0]['role'] }}") == "user"
    assert processor.apply_chat_template(messages, "{{ messages[0]['role'] }}{{ extra }}", extra="!") == "user!"
    with pytest.raises(ValueError, match="row 0 has 0 <image> tokens but 1 media"):
        encode(messages, processor, chat_template="{{ messages[0]['role'] }}")


# transformers reads the names of a constructor's arguments in its code, which older jaxtyping hides behind its checks.
@pytest.mark.unchecked
@pytest.mark.parametrize("template", [None, TEXT_TEMPLATES["adds"], PARTS_TEMPLATE])
def test_a_template_round_trips_and_stays_as_it_is(template: str | None, tmp_path: Path) -> None:
    processor = FlamingoProcessor(make_image_processor(), make_tokenizer(chat_template=template))
    processor.save_pretrained(tmp_path)
    restored = FlamingoProcessor.from_pretrained(tmp_path)
    assert restored.chat_template == processor.chat_template
    assert_same(encode(DIALOGUE, restored), encode(DIALOGUE, processor))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert FlamingoProcessor(make_image_processor(), tokenizer).chat_template == processor.chat_template
    again = FlamingoProcessor.from_pretrained(tmp_path, chat_template="{{ messages[0]['role'] }}")
    assert again.chat_template == "{{ messages[0]['role'] }}"


def test_other_tokens_stand_in_the_default_template() -> None:
    special = ("<it's>", 'a"b')
    processor = FlamingoProcessor(
        make_image_processor(), make_tokenizer(special), image_token=special[0], end_of_chunk_token=special[1]
    )
    messages = [say("user", CAT), say("assistant", "A cat.")]
    assert processor.apply_chat_template(messages) == "User: <it's>\nFlamingo: A cat.a\"b"


def test_a_conversation_without_media_has_no_pixels() -> None:
    messages = [{"role": "user", "content": "Hello"}]
    assert encode(messages).keys() == {"input_ids", "attention_mask"}
    inputs = encode([messages, [say("user", CAT)]])
    assert inputs["num_frames"].tolist() == [[0], [1]]


def test_a_conversation_may_end_in_a_message_to_go_on_with() -> None:
    messages = [say("user", CAT), say("assistant", "A brown")]
    assert PROCESSOR.apply_chat_template(messages, continue_final_message=True) == "User: <image>\nFlamingo: A brown"


def test_a_growing_dialogue_starts_with_what_was_there_before() -> None:
    """So that caches can be kept: an answer ends as it was generated, with <EOC>."""
    earlier = PROCESSOR.apply_chat_template(DIALOGUE[:2], add_generation_prompt=True)
    later = PROCESSOR.apply_chat_template(DIALOGUE, add_generation_prompt=True)
    assert later.startswith(earlier + " Friends.<EOC>")


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("template", [None, TEXT_TEMPLATES["takes the first away"]])
@pytest.mark.skipif(
    not hasattr(ProcessorMixin, "_adjust_assistant_masks_indices"), reason="older transformers lose an answer's place"
)
def test_the_tokens_of_answers_are_marked(template: str | None, padding_side: str) -> None:
    processor = FlamingoProcessor(make_image_processor(), make_tokenizer(chat_template=template))
    chats = [DIALOGUE, [say("user", "?"), say("assistant", "Yes."), say("user", CAT), say("assistant", "No.")]]
    inputs = encode(chats, processor, return_assistant_tokens_mask=True, padding_side=padding_side)
    marked = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)
    ]
    assert marked == (["Friends.</s>", "Yes.</s>No.</s>"] if template else [" Friends.<EOC>", " Yes.<EOC> No.<EOC>"])


def test_answers_that_no_template_marks_are_an_error() -> None:
    processor = FlamingoProcessor(make_image_processor(), make_tokenizer(chat_template=TEXT_TEMPLATES["adds"]))
    with pytest.raises(ValueError, match=r"row 0 has answers, but none of their tokens .*{% generation %}"):
        encode(DIALOGUE, processor, return_assistant_tokens_mask=True)


@pytest.mark.parametrize("where", ["directly", "in processor_kwargs", "nested"])
def test_options_reach_the_processor(where: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 25)
    chats = [[say("user", CAT), {"role": "user", "content": [{"type": "video", "path": path}]}], [say("user", "Hello")]]
    options: dict[str, Any] = {"padding_side": "left", "num_frames": 2}
    options = {
        "directly": options,
        "in processor_kwargs": {"processor_kwargs": options},
        "nested": {
            "processor_kwargs": {"text_kwargs": {"padding_side": "left"}, "videos_kwargs": {"num_frames": 2}},
        },
    }[where]
    inputs = encode(chats, **options)
    assert inputs["num_frames"].tolist() == [[1, 2], [0, 0]]
    assert inputs["attention_mask"][1, 0] == 0
    assert inputs["attention_mask"][:, -1].all()


def test_conversations_are_left_as_they_are() -> None:
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "video", "video": [CAT, DOG]}, {"type": "text", "text": "a"}]}
    ]
    content = messages[0]["content"]
    encode(messages)
    assert messages[0]["content"] is content
    assert content[0] == {"type": "video", "video": [CAT, DOG]}


# Where media come from


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    CAT.save(tmp_path / "cat.png")
    write_video(tmp_path / "clip.mp4", 25)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_an_image_comes_from_wherever_transformers_takes_it(server: str, tmp_path: Path) -> None:
    path = str(tmp_path / "cat.png")
    in_letters = base64.b64encode(Path(path).read_bytes()).decode()
    expected = encode([say("user", CAT)])
    for part in (
        {"type": "image", "image": path},
        {"type": "image", "path": Path(path)},
        {"type": "image", "url": path},
        {"type": "image", "url": f"{server}/cat.png"},
        {"type": "image", "image": f"{server}/cat.png"},
        {"type": "image", "base64": in_letters},
        {"type": "image", "url": f"data:image/png;base64,{in_letters}"},
        {"type": "image_url", "image_url": {"url": f"{server}/cat.png"}},
        {"type": "image_url", "image_url": path},
        {"type": "image", "image": np.asarray(CAT)},
        {"type": "image", "image": torch.from_numpy(np.array(CAT)).permute(2, 0, 1), "url": None},
    ):
        assert_same(encode([{"role": "user", "content": [part]}]), expected)


def test_a_video_comes_from_wherever_an_image_does(server: str, tmp_path: Path) -> None:
    path = str(tmp_path / "clip.mp4")
    in_letters = base64.b64encode(Path(path).read_bytes()).decode()
    text = PROCESSOR.apply_chat_template([say("user", [CAT])])
    expected = PROCESSOR(text=text, videos=path)
    for part in (
        {"type": "video", "video": path},
        {"type": "video", "path": Path(path)},
        {"type": "video", "url": f"{server}/clip.mp4"},
        {"type": "video", "base64": in_letters},
    ):
        assert_same(encode([{"role": "user", "content": [part]}]), expected)
    paths = [str(tmp_path / "cat.png")] * 2
    assert_same(
        encode([{"role": "user", "content": [{"type": "video", "video": paths}]}]), encode([say("user", [CAT, CAT])])
    )


def test_an_image_of_16_bits_keeps_its_range_when_fetched(server: str, tmp_path: Path) -> None:
    deep = Image.fromarray(np.asarray(CAT.convert("L")).astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png")
    content = [{"type": "image", "url": f"{server}/deep.png"}]
    assert_same(encode([{"role": "user", "content": content}]), encode([say("user", CAT.convert("L"))]))


@pytest.mark.parametrize(
    "part, message",
    [
        ({"type": "image", "url": "{server}/dog.png"}, "dog.png' cannot be fetched: .*404"),
        ({"type": "video", "url": "{server}/dog.mp4"}, "dog.mp4' cannot be fetched: .*404"),
        ({"type": "video", "url": "{server}/cat.png.mp4"}, "cannot be fetched"),
        ({"type": "image", "url": "{server}/clip.mp4"}, "row 0, medium 0: what was fetched cannot be read as an image"),
        ({"type": "image", "base64": "cat"}, "'cat'... is not base64|cannot be read as an image"),
        ({"type": "image", "path": "cat.png"}, "row 0, medium 0: there is no image file 'cat.png'"),
        ({"type": "video", "path": "cat.mp4"}, "row 0, medium 0: there is no video file 'cat.mp4'"),
        ({"type": "image"}, "row 0 has 1 <image> tokens but 0 media"),
        ({"type": "video", "video": None}, "row 0 has 1 <image> tokens but 0 media"),
        ({"type": "text", "text": "<image>"}, "row 0 has 1 <image> tokens but 0 media"),
        ({"type": "audio", "audio": "cat.wav"}, "a Flamingo takes text, images and videos; a message has audio"),
    ],
)
def test_a_medium_that_cannot_be_had_is_refused(part: Any, message: str, server: str) -> None:
    part = {key: value.format(server=server) if isinstance(value, str) else value for key, value in part.items()}
    with pytest.raises(ValueError, match=message):
        encode([{"role": "user", "content": [part]}])


@pytest.mark.parametrize("template", [None, TEXT_TEMPLATES["adds"]])
def test_a_part_or_role_that_a_template_does_not_know_is_refused(template: str | None) -> None:
    processor = FlamingoProcessor(make_image_processor(), make_tokenizer(chat_template=template))
    with pytest.raises(Exception, match="must be text, image or video, got table"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "table"}]}])
    if template is None:
        with pytest.raises(Exception, match="a role must be system, user or assistant, got robot"):
            processor.apply_chat_template([{"role": "robot", "content": "a"}])


def test_a_template_may_be_asked_for_text_only_with_places_for_media() -> None:
    """As lm-eval and others do, which tokenize later."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}, {"type": "video"}]}]
    assert PROCESSOR.apply_chat_template(messages, add_generation_prompt=True) == "User: <image>Who?<image>\nFlamingo:"


@pytest.mark.skipif(
    not hasattr(PreTrainedTokenizerFast, "_mark_chat_inputs"), reason="older transformers do not know sanitizing"
)
def test_an_image_token_that_a_user_writes_can_be_meant_as_text() -> None:
    template = "{{ bos_token }}" + str(PROCESSOR.chat_template)
    inputs = encode([say("user", "an <image>:", CAT)], chat_template=template, sanitize_control_tokens=True)
    assert (inputs["input_ids"] == PROCESSOR.image_token_id).sum() == 1
    assert PROCESSOR.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True) == "User: an <image>:"


def test_a_video_may_be_an_open_file(tmp_path: Path) -> None:
    processor, path = make_processor(), write_video(tmp_path / "video.mkv", 12, rate=4)
    options: dict[str, Any] = {"tokenize": True, "return_dict": True}
    with path.open("rb") as file:
        for video in (str(path), io.BytesIO(path.read_bytes()), file):
            chat = [{"role": "user", "content": [{"type": "video", "video": video}]}]
            assert processor.apply_chat_template(chat, **options)["num_frames"].tolist() == [[3]]


@pytest.mark.parametrize("name", ["images", "videos"])
def test_media_beside_a_conversation_are_refused(name: str) -> None:
    chat = [{"role": "user", "content": [{"type": "image", "image": CAT}]}]
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, name: [DOG]}
    with pytest.raises(ValueError, match=f"stand in its messages; put them there instead of {name}="):
        make_processor().apply_chat_template(chat, **options)

"""An example is a window of its document, and nothing else: each law against a slow list of all windows there are."""

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from flamingo_blocks import FlamingoProcessor
from flamingo_blocks.data import Document, Example, ExampleMaker, Medium
from flamingo_blocks.processing_flamingo import FlamingoImageProcessor
from tests import reference
from tests.strategies import seeds
from tests.tiny_flamingo import make_tokenizer
from tests.tiny_videos import write_video

SPECIAL = ("<image>", "<EOC>")
BOS = 0
UNKNOWN = 98  # the last word of the tokenizer
IMAGE, END_OF_CHUNK = 99, 100


def make_processor(tokenizer: Any = None) -> FlamingoProcessor:
    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL], special_tokens=True)
    return FlamingoProcessor(FlamingoImageProcessor({"height": 8, "width": 8}), tokenizer)


PROCESSOR = make_processor()


def with_bos() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", 1)]
    )
    return tokenizer


PROCESSORS = {False: PROCESSOR, True: make_processor(with_bos())}


def number_of(medium: Medium) -> Tensor:
    """Load a medium as one number, which tells which one it is."""
    return torch.full((1, 1, 1), float(int(medium.read())))


# What a document is made of: ids of words, what spells a special token, and None for a medium.
texts = st.lists(st.integers(3, UNKNOWN - 1) | st.sampled_from(SPECIAL), min_size=1, max_size=5)
layouts = st.lists(texts | st.none(), min_size=1, max_size=8).filter(any)


def document_of(layout: list[Any]) -> Document:
    parts: list[str | Medium] = []
    for i, words in enumerate(layout):
        if words is None:
            parts.append(Medium("image", str(i).encode()))
        else:
            parts.append("".join(f"{word} " if isinstance(word, str) else f"w{word} " for word in words))
    return Document(tuple(parts), key="page 7")


def ids_of(layout: list[Any]) -> list[Any]:
    """The same with ids of tokens: text that spells a special token has none of its own."""
    return [words and [UNKNOWN if isinstance(word, str) else word for word in words] for words in layout]


def spelled_out(example: Example) -> reference.Window:
    return reference.Window(
        example.input_ids.tolist(),
        example.labels.tolist(),
        [(start, stop) for start, stop in example.media_ranges.tolist()],
        [int(medium) for medium in example.media],
    )


@given(
    layout=layouts,
    seed=seeds,
    max_tokens=st.integers(4, 16),
    max_media=st.integers(1, 3),
    p_next=st.sampled_from((0.0, 0.5, 1.0)),
    has_bos=st.booleans(),
)
def test_an_example_is_a_window_of_its_document(
    layout: list[Any], seed: int, max_tokens: int, max_media: int, p_next: float, has_bos: bool
) -> None:
    make = ExampleMaker(PROCESSORS[has_bos], max_tokens=max_tokens, max_media=max_media, p_next=p_next, load=number_of)
    document = document_of(layout)
    example = make(document, generator=torch.Generator().manual_seed(seed))
    windows = [
        window
        for attend in {0.0: ("last",), 0.5: ("last", "next"), 1.0: ("next",)}[p_next]
        for window in reference.windows(
            ids_of(layout),
            image=IMAGE,
            end_of_chunk=END_OF_CHUNK,
            before=[BOS] if has_bos else [],
            max_tokens=max_tokens,
            max_media=max_media,
            attend=attend,
        )
    ]
    assert spelled_out(example) in windows
    again = make(document, generator=torch.Generator().manual_seed(seed))
    assert spelled_out(again) == spelled_out(example)


@given(layout=layouts)
def test_a_whole_document_loses_no_token(layout: list[Any]) -> None:
    make = ExampleMaker(PROCESSOR, max_tokens=100, max_media=10, load=number_of)
    example = make(document_of(layout), generator=torch.Generator())
    written = [word for words in ids_of(layout) if words for word in words]
    assert [i for i in example.input_ids.tolist() if i not in (IMAGE, END_OF_CHUNK)] == written
    assert torch.equal(example.input_ids, make.tokenize(document_of(layout)))
    assert [int(medium) for medium in example.media] == [i for i, words in enumerate(layout) if words is None]


def test_windows_and_placements_are_equally_probable() -> None:
    layout: list[Any] = [None, [3, 4, 5, 6], None, [7, 8, 9]]  # 11 tokens: seven windows of five
    make = ExampleMaker(PROCESSOR, max_tokens=5, p_next=0.25, load=number_of)
    generator = torch.Generator().manual_seed(0)
    found = [make(document_of(layout), generator=generator) for _ in range(1400)]
    starts = Counter(tuple(example.input_ids.tolist()) for example in found)
    assert len(starts) == 7
    # Five standard deviations: sqrt(1400 * 1/7 * 6/7) = 13.1, sqrt(1400 * 1/4 * 3/4) = 16.2.
    assert all(abs(count - 200) < 66 for count in starts.values())
    text_before = [example.media_ranges.tolist() for example in found if IMAGE in example.input_ids[1:4]]
    placed = [ranges[0] == [0, 1] for ranges in text_before]
    expected = len(placed) / 4
    assert abs(sum(placed) - expected) < 5 * (expected * 0.75) ** 0.5


def test_only_media_of_the_window_are_read() -> None:
    read: list[Medium] = []

    def load(medium: Medium) -> Tensor:
        read.append(medium)
        return number_of(medium)

    document = document_of([None, [3], None, [4], None, [5, 6, 7]])
    example = ExampleMaker(PROCESSOR, max_tokens=100, max_media=2, load=load)(document, generator=torch.Generator())
    assert tuple(read) == document.media[:2]
    assert example.input_ids.tolist().count(IMAGE) == len(example.media) == 2


# ------------------------------------------------------------ tokenizers

CORPUS = ["A cat sits on the mat.", "the dog eats </s> <image> <EOC> of the cat, sitting on top"] * 3
TEXT = "A cat sits on <image>the mat</s>. <EOC> <pad> A dog"


def make_fast(model: models.Model, trainer: Any, pre_tokenizer: Any, decoder: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def make_bpe() -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<unk>", "</s>", "<pad>"])
    return make_fast(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())


def make_sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama's: a space before the first word alone, and no word of the vocabulary is a special token."""
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>", "<pad>"])
    space = pre_tokenizers.Metaspace(prepend_scheme="first")
    return make_fast(models.BPE(unk_token="<unk>"), trainer, space, decoders.Metaspace(prepend_scheme="first"))


def make_unigram() -> PreTrainedTokenizerFast:
    """As T5's, whose special tokens are pieces of the model, too."""
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>", "</s>", "<pad>"], unk_token="<unk>")
    return make_fast(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace())


def make_word_pieces() -> PreTrainedTokenizerFast:
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>", "</s>", "<pad>"])
    return make_fast(models.WordPiece(unk_token="<unk>"), trainer, pre_tokenizers.Whitespace(), decoders.WordPiece())


KINDS: dict[str, Callable[[], Any]] = {
    "words": make_tokenizer,
    "byte-level BPE": make_bpe,
    "sentencepiece BPE": make_sentencepiece,
    "Unigram": make_unigram,
    "word pieces": make_word_pieces,
    "written in Python": ByT5Tokenizer,
}


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_tokenized_as_for_generating(kind: str) -> None:
    processor = make_processor(KINDS[kind]())
    make = ExampleMaker(processor, load=number_of)
    document = Document(("A cat", " sits", Medium("image", b"1"), Medium("image", b"2"), "the mat. A", " dog"))
    written = "A cat sits<EOC><image><EOC><image>the mat. A dog<EOC>"
    assert make.tokenize(document).tolist() == processor.tokenizer(written, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_spells_special_tokens_is_text(kind: str) -> None:
    processor = make_processor(KINDS[kind]())
    tokenizer = processor.tokenizer
    make = ExampleMaker(processor, load=number_of)
    special = {*tokenizer.all_special_ids, *tokenizer.convert_tokens_to_ids(list(SPECIAL))} - {tokenizer.unk_token_id}
    ends = special & set(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    assert len(ends) >= 2  # so it would be without care
    document = Document((TEXT, Medium("image", b"1"), TEXT))
    if kind in ("words", "Unigram"):
        with pytest.raises(ValueError, match=r"'.*': its text spells the special token '(<pad>|</s>)'"):
            make(document, generator=torch.Generator())
        return
    ids = make.tokenize(document).tolist()
    place = ids.index(processor.image_token_id)
    end_of_chunk = ids[place - 1]
    assert [i for i in ids if i in special] == [end_of_chunk, processor.image_token_id, end_of_chunk]
    assert ids[place + 1 : -1] == ids[: place - 1]
    if kind != "word pieces":  # which forget spaces
        assert tokenizer.decode(ids[: place - 1], clean_up_tokenization_spaces=False) == TEXT


# ------------------------------------------------------------ media


def picture(colour: str) -> Medium:
    file = io.BytesIO()
    Image.new("RGB", (12, 9), colour).save(file, format="png")
    return Medium("image", file.getvalue())


def test_media_are_read_as_the_processor_reads_them(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mkv", 100, rate=10)  # ten seconds
    document = Document((picture("orange"), "w3", Medium("video", video), "w4", Medium("video", video.read_bytes())))
    example = ExampleMaker(PROCESSOR)(document, generator=torch.Generator())
    inputs = PROCESSOR(text="<image><image>", images=[Image.new("RGB", (12, 9), "orange"), str(video)])
    assert inputs["num_frames"].tolist() == [[1, 10]]
    assert [len(medium) for medium in example.media] == [1, 8, 8]
    assert torch.equal(example.media[0], inputs["pixel_values"][0, 0, :1])
    for medium in example.media[1:]:
        assert torch.equal(medium, inputs["pixel_values"][0, 1, :8])
    fewer = ExampleMaker(PROCESSOR, fps=0.5, max_frames=3)(document, generator=torch.Generator())
    assert torch.equal(fewer.media[1], inputs["pixel_values"][0, 1, :6:2])


@pytest.mark.parametrize(
    "broken", [Medium("image", b"no image"), Medium("video", b"no video"), Medium("image", Path("-"))]
)
def test_a_document_with_a_broken_medium_is_an_error_that_names_it(broken: Medium) -> None:
    with pytest.raises(ValueError, match="document 'page 7': "):
        ExampleMaker(PROCESSOR)(Document(("w3", broken), key="page 7"), generator=torch.Generator())


@pytest.mark.parametrize("parts", [(), ("",), (" \n",), (Medium("image", b"1"),), (" ", Medium("image", b"1"), "")])
def test_a_document_without_text_is_an_error_that_names_it(parts: tuple[str | Medium, ...]) -> None:
    with pytest.raises(ValueError, match="document 'page 7': a document must have text"):
        ExampleMaker(PROCESSOR, load=number_of)(Document(parts, key="page 7"), generator=torch.Generator())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens": 2}, "max_tokens must be at least 3"),
        ({"max_media": 0}, "max_media must be at least 1"),
        ({"max_frames": 0}, "max_frames must be at least 1"),
        ({"p_next": 1.5}, "p_next must be a probability"),
        ({"fps": 0.0}, "fps must be a positive number, got 0"),
    ],
)
def test_numbers_that_cannot_be_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExampleMaker(PROCESSOR, **options)
    with pytest.raises(ValueError, match="max_tokens must be at least 4"):
        ExampleMaker(PROCESSORS[True], max_tokens=3)


@pytest.mark.unchecked
def test_a_rule_that_is_not_known_is_an_error() -> None:
    with pytest.raises(ValueError, match="attend must be one of 'last', 'all_previous', 'next', got 'first'"):
        ExampleMaker(PROCESSOR, attend="first")  # type: ignore[arg-type]

"""A packed batch does to its documents what each alone would do: through the whole model, in float64."""

from functools import cache
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from flamingo_blocks import media_ranges
from flamingo_blocks.data import Example, collate, separates_documents
from tests import reference
from tests.strategies import seeds
from tests.tiny_flamingo import make_flamingo
from tests.tiny_language_models import VOCAB

IMAGE, PAD = VOCAB, 2
PIXELS = (3, 32, 32)


@cache
def flamingo(lm: str, dtype: torch.dtype = torch.float64) -> Any:
    model: Any = make_flamingo(lm, dtype=dtype)[0]
    return model.to(dtype)  # the vision encoder, too


def make_example(length: int, media: dict[int, int], sees_next: bool, seed: int, shape: tuple[int, ...]) -> Example:
    """Random words, and media of so many frames at places."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, VOCAB - 5, (length,), generator=generator)
    ids[list(media)] = IMAGE
    labels = ids.masked_fill(ids == IMAGE, -100)
    labels[0] = -100
    ranges = media_ranges((ids == IMAGE)[None], attend="next" if sees_next else "last")[0]
    frames = [torch.randn(count, *shape, generator=generator, dtype=torch.float64) for count in media.values()]
    return Example(ids, labels, ranges, tuple(frames))


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    length = draw(st.integers(1, 6))
    media = draw(st.dictionaries(st.integers(0, length - 1), st.integers(1, 2), max_size=2))
    return {
        "length": length,
        "media": dict(sorted(media.items())),
        "sees_next": draw(st.booleans()),
        "seed": draw(seeds),
    }


rows_of_layouts = st.lists(st.lists(layouts(), min_size=1, max_size=3), min_size=1, max_size=3)


def make_rows(rows: list[list[dict[str, Any]]], shape: tuple[int, ...]) -> list[list[Example]]:
    return [[make_example(**layout, shape=shape) for layout in row] for row in rows]


@given(layout=rows_of_layouts, extra=st.none() | st.integers(0, 3), separate=st.booleans())
def test_a_batch_holds_each_token_and_medium_at_its_place(
    layout: list[list[dict[str, Any]]], extra: int | None, separate: bool
) -> None:
    rows = make_rows(layout, (2, 3))
    longest = max(sum(len(example) for example in row) for row in rows)
    length = None if extra is None else longest + extra
    batch = collate(rows, pad_token_id=PAD, media_shape=(2, 3), length=length, separate_attention=separate)
    length = length or longest
    for number, row in enumerate(rows):
        documents = [i for i, example in enumerate(row) for _ in example.input_ids]
        padding = length - len(documents)
        ids = [int(i) for example in row for i in example.input_ids]
        labels = [int(i) for example in row for i in example.labels]
        assert batch["input_ids"][number].tolist() == ids + [PAD] * padding
        assert batch["labels"][number].tolist() == labels + [-100] * padding
        if separate:
            positions = [i for example in row for i in range(len(example))]
            assert batch["position_ids"][number].tolist() == positions + list(range(padding))
        else:
            assert batch["attention_mask"][number].tolist() == [1] * len(ids) + [0] * padding
        media = [medium for example in row for medium in example.media]
        frames = [len(medium) for medium in media]
        assert batch["num_frames"][number].tolist() == frames + [0] * (batch["num_frames"].shape[1] - len(frames))
        for i, medium in enumerate(media):
            assert torch.equal(batch["vision_features"][number, i, : len(medium)], medium)
            assert not batch["vision_features"][number, i, len(medium) :].any()
        seen = batch["media_ranges"][number].tolist()
        at = 0
        for example in row:  # each token sees the same tensors as before
            for token, (start, stop) in enumerate(example.media_ranges.tolist()):
                first, last = seen[at + token]
                assert list(map(id, media[first:last])) == list(map(id, example.media[start:stop]))
            at += len(example)
        assert seen[at:] == [[0, 0]] * padding


@given(layout=rows_of_layouts)
def test_ranges_are_those_of_packed_documents(layout: list[list[dict[str, Any]]]) -> None:
    rows = make_rows(layout, (2, 3))
    batch = collate(rows, pad_token_id=PAD, media_shape=(2, 3))
    length = batch["input_ids"].shape[1]
    for number, row in enumerate(rows):
        is_image = (batch["input_ids"][number] == IMAGE).tolist()
        documents = [i for i, example in enumerate(row) for _ in example.input_ids]
        documents += [-1] * (length - len(documents))
        last, following = (reference.media_ranges(is_image, documents, attend) for attend in ("last", "next"))
        at = 0
        for example in row:
            ranges = [tuple(pair) for pair in batch["media_ranges"][number, at : at + len(example)].tolist()]
            assert ranges in (last[at : at + len(example)], following[at : at + len(example)])
            at += len(example)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """In float64; the model's own, which is transformers', is in float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("lm", ["llama", "gpt2", "qwen3"])
@settings(max_examples=6)
@given(layout=rows_of_layouts)
def test_packed_equals_unpacked(lm: str, layout: list[list[dict[str, Any]]]) -> None:
    rows = make_rows(layout, PIXELS)
    model = flamingo(lm)
    options: dict[str, Any] = {"pad_token_id": PAD, "media_shape": PIXELS}
    batch = collate(rows, separate_attention=True, **options)
    packed = model(**batch, num_items_in_batch=1)
    loss = summed_loss(packed.logits, batch["labels"])
    torch.testing.assert_close(packed.loss.double(), loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    together = gradients(model)
    unpacked = collate([[example] for row in rows for example in row], **options)
    logits = model(**unpacked).logits
    alone = iter(logits)
    for number, row in enumerate(rows):
        at = 0
        for example in row:
            here = packed.logits[number, at : at + len(example)]
            torch.testing.assert_close(here, next(alone)[: len(example)])
            at += len(example)
    total = summed_loss(logits, unpacked["labels"])
    torch.testing.assert_close(loss, total)
    total.backward()
    apart = gradients(model)
    assert together.keys() >= apart.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart.get(name, torch.zeros_like(gradient)))


@pytest.mark.parametrize("lm", ["llama", "gpt2", "qwen3"])
def test_media_of_another_document_change_nothing(lm: str) -> None:
    first, second = (make_example(5, {1: 1, 3: 2}, False, seed, PIXELS) for seed in (0, 1))
    other = make_example(5, {1: 1, 3: 2}, False, 2, PIXELS).media
    changed = Example(first.input_ids, first.labels, first.media_ranges, other)
    rows = [[first, second], [changed, second]]
    model = flamingo(lm)
    options: dict[str, Any] = {"pad_token_id": PAD, "media_shape": PIXELS}
    logits = model(**collate(rows, separate_attention=True, **options)).logits
    assert not torch.equal(logits[0, 1:5], logits[1, 1:5])
    assert torch.equal(logits[0, 5:], logits[1, 5:])
    # Where self-attention is not separated, it alone carries something over.
    logits = model(**collate(rows, **options)).logits
    assert not torch.equal(logits[0, 5:], logits[1, 5:])


def test_a_batch_of_text_runs_the_resampler_and_changes_nothing() -> None:
    model = flamingo("llama")
    batch = collate([[make_example(5, {}, False, 0, PIXELS)]], pad_token_id=PAD, media_shape=PIXELS)
    assert batch["num_frames"].tolist() == [[0]]
    logits = model(input_ids=batch["input_ids"]).logits
    model.train()
    try:
        output = model(**batch)
        output.loss.backward()
        found = gradients(model)
    finally:
        model.eval()
    torch.testing.assert_close(output.logits, logits)
    resampler = [name for name, _ in model.named_parameters() if name.startswith("resampler.")]
    assert all(not found[name].any() for name in resampler)


def test_features_give_what_their_pixels_give() -> None:
    model = flamingo("llama")
    example = make_example(6, {0: 2, 3: 1}, False, 0, PIXELS)
    features = tuple(model.vision_encoder(medium) for medium in example.media)
    cached = Example(example.input_ids, example.labels, example.media_ranges, features)
    shape = tuple(features[0].shape[1:])
    from_pixels = model(**collate([[example]], pad_token_id=PAD, media_shape=PIXELS))
    from_features = model(**collate([[cached]], pad_token_id=PAD, media_shape=shape))
    torch.testing.assert_close(from_features.logits, from_pixels.logits)


# OPT heeds positions, but makes its mask without them; Mamba has neither.
SEPARATES = {"llama": True, "gpt2": True, "qwen3": True, "gpt_neox": True, "gemma3": True, "opt": False, "mamba": False}


@pytest.mark.parametrize("lm", ["llama", "gpt2", "opt"])
def test_it_is_known_which_models_separate_documents(lm: str) -> None:
    assert separates_documents(flamingo(lm)) == SEPARATES[lm]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lm", SEPARATES)
def test_it_is_known_in_every_precision_which_models_separate_documents(lm: str, dtype: torch.dtype) -> None:
    model = flamingo(lm, dtype).train()
    assert separates_documents(model) == SEPARATES[lm]
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([], {}, "rows must each hold an example"),
        ([[]], {}, "rows must each hold an example"),
        ([[make_example(5, {}, False, 0, (2, 3))]], {"length": 4}, "length must be at least .* 5, got 4"),
        ([[make_example(5, {1: 2}, False, 0, (2, 4))]], {}, r"shape \(frames, 2, 3\), got \(2, 2, 4\)"),
        ([[make_example(5, {1: 0}, False, 0, (2, 3))]], {}, r"shape \(frames, 2, 3\), got \(0, 2, 3\)"),
        ([[make_example(5, {}, False, 0, (2, 3))]], {"media_shape": (3,)}, "media_shape must be"),
    ],
)
def test_what_cannot_be_collated_is_an_error(rows: Any, options: dict[str, Any], message: str) -> None:
    defaults: dict[str, Any] = {"pad_token_id": PAD, "media_shape": (2, 3)}
    with pytest.raises(ValueError, match=message):
        collate(rows, **defaults | options)

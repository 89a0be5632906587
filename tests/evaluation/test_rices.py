"""RICES finds the most similar examples, by vectors that are the encoder's, or there is an error that says why not."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from flamingo_blocks.evaluation import Example, RicesSupport, media_vectors
from tests.tiny_flamingo import make_flamingo
from tests.tiny_language_models import make_lm
from tests.tiny_videos import write_video


def make_examples(count: int, *, start: int = 0) -> list[Example]:
    return [Example(str(i), (f"{i}.png",), ("?",)) for i in range(start, start + count)]


def slow_rices(examples: list[Example], vectors: dict[str, Tensor], query: Example, vector: Tensor) -> list[str]:
    """Order all examples by their cosine to the query, the most similar one last."""

    def cosine(a: list[float], b: list[float]) -> float:
        product = sum(x * y for x, y in zip(a, b, strict=True))
        return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    others = [example.key for example in examples if example.key != query.key]
    likeness = [cosine(vectors[key].tolist(), vector.tolist()) for key in others]
    order = sorted(range(len(others)), key=lambda i: (-round(likeness[i], 9), i))
    return [others[i] for i in order][::-1]


@pytest.mark.parametrize("spread", [1.0, 1e-6], ids=["anywhere", "almost in one direction"])
@pytest.mark.parametrize("are_queries_examples", [True, False])
def test_support_is_ordered_by_cosine_the_most_similar_last(spread: float, are_queries_examples: bool) -> None:
    """With ties, which are many, also of vectors that differ in length alone: the earlier example is the nearer one."""
    generator = torch.Generator().manual_seed(0)
    examples, queries = make_examples(40), make_examples(10, start=0 if are_queries_examples else 100)
    distinct = torch.randn(24, generator=generator) + spread * torch.randn(13, 24, generator=generator)
    vectors = {example.key: distinct[i * 7 % 13] * 2 ** (i % 3) for i, example in enumerate(examples)}
    of_queries = {query.key: torch.randn(24, generator=generator) for query in queries}
    select = RicesSupport(examples, vectors, None if are_queries_examples else of_queries)
    for query in queries:
        vector = (vectors if are_queries_examples else of_queries)[query.key]
        expected = slow_rices(examples, vectors, query, vector)
        for shots in (0, 1, 8, len(expected)):
            support = [example.key for example in select(query, shots=shots, seed=shots)]
            assert support == expected[len(expected) - shots :]


def test_a_query_is_compared_by_its_own_vector() -> None:
    """Where queries are not among the examples, a key may stand for one thing here and for another there."""
    examples = make_examples(3)
    vectors = dict(zip("012", torch.eye(3), strict=True))
    query = Example("0", ("query.png",), ("?",))
    support = RicesSupport(examples, vectors, {"0": torch.tensor([0.0, 0.1, 1.0])})(query, shots=2)
    assert [example.key for example in support] == ["1", "2"]


@pytest.mark.parametrize(
    ("vectors", "of_query", "message"),
    [
        ({"0": torch.ones(3)}, torch.ones(3), "vectors has none for example '1'; make them with media_vectors"),
        (
            {"0": torch.ones(3), "1": torch.tensor([0, torch.nan, 1])},
            torch.ones(3),
            r"vectors must be finite, with one axis, got shape \(3,\) for example '1', not finite",
        ),
        (
            {"0": torch.ones(3), "1": torch.ones(3)},
            torch.full((3,), torch.inf),
            "query_vectors must be finite, .* for example 'query', not finite",
        ),
        ({"0": torch.ones(3), "1": torch.ones(3)}, None, "query_vectors has none for example 'query'"),
    ],
)
def test_vectors_that_cannot_be_compared_are_refused(
    vectors: dict[str, Tensor], of_query: Tensor | None, message: str
) -> None:
    query = Example("query", ("query.png",), ("?",))
    with pytest.raises(ValueError, match=message):
        RicesSupport(make_examples(2), vectors, {} if of_query is None else {"query": of_query})(query, shots=1)


@pytest.mark.unchecked
def test_vectors_of_several_sizes_or_axes_are_refused() -> None:
    query, size = Example("query", ("query.png",), ("?",)), {"0": torch.ones(3), "1": torch.ones(4)}
    with pytest.raises(
        ValueError, match="vectors must have one size, but that of example '0' has 3, that of '1' 4; ma"
    ):
        RicesSupport(make_examples(2), size)
    select = RicesSupport(make_examples(1), size, {"query": torch.ones(2)})
    with pytest.raises(
        ValueError, match="query_vectors must have the size of the examples' vectors, 3, got 2 for 'que"
    ):
        select(query, shots=1)
    with pytest.raises(ValueError, match=r"vectors must be finite, with one axis, got shape \(2, 3\) for example '0'"):
        RicesSupport(make_examples(1), {"0": torch.ones(2, 3)})


def test_without_examples_there_is_no_support() -> None:
    select = RicesSupport([], {}, {"query": torch.ones(3)})
    query = Example("query", ("query.png",), ("?",))
    assert select(query, shots=0) == []
    with pytest.raises(ValueError, match="shots must be at most 0"):
        select(query, shots=1)


# ---------------------------------------------------------------- vectors


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three photographs and a video of three frames."""
    folder = tmp_path_factory.mktemp("media")
    for i in range(3):
        Image.fromarray(load_sample_image("china.jpg")[60 * i : 60 * i + 50, 100:160]).save(folder / f"{i}.png")
    write_video(folder / "3.mp4", 6, rate=2)
    return [str(folder / f"{i}.png") for i in range(3)] + [str(folder / "3.mp4")]


@pytest.fixture
def examples(files: list[str]) -> list[Example]:
    """With one medium or several, an image and a video among them, some of them shared."""
    media = [(files[0],), (files[3],), (files[1], files[0]), (Path(files[0]),), (files[3], files[2], files[1])]
    return [Example(f"key {i}", of_example, ("?",)) for i, of_example in enumerate(media)]


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_vectors_are_means_of_what_the_vision_encoder_sees(examples: list[Example], batch_size: int) -> None:
    model, processor = make_flamingo(lm="llama")
    model.vision_encoder.double()
    vectors = media_vectors(model, processor, examples, batch_size=batch_size, progress=False)
    assert list(vectors) == [example.key for example in examples]
    for example in examples:
        of_media = []
        for medium in example.media:
            (frames,) = processor(text="<image>", images=[[medium]])["pixel_values"][0]
            features = torch.stack([model.vision_encoder(frame[None])[0] for frame in frames])
            mean = features.flatten(0, 1).mean(0)
            of_media.append(mean / mean.norm())
        expected = torch.stack(of_media).mean(0).float()
        torch.testing.assert_close(vectors[example.key], expected, atol=1e-6, rtol=1e-5)


def count_frames(encoder: Any) -> Callable[[], int]:
    frames: list[int] = []
    encoder.register_forward_pre_hook(lambda _, inputs: frames.append(len(inputs[0])))
    return lambda: sum(frames)


def test_each_medium_is_encoded_once(examples: list[Example]) -> None:
    model, processor = make_flamingo()
    frames = count_frames(model.vision_encoder)
    media_vectors(model, processor, examples, progress=False)
    assert frames() == 3 + 3


def test_more_frames_than_the_batch_size_are_never_encoded_at_once(examples: list[Example]) -> None:
    model, processor = make_flamingo()
    sizes: list[int] = []
    model.vision_encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    media_vectors(model, processor, examples, batch_size=2, progress=False)
    assert max(sizes) == 2


def test_functions_can_make_pixels_and_vectors() -> None:
    """The pixels of a medium with any axes in front, features with patches or without."""
    pixels = {"a.png": torch.rand(3, 2, 2), "b.png": torch.rand(1, 1, 3, 2, 2), "c.mp4": torch.rand(1, 4, 3, 2, 2)}
    examples = [Example(name, (name,), ("?",)) for name in pixels]
    expected = {name: image.reshape(-1, 3, 4).mean((0, 2)) for name, image in pixels.items()}
    for encode in (lambda frames: frames.flatten(2).transpose(1, 2), lambda frames: frames.mean((2, 3))):
        vectors = media_vectors(encode, pixels.__getitem__, examples, batch_size=2, progress=False)
        for name, vector in expected.items():
            torch.testing.assert_close(vectors[name], vector / vector.norm())


def test_vectors_and_rices_find_the_same_scene_again(files: list[str], tmp_path: Path) -> None:
    model, processor = make_flamingo()
    examples = [Example(str(i), (file,), ("?",)) for i, file in enumerate(files)]
    queries = []
    for i, file in enumerate(files[:3]):
        Image.open(file).resize((56, 46)).save(tmp_path / f"query {i}.png")
        queries.append(Example(f"query {i}", (tmp_path / f"query {i}.png",), ("?",)))
    of_examples, of_queries = (media_vectors(model, processor, e, progress=False) for e in (examples, queries))
    select = RicesSupport(examples, of_examples, of_queries)
    assert [select(query, shots=2)[-1].key for query in queries] == ["0", "1", "2"]


def test_vectors_in_a_file_are_read_and_not_made_again(examples: list[Example], tmp_path: Path) -> None:
    model, processor = make_flamingo()
    frames = count_frames(model.vision_encoder)
    written = media_vectors(model, processor, examples, path=tmp_path / "vectors.safetensors", progress=False)
    count = frames()
    read = media_vectors(model, processor, examples, path=str(tmp_path / "vectors.safetensors"), progress=False)
    assert frames() == count
    assert read.keys() == written.keys()
    assert all(torch.equal(read[key], written[key]) for key in written)
    assert [file.name for file in tmp_path.iterdir()] == ["vectors.safetensors"]


def test_vectors_of_media_in_memory_can_be_in_a_file(files: list[str], tmp_path: Path) -> None:
    """Frames of a video among them, in memory or in files."""
    model, processor = make_flamingo()
    images = [Image.open(file) for file in files[:3]]
    media: list[Any] = [images[0], images[1:], files[1:3]]
    examples = [Example(f"key {i}", (medium,), ("?",)) for i, medium in enumerate(media)]
    frames = count_frames(model.vision_encoder)
    options: dict[str, Any] = {"path": tmp_path / "vectors.safetensors", "progress": False}
    written, read = (media_vectors(model, processor, examples, **options) for _ in range(2))
    assert frames() == 1 + 2 + 2
    assert all(torch.equal(read[key], vector) for key, vector in written.items())
    torch.testing.assert_close(written["key 1"], written["key 2"])
    with pytest.raises(ValueError, match="examples is"):
        media_vectors(model, processor, [*examples[:2], Example("key 2", (files[:2],), ("?",))], **options)


def another_weight(parts: dict[str, Any]) -> None:
    parameter = list(parts["model"].vision_encoder.parameters())[-1]
    parameter.data.view(-1)[-1] += 2**-20


def another_statistic(parts: dict[str, Any]) -> None:
    parts["processor"].image_processor.image_std = [0.4, 0.5, 0.5]


def another_sampling(parts: dict[str, Any]) -> None:
    parts["processor"].fps = 2


def another_key(parts: dict[str, Any]) -> None:
    parts["examples"][1] = Example("another", parts["examples"][1].media, ("?",))


def another_medium(parts: dict[str, Any]) -> None:
    parts["examples"][1] = Example("key 1", parts["examples"][2].media, ("?",))


def another_order_of_media(parts: dict[str, Any]) -> None:
    parts["examples"][2] = Example("key 2", parts["examples"][2].media[::-1], ("?",))


def an_example_less(parts: dict[str, Any]) -> None:
    parts["examples"].pop()


def another_content(parts: dict[str, Any]) -> None:
    Image.new("RGB", (40, 30)).save(parts["examples"][0].media[0])


CHANGES = {
    change.__name__: (change, message)
    for change, message in [
        (another_weight, "weights is"),
        (another_statistic, "processor is"),
        (another_sampling, "processor is"),
        (another_key, "examples is"),
        (another_medium, "examples is"),
        (another_order_of_media, "examples is"),
        (an_example_less, "examples is"),
        (another_content, "examples is"),
    ]
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_file_of_something_else_is_refused(
    files: list[str], tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    model, processor = make_flamingo()
    images = [tmp_path / f"{i}.png" for i in range(3)]
    for file, image in zip(files, images, strict=False):
        image.write_bytes(Path(file).read_bytes())
    examples = [Example(f"key {i}", (image,), ("?",)) for i, image in enumerate(images[:2])]
    examples.append(Example("key 2", (images[2], images[0]), ("?",)))
    parts: dict[str, Any] = {"model": model, "processor": processor, "examples": examples}
    path = tmp_path / "vectors.safetensors"
    media_vectors(**parts, path=path, progress=False)
    before = path.read_bytes()
    change(parts)
    with pytest.raises(ValueError, match=f"{path.name} is stale, it holds vectors of something else: {message}"):
        media_vectors(**parts, path=path, progress=False)
    assert path.read_bytes() == before


def test_a_folder_of_media_may_be_moved(files: list[str], tmp_path: Path) -> None:
    model, processor = make_flamingo()
    path = tmp_path / "vectors.safetensors"
    moved = [tmp_path / Path(file).name for file in files]
    for file, image in zip(files, moved, strict=True):
        image.write_bytes(Path(file).read_bytes())
    before, after = ([Example("a", tuple(media), ("?",))] for media in (files, moved))
    vectors = media_vectors(model, processor, before, path=path, progress=False)
    assert torch.equal(media_vectors(model, processor, after, path=path, progress=False)["a"], vectors["a"])


def test_a_damaged_file_is_named(examples: list[Example], tmp_path: Path) -> None:
    model, processor = make_flamingo()
    path = tmp_path / "vectors.safetensors"
    media_vectors(model, processor, examples, path=path, progress=False)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(
        ValueError, match=r"vectors.safetensors is damaged or cut short: .*; delete it, and make it aga"
    ):
        media_vectors(model, processor, examples, path=path, progress=False)


def test_functions_need_a_name_for_a_file(tmp_path: Path) -> None:
    examples, pixels = make_examples(2), torch.rand(1, 3, 2, 2)
    path = tmp_path / "vectors.safetensors"

    def make(fingerprint: str | None) -> Any:
        return media_vectors(
            lambda frames: frames.mean((2, 3)), lambda _: pixels, examples, fingerprint=fingerprint, path=path
        )

    with pytest.raises(ValueError, match="fingerprint must be given with a path where the encoder is no module or"):
        make(None)
    make("mean colour")
    make("mean colour")
    with pytest.raises(ValueError, match="fingerprint is median colour, but mean colour in the file"):
        make("median colour")


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda frames: frames, r"the encoder must give features .* for 2 frames, got \(2, 3, 4, 4\); wrap it"),
        (lambda frames: frames.mean((0, 2, 3))[None], r"or vectors \(frames, dim\) for 2 frames, got \(1, 3\)"),
        (lambda frames: frames.mean((2, 3)) / 0, "the encoder's features must be finite"),
    ],
)
def test_what_is_no_feature_is_refused(encode: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        media_vectors(encode, lambda _: torch.rand(3, 4, 4), make_examples(2), progress=False)


def test_examples_that_cannot_be_encoded_are_refused() -> None:
    encode: Any = torch.nn.Identity()
    with pytest.raises(ValueError, match="example 'text' has no media, by which it could be compared; leave it out"):
        media_vectors(encode, encode, [*make_examples(2), Example("text", (), ("?",))])
    with pytest.raises(ValueError, match="examples must have a key each, but several have '0'"):
        media_vectors(encode, encode, make_examples(2) * 2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        media_vectors(encode, encode, [], batch_size=0)
    assert media_vectors(encode, encode, [], progress=False) == {}


def test_a_model_that_writes_and_has_no_vision_encoder_is_refused() -> None:
    model = make_lm("llama")
    with pytest.raises(
        ValueError, match=r"model must have a vision_encoder, or be one, got LlamaForCausalLM, which wr"
    ):
        media_vectors(model, None, [Example("a", ("a.png",), ("b",))])

"""Features from the cache are those that the encoder would give, or there is an error that says why not."""

import io
import os
import pickle
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flamingo_blocks import FlamingoForConditionalGeneration, VisionEncoder
from flamingo_blocks.data import CorruptSample, Document, FeatureCache, Medium, write_feature_cache
from tests.tiny_flamingo import make_flamingo
from tests.tiny_language_models import VOCAB
from tests.tiny_videos import write_video

SECONDS = (1, 3, 5)  # of the videos: at one frame a second, so many frames


def photograph(number: int) -> Medium:
    """Cut a piece out of a photograph, each of another size."""
    pixels = load_sample_image("china.jpg")[10 * number : 10 * number + 40 + number, 100 : 180 + 3 * number]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG")
    return Medium("image", file.getvalue())


@pytest.fixture(scope="module")
def photographs() -> list[Medium]:
    return [photograph(number) for number in range(10)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Medium]:
    folder = tmp_path_factory.mktemp("videos")
    return [Medium("video", write_video(folder / f"{i}.mp4", 2 * i, rate=2)) for i in SECONDS]


@pytest.fixture
def parts() -> dict[str, Any]:
    """What features depend on."""
    model, processor = make_flamingo()
    return {"vision_encoder": model.vision_encoder, "image_processor": processor.image_processor}


def write(path: Path, media: Any, parts: dict[str, Any], **options: Any) -> Any:
    return write_feature_cache(path, media, **parts, **{"progress": False} | options)


def encoded(parts: dict[str, Any], medium: Medium) -> Tensor:
    """Encode a medium frame by frame, its pixels as the processor makes them."""
    _, processor = make_flamingo()
    processor.image_processor = parts["image_processor"]
    media = {"images": Image.open(medium.open())} if medium.kind == "image" else {"videos": str(medium.source)}
    (frames,) = processor(text="<image>", **media)["pixel_values"][0]
    return torch.cat([parts["vision_encoder"](frame[None]) for frame in frames])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_features_are_those_of_the_encoder(
    parts: dict[str, Any], photographs: list[Medium], videos: list[Medium], tmp_path: Path, dtype: torch.dtype
) -> None:
    media = [photographs[0], videos[2], photographs[1], videos[0], videos[1]]
    write(tmp_path, media, parts, dtype=dtype, batch_size=1)
    cache = FeatureCache(tmp_path, **parts)
    assert len(cache) == len(media)
    for medium, frames in zip(media, (1, 5, 1, 1, 3), strict=True):
        features = cache(medium)
        assert features.shape[0] == frames
        assert torch.equal(features, encoded(parts, medium).to(dtype)), "bit for bit, rounded once"


def test_frames_are_encoded_in_batches_also_across_media(
    parts: dict[str, Any], photographs: list[Medium], videos: list[Medium], tmp_path: Path
) -> None:
    sizes: list[int] = []
    parts["vision_encoder"].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    media = [*photographs[:3], *videos, *photographs[3:]]
    write(tmp_path, media, parts, dtype=torch.float32, batch_size=4)
    assert sum(sizes) == 10 + sum(SECONDS)
    assert max(sizes) == 4
    cache = FeatureCache(tmp_path, **parts)
    for medium in media:
        torch.testing.assert_close(cache(medium), encoded(parts, medium))


def test_of_a_long_video_the_first_frames_are_kept(parts: dict[str, Any], videos: list[Medium], tmp_path: Path) -> None:
    write(tmp_path, videos, parts, fps=2, max_frames=4, dtype=torch.float32)
    cache = FeatureCache(tmp_path, **parts, fps=2, max_frames=4)
    assert [len(cache(video)) for video in videos] == [2, 4, 4]
    torch.testing.assert_close(cache(videos[2])[::2], encoded(parts, videos[2])[:2])


def losses(model: Any, processor: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Give the loss of texts with a medium each, and the gradients."""
    ids = torch.randint(10, VOCAB - 5, (4, 8), generator=torch.Generator().manual_seed(0))
    ids[:, 1] = processor.image_token_id
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["float32", "encoder of bfloat16", "rounded to bfloat16"])
def test_training_from_the_cache_gives_the_same_losses_and_gradients(
    photographs: list[Medium], videos: list[Medium], tmp_path: Path, kind: str
) -> None:
    model, processor = make_flamingo()
    if kind == "encoder of bfloat16":
        model.vision_encoder.to(torch.bfloat16)
    parts = {"vision_encoder": model.vision_encoder, "image_processor": processor.image_processor}
    media = [photographs[0], videos[1], photographs[2], photographs[3]]
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    # The batch that forward makes of these, so that the encoder has no other one to be rounded in.
    write(tmp_path, media, parts, dtype=dtype, batch_size=6)
    cache = FeatureCache(tmp_path, **parts)
    features = nn.utils.rnn.pad_sequence([cache(medium) for medium in media], batch_first=True)[:, None]
    num_frames = torch.tensor([[len(cache(medium))] for medium in media])
    files = [[Image.open(medium.open())] if medium.kind == "image" else [str(medium.source)] for medium in media]
    pixels = processor(text=["<image>"] * 4, images=files)
    assert torch.equal(pixels["num_frames"], num_frames)
    expected, gradients = losses(model, processor, {name: pixels[name] for name in ("pixel_values", "num_frames")})
    found, found_gradients = losses(model, processor, {"vision_features": features, "num_frames": num_frames})
    assert gradients.keys() == found_gradients.keys()
    if kind == "rounded to bfloat16":
        torch.testing.assert_close(found, expected, rtol=2**-8, atol=0)
        assert not torch.equal(found, expected), "rounding must show, else this tests nothing"
        return
    assert torch.equal(found, expected)
    for name, gradient in gradients.items():
        assert torch.equal(found_gradients[name], gradient), name


def test_each_medium_is_encoded_once_also_in_later_runs(
    parts: dict[str, Any], photographs: list[Medium], tmp_path: Path
) -> None:
    frames: list[int] = []
    parts["vision_encoder"].register_forward_pre_hook(lambda _, inputs: frames.append(len(inputs[0])))
    one, two, three = photographs[:3]
    file = tmp_path / "a copy.jpg"
    file.write_bytes(one.read())
    documents = [Document((one, "a", two)), Document((two, Medium("image", file))), Document(("only text",))]
    report = write(tmp_path / "cache", [*documents, one], parts, threads=1)
    assert (report.written, report.known, report.corrupt) == (2, 3, ())
    assert sum(frames) == 2
    report = write(tmp_path / "cache", photographs[:3], parts)
    assert (report.written, report.known) == (1, 2)
    assert sum(frames) == 3
    cache = FeatureCache(tmp_path / "cache", **parts)
    assert torch.equal(cache(Medium("image", file)), cache(one))
    assert len(cache) == 3
    torch.testing.assert_close(cache(three), encoded(parts, three).bfloat16())


def test_autocast_does_not_reach_the_encoder(parts: dict[str, Any], photographs: list[Medium], tmp_path: Path) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        write(tmp_path, photographs[:1], parts, dtype=torch.float32)
    cache = FeatureCache(tmp_path, **parts)
    assert torch.equal(cache(photographs[0]), encoded(parts, photographs[0]))


# ------------------------------------------------------------ stale caches


def next_number(parts: dict[str, Any]) -> None:
    """Change a weight by its last bit."""
    weight = parts["vision_encoder"].backbone.blocks[1].mlp.fc1.weight.data
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))


def other_activation(parts: dict[str, Any]) -> None:
    """Change what no weight tells."""
    parts["vision_encoder"].backbone.blocks[0].mlp.act = nn.ReLU()


def encoder_with(**options: Any) -> Callable[[dict[str, Any]], None]:
    def change(parts: dict[str, Any]) -> None:
        backbone = deepcopy(parts["vision_encoder"].backbone)
        parts["vision_encoder"] = VisionEncoder(backbone, **{"image_size": 32} | options)

    return change


def setting(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda parts: setattr(parts["image_processor"], name, value)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "weights": next_number,
    "architecture": other_activation,
    "dtype": lambda parts: parts["vision_encoder"].to(torch.float64),
    "output_dtype": encoder_with(output_dtype=torch.float16),
    "keep_prefix_tokens": encoder_with(keep_prefix_tokens=True),
    "final_norm": encoder_with(final_norm=False),
    "image processor's image_mean": setting("image_mean", [0.25, 0.5, 0.5]),
    "image processor's size": setting("size", {"height": 64, "width": 32}),
    "image processor's crop_pct": setting("crop_pct", 0.9),
    "fps": lambda parts: parts.update(fps=3.0),
    "max_frames": lambda parts: parts.update(max_frames=30),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_stale_cache_is_an_error_that_says_what_differs(
    parts: dict[str, Any], photographs: list[Medium], tmp_path: Path, what: str
) -> None:
    write(tmp_path, photographs[:1], parts)
    assert len(FeatureCache(tmp_path, **parts)) == 1
    CHANGES[what](parts)
    with pytest.raises(ValueError, match=rf"is stale.*{what} is .*, but .* in the cache"):
        FeatureCache(tmp_path, **parts)
    with pytest.raises(ValueError, match=rf"is stale.*{what} is "):
        write(tmp_path, photographs, parts)


def test_a_cache_has_one_dtype(parts: dict[str, Any], photographs: list[Medium], tmp_path: Path) -> None:
    write(tmp_path, photographs[:1], parts)
    with pytest.raises(ValueError, match=r"stored dtype is torch\.float32, but torch\.bfloat16 in the cache"):
        write(tmp_path, photographs, parts, dtype=torch.float32)


def test_the_same_model_loaded_anew_opens_the_cache(photographs: list[Medium], tmp_path: Path) -> None:
    model, processor = make_flamingo()
    image_processor = processor.image_processor
    write(
        tmp_path / "cache",
        photographs[:1],
        {"vision_encoder": model.vision_encoder, "image_processor": image_processor},
    )
    model.save_pretrained(tmp_path / "model")
    image_processor.save_pretrained(tmp_path / "model")
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "model")
    again = type(image_processor).from_pretrained(tmp_path / "model")
    assert FeatureCache(tmp_path / "cache", vision_encoder=loaded.train().vision_encoder, image_processor=again)


# ------------------------------------------------------------ what can go wrong


def test_corrupt_media_are_skipped_counted_and_logged(
    parts: dict[str, Any], photographs: list[Medium], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Medium("image", photographs[1].read()[:-200])
    missing = Medium("image", tmp_path / "none.jpg")
    no_video = Medium("video", b"no video")
    sample = CorruptSample("page 7", "no JSON")
    report = write(tmp_path, [photographs[0], broken, missing, sample, no_video, photographs[2]], parts)
    assert report.written == 2
    assert [corrupt.key.split(" ")[1] for corrupt in report.corrupt] == ["image", "image", "7", "video"]
    assert str(tmp_path / "none.jpg") in report.corrupt[1].key
    assert all(corrupt.key in caplog.text and corrupt.error in caplog.text for corrupt in report.corrupt)
    cache = FeatureCache(tmp_path, **parts)
    torch.testing.assert_close(cache(photographs[2]), encoded(parts, photographs[2]).bfloat16())


def test_too_many_corrupt_media_stop_it(parts: dict[str, Any], photographs: list[Medium], tmp_path: Path) -> None:
    broken = [Medium("image", str(i).encode()) for i in range(200)]
    good = [photographs[i % 10] for i in range(180)]
    assert len(write(tmp_path, [*good, *broken[:20]], parts).corrupt) == 20
    with pytest.raises(
        RuntimeError, match=r"19 of 181 media are corrupt, more than .*=0\.1; the last one is the image"
    ):
        write(tmp_path, [*good[:162], *broken], parts)


@pytest.mark.parametrize("left", [0.0, 0.001, 0.5, 0.9999])
def test_a_shard_that_was_cut_short_is_found_when_the_cache_is_opened(
    parts: dict[str, Any], photographs: list[Medium], tmp_path: Path, left: float
) -> None:
    write(tmp_path, photographs, parts, shard_bytes=2000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: int(left * len(content))])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged or cut short"):
        FeatureCache(tmp_path, **parts)
    with pytest.raises(ValueError, match="delete it, and run write_feature_cache again"):
        write(tmp_path, photographs, parts)
    shard.unlink()
    assert write(tmp_path, photographs, parts).written > 0
    assert len(FeatureCache(tmp_path, **parts)) == len(photographs)


def test_shards_have_bounded_sizes(parts: dict[str, Any], photographs: list[Medium], tmp_path: Path) -> None:
    write(tmp_path, photographs, parts, shard_bytes=2000, batch_size=3)
    size = FeatureCache(tmp_path, **parts)(photographs[0]).nbytes
    shards = [safetensors.torch.load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    counts = [-(-2000 // size)] * len(shards)
    counts[-1] = len(photographs) - sum(counts[:-1])
    assert [len(shard) for shard in shards] == counts
    assert 0 < counts[-1] < counts[0]


def kill_at(moment: int, encoder: nn.Module) -> None:
    """Let this process die: for each medium while it is encoded, half through its shard, and before it has its name."""
    moments = iter(range(1, moment + 1))
    save, sync = safetensors.torch.save_file, os.fsync

    def count(*_: Any) -> Any:
        if next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_half(tensors: Any, file: Path, metadata: Any) -> None:
        save(tensors, file, metadata=metadata)
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        count()
        file.write_bytes(content)

    encoder.register_forward_pre_hook(count)
    pytest.MonkeyPatch().setattr(safetensors.torch, "save_file", save_half)
    pytest.MonkeyPatch().setattr(os, "fsync", lambda file: (sync(file), count()))


def test_a_writer_that_is_killed_leaves_whole_shards_and_goes_on(
    parts: dict[str, Any], photographs: list[Medium], tmp_path: Path
) -> None:
    media, finished = photographs, 0
    for moment in range(1, 8):
        child = os.fork()
        if not child:
            with suppress(BaseException):
                kill_at(moment, parts["vision_encoder"])
                write(tmp_path, media, parts, shard_bytes=1, batch_size=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        finished += (moment - 1) // 3
        assert len(list(tmp_path.glob("*.safetensors"))) == finished
        assert not finished or len(FeatureCache(tmp_path, **parts)) == finished
    (tmp_path / "00000-000099.safetensors.part").write_bytes(b"a half shard")
    report = write(tmp_path, media, parts, shard_bytes=1)
    assert report.known == finished
    assert report.written == len(media) - finished
    assert not list(tmp_path.glob("*.part"))
    cache = FeatureCache(tmp_path, **parts)
    for medium in media:
        torch.testing.assert_close(cache(medium), encoded(parts, medium).bfloat16())


def test_when_the_disk_is_full_finished_shards_are_intact(
    parts: dict[str, Any], photographs: list[Medium], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = safetensors.torch.save_file, []

    def run_out_of_space(tensors: Any, file: Any, metadata: Any) -> None:
        save(tensors, file, metadata=metadata)
        saved.append(file)
        if len(saved) == 3:
            file.write_bytes(file.read_bytes()[:100])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", run_out_of_space)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, photographs, parts, shard_bytes=1)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".safetensors"] * 2
    assert len(FeatureCache(tmp_path, **parts)) == 2


def test_several_writers_fill_one_cache(parts: dict[str, Any], photographs: list[Medium], tmp_path: Path) -> None:
    def run(rank: int) -> Any:
        return write(tmp_path, photographs[rank::3], deepcopy(parts), rank=rank, shard_bytes=2000)

    with ThreadPoolExecutor(3) as pool:
        assert sum(report.written for report in pool.map(run, range(3))) == len(photographs)
    cache = FeatureCache(tmp_path, **parts)
    for medium in photographs:
        torch.testing.assert_close(cache(medium), encoded(parts, medium).bfloat16())
    # Another number of writers goes on.
    assert write(tmp_path, [*photographs, photograph(11)], parts).written == 1


def test_a_medium_that_is_not_there_is_named(parts: dict[str, Any], photographs: list[Medium], tmp_path: Path) -> None:
    file = tmp_path / "cat.jpg"
    file.write_bytes(photographs[1].read())
    write(tmp_path, photographs[:1], parts)
    cache = FeatureCache(tmp_path, **parts)
    with pytest.raises(ValueError, match=r"has no features of the image .*cat\.jpg; write_feature_cache adds"):
        cache(Medium("image", file))
    with pytest.raises(ValueError, match=f"of the video with the digest {photographs[0].digest()}"):
        cache(Medium("video", photographs[0].source))
    with pytest.raises(ValueError, match="holds no feature cache; write one"):
        FeatureCache(tmp_path / "elsewhere", **parts)


def test_a_medium_is_read_once_to_find_its_features(
    parts: dict[str, Any], photographs: list[Medium], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, photographs[:1], parts)
    cache = FeatureCache(tmp_path, **parts)
    read: list[Medium] = []
    digest = Medium.digest

    def note(medium: Medium) -> str:
        read.append(medium)
        return digest(medium)

    monkeypatch.setattr(Medium, "digest", note)
    cache(photographs[0])
    assert read == photographs[:1]


def test_a_cache_goes_to_data_workers_and_threads(
    parts: dict[str, Any], photographs: list[Medium], tmp_path: Path
) -> None:
    write(tmp_path, photographs, parts, shard_bytes=2000)
    cache = FeatureCache(tmp_path, **parts)
    expected = torch.stack([cache(medium) for medium in photographs])
    assert len(pickle.dumps(cache)) < 5000
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(torch.stack([again(medium) for medium in photographs]), expected)
    dataset: Any = photographs
    loader = DataLoader(
        dataset, batch_size=5, num_workers=2, collate_fn=lambda media: [cache(medium) for medium in media]
    )
    assert torch.equal(torch.stack([features for batch in loader for features in batch]), expected)
    with ThreadPoolExecutor(4) as pool:
        for features in pool.map(lambda _: torch.stack([cache(medium) for medium in photographs]), range(20)):
            assert torch.equal(features, expected)


def test_features_may_be_changed_without_changing_the_cache(
    parts: dict[str, Any], photographs: list[Medium], tmp_path: Path
) -> None:
    write(tmp_path, photographs[:2], parts)
    cache = FeatureCache(tmp_path, **parts)
    features, original = cache(photographs[0]), cache(photographs[0]).clone()
    features.zero_()
    assert torch.equal(cache(photographs[0]), original)
    assert features.untyped_storage().nbytes() == features.nbytes, "it does not take its shard along"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"shard_bytes": 0}, "shard_bytes must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"rank": -1}, "rank must not be negative"),
        ({"max_corrupt": 1.5}, r"max_corrupt must be in 0\.\.1"),
        ({"dtype": torch.int8}, "dtype must be one of floating-point numbers"),
        ({"fps": 0.0}, "fps must be positive"),
        ({"max_frames": 0}, "max_frames at least 1"),
    ],
)
def test_wrong_options_are_errors(parts: dict[str, Any], tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, [], parts, **options)


def test_an_encoder_that_is_trained_has_no_cache(parts: dict[str, Any], tmp_path: Path) -> None:
    parts["vision_encoder"].unfreeze()
    with pytest.raises(ValueError, match="must be a VisionEncoder that is frozen"):
        write(tmp_path, [], parts)
    parts["vision_encoder"] = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="must be a VisionEncoder that is frozen, got Linear"):
        FeatureCache(tmp_path, **parts)


def test_features_that_the_dtype_cannot_hold_are_an_error(
    parts: dict[str, Any], photographs: list[Medium], tmp_path: Path
) -> None:
    parts["vision_encoder"].backbone.norm.weight.data.fill_(1e6)
    with pytest.raises(ValueError, match=r"not finite in torch\.float16; try another dtype"):
        write(tmp_path, photographs[:1], parts, dtype=torch.float16)


@pytest.mark.unchecked
def test_only_media_are_cached(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="media must be Medium or Document objects, got str"):
        write(tmp_path, ["cat.jpg"], parts)

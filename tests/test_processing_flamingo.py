import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, BatchFeature, PreTrainedTokenizerFast

from flamingo_blocks import FlamingoProcessor
from flamingo_blocks.processing_flamingo import FlamingoImageProcessor, special_token_id
from flamingo_blocks.video import VideoFile
from tests.tiny_videos import write_video

timm_data: Any = timm.data  # which has no types
WORDS = ("?", "a", "b", "cat", "dog", "image")
SPECIAL = ("<image>", "<EOC>")


def picture(seed: int, width: int = 12, height: int = 9) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_array(*images: Image.Image) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def as_tensor(*images: Image.Image) -> Tensor:
    return torch.from_numpy(as_array(*images)).permute(0, 3, 1, 2)


def make_image_processor(size: int = 6, channels: int = 3, **settings: Any) -> FlamingoImageProcessor:
    """Leave the images in 0..1."""
    return FlamingoImageProcessor(
        size={"height": size, "width": size},
        image_mean=[0.0] * channels,
        image_std=[1.0] * channels,
        channels=channels,
        **settings,
    )


def make_tokenizer(
    special: tuple[str, ...] = SPECIAL,
    words: tuple[str, ...] = WORDS,
    splitter: type[pre_tokenizers.PreTokenizer] = pre_tokenizers.Whitespace,
) -> PreTrainedTokenizerFast:
    words_only = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    words_only.pre_tokenizer = splitter()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_only, unk_token="?", pad_token="?")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    return tokenizer


@cache
def make_processor() -> FlamingoProcessor:
    return FlamingoProcessor(make_image_processor(), make_tokenizer())


NAMED = {"default": "{{ messages[0]['content'] }}", "other": "{{ messages[1]['content'] }}"}
CAT, DOG, EEL = picture(0), picture(1), picture(2)


def pixels_of(*images: Any) -> Tensor:
    return make_image_processor()(list(images))["pixel_values"]


def assert_same(one: BatchFeature, other: BatchFeature) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


# The image processor


@pytest.mark.parametrize("size", [(160, 160), (96, 96), (64, 96)])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_nfnet"])
def test_images_are_transformed_as_timm_does(name: str, size: tuple[int, int]) -> None:
    backbone = timm.create_model(name, num_classes=0)
    config = timm_data.resolve_model_data_config(backbone)
    assert config["input_size"] == (3, 160, 160)
    transform = timm_data.create_transform(**{**config, "input_size": (3, *size)})
    images = [picture(0, 200, 130), picture(1, 90, 120)]
    pixel_values = FlamingoImageProcessor.from_timm(backbone, image_size=size)(images)["pixel_values"]
    assert torch.equal(pixel_values, torch.stack([transform(image) for image in images]))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_every_setting_reaches_timm(crop_mode: str, interpolation: str) -> None:
    settings: dict[str, Any] = {"interpolation": interpolation, "crop_pct": 0.8, "crop_mode": crop_mode}
    mean, std = (0.5, 0.4, 0.3), (0.3, 0.4, 0.5)
    transform = timm_data.create_transform((3, 8, 10), mean=mean, std=std, **settings)
    processor = FlamingoImageProcessor({"height": 8, "width": 10}, mean, std, **settings)
    assert torch.equal(processor(CAT)["pixel_values"][0], transform(CAT))


def test_statistics_of_colours_are_averaged_for_grey() -> None:
    statistics = {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.3, 0.2)}
    backbone = timm.create_model("test_vit", pretrained_cfg_overlay=statistics)
    processor = FlamingoImageProcessor.from_timm(backbone, image_size=(32, 32), channels=1)
    assert processor.image_mean == pytest.approx([0.4])
    assert processor.image_std == pytest.approx([0.2])
    assert processor(CAT)["pixel_values"].shape == (1, 1, 32, 32)


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda array: array,
    "array, channels first": lambda array: np.ascontiguousarray(array.transpose(2, 0, 1)),
    "array, read-only": lambda array: np.asarray(Image.fromarray(array)),
    "array, reversed twice": lambda array: np.ascontiguousarray(array[:, ::-1])[:, ::-1],
    "array of 16 bits": lambda array: array.astype(np.uint16) * 257,
    "array of 16 bits, big-endian": lambda array: (array.astype(np.uint16) * 257).astype(">u2"),
    "array of float16": lambda array: (array / 255).astype(np.float16),
    "array of float32": lambda array: (array / 255).astype(np.float32),
    "array of float64": lambda array: array / 255,
    "tensor": lambda array: torch.from_numpy(array).permute(2, 0, 1),
    "tensor of 16 bits": lambda array: torch.from_numpy(array.astype(np.uint16) * 257).permute(2, 0, 1),
    "tensor of floats": lambda array: torch.from_numpy(array).permute(2, 0, 1) / 255,
    "tensor with gradient": lambda array: (torch.from_numpy(array).permute(2, 0, 1) / 255).requires_grad_(),
    "with alpha": lambda array: np.concatenate([array, array[..., :1]], axis=-1),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_gives_the_same_pixels_whichever_kind_it_is(kind: str, channels: int) -> None:
    processor = make_image_processor(channels=channels)
    pixels = processor(KINDS[kind](np.array(CAT)), return_tensors="pt")["pixel_values"]
    assert not pixels.requires_grad
    assert torch.equal(pixels, processor(CAT)["pixel_values"])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("grey", [lambda array: array, lambda array: array[..., None], torch.from_numpy])
def test_an_array_without_channels_is_grey(grey: Callable[[np.ndarray], Any], channels: int) -> None:
    processor = make_image_processor(channels=channels)
    image = CAT.convert("L")
    assert torch.equal(processor(grey(np.array(image)))["pixel_values"], processor(image)["pixel_values"])


@pytest.mark.parametrize("path_type", [str, Path])
def test_a_path_gives_the_image_of_its_file(path_type: Callable[[Path], Any], tmp_path: Path) -> None:
    CAT.save(tmp_path / "cat.png")
    assert torch.equal(pixels_of(path_type(tmp_path / "cat.png")), pixels_of(CAT))


def test_bfloat16_is_close() -> None:
    torch.testing.assert_close(pixels_of(as_tensor(CAT)[0].div(255).bfloat16()), pixels_of(CAT), atol=1e-2, rtol=0)


def test_a_batch_may_be_one_array() -> None:
    assert torch.equal(make_image_processor()(as_array(CAT, DOG))["pixel_values"], pixels_of(CAT, DOG))
    assert torch.equal(make_image_processor()(as_tensor(CAT, DOG))["pixel_values"], pixels_of(CAT, DOG))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_a_grey_ramp_looks_the_same_in_every_mode(mode: str, channels: int) -> None:
    """On a coarse grid, since the modes 1 and P dither."""
    ramp = Image.linear_gradient("L").convert("RGB").convert(mode)
    pixels = make_image_processor(channels=channels, interpolation="bilinear")(ramp)["pixel_values"]
    expected = ((torch.arange(6) + 0.5) / 6)[:, None].expand(1, channels, 6, 6)
    torch.testing.assert_close(pixels, expected, atol=0.03, rtol=0)


DEEP: dict[str, Callable[[np.ndarray], Image.Image]] = {
    "I;16": lambda grey: Image.frombytes("I;16", grey.shape[::-1], (grey.astype("<u2") * 257).tobytes()),
    "I;16B": lambda grey: Image.frombytes(
        "I;16B", grey.shape[::-1], (grey.astype("<u2") * 257).astype(">u2").tobytes()
    ),
    "I": lambda grey: Image.fromarray(grey.astype(np.int32) * 257),
    "F": lambda grey: Image.fromarray((grey / 255).astype(np.float32)),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", DEEP)
def test_an_image_of_more_bits_gives_what_one_of_8_bits_gives(mode: str, channels: int) -> None:
    grey = CAT.convert("L")
    deep = DEEP[mode](np.asarray(grey))
    assert deep.mode == mode
    processor = make_image_processor(channels=channels)
    assert torch.equal(processor(deep)["pixel_values"], processor(grey)["pixel_values"])


def test_a_png_file_of_16_bits_keeps_its_range(tmp_path: Path) -> None:
    grey = CAT.convert("L")
    DEEP["I;16"](np.asarray(grey)).save(tmp_path / "grey.png")
    assert torch.equal(pixels_of(tmp_path / "grey.png"), pixels_of(grey))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_dropped(mode: str) -> None:
    opaque = CAT.convert(mode)
    see_through = opaque.copy()
    see_through.putalpha(7)
    assert torch.equal(pixels_of(see_through), pixels_of(opaque))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [0, bytes(256)])
def test_a_transparent_palette_gives_its_colours(transparency: int | bytes, tmp_path: Path) -> None:
    palette = CAT.quantize()
    palette.save(tmp_path / "palette.png", transparency=transparency)
    assert torch.equal(pixels_of(tmp_path / "palette.png"), pixels_of(palette))


@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("I;16", "png"), ("RGB", "tiff")])
@pytest.mark.parametrize(
    "orientation, stored_as",
    [
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_images_are_turned_upright(
    mode: str, suffix: str, orientation: int, stored_as: Image.Transpose, tmp_path: Path
) -> None:
    path = tmp_path / f"turned.{suffix}"
    upright = CAT if mode == "RGB" else DEEP[mode](np.asarray(CAT.convert("L")))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(stored_as).save(path, exif=exif)
    assert torch.equal(pixels_of(path), pixels_of(upright))
    with Image.open(path) as turned:
        assert torch.equal(pixels_of(turned), pixels_of(upright))


def test_damaged_exif_data_are_no_reason_to_refuse_an_image(tmp_path: Path) -> None:
    CAT.save(tmp_path / "damaged.jpg", exif=b"Exif\0\0no such thing")
    CAT.save(tmp_path / "sound.jpg")
    assert torch.equal(pixels_of(tmp_path / "damaged.jpg"), pixels_of(tmp_path / "sound.jpg"))


@pytest.mark.parametrize("size", [(1, 60), (60, 1)])
def test_a_line_that_would_fill_the_memory_is_refused(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"size": {"height": 8, "width": 10}, "crop_pct": 0.5}
    resized: list[int] = []
    resize = Image.Image.resize

    def watched(image: Image.Image, *arguments: Any, **options: Any) -> Image.Image:
        result = resize(image, *arguments, **options)
        resized.append(result.width * result.height)
        return result

    monkeypatch.setattr(Image.Image, "resize", watched)
    line = Image.new("RGB", size)
    FlamingoImageProcessor(**settings).preprocess(line)
    (pixels,) = resized
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels // 2 - 1)
    with pytest.raises(ValueError, match=f"image 0: an image of {size[0]}x{size[1]} pixels is too thin"):
        FlamingoImageProcessor(**settings).preprocess(line)
    FlamingoImageProcessor(**settings, crop_mode="squash").preprocess(line)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels // 2)
    FlamingoImageProcessor(**settings).preprocess(line)


def test_images_are_left_as_they_are() -> None:
    image, array = CAT.copy(), as_array(CAT)[0] / 255
    pixels_of(image, array)
    assert image == CAT
    assert np.array_equal(array, as_array(CAT)[0] / 255)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_an_image_processor_round_trips(name: str, tmp_path: Path) -> None:
    processor = FlamingoImageProcessor.from_timm(timm.create_model(name), image_size=(24, 32), channels=1)
    processor.save_pretrained(tmp_path)
    for restored in (
        FlamingoImageProcessor.from_dict(json.loads(json.dumps(processor.to_dict()))),
        FlamingoImageProcessor.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path),
    ):
        assert type(restored) is FlamingoImageProcessor
        assert restored.to_dict() == processor.to_dict()
        assert torch.equal(restored(CAT)["pixel_values"], processor(CAT)["pixel_values"])


@pytest.mark.parametrize("channels", [1, 3])
def test_no_images_give_an_empty_batch(channels: int) -> None:
    assert make_image_processor(channels=channels)([])["pixel_values"].shape == (0, channels, 6, 6)


# The processor: where media come to stand


def make_medium(form: str, frames: list[Image.Image]) -> Any:
    if form == "image" and len(frames) == 1:
        return frames[0]
    if form == "array":
        return as_array(*frames)
    return as_tensor(*frames) if form == "tensor" else frames


@given(
    rows=st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=4),
    form=st.sampled_from(("list", "image", "array", "tensor")),
)
def test_each_frame_stands_at_its_place_and_all_else_is_zero(rows: list[list[int]], form: str) -> None:
    seeds = iter(range(36))
    frames = [[[picture(next(seeds)) for _ in range(count)] for count in row] for row in rows]
    images = [[make_medium(form, medium) for medium in row] for row in frames]
    inputs = make_processor()(text=["a <image>" * len(row) for row in rows], images=images)
    if not any(rows):
        assert inputs.keys() == {"input_ids", "attention_mask"}
        return
    expected = torch.zeros(len(rows), max(map(len, rows)), max(max(row, default=0) for row in rows), 3, 6, 6)
    num_frames = torch.zeros(expected.shape[:2], dtype=torch.long)
    for row, media in enumerate(frames):
        for medium, images_of_medium in enumerate(media):
            num_frames[row, medium] = len(images_of_medium)
            expected[row, medium, : len(images_of_medium)] = pixels_of(*images_of_medium)
    assert torch.equal(inputs["num_frames"], num_frames)
    assert torch.equal(inputs["pixel_values"], expected)


@given(
    rows=st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=4).filter(any),
    are_videos=st.booleans(),
)
def test_a_flat_list_is_dealt_out_as_the_texts_ask(rows: list[list[int]], are_videos: bool) -> None:
    seeds = iter(range(36))
    media = [[[picture(next(seeds)) for _ in range(n)] if are_videos else CAT for n in row] for row in rows]
    flat: list[Any] = [medium for row in media for medium in row]
    text = ["a" + "<image>" * len(row) for row in rows]
    inputs = make_processor()(text=text, videos=flat) if are_videos else make_processor()(text=text, images=flat)
    assert_same(inputs, make_processor()(text=text, images=media))


TWO_IMAGES: dict[str, Any] = {
    "a list": {"images": [CAT, DOG]},
    "a tuple": {"images": (CAT, DOG)},
    "one list a text": {"images": [[CAT, DOG]]},
    "an array": {"images": as_array(CAT, DOG)},
    "a tensor": {"images": as_tensor(CAT, DOG)},
    "of different kinds": {"images": [as_array(CAT)[0], as_tensor(DOG)[0]]},
    "videos of one frame": {"videos": [[CAT], [DOG]]},
}
ONE_VIDEO: dict[str, Any] = {
    "a row with a list": {"images": [[[CAT, DOG]]]},
    "a row with a tuple": {"images": [[(CAT, DOG)]]},
    "a row with an array": {"images": [[as_array(CAT, DOG)]]},
    "a row with a tensor": {"images": [[as_tensor(CAT, DOG)]]},
    "a list with an array": {"images": [as_array(CAT, DOG)]},
    "an array with two more axes": {"images": as_array(CAT, DOG)[None]},
    "videos, the frames": {"videos": [CAT, DOG]},
    "videos, a list": {"videos": [[CAT, DOG]]},
    "videos, a row": {"videos": [[[CAT, DOG]]]},
    "videos, an array": {"videos": as_array(CAT, DOG)},
    "videos, a list with a tensor": {"videos": [as_tensor(CAT, DOG)]},
    "videos, a row with a tensor": {"videos": [[as_tensor(CAT, DOG)]]},
    "videos, an array with two more axes": {"videos": as_array(CAT, DOG)[None]},
}


@pytest.mark.parametrize("spelling", TWO_IMAGES)
def test_two_images_of_a_text(spelling: str) -> None:
    inputs = make_processor()(text="<image>a<image>b", **TWO_IMAGES[spelling])
    assert torch.equal(inputs["num_frames"], torch.tensor([[1, 1]]))
    assert torch.equal(inputs["pixel_values"], pixels_of(CAT, DOG)[None, :, None])


@pytest.mark.parametrize("spelling", ONE_VIDEO)
def test_a_video_of_two_frames(spelling: str) -> None:
    inputs = make_processor()(text=["<image>a"], **ONE_VIDEO[spelling])
    assert torch.equal(inputs["num_frames"], torch.tensor([[2]]))
    assert torch.equal(inputs["pixel_values"], pixels_of(CAT, DOG)[None, None])


@pytest.mark.parametrize("image", [CAT, [CAT], [[CAT]], as_array(CAT)[0], as_array(CAT), as_tensor(CAT)[0]])
def test_a_single_image(image: Any) -> None:
    inputs = make_processor()(text="<image>a", images=image)
    assert torch.equal(inputs["num_frames"], torch.tensor([[1]]))
    assert torch.equal(inputs["pixel_values"], pixels_of(CAT)[None, None])


@pytest.mark.parametrize("images", [np.asarray(CAT.convert("L")), [torch.from_numpy(np.array(CAT.convert("L")))]])
def test_an_array_of_two_axes_is_a_grey_image(images: Any) -> None:
    inputs = make_processor()(text="<image>a", images=images)
    assert torch.equal(inputs["pixel_values"], pixels_of(CAT.convert("L"))[None, None])


def test_images_and_videos_stand_together_in_a_row() -> None:
    inputs = make_processor()(text=["<image>a<image>", "<image>"], images=[[CAT, [DOG, EEL, CAT]], [[EEL, DOG]]])
    assert torch.equal(inputs["num_frames"], torch.tensor([[1, 3], [2, 0]]))
    padding = torch.zeros(1, 3, 6, 6)
    rows = [pixels_of(CAT), padding, padding, pixels_of(DOG, EEL, CAT), pixels_of(EEL, DOG), *[padding] * 4]
    assert torch.equal(inputs["pixel_values"], torch.cat(rows).view(2, 2, 3, 3, 6, 6))


@pytest.mark.parametrize("empty", [[], None, ()])
def test_a_row_without_media_is_padding(empty: Any) -> None:
    inputs = make_processor()(text=["a", "<image>b"], images=[empty, [CAT]])
    assert torch.equal(inputs["num_frames"], torch.tensor([[0], [1]]))
    assert not inputs["pixel_values"][0].any()
    assert torch.equal(inputs["pixel_values"][1, 0], pixels_of(CAT))


@pytest.mark.parametrize("media", [{}, {"images": []}, {"images": [[], []]}, {"images": [None, []]}, {"videos": []}])
def test_text_alone_gives_no_pixels(media: Any) -> None:
    inputs = make_processor()(text=["a cat", "b"], **media)
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].tolist() == [[1, 3], [2, 0]]


# The processor: videos


def frames_of(path: Path, *indices: int) -> list[Image.Image]:
    frames = list(VideoFile(path).frames())
    return [frames[i] for i in indices]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One of 2.5 seconds, another of half a second; ten frames a second."""
    folder = tmp_path_factory.mktemp("clips")
    return write_video(folder / "long.mp4", 25), write_video(folder / "short.mkv", 5)


@pytest.mark.parametrize(
    "options, long, short",
    [
        ({}, (0, 10, 20), (0,)),
        ({"fps": 2}, (0, 5, 10, 15, 20), (0,)),
        ({"fps": 0.5}, (0, 20), (0,)),
        ({"num_frames": 2}, (0, 12), (0, 2)),
        ({"num_frames": 6}, (0, 4, 8, 12, 16, 20), (0, 1, 2, 3, 4)),
        ({"max_frames": 2}, (0, 10), (0,)),
        ({"fps": 5, "max_frames": 2}, (0, 2), (0, 2)),
        ({"fps": 3, "max_frames": 30}, (0, 3, 6, 10, 13, 16, 20, 23), (0, 3)),
        ({"do_sample_frames": True}, (0, 10, 20), (0,)),
        ({"do_sample_frames": False}, range(25), range(5)),
    ],
)
def test_a_video_file_gives_the_frames_asked_for(
    options: dict[str, Any], long: Sequence[int], short: Sequence[int], clips: tuple[Path, Path]
) -> None:
    expected = make_processor()(
        text=["<image>", "<image>"], videos=[[frames_of(clips[0], *long)], [frames_of(clips[1], *short)]]
    )
    assert expected["num_frames"].tolist() == [[len(long)], [len(short)]]
    assert_same(make_processor()(text=["<image>", "<image>"], videos=clips, **options), expected)
    processor = FlamingoProcessor(make_image_processor(), make_tokenizer(), **without(options, "do_sample_frames"))
    assert_same(processor(text=["<image>", "<image>"], videos=clips, **only(options, "do_sample_frames")), expected)


def only(options: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key == name}


def without(options: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}


def test_a_call_says_otherwise_than_the_processor(clips: tuple[Path, Path]) -> None:
    processor = FlamingoProcessor(make_image_processor(), make_tokenizer(), fps=5, max_frames=4)
    for options, indices in (
        ({}, (0, 2, 4, 6)),
        ({"fps": 1}, (0, 10, 20)),
        ({"max_frames": 30}, range(0, 25, 2)),
        ({"num_frames": 5}, (0, 5, 10, 15, 20)),
        ({"do_sample_frames": False}, range(25)),
    ):
        expected = make_processor()(text="<image>", videos=[[frames_of(clips[0], *indices)]])
        assert_same(processor(text="<image>", videos=clips[0], **options), expected)
    processor = FlamingoProcessor(make_image_processor(), make_tokenizer(), num_frames=5)
    with pytest.raises(ValueError, match="max_frames and num_frames exclude each other, got 3 and 5"):
        processor(text="<image>", videos=clips[0], max_frames=3)


@pytest.mark.parametrize("path_type", [str, Path])
def test_videos_are_paths_in_every_layout(path_type: Callable[[Path], Any], clips: tuple[Path, Path]) -> None:
    long, short = map(path_type, clips)
    processor = make_processor()
    one = processor(text="<image>", videos=[[frames_of(clips[0], 0, 10, 20)]])
    for videos in (long, [long], [[long]], (long,), VideoFile(long)):
        assert_same(processor(text="<image>", videos=videos), one)
    for images in (long, [long], [[long]], VideoFile(long)):
        assert_same(processor(text="<image>", images=images), one)
    two = processor(text=["<image><image>"], images=[[frames_of(clips[0], 0, 10, 20), frames_of(clips[1], 0)]])
    assert_same(processor(text="<image><image>", videos=[long, short]), two)
    assert_same(processor(text="<image><image>", videos=[[long, short]]), two)
    mixed = processor(text=["<image>", "<image>"], videos=[[[CAT, DOG]], [frames_of(clips[1], 0)]])
    assert_same(processor(text=["<image>", "<image>"], videos=[[CAT, DOG], short]), mixed)


def test_images_and_files_of_both_kinds_stand_in_the_order_of_their_tokens(
    clips: tuple[Path, Path], tmp_path: Path
) -> None:
    CAT.save(tmp_path / "cat.png")
    images: Any = [[clips[0], tmp_path / "cat.png", DOG], [[EEL, CAT], str(clips[1])]]
    inputs = make_processor()(text=["<image>a<image><image>", "<image><image>"], images=images)
    assert inputs["num_frames"].tolist() == [[3, 1, 1], [2, 1, 0]]
    assert torch.equal(inputs["pixel_values"][0, 0], pixels_of(*frames_of(clips[0], 0, 10, 20)))
    assert torch.equal(inputs["pixel_values"][0, 1:, 0], pixels_of(CAT, DOG))
    assert torch.equal(inputs["pixel_values"][1, 0, :2], pixels_of(EEL, CAT))
    assert torch.equal(inputs["pixel_values"][1, 1, :1], pixels_of(*frames_of(clips[1], 0)))


def test_the_suffix_tells_a_video_from_an_image(tmp_path: Path) -> None:
    """An animated picture is its first frame among images, and a video where all are videos."""
    path = write_video(tmp_path / "moving.gif", 25)
    processor = make_processor()
    with Image.open(path) as image:
        assert_same(processor(text="<image>", images=path), processor(text="<image>", images=image))
    assert processor(text="<image>", videos=path)["num_frames"].tolist() == [[3]]
    assert processor(text="<image>", images=[VideoFile(path)])["num_frames"].tolist() == [[3]]


@pytest.mark.parametrize("form", ["list", "array", "tensor"])
def test_frames_that_are_given_are_all_taken_unless_a_number_is_asked_for(form: str) -> None:
    seven = [picture(i) for i in range(7)]
    processor = make_processor()

    def taken(**options: Any) -> Tensor:
        medium = make_medium(form, seven)
        return processor(text="<image><image>", images=[[medium, CAT]], **options)["pixel_values"]

    for options in ({}, {"num_frames": 7}, {"num_frames": 9}, {"do_sample_frames": False}):
        assert torch.equal(taken(**options)[0, 0], pixels_of(*seven)), options
    three = taken(num_frames=3)
    assert torch.equal(three[0, 0], pixels_of(seven[0], seven[2], seven[4]))
    assert torch.equal(three[0, 1, :1], pixels_of(CAT))
    assert torch.equal(taken(num_frames=1)[0, :, 0], pixels_of(seven[0], CAT))
    assert torch.equal(taken(max_frames=3)[0, 0], pixels_of(*seven[:3])), "they need no times"
    processor = FlamingoProcessor(make_image_processor(), make_tokenizer(), max_frames=3)
    assert torch.equal(taken()[0, 0], pixels_of(*seven)), "what is set once is for files"
    processor = FlamingoProcessor(make_image_processor(), make_tokenizer(), num_frames=3)
    assert torch.equal(taken()[0, 0], pixels_of(*seven)), "what is set once is for files"
    assert torch.equal(taken(do_sample_frames=True), three)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fps": 1, "num_frames": 2}, "fps and num_frames exclude each other, got 1 and 2; give one of them"),
        ({"fps": 0}, "fps must be a positive number, got 0"),
        ({"fps": float("nan")}, "fps must be a positive number, got nan"),
        ({"fps": float("inf")}, "fps must be a positive number, got inf"),
        ({"fps": "1"}, "fps must be a positive number, got '1'"),
        ({"num_frames": 0}, "num_frames must be a positive integer, got 0"),
        ({"num_frames": 2.0}, r"num_frames must be a positive integer, got 2.0"),
        ({"num_frames": True}, "num_frames must be a positive integer, got True"),
        (
            {"fps": 1, "do_sample_frames": False},
            "do_sample_frames=False takes all frames; leave out fps, num_frames and max_frames",
        ),
        ({"max_frames": 3, "do_sample_frames": False}, "do_sample_frames=False takes all frames"),
        ({"max_frames": 0}, "max_frames must be a positive integer, got 0"),
        ({"max_frames": 3, "num_frames": 2}, "max_frames and num_frames exclude each other, got 3 and 2"),
        ({"fps": 1, "max_frames": 2}, "row 1, medium 1: fps needs times"),
        ({"fps": 1}, "row 1, medium 1: fps needs times, but frames that are given as such have none; give num_frames"),
        ({"do_sample_frames": True}, "row 1, medium 1: fps needs times"),
    ],
)
def test_what_cannot_be_sampled_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_processor()(text=["a", "<image><image>"], images=[[], [CAT, [DOG, EEL]]], **options)


@pytest.mark.unchecked
@pytest.mark.parametrize("settings", [{"fps": 1, "num_frames": 2}, {"fps": -1}, {"num_frames": 0}, {"max_frames": 0}])
def test_a_processor_that_cannot_sample_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"fps|num_frames|max_frames"):
        FlamingoProcessor(make_image_processor(), make_tokenizer(), **settings)


def test_a_damaged_file_is_refused_by_row_medium_and_frame(clips: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.png"
    picture(0, 60, 60).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:200])
    video = tmp_path / "damaged.mkv"
    video.write_bytes(clips[1].read_bytes()[:200])
    for medium, message in (
        (damaged, r"row 1, medium 1: '.*damaged.png' cannot be read as an image: .*truncated"),
        ([CAT, DOG, damaged], r"row 1, medium 1, frame 2: '.*damaged.png' cannot be read as an image"),
        (video, r"row 1, medium 1: '.*damaged.mkv' cannot be read as a video"),
        ([CAT, video], r"row 1, medium 1: an image must be .* got list"),
        ([], r"row 1, medium 1: a video must have at least one frame, got none"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            make_processor()(text=["<image>", "<image><image>"], images=[[CAT], [DOG, medium]])
        if medium:
            with pytest.raises(ValueError, match=f"^{message}"):
                make_processor()(text=["<image>", "<image><image>"], images=[CAT, DOG, medium])


def test_a_decompression_bomb_is_refused_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CAT.save(tmp_path / "cat.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"^row 1, medium 0: '.*cat.png' cannot be .* decompression bomb"):
        make_processor()(text=["a", "<image>"], images=[[], [tmp_path / "cat.png"]])


# The processor: text


@pytest.mark.parametrize(
    "side, input_ids, attention_mask",
    [
        ("left", [[6, 1, 3, 7], [0, 0, 1, 4]], [[1, 1, 1, 1], [0, 0, 1, 1]]),
        ("right", [[6, 1, 3, 7], [1, 4, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]]),
    ],
)
def test_text_is_padded_on_the_side_asked_for(
    side: str, input_ids: list[list[int]], attention_mask: list[list[int]]
) -> None:
    inputs = make_processor()(text=["<image>a cat<EOC>", "a dog"], images=[[CAT], []], padding_side=side)
    assert inputs["input_ids"].tolist() == input_ids
    assert inputs["attention_mask"].tolist() == attention_mask


def test_numpy_arrays_are_what_the_tensors_are() -> None:
    arguments: Any = {"text": ["<image>a cat", "b"], "images": [[[CAT, DOG]], []]}
    arrays, tensors = (make_processor()(**arguments, return_tensors=kind) for kind in ("np", "pt"))
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    assert_same(BatchFeature({key: torch.from_numpy(array) for key, array in arrays.items()}), tensors)


def test_text_is_padded_to_the_length_asked_for() -> None:
    inputs = make_processor()(text="a cat", padding="max_length", max_length=4)
    assert inputs["attention_mask"].tolist() == [[1, 1, 0, 0]]


def test_types_of_tokens_are_not_returned_unless_asked_for() -> None:
    """Flamingo's language models take none, but some of their tokenizers return them."""
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    processor = FlamingoProcessor(make_image_processor(), tokenizer)
    assert processor(text="a").keys() == {"input_ids", "attention_mask"}
    assert "token_type_ids" in processor(text="a", return_token_type_ids=True)


def test_truncation_may_cut_text_behind_the_last_medium() -> None:
    inputs = make_processor()(text="a<image>cat dog", images=CAT, truncation=True, max_length=2)
    assert inputs["input_ids"].tolist() == [[1, 6]]


@pytest.mark.parametrize("in_chat", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [True, "max_length"])
def test_truncation_never_cuts_a_medium_from_its_token(padding: Any, side: str, in_chat: bool) -> None:
    tokenizer = make_tokenizer()
    tokenizer.truncation_side = side
    template = "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] or '<image>' }}"
    template += "{% endfor %}{% endfor %}"
    processor = FlamingoProcessor(make_image_processor(), tokenizer, chat_template=template)

    def encode(max_length: int) -> Any:
        options: dict[str, Any] = {"truncation": True, "max_length": max_length, "padding": padding}
        if not in_chat:
            return processor(text="a b<image>cat dog a", images=CAT, **options)
        content = [
            {"type": "text", "text": "a b"},
            {"type": "image", "image": CAT},
            {"type": "text", "text": "cat dog a"},
        ]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, **options
        )

    for max_length in range(1, 9):
        is_kept = max_length >= (4 if side == "left" else 3)
        if is_kept:
            assert (encode(max_length)["input_ids"] == processor.image_token_id).sum() == 1
        else:
            with pytest.raises(ValueError, match="row 0 has 1 <image> tokens, but 0 after tokenization; truncation"):
                encode(max_length)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_frame": 3}, "unexpected keyword argument 'num_frame'; did you mean num_frames?"),
        ({"truncate": True}, "unexpected keyword argument 'truncate'; did you mean truncation?"),
        ({"text_kwargs": {"pading": True}}, "unexpected keyword argument 'pading'; did you mean padding?"),
        ({"videos_kwargs": {"padding": True}}, "unexpected keyword argument 'padding'"),
        ({"images_kwargs": {"size": 3}}, "unexpected keyword argument 'size'; known are return_tensors"),
        ({"text_pair": "<image>"}, "unexpected keyword argument 'text_pair'"),
        ({"is_split_into_words": True}, "unexpected keyword argument 'is_split_into_words'"),
        ({"return_overflowing_tokens": True}, "unexpected keyword argument 'return_overflowing_tokens'"),
        ({"padding": True, "text_kwargs": {"padding": False}}, "padding is given twice, as True and as False"),
    ],
)
def test_an_option_that_is_unknown_or_given_twice_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make_processor()(text="a", **options)
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(TypeError, match=message):
        make_processor().apply_chat_template(messages, tokenize=True, processor_kwargs=options)
    with pytest.raises(TypeError, match=message):
        make_processor().apply_chat_template(messages, tokenize=True, **options)


def test_options_may_stand_where_transformers_sorts_them(clips: tuple[Path, Path]) -> None:
    arguments: Any = {"text": ["<image>a cat", "a"], "images": [[clips[0]], []]}
    expected = make_processor()(**arguments, padding_side="left", num_frames=2, return_tensors="np")
    nested = make_processor()(
        **arguments,
        text_kwargs={"padding_side": "left", "return_tensors": "np"},
        images_kwargs={"return_tensors": "np"},
        videos_kwargs={"num_frames": 2},
        common_kwargs={"return_tensors": "np"},
    )
    assert nested.keys() == expected.keys()
    for key in nested:
        np.testing.assert_array_equal(nested[key], expected[key])


def test_without_tensors_there_are_lists() -> None:
    arguments: Any = {"text": ["<image>a cat", "b"], "images": [[[CAT, DOG]], []]}
    lists, tensors = (make_processor()(**arguments, return_tensors=kind) for kind in (None, "pt"))
    assert lists["input_ids"] == tensors["input_ids"].tolist()
    assert lists["num_frames"] == tensors["num_frames"].tolist() == [[2], [0]]
    assert [type(pixels) for pixels in lists["pixel_values"]] == [np.ndarray] * 2
    assert torch.equal(torch.tensor(np.array(lists["pixel_values"])), tensors["pixel_values"])
    ragged = make_processor()(**arguments, return_tensors=None, padding=False)
    assert ragged["input_ids"] == [[6, 1, 3], [2]]
    with pytest.raises(ValueError, match="row 0 has 1 <image> tokens, but 0 after"):
        make_processor()(**arguments, return_tensors=None, padding=False, truncation=True, max_length=0)


def test_sound_is_refused() -> None:
    with pytest.raises(ValueError, match="a Flamingo takes text, images and videos; got audio"):
        make_processor()(text="a", audio=[np.zeros(5)])


def test_what_was_encoded_is_decoded() -> None:
    processor: Any = make_processor()
    input_ids = processor(text=["<image>a cat<EOC>", "dog"], images=CAT)["input_ids"]
    assert processor.batch_decode(input_ids, skip_special_tokens=True) == ["a cat", "dog"]
    assert processor.decode(input_ids[0]) == "<image> a cat <EOC>"
    assert processor.post_process_image_text_to_text(input_ids) == ["a cat", "dog"]
    assert processor.post_process_image_text_to_text(input_ids, skip_special_tokens=False)[0] == "<image> a cat <EOC>"


# transformers reads the names of a constructor's arguments in its code, which older jaxtyping hides behind its checks.
@pytest.mark.unchecked
@pytest.mark.parametrize("loader", [FlamingoProcessor, AutoProcessor])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fps": 2, "max_frames": 3},
        {"num_frames": 4, "chat_template": "{{ messages[0]['content'] }}"},
        {"chat_template": NAMED},
    ],
)
@pytest.mark.parametrize("image_token, end_of_chunk_token", [SPECIAL, ("<photo>", "<stop>")])
def test_a_processor_round_trips(
    loader: Any,
    settings: dict[str, Any],
    image_token: str,
    end_of_chunk_token: str,
    tmp_path: Path,
    clips: tuple[Path, Path],
) -> None:
    tokenizer = make_tokenizer((image_token, end_of_chunk_token))
    processor = FlamingoProcessor(
        make_image_processor(crop_pct=0.7),
        tokenizer,
        image_token=image_token,
        end_of_chunk_token=end_of_chunk_token,
        **settings,
    )
    processor.save_pretrained(tmp_path)
    restored = loader.from_pretrained(tmp_path)
    assert type(restored) is FlamingoProcessor
    assert (restored.image_token, restored.end_of_chunk_token) == (image_token, end_of_chunk_token)
    assert restored.image_token_id == processor.image_token_id
    assert restored.chat_template == processor.chat_template
    for name in ("fps", "num_frames", "max_frames"):
        assert getattr(restored, name) == settings.get(name)
    text = [f"{image_token}a cat{end_of_chunk_token}{image_token}", f"b{image_token}"]
    images = [[CAT, [DOG, EEL]], [clips[0]]]
    assert_same(restored(text=text, images=images), processor(text=text, images=images))


# What is refused


@pytest.mark.parametrize(
    "text, media, message",
    [
        (["a", "<image>"], {"images": [[], [CAT, DOG]]}, "row 1 has 1 <image> tokens but 2 media"),
        (["<image><image>", "a"], {"images": [[CAT], []]}, "row 0 has 2 <image> tokens but 1 media"),
        (["<image>"], {}, "row 0 has 1 <image> tokens but 0 media"),
        (["<image>"], {"images": [None]}, "row 0 has 1 <image> tokens but 0 media"),
        ("a", {"images": CAT}, "row 0 has 0 <image> tokens but 1 media"),
        ("<image>", {"images": [[CAT, DOG]]}, r"\(a video in images is a list of frames\)"),
        (
            ["<image>", "a", "<image><image>"],
            {"images": [CAT, DOG]},
            r"the texts have 3 <image> tokens \(1, 0, 2 by row\), but there are 2 media; give one list of media a text",
        ),
        (["<image>", "a"], {"images": []}, r"the texts have 1 <image> tokens \(1, 0 by row\), but there are 0 media"),
        (["<image>", "<image>"], {"images": [[CAT], [DOG], []]}, "there are 2 texts, but media for 3; give one list"),
        (["<image>", "<image>"], {"images": [[CAT, DOG]]}, "there are 2 texts, but media for 1; give one list a text"),
        ("<image>", {"images": CAT, "videos": [[CAT]]}, "give images and videos together as images, in the order"),
    ],
)
def test_media_that_do_not_fit_the_text_are_refused(text: Any, media: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_processor()(text=text, **media)


@given(st.lists(st.sampled_from(["<", "<EOC>", "a<", "<<", "a<b", "cat"]), max_size=6))
def test_other_tokens_may_hold_that_of_a_medium_in_their_names(pieces: list[str]) -> None:
    """As in flamingo-mini, where `<` stands for a medium."""
    tokenizer = make_tokenizer(("<", "<EOC>", "a<"))
    processor = FlamingoProcessor(make_image_processor(), tokenizer, image_token="<")
    text = "".join(pieces)
    media = tokenizer(text)["input_ids"].count(processor.image_token_id)
    assert processor(text=text, images=[CAT] * media)["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match=f"row 0 has {media} < tokens but {media + 1} media"):
        processor(text=text, images=[[CAT] * (media + 1)])


def test_truncation_must_not_cut_a_medium() -> None:
    with pytest.raises(
        ValueError, match=r"row 1 has 2 <image> tokens, but 1 after tokenization; .* raise max_length, or drop whole"
    ):
        make_processor()(text=["a", "<image>a<image>"], images=[CAT, DOG], truncation=True, max_length=2)


@pytest.mark.parametrize(
    "media, message",
    [
        ({"images": [[[]]]}, "a video must have at least one frame, got none"),
        ({"images": [[as_array(CAT)[:0]]]}, "a video must have at least one frame, got none"),
        ({"videos": [[]]}, "row 0 has 1 <image> tokens but 0 media"),
        ({"videos": [[[CAT], []]]}, "a video must have at least one frame, got none"),
        ({"videos": CAT}, "videos must be lists of frames or video files, got Image"),
        (
            {"videos": torch.zeros(4, 8, 8)},
            r"videos must be lists of frames or video files, got Tensor of shape \(4, 8, 8\)",
        ),
        ({"images": 3}, r"images must be a PIL image, .* or a path, or lists of them, got int"),
        ({"images": {"cat": CAT}}, "images must be a PIL image, .* or lists of them, got dict"),
        ({"images": torch.tensor(0.5)}, r"images must be a PIL image, .* got Tensor of shape \(\)"),
        (
            {"images": [{"cat": CAT}]},
            "an image must be a PIL image, .* a video a list of such images or a video file, got dict",
        ),
        ({"images": [[3]]}, "an image must be a PIL image, .* a video a list of such images or a video file, got int"),
        ({"images": [[np.zeros(5)]]}, r"an image must be .* got ndarray of shape \(5,\)"),
        ({"images": [[[CAT, None]]]}, "an image must be .* got list"),
    ],
)
def test_media_of_another_kind_are_refused(media: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_processor()(text="<image>", **media)


@pytest.mark.parametrize(
    "image, message",
    [
        ({"cat": CAT}, "an image must be a PIL image, .* or a path, got dict"),
        (3, "an image must be a PIL image, .* or a path, got int"),
        (None, "an image must be a PIL image, .* or a path, got NoneType"),
        (np.zeros(5), r"an image must be a PIL image, .* or a path, got shape \(5,\)"),
        (np.zeros((8, 8, 5)), r"an image must be a PIL image, .* or a path, got shape \(8, 8, 5\)"),
        (torch.zeros(5, 8, 8), r"an image must be a PIL image, .* or a path, got shape \(5, 8, 8\)"),
        (torch.zeros(8, 8, 3), r"tensor \(channels, height, width\) or a path, got shape \(8, 8, 3\)"),
        (torch.zeros(3, 0, 8), r"an image must be a PIL image, .* or a path, got shape \(3, 0, 8\)"),
        (Image.new("RGB", (0, 8)), r"must have at least one pixel, got width and height \(0, 8\)"),
        (np.full((8, 8, 3), 255.0), r"must be in 0..1, got 255..255; divide by 255, or give integers"),
        (torch.tensor([[0.0, -0.5]]), r"must be in 0..1, got -0.5..0; divide by 255, or give integers"),
        (np.full((8, 8), np.nan), r"must be in 0..1, got nan..nan"),
        (Image.new("F", (8, 8), 2), r"must be in 0..1, got 2..2"),
        (Image.new("I", (8, 8), 65536), r"of mode I must be in 0..65535, got 65536..65536; scale them first"),
        (Image.new("I", (8, 8), -1), r"of mode I must be in 0..65535, got -1..-1; scale them first"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"unsigned integers of 8 or 16 bits or .*, got torch.int64; convert"),
        (np.zeros((8, 8), dtype=bool), r"unsigned integers of 8 or 16 bits or .*, got bool; convert it"),
        (np.zeros((8, 8), dtype=object), r"unsigned integers of 8 or 16 bits or .*, got object; convert it"),
        ("cat.png", r"there is no image file 'cat.png'; images are never fetched from elsewhere, load it first"),
        ("https://example.org/cat.png", "there is no image file 'https://example.org/cat.png'; images are never"),
        (".", "there is no image file '.'"),
        ("data:image/png;base64," + "A" * 9000, "there is no image file 'data:image/png;base64,A{100,200}'"),
    ],
)
def test_an_image_of_another_kind_is_refused_by_number(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^image 1: .*{message}"):
        pixels_of(CAT, image)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif"])
def test_a_damaged_file_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"damaged.{suffix}"
    picture(0, 60, 60).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"image 1: '.*damaged.{suffix}' cannot be read as an image: .*truncated"):
        pixels_of(CAT, path)
    with Image.open(path) as image, pytest.raises(ValueError, match=r"image 1: .*truncated"):
        pixels_of(CAT, image)


def test_a_file_that_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_text("cat")
    with pytest.raises(ValueError, match=r"image 0: '.*cat.png' cannot be read as an image: cannot identify"):
        pixels_of(tmp_path / "cat.png")


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CAT.save(tmp_path / "cat.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"cat.png' cannot be read as an image: .* decompression bomb"):
        pixels_of(tmp_path / "cat.png")


def test_images_of_other_than_1_or_3_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 4; make pixel_values of such images yourself"):
        make_image_processor(channels=4)(CAT)


@pytest.mark.parametrize("text", [None, []])
def test_text_is_required(text: Any) -> None:
    with pytest.raises(ValueError, match=r"text must be a string or a list of strings, got (None|\[\]); pass text="):
        make_processor()(CAT, text)


@pytest.mark.unchecked
@pytest.mark.parametrize("text", [3, b"a", ["a", None], {"a": "b"}])
def test_text_of_another_kind_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="text must be a string or a list of strings, got "):
        make_processor()(text=text)


def test_other_frameworks_are_refused() -> None:
    with pytest.raises(ValueError, match='return_tensors must be "pt", "np" or None, got \'tf\''):
        make_processor()(text="a", return_tensors="tf")


# The special tokens


def test_a_token_that_the_tokenizer_lacks_is_refused_until_added() -> None:
    tokenizer = make_tokenizer(special=("<EOC>",))
    with pytest.raises(ValueError, match=r"does not know '<image>' as one token; add it with tokenizer.add_tokens"):
        FlamingoProcessor(make_image_processor(), tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert FlamingoProcessor(make_image_processor(), tokenizer).image_token_id == len(tokenizer) - 1


def test_the_end_of_chunk_token_is_needed_too() -> None:
    with pytest.raises(ValueError, match="does not know '<EOC>' as one token"):
        FlamingoProcessor(make_image_processor(), make_tokenizer(special=("<image>",)))


def test_a_token_that_is_split_is_refused() -> None:
    tokenizer = make_tokenizer(special=("<EOC>",), words=(*WORDS, "<image>"))
    assert tokenizer.convert_tokens_to_ids("<image>") == len(WORDS)
    with pytest.raises(ValueError, match="does not know '<image>' as one token"):
        FlamingoProcessor(make_image_processor(), tokenizer)


@pytest.mark.parametrize("is_added", [False, True])
def test_an_ordinary_word_is_refused(is_added: bool) -> None:
    words = WORDS if is_added else (*WORDS, "<image>")
    tokenizer = make_tokenizer(special=("<EOC>",), words=words, splitter=pre_tokenizers.WhitespaceSplit)
    if is_added:
        tokenizer.add_tokens(["<image>"])
    with pytest.raises(ValueError, match=r"'<image>' is an ordinary word of the tokenizer, .*; choose another token"):
        FlamingoProcessor(make_image_processor(), tokenizer)


def test_a_special_token_that_is_there_is_used() -> None:
    tokenizer = make_tokenizer(special=("<EOC>", "<picture>"))
    assert special_token_id(tokenizer, "<picture>") == len(tokenizer) - 1
    processor = FlamingoProcessor(make_image_processor(), tokenizer, image_token="<picture>")
    assert processor.image_token_id == len(tokenizer) - 1
    assert processor(text="<picture>a", images=CAT)["num_frames"].tolist() == [[1]]


def test_a_word_made_special_is_used() -> None:
    tokenizer = make_tokenizer(words=(*WORDS, "<image>"))
    assert special_token_id(tokenizer, "<image>") == len(WORDS)

"""FlamingoProcessor: text and images in, tensors for the model out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, no_type_check

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from flamingo_blocks.configuration_flamingo import FlamingoConfig

_KINDS = "a PIL image, a numpy array (height, width, channels), a tensor (channels, height, width) or a path"


class FlamingoImageProcessor(BaseImageProcessor):
    """Bring images to the size, range and statistics that a timm model was trained with.

    The transform is timm's own (`timm.data.create_transform`); its settings are saved as plain JSON.

    Args:
        size: Height and width of the result.
        image_mean: Of each channel, for images in 0..1.
        image_std: Of each channel.
        interpolation: `"bicubic"`, `"bilinear"`, `"nearest"`, ...
        crop_pct: Share of the shorter side that a centre crop keeps.
        crop_mode: `"center"`, `"squash"` or `"border"`, as in timm.
        channels: 3 for colour, 1 for grey. Images are converted.
        **kwargs: As transformers' image processors take them.

    Example:
        ```python
        from PIL import Image
        from flamingo_blocks.processing_flamingo import FlamingoImageProcessor

        image_processor = FlamingoImageProcessor(size={"height": 32, "width": 32})
        pixel_values = image_processor([Image.new("L", (40, 30))])["pixel_values"]  # images channels height width
        ```
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012
    size: dict[str, int]
    image_mean: list[float]
    image_std: list[float]
    interpolation: str
    crop_pct: float
    crop_mode: str
    channels: int

    @no_type_check  # transformers looks at the code of constructors
    def __init__(
        self,
        size: dict[str, int] | None = None,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        interpolation: str = "bicubic",
        crop_pct: float = 1.0,
        crop_mode: str = "center",
        channels: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = {"height": 224, "width": 224} if size is None else dict(size)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.interpolation = interpolation
        self.crop_pct = crop_pct
        self.crop_mode = crop_mode
        self.channels = channels

    @classmethod
    def from_timm(cls, backbone: Any, *, image_size: tuple[int, int], channels: int = 3) -> "FlamingoImageProcessor":
        """Read the settings from a timm model's data config.

        Args:
            backbone: A timm model. One without a config gets timm's defaults.
            image_size: Height and width of the images that the model is to encode.
            channels: Of the images.
        """
        import timm.data

        data: Any = timm.data.resolve_model_data_config(backbone)  # type: ignore[attr-defined, no-untyped-call]
        return cls(
            size={"height": image_size[0], "width": image_size[1]},
            image_mean=_for_channels(data["mean"], channels),
            image_std=_for_channels(data["std"], channels),
            interpolation=data["interpolation"],
            crop_pct=data["crop_pct"],
            crop_mode=data["crop_mode"],
            channels=channels,
        )

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
        """Transform an image, or a list of them.

        Args:
            images: PIL images of any mode, numpy arrays (height, width, channels), tensors (channels, height, width) or
                paths. Integers are in 0..255 (0..65535 for 16 bits, also in PIL's mode I), floating-point numbers in
                0..1; all are rounded to 8 bits. Images are turned upright, and lose their alpha channel.
            return_tensors: `"pt"` or `"np"`.
            **_: Settings of other image processors are ignored.

        Raises:
            ValueError: If an image is of another kind, or its numbers out of range.
        """
        import timm.data

        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}; make pixel_values of such images yourself")
        is_batch = isinstance(images, list | tuple) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 4)
        images = list(images) if is_batch else [images]
        transform: Any = timm.data.create_transform(  # type: ignore[attr-defined]
            input_size=(self.channels, self.size["height"], self.size["width"]),
            is_training=False,
            interpolation=self.interpolation,
            mean=tuple(self.image_mean),
            std=tuple(self.image_std),
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        pixels = []
        for i, image in enumerate(images):
            try:
                loaded = _load(image, self.channels)
            except Exception as error:  # of many kinds, where a PIL image is read only now
                raise ValueError(f"image {i}: {error}") from error
            pixels.append(transform(loaded))
        shape = (0, self.channels, self.size["height"], self.size["width"])
        return BatchFeature(
            {"pixel_values": torch.stack(pixels) if pixels else torch.zeros(shape)}, tensor_type=return_tensors
        )


class FlamingoProcessor(ProcessorMixin):
    """Tokenize text and transform its images.

    Each medium, an image or a video, stands in the text as one `<image>` token.

    Args:
        image_processor: Transforms images.
        tokenizer: The language model's, with the two special tokens.
        chat_template: As in transformers.
        image_token: Stands for a medium.
        end_of_chunk_token: Ends what belongs to a medium, e.g. a caption.

    Attributes:
        image_token_id: Id of `image_token`.

    Raises:
        ValueError: If the tokenizer does not know a token as one special token.

    Example:
        ```python
        # inputs = processor(
        #     text=["<image>A cat.<EOC><image>", "No image at all."],
        #     images=[[cat, dog], []],
        # )
        # model.generate(**inputs)
        ```
    """

    image_token: str
    end_of_chunk_token: str
    image_token_id: int

    @no_type_check  # transformers looks at the code of constructors
    def __init__(
        self,
        image_processor: FlamingoImageProcessor | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        end_of_chunk_token: str = "<EOC>",
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = image_token
        self.end_of_chunk_token = end_of_chunk_token
        self.image_token_id = special_token_id(tokenizer, image_token)
        special_token_id(tokenizer, end_of_chunk_token)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what `__call__` can return."""
        return ["input_ids", "attention_mask", "pixel_values", "num_frames"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare a text, or a batch of them.

        Args:
            images: The media of the texts, in the order of their `<image>` tokens. Each is an image (a PIL image, a
                numpy array, a tensor or a path) or a video: a list of such images, or an array with one more axis in
                front.

                - One list a text: `[[cat, dog], []]`. `[[[frame, frame, frame]]]` is one text with one video.
                - One list for all texts, dealt out as the texts ask: `[cat, dog]`.
                - A single image, for a single text.
            text: The texts. Required.
            videos: Instead of `images` where all media are videos: `[[frame, frame], [frame]]`, or one such list a
                text.
            padding: As the tokenizer takes it. Choose the side with `padding_side`; generating wants `"left"`.
            return_tensors: `"pt"` or `"np"`.
            **kwargs: Passed on to the tokenizer, e.g. `truncation`, `max_length`, `padding_side`.

        Returns:
            `input_ids` and `attention_mask`, (batch, text); if there are media, `pixel_values`, (batch, media, frames,
            channels, height, width), and `num_frames`, (batch, media), 0 where a medium is padding.

        Raises:
            ValueError: If a row's `<image>` tokens and media do not agree in number, also after truncation, or
                something is of the wrong kind.
        """
        if return_tensors not in ("pt", "np"):
            raise ValueError(f'return_tensors must be "pt" or "np", got {return_tensors!r}')
        if isinstance(text, str):
            text = [text]
        if not isinstance(text, list | tuple) or not text or not all(isinstance(row, str) for row in text):
            raise ValueError(
                f"text must be a string or a list of strings, got {text!r:.80}; pass text=..., as images come first"
            )
        if images is not None and videos is not None:
            raise ValueError("give images and videos together as images, in the order of their <image> tokens")
        counts = [row.count(self.image_token) for row in text]
        rows = _media_by_row(images if videos is None else videos, counts, are_videos=videos is not None)
        for row, (count, media) in enumerate(zip(counts, rows, strict=True)):
            if count != len(media):
                raise ValueError(
                    f"row {row} has {count} {self.image_token} tokens but {len(media)} media; every image or video "
                    f"needs exactly one {self.image_token} in its text (a video in images is a list of frames)"
                )
        kwargs.setdefault("return_token_type_ids", False)
        data = dict(self.tokenizer(list(text), padding=padding, return_tensors=return_tensors, **kwargs))
        kept = (np.asarray(data["input_ids"]) == self.image_token_id).sum(1)
        for row, (count, left) in enumerate(zip(counts, kept.tolist(), strict=True)):
            if count != left:
                raise ValueError(
                    f"row {row} has {count} {self.image_token} tokens, but {left} after tokenization; truncation must "
                    "not cut a medium from its token: raise max_length, or drop whole examples"
                )
        if any(counts):
            data |= self._transform(rows)
        return BatchFeature(data, tensor_type=return_tensors)

    def _transform(self, rows: list[list[list[Any]]]) -> dict[str, Tensor]:
        """Transform all frames at once, and pad media and frames with zeros."""
        frames = [frame for media in rows for medium in media for frame in medium]
        pixels = self.image_processor(frames)["pixel_values"]
        num_frames = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, media in enumerate(rows):
            num_frames[row, : len(media)] = torch.tensor([len(medium) for medium in media], dtype=torch.long)
        longest = int(num_frames.max())
        is_real = torch.arange(longest) < num_frames[..., None]
        pixel_values = pixels.new_zeros(*is_real.shape, *pixels.shape[1:])
        pixel_values[is_real] = pixels
        return {"pixel_values": pixel_values, "num_frames": num_frames}


def special_token_id(tokenizer: Any, token: str) -> int:
    """Look up a token that must be one special token.

    Args:
        tokenizer: A tokenizer of transformers.
        token: E.g. `<image>`.

    Raises:
        ValueError: If the tokenizer splits the token, or takes it for an ordinary word.
    """
    token_id = tokenizer.convert_tokens_to_ids(token)
    ids = tokenizer(f"a {token} b", add_special_tokens=False)["input_ids"]
    if token_id is None or token_id == tokenizer.unk_token_id or ids.count(token_id) != 1:
        raise ValueError(
            f"the tokenizer does not know {token!r} as one token; add it with "
            "tokenizer.add_tokens([token], special_tokens=True), as build_flamingo does"
        )
    if token_id not in tokenizer.all_special_ids and not _is_added_as_special(tokenizer, token_id):
        raise ValueError(
            f"{token!r} is an ordinary word of the tokenizer, not a special token, so that any text may hold it; "
            "choose another token"
        )
    return int(token_id)


def _is_added_as_special(tokenizer: Any, token_id: int) -> bool:
    added = getattr(tokenizer, "added_tokens_decoder", {}).get(token_id)
    return added is not None and bool(added.special)


def _media_by_row(media: Any, counts: Sequence[int], *, are_videos: bool) -> list[list[list[Any]]]:
    """Sort media into rows of media of frames."""
    if media is None:
        return [[] for _ in counts]
    is_medium = _is_video if are_videos else _is_image
    if is_medium(media):
        media = [media]
    elif isinstance(media, np.ndarray | Tensor) and media.ndim > 3:
        media = list(media)
    if not isinstance(media, list | tuple):
        wanted = "videos must be lists of frames" if are_videos else f"images must be {_KINDS}, or lists of them"
        raise ValueError(f"{wanted}, got {_kind(media)}")
    if media and all(row is None or (isinstance(row, list | tuple) and not is_medium(row)) for row in media):
        if len(media) != len(counts):
            raise ValueError(f"there are {len(counts)} texts, but media for {len(media)}; give one list a text")
        return [[_frames(medium) for medium in row or ()] for row in media]
    flat = [_frames(medium) for medium in media]
    if len(counts) == 1:
        return [flat]
    if len(flat) != sum(counts):
        raise ValueError(
            f"the texts have {sum(counts)} <image> tokens ({', '.join(map(str, counts))} by row), but there are "
            f"{len(flat)} media; give one list of media a text to see which row is wrong"
        )
    remaining = iter(flat)
    return [[next(remaining) for _ in range(count)] for count in counts]


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image | str | Path) or (
        isinstance(value, np.ndarray | Tensor) and value.ndim in (2, 3)
    )


def _is_video(value: Any) -> bool:
    if isinstance(value, np.ndarray | Tensor):
        return value.ndim == 4
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_image, value))


def _frames(medium: Any) -> list[Any]:
    """Give the frames of a medium; an image has one."""
    if _is_image(medium):
        return [medium]
    if (isinstance(medium, list | tuple) or _is_video(medium)) and not len(medium):
        raise ValueError("a video must have at least one frame, got none")
    if _is_video(medium):
        return list(medium)
    raise ValueError(f"an image must be {_KINDS}, a video a list of such images, got {_kind(medium)}")


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{name} of shape {tuple(value.shape)}" if hasattr(value, "shape") else name


def _load(image: Any, channels: int) -> Image.Image:
    """Bring an image to an upright PIL image of 8 bits, in colour or grey."""
    if isinstance(image, str | Path):
        image = _open(image)
    elif isinstance(image, np.ndarray | Tensor):
        image = _from_array(image)
    elif not isinstance(image, Image.Image):
        raise ValueError(f"an image must be {_KINDS}, got {type(image).__name__}")
    if 0 in image.size:
        raise ValueError(f"an image must have at least one pixel, got width and height {image.size}")
    image = _turn_upright(image)
    if image.mode == "I":
        lowest, highest = image.getextrema()
        if lowest < 0 or highest > 65535:
            raise ValueError(
                f"the numbers of an image of mode I must be in 0..65535, got {lowest}..{highest}; scale them first"
            )
        image = _from_array(np.asarray(image).astype(np.uint16))
    elif image.mode == "F" or image.mode.startswith("I;"):
        image = _from_array(np.asarray(image))
    elif image.mode == "P":  # PIL warns where a palette with transparency skips this step
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


def _open(path: str | Path) -> Image.Image:
    """Read a whole file here, so that a damaged one is named."""
    name = repr(str(path)[:200])
    try:
        is_file = Path(path).is_file()
    except OSError:  # longer than a path can be
        is_file = False
    if not is_file:
        raise ValueError(f"there is no image file {name}; images are never fetched from elsewhere, load it first")
    try:
        with Image.open(path) as image:
            return image.copy()
    except Exception as error:  # decoders raise errors of many kinds
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def _turn_upright(image: Image.Image) -> Image.Image:
    image = image.copy()  # older Pillow turns TIFF images when it reads them, but tells only the copy
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data, common on the web, say nothing about the pixels
        return image


def _from_array(image: np.ndarray | Tensor) -> Image.Image:
    """Round the numbers to 8 bits, so that an image gives the same pixels, of whichever kind it is."""
    if isinstance(image, Tensor):
        tensor = image.detach().cpu()
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    else:
        array = image
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and (isinstance(image, Tensor) or array.shape[-1] > 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or not 1 <= array.shape[-1] <= 4 or 0 in array.shape:
        raise ValueError(f"an image must be {_KINDS}, got shape {tuple(image.shape)}")
    if array.dtype.kind == "f":
        if not ((array >= 0) & (array <= 1)).all():
            raise ValueError(
                "the floating-point numbers of an image must be in 0..1, got "
                f"{array.min():g}..{array.max():g}; divide by 255, or give integers"
            )
        array = np.rint(255 * array.astype(np.float32))
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = np.rint(array / 257)
    elif array.dtype != np.uint8:
        raise ValueError(
            "an image must hold unsigned integers of 8 or 16 bits or floating-point numbers in 0..1, "
            f"got {image.dtype}; convert it"
        )
    return Image.fromarray(array.astype(np.uint8).squeeze(-1) if array.shape[-1] == 1 else array.astype(np.uint8))


def _for_channels(values: Sequence[float], channels: int) -> list[float]:
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


# One class for both of transformers' backends: which one resizes is timm's choice.
_BACKENDS = {"torchvision": FlamingoImageProcessor, "pil": FlamingoImageProcessor}
AutoImageProcessor.register(FlamingoConfig, image_processor_classes=_BACKENDS, exist_ok=True)
AutoProcessor.register(FlamingoConfig, FlamingoProcessor, exist_ok=True)

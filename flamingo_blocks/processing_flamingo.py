"""FlamingoProcessor: text, images and videos in, tensors for the model out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import TextKwargs

from flamingo_blocks.chat import collect_media, default_chat_template
from flamingo_blocks.configuration_flamingo import FlamingoConfig
from flamingo_blocks.video import VideoFile, check_sampling, has_video_suffix

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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what it makes of an image."""
        return self.channels, self.size["height"], self.size["width"]

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
        is_batch = isinstance(images, list | tuple) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 4)
        images = list(images) if is_batch else [images]
        pixel_values = self.transform((f"image {i}", image) for i, image in enumerate(images))
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def transform(self, images: Iterable[tuple[str, Any]]) -> Float[Tensor, "images channels height width"]:
        """Transform images one by one, so that no more than one must be held in memory.

        Args:
            images: Names and images. Names stand in errors.

        Raises:
            ValueError: If an image is of another kind, or its numbers out of range.
        """
        import timm.data

        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}; make pixel_values of such images yourself")
        transform: Any = timm.data.create_transform(  # type: ignore[attr-defined]
            input_size=self.image_shape,
            is_training=False,
            interpolation=self.interpolation,
            mean=tuple(self.image_mean),
            std=tuple(self.image_std),
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        pixels = []
        for name, image in images:
            try:
                loaded = _load(image, self.channels)
                self._check_thickness(loaded)
            except Exception as error:  # of many kinds, where a PIL image is read only now
                raise ValueError(f"{name}: {error or type(error).__name__}") from error
            pixels.append(transform(loaded))
        return torch.stack(pixels) if pixels else torch.zeros(0, *self.image_shape)

    def _check_thickness(self, image: Image.Image) -> None:
        """Refuse a line of pixels that would fill the memory when its shorter side is brought to size."""
        limit = Image.MAX_IMAGE_PIXELS
        if self.crop_mode != "center" or limit is None:
            return
        scale = max(self.size["width"] / image.width, self.size["height"] / image.height) / self.crop_pct
        if image.width * image.height * scale**2 > 2 * limit:  # as Pillow guards images
            raise ValueError(
                f"an image of {image.width}x{image.height} pixels is too thin to be scaled until it covers "
                f"{self.size['width']}x{self.size['height']}; crop it, leave it out, or set crop_mode to 'squash'"
            )


# Those of the tokenizer's options under which each text stays one row, where this version of transformers has them.
_TEXT_OPTIONS = (
    "add_special_tokens",
    "max_length",
    "pad_to_multiple_of",
    "padding",
    "padding_side",
    "return_attention_mask",
    "return_length",
    "return_mm_token_type_ids",
    "return_offsets_mapping",
    "return_special_tokens_mask",
    "return_tensors",
    "return_text_replacement_offsets",
    "return_token_type_ids",
    "sanitize_control_tokens",
    "truncation",
    "verbose",
)
# What __call__ takes besides texts and media, by transformers' names for the parts that it is for.
_OPTIONS = {
    "text_kwargs": tuple(name for name in _TEXT_OPTIONS if name in TextKwargs.__annotations__),
    "images_kwargs": ("return_tensors",),
    "videos_kwargs": ("do_sample_frames", "fps", "max_frames", "num_frames", "return_tensors"),
    "audio_kwargs": ("return_tensors",),
}
_ALL_OPTIONS = frozenset(name for names in _OPTIONS.values() for name in names)


class FlamingoProcessor(ProcessorMixin):
    """Tokenize text and transform its images and videos.

    Each medium, an image or a video, stands in the text as one `<image>` token.

    Args:
        image_processor: Transforms images.
        tokenizer: The language model's, with the two special tokens.
        chat_template: As in transformers; it writes each part `{"type": "image"}` of a message as `<image>`. Videos are
            images to it. None: the tokenizer's own, which gets to see text with `<image>` where it knows text only;
            without one, a dialogue as in the paper: `User: <image>What is this?`, `Flamingo: A cat.<EOC>`.
        image_token: Stands for a medium.
        end_of_chunk_token: Ends what belongs to a medium, e.g. a caption.
        fps: Frames of a video file per second, unless a call says otherwise. None: 1, as in the paper.
        num_frames: Instead: that many, evenly spread.
        max_frames: The most frames of a video file, unless a call says otherwise: the first ones. None: as many as it
            has. The paper's training takes 8.

    Attributes:
        image_token_id: Id of `image_token`.

    Raises:
        ValueError: If the tokenizer does not know a token as one special token.

    Example:
        ```python
        # inputs = processor(
        #     text=["<image>A cat.<EOC><image>", "No image at all."],
        #     images=[[cat, "dog.mp4"], []],
        # )
        # model.generate(**inputs)
        ```
    """

    image_token: str
    end_of_chunk_token: str
    image_token_id: int
    fps: int | float | None
    num_frames: int | None
    max_frames: int | None

    @no_type_check  # transformers looks at the code of constructors
    def __init__(
        self,
        image_processor: FlamingoImageProcessor | None = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
        end_of_chunk_token: str = "<EOC>",
        fps: int | float | None = None,
        num_frames: int | None = None,
        max_frames: int | None = None,
    ) -> None:
        self.image_token_id = special_token_id(tokenizer, image_token)
        special_token_id(tokenizer, end_of_chunk_token)
        if chat_template is None:
            chat_template = default_chat_template(tokenizer, image_token, end_of_chunk_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = image_token
        self.end_of_chunk_token = end_of_chunk_token
        check_sampling(fps, num_frames, max_frames)
        self.fps = fps if fps is None or isinstance(fps, int) else float(fps)  # numbers of numpy are no JSON
        self.num_frames = None if num_frames is None else int(num_frames)
        self.max_frames = None if max_frames is None else int(max_frames)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what `__call__` can return."""
        return ["input_ids", "attention_mask", "pixel_values", "num_frames"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare a text, or a batch of them.

        Args:
            images: The media of the texts, in the order of their `<image>` tokens. Each is an image (a PIL image, a
                numpy array, a tensor or a path) or a video: a list of such images, an array with one more axis in
                front, a path that ends as those of videos do (`.mp4`, `.mkv`, `.webm`, ...), or any other one as
                `VideoFile(path)`.

                - One list a text: `[[cat, dog], []]`. `[[[frame, frame, frame]]]` is one text with one video.
                - One list for all texts, dealt out as the texts ask: `[cat, dog]`.
                - A single image, for a single text.
            text: The texts. Required.
            videos: Instead of `images` where all media are videos: `[[frame, frame], [frame]]`, or one such list a
                text. Each path is a video file.
            audio: There is none.
            **kwargs: These, and the tokenizer's `add_special_tokens`, `truncation`, `max_length`,
                `pad_to_multiple_of` and `return_...`. They can also stand in `text_kwargs`, `videos_kwargs` or
                `common_kwargs`, as elsewhere in transformers.

                - `padding`: As the tokenizer takes it, True if not given. Choose the side with `padding_side`;
                  generating wants `"left"`.
                - `return_tensors`: `"pt"`, the default, or `"np"`; None gives lists, with an array of pixels a text.
                - `fps`: Take this many frames of each second of a video file: those shown after 0, 1/fps, 2/fps, ...
                  seconds. Frames that are given as such have no times: an error.
                - `num_frames`: Take this many frames of each video, at the starts of parts of equal length; all where
                  it has no more. This goes for frames that are given as such, too.
                - `max_frames`: Take no more than this many frames of each video, the first ones; also of frames that
                  are given as such. The paper's evaluation is `fps=3, max_frames=30`.
                - `do_sample_frames`: False: take all frames. True: treat frames that are given as such as those of
                  files. None, the default: take all that are given as such, unless `num_frames` or `max_frames` is
                  given.

        Returns:
            `input_ids` and `attention_mask`, (batch, text); if there are media, `pixel_values`, (batch, media, frames,
            channels, height, width), and `num_frames`, (batch, media), 0 where a medium is padding.

        Raises:
            ValueError: If a row's `<image>` tokens and media do not agree in number, also after truncation, or
                something is of the wrong kind.
            TypeError: If an option is unknown; the message names the nearest one.
            ImportError: If there is a video file, and PyAV is missing.
        """
        if audio is not None:
            raise ValueError("a Flamingo takes text, images and videos; got audio")
        options = {"padding": True, "return_token_type_ids": False, **_flatten_options(kwargs)}
        sampling = _Sampling.choose(
            **{name: options.pop(name, None) for name in ("fps", "num_frames", "max_frames", "do_sample_frames")},
            processor=self,
        )
        return_tensors = options.pop("return_tensors", "pt")
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f'return_tensors must be "pt", "np" or None, got {return_tensors!r}')
        if isinstance(text, str):
            text = [text]
        if not isinstance(text, list | tuple) or not text or not all(isinstance(row, str) for row in text):
            raise ValueError(
                f"text must be a string or a list of strings, got {text!r:.80}; pass text=..., as images come first"
            )
        if images is not None and videos is not None:
            raise ValueError("give images and videos together as images, in the order of their <image> tokens")
        counts = self._count_image_tokens(text, options)
        media = _find_files(images, all_paths=False) if videos is None else _find_files(videos, all_paths=True)
        rows = _media_by_row(media, counts, are_videos=videos is not None)
        for row, (count, found) in enumerate(zip(counts, rows, strict=True)):
            if count != len(found):
                raise ValueError(
                    f"row {row} has {count} {self.image_token} tokens but {len(found)} media; every image or video "
                    f"needs exactly one {self.image_token} in its text (a video in images is a list of frames)"
                )
        data = dict(self.tokenizer(list(text), return_tensors=return_tensors, **options))
        kept = [np.sum(np.asarray(ids) == self.image_token_id) for ids in data["input_ids"]]
        for row, (count, left) in enumerate(zip(counts, kept, strict=True)):
            if count != left:
                raise ValueError(
                    f"row {row} has {count} {self.image_token} tokens, but {left} after tokenization; truncation must "
                    "not cut a medium from its token: raise max_length, or drop whole examples"
                )
        if any(counts):
            data |= self._transform(rows, sampling, as_lists=return_tensors is None)
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(  # type: ignore[override] # the other arguments are passed on by name
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_tensors: str | None = "auto",
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write a conversation, or a batch of them, as text for the model.

        Args:
            conversation: Messages as in transformers. Their content is a text, or a list of parts:

                - `{"type": "text", "text": "..."}`
                - `{"type": "image", "image": image}`, or `"path"`, `"url"`, `"base64"`
                - `{"type": "video", "video": video}`, or `"path"`, `"url"`, `"base64"`; every path is a video file, a
                  list is one of frames

                Only here, an address that begins with `http` is fetched. In the text, a medium becomes an `<image>`
                token, whether it is an image or a video.
            chat_template: Another one than `processor.chat_template`, or the name of one of several.
            tokenize: Whether to return what `__call__` returns, not the text.
            return_tensors: As in `__call__`.
            processor_kwargs: What `__call__` takes, e.g. `{"num_frames": 8}`. These can also be given directly.
            **kwargs: As in transformers, e.g. `add_generation_prompt`, `return_dict` (without it, there are `input_ids`
                only), `return_assistant_tokens_mask`; and what the template takes.

        Raises:
            ValueError: If a medium cannot be fetched or stands in no message, or for what `__call__` raises it.
        """
        for name in ("images", "videos"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"the media of a conversation stand in its messages; put them there instead of {name}="
                )
        known = {*_OPTIONS, "common_kwargs", *_ALL_OPTIONS} - {"sanitize_control_tokens"}
        direct = _flatten_options({name: kwargs.pop(name) for name in [*kwargs] if name in known})
        options = _flatten_options({**direct, "common_kwargs": _flatten_options(processor_kwargs or {})})
        if return_tensors != "auto":
            options["return_tensors"] = return_tensors
        options.setdefault("return_tensors", "pt")
        is_batch = bool(conversation) and (
            isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "messages")
        )
        conversations = collect_media(conversation if is_batch else [conversation], load=tokenize)
        result: Any = super().apply_chat_template(
            conversations if is_batch else conversations[0],
            chat_template,
            tokenize=tokenize,
            return_tensors=options["return_tensors"],
            processor_kwargs=options,
            **kwargs,
        )
        if isinstance(result, BatchFeature) and "assistant_masks" in result and not options.get("truncation"):
            _check_masks(result["assistant_masks"], conversations)
        return result

    def _count_image_tokens(self, text: Sequence[str], options: Mapping[str, Any]) -> list[int]:
        # Where some <image> are meant as text, or are within another token, as < is in <EOC>, only the tokenizer knows.
        if options.get("sanitize_control_tokens") or self._is_within_another_token():
            sanitize = {"sanitize_control_tokens": True} if options.get("sanitize_control_tokens") else {}
            ids = self.tokenizer(list(text), add_special_tokens=False, **sanitize)["input_ids"]
            return [row.count(self.image_token_id) for row in ids]
        return [row.count(self.image_token) for row in text]

    def _is_within_another_token(self) -> bool:
        """Whether a text may hold the image token's name where there is none: within, or across, another token."""
        name = self.image_token
        parts = [(name[:i], name[i:]) for i in range(1, len(name))]
        return any(
            name in token or any(token.endswith(begin) or token.startswith(end) for begin, end in parts)
            for token in self.tokenizer.get_added_vocab()
            if token != name
        )

    def _transform(
        self, rows: Sequence[Sequence["_Medium"]], sampling: "_Sampling", *, as_lists: bool
    ) -> dict[str, Any]:
        """Transform all frames, and pad media and frames with zeros."""
        num_frames = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)

        def frames() -> Iterator[tuple[str, Any]]:
            for row, media in enumerate(rows):
                for i, medium in enumerate(media):
                    name = _name(row, i)
                    try:
                        for frame in sampling.frames(medium):
                            is_image = not isinstance(medium, VideoFile) and len(medium) == 1
                            yield name if is_image else f"{name}, frame {num_frames[row, i]}", frame
                            num_frames[row, i] += 1
                    except ValueError as error:
                        raise ValueError(f"{name}: {error}") from error

        pixels = self.image_processor.transform(frames())
        longest = int(num_frames.max())
        is_real = torch.arange(longest) < num_frames[..., None]
        pixel_values = pixels.new_zeros(*is_real.shape, *pixels.shape[1:])
        pixel_values[is_real] = pixels
        if as_lists:
            return {"pixel_values": list(pixel_values.numpy()), "num_frames": num_frames.tolist()}
        return {"pixel_values": pixel_values, "num_frames": num_frames}


def _check_masks(masks: Any, conversations: Sequence[Any]) -> None:
    """Nothing is learned where no token is marked, which transformers does not say."""
    for row, (mask, messages) in enumerate(zip(masks, conversations, strict=True)):
        if any(message["role"] == "assistant" for message in messages) and not np.any(np.asarray(mask)):
            raise ValueError(
                f"row {row} has answers, but none of their tokens is found; mark them in the chat template with "
                "{% generation %}, and take the newest transformers, as older ones lose answers that begin with a space"
            )


def _flatten_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Take options out of the dictionaries that transformers sorts them into, and look for unknown ones."""
    groups = {**_OPTIONS, "common_kwargs": _ALL_OPTIONS}
    options = {name: value for name, value in kwargs.items() if name not in groups}
    _check_names(options, _ALL_OPTIONS)
    for group, names in groups.items():
        given = kwargs.get(group) or {}
        _check_names(given, names)
        for name, value in given.items():
            if options.setdefault(name, value) != value:
                raise TypeError(f"{name} is given twice, as {options[name]!r} and as {value!r}")
    if options.pop("return_mm_token_type_ids", None):
        raise ValueError("a Flamingo takes no types of tokens; leave out return_mm_token_type_ids")
    options.pop("return_text_replacement_offsets", None)  # each medium is one token, before and after
    return options


def _check_names(options: Mapping[str, Any], known: Iterable[str]) -> None:
    for name in options:
        if name not in known:
            nearest = get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(sorted(known))}"
            raise TypeError(f"FlamingoProcessor got an unexpected keyword argument {name!r}; {hint}")


class _Sampling(NamedTuple):
    """Which frames of a video to take; all, where no number is given."""

    fps: int | float | None
    num_frames: int | None
    max_frames: int | None
    also_of_given_frames: bool
    max_given_frames: int | None

    @classmethod
    def choose(
        cls, *, fps: Any, num_frames: Any, max_frames: Any, do_sample_frames: bool | None, processor: FlamingoProcessor
    ) -> "_Sampling":
        check_sampling(fps, num_frames, max_frames)
        if do_sample_frames is not None and not do_sample_frames:
            if fps is not None or num_frames is not None or max_frames is not None:
                raise ValueError("do_sample_frames=False takes all frames; leave out fps, num_frames and max_frames")
            return cls(None, None, None, False, None)
        also_of_given_frames = bool(do_sample_frames) or fps is not None or num_frames is not None
        max_given_frames = max_frames
        if fps is None and num_frames is None:
            fps, num_frames = processor.fps, processor.num_frames
        if max_frames is None and num_frames is None:
            max_frames = processor.max_frames
        check_sampling(fps, num_frames, max_frames)
        fps = 1.0 if fps is None and num_frames is None else fps
        return cls(fps, num_frames, max_frames, also_of_given_frames, max_given_frames)

    def frames(self, medium: "_Medium") -> Iterable[Any]:
        if isinstance(medium, VideoFile):
            return medium.frames(fps=self.fps, num_frames=self.num_frames, max_frames=self.max_frames)
        count = len(medium)
        if not self.also_of_given_frames or count == 1:
            return medium[: self.max_given_frames]
        if self.num_frames is None:
            raise ValueError(
                "fps needs times, but frames that are given as such have none; give num_frames, or the video's file"
            )
        count = min(count, self.num_frames)
        return (medium[i * len(medium) // count] for i in range(count))


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


_Medium = VideoFile | Sequence[Any]  # a video's file, or frames; an image has one


def _find_files(media: Any, *, all_paths: bool) -> Any:
    """Tell paths of videos from those of images."""
    if isinstance(media, str | Path):
        return VideoFile(media) if all_paths or has_video_suffix(media) else media
    if isinstance(media, list | tuple):
        return [_find_files(medium, all_paths=all_paths) for medium in media]
    return media


def _media_by_row(media: Any, counts: Sequence[int], *, are_videos: bool) -> list[list[_Medium]]:
    """Sort media into rows."""
    if media is None:
        return [[] for _ in counts]
    is_medium = _is_video if are_videos else _is_image
    if is_medium(media) or isinstance(media, VideoFile):
        media = [media]
    elif isinstance(media, np.ndarray | Tensor) and media.ndim > 3:
        media = list(media)
    if not isinstance(media, list | tuple):
        wanted = (
            "videos must be lists of frames or video files"
            if are_videos
            else f"images must be {_KINDS}, or lists of them"
        )
        raise ValueError(f"{wanted}, got {_kind(media)}")
    if media and all(row is None or (isinstance(row, list | tuple) and not is_medium(row)) for row in media):
        if len(media) != len(counts):
            raise ValueError(f"there are {len(counts)} texts, but media for {len(media)}; give one list a text")
        rows = [list(row or ()) for row in media]
    elif len(counts) == 1:
        rows = [list(media)]
    else:
        if len(media) != sum(counts):
            raise ValueError(
                f"the texts have {sum(counts)} <image> tokens ({', '.join(map(str, counts))} by row), but there are "
                f"{len(media)} media; give one list of media a text to see which row is wrong"
            )
        remaining = iter(media)
        rows = [[next(remaining) for _ in range(count)] for count in counts]
    return [[_frames(medium, _name(row, i)) for i, medium in enumerate(found)] for row, found in enumerate(rows)]


def _name(row: int, medium: int) -> str:
    return f"row {row}, medium {medium}"


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image | str | Path | BytesIO) or (
        isinstance(value, np.ndarray | Tensor) and value.ndim in (2, 3)
    )


def _is_video(value: Any) -> bool:
    if isinstance(value, np.ndarray | Tensor):
        return value.ndim == 4
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_image, value))


def _frames(medium: Any, name: str) -> _Medium:
    """Give the frames of a medium; an image has one."""
    if isinstance(medium, VideoFile):
        return medium
    if _is_image(medium):
        return [medium]
    if (isinstance(medium, list | tuple) or _is_video(medium)) and not len(medium):
        raise ValueError(f"{name}: a video must have at least one frame, got none")
    if _is_video(medium):
        return list(medium)
    raise ValueError(
        f"{name}: an image must be {_KINDS}, a video a list of such images or a video file, got {_kind(medium)}"
    )


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{name} of shape {tuple(value.shape)}" if hasattr(value, "shape") else name


def _load(image: Any, channels: int) -> Image.Image:
    """Bring an image to an upright PIL image of 8 bits, in colour or grey."""
    if isinstance(image, str | Path | BytesIO):
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


def _open(source: str | Path | BytesIO) -> Image.Image:
    """Read a whole file here, so that a damaged one is named."""
    name = "what was fetched" if isinstance(source, BytesIO) else repr(str(source)[:200])
    try:
        is_file = isinstance(source, BytesIO) or Path(source).is_file()
    except OSError:  # longer than a path can be
        is_file = False
    if not is_file:
        raise ValueError(f"there is no image file {name}; images are never fetched from elsewhere, load it first")
    try:
        with Image.open(source) as image:
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

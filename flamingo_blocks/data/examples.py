"""Example: a window of a document as the model is trained on it, with tokens, labels, ranges of media, and the media.

Source: Alayrac et al. 2022 (Flamingo), appendices A.3.1 and A.3.2.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flamingo_blocks.blocks import Attend, media_ranges
from flamingo_blocks.data.document import Document, Medium
from flamingo_blocks.data.reading import read_medium

IGNORED = -100  # no loss at labels of this number, as everywhere in torch and transformers


@dataclass(frozen=True, eq=False)
class Example:
    """What the model learns from a document.

    Args:
        input_ids: Text, with an `<image>` token for each medium.
        labels: The same ids, and -100 where there is no loss: at `<image>` tokens, and where nothing comes before.
        media_ranges: What each token sees of this example's own media, as `flamingo_blocks.media_ranges` gives it.
        media: Pixels, (frames, channels, height, width), or features, (frames, patches, vision_dim), of each.
    """

    input_ids: Int[Tensor, " text"]
    labels: Int[Tensor, " text"]
    media_ranges: Int[Tensor, "text 2"]
    media: tuple[Float[Tensor, "_ ..."], ...]

    def __len__(self) -> int:
        """Tell how many tokens it has."""
        return len(self.input_ids)


class ExampleMaker:
    """Make examples of documents: the paper's random windows, with its augmentation of where text looks for its image.

    A document reads `text<EOC><image>text<EOC><image>text<EOC>`: `<EOC>` comes before each medium but one that the
    document begins with, and at the document's end. Text that spells `<image>` or another special token is text.

    - **Window.** Of a document that is too long, so many tokens in a row, from a random place. The window's first
      `max_media` media are kept; the `<image>` tokens of further ones are dropped, and none of those is read. What the
      tokenizer puts before a text (`<bos>`) is put before each window, and counted in `max_tokens`, since a language
      model has seldom seen text that begins without it.
    - **Placement.** With probability `p_next` the whole example sees the next medium instead of the last one.
    - **Labels.** None at `<image>` tokens, at what the tokenizer puts before, and at the first token without it.

    Args:
        processor: A `FlamingoProcessor`.
        max_tokens: The most tokens of an example.
        max_media: The most media of an example.
        p_next: How probable it is that text sees the next medium.
        attend: What text sees otherwise; the model's own rule, `model.config.attend`.
        fps: Frames per second of a video.
        max_frames: The most frames of a video, from its beginning.
        load: Gives the pixels or the features of a medium, instead of reading and transforming it, e.g. from a cache.
            Its `ValueError` says that this medium cannot be read; other errors end the training.

    Raises:
        ValueError: If a number is out of range, or `attend` is no rule.

    Source: Alayrac et al. 2022, appendices A.3.1 and A.3.2. Differs from the paper: what comes before each window.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_tokens: int = 256,
        max_media: int = 5,
        p_next: float = 0.5,
        attend: Attend = "last",
        fps: float = 1.0,
        max_frames: int = 8,
        load: Callable[[Medium], Tensor] | None = None,
    ) -> None:
        tokenizer = processor.tokenizer
        self.processor = processor
        self.max_tokens = max_tokens
        self.max_media = max_media
        self.p_next = p_next
        self.attend: Attend = attend
        if load is None:
            load = partial(read_medium, image_processor=processor.image_processor, fps=fps, max_frames=max_frames)
        self.load = load
        self._end_of_chunk_id = int(tokenizer.convert_tokens_to_ids(processor.end_of_chunk_token))
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        # What is unknown is text, too.
        self._special_ids = special - {tokenizer.unk_token_id}
        self._spelling = re.compile("|".join(map(re.escape, tokenizer.convert_ids_to_tokens(sorted(special)))))
        self._before = _put_before(tokenizer)
        # Of three tokens in a row, one has a label: there is text or <EOC> between two media.
        if max_tokens < len(self._before) + 3:
            raise ValueError(f"max_tokens must be at least {len(self._before) + 3}, got {max_tokens}")
        for name, value in (("max_media", max_media), ("max_frames", max_frames)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < fps < math.inf:
            raise ValueError(f"fps must be a positive number, got {fps}")
        if attend not in get_args(Attend):
            raise ValueError(f"attend must be one of {', '.join(map(repr, get_args(Attend)))}, got {attend!r}")
        if not 0 <= p_next <= 1:
            raise ValueError(f"p_next must be a probability, in 0..1, got {p_next}")

    def __call__(self, document: Document, *, generator: torch.Generator) -> Example:
        """Make an example.

        Args:
            document: With text.
            generator: Chooses the window and the placement. The same state gives the same example.

        Raises:
            ValueError: If the document has no text, or a medium of the window cannot be read. It names the document.
        """
        try:
            return self._make(document, generator)
        except ValueError as error:
            raise ValueError(f"document {document.key!r}: {error}") from error

    def tokenize(self, document: Document) -> Int[Tensor, " text"]:
        """Give the tokens of the whole document, without what comes before a text.

        Raises:
            ValueError: If the text spells a special token, and the tokenizer knows no other way to write it.
        """
        image_id = self.processor.image_token_id
        segments: list[str | int] = []
        for is_text, parts in groupby(document.parts, key=lambda part: isinstance(part, str)):
            if is_text:
                segments.append("".join(parts))  # type: ignore[arg-type] # strings
                continue
            for _ in parts:
                segments += [self._end_of_chunk_id, image_id] if segments else [image_id]
        return torch.tensor(self._encode([*segments, self._end_of_chunk_id]))

    def _make(self, document: Document, generator: torch.Generator) -> Example:
        image_id = self.processor.image_token_id
        ids = self.tokenize(document)
        is_text = (ids != image_id) & (ids != self._end_of_chunk_id)
        if not is_text.any() or not document.text.strip():
            raise ValueError("a document must have text, without which there is nothing to learn")
        sees_next = bool(torch.rand((), generator=generator) < self.p_next)
        room = self.max_tokens - len(self._before)
        start = int(torch.randint(max(len(ids) - room, 0) + 1, (), generator=generator))
        is_image = ids == image_id
        first_medium = int(is_image[:start].sum())
        ids, is_image = ids[start : start + room], is_image[start : start + room]
        is_kept = ~is_image | (is_image.cumsum(0) <= self.max_media)
        ids = torch.cat([ids.new_tensor(self._before), ids[is_kept]])
        is_image = ids == image_id
        media = document.media[first_medium : first_medium + int(is_image.sum())]
        labels = ids.masked_fill(is_image, IGNORED)
        labels[: max(len(self._before), 1)] = IGNORED
        ranges = media_ranges(is_image[None], attend="next" if sees_next else self.attend)[0]
        return Example(ids, labels, ranges, tuple(map(self.load, media)))

    def _encode(self, segments: Sequence[str | int]) -> list[int]:
        """Tokenize text between special tokens, as it is tokenized for generating, but spelled special tokens as text.

        Args:
            segments: Texts, and ids of special tokens.
        """
        tokenizer = self.processor.tokenizer
        wanted = [segment for segment in segments if isinstance(segment, int)]
        if not any(isinstance(segment, str) and self._spelling.search(segment) for segment in segments):
            names = dict(zip(wanted, tokenizer.convert_ids_to_tokens(wanted), strict=True))
            text = "".join(segment if isinstance(segment, str) else names[segment] for segment in segments)
            ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if self._special_among(ids) == wanted:
                return ids
        ids = []
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        for segment in segments:
            ids += [segment] if isinstance(segment, int) else tokenizer(segment, **options)["input_ids"]
        if unwanted := Counter(self._special_among(ids)) - Counter(wanted):
            raise ValueError(
                f"its text spells the special token {tokenizer.convert_ids_to_tokens(min(unwanted))!r}, which this "
                "tokenizer cannot write as text; leave the document out, or the token out of its text"
            )
        return ids

    def _special_among(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._special_ids]


def _put_before(tokenizer: Any) -> list[int]:
    """Tell what the tokenizer puts before a text: `<bos>`, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    places = (i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare)
    return list(dressed[: next(places, 0)])

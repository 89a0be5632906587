"""Frames of video files, decoded one by one."""

import math
import re
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from io import BufferedIOBase
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

_SUFFIXES = frozenset(
    ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()  # noqa: SIM905
)
# Signs of the first two rows and columns of a display matrix.
_TURNS = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


def has_video_suffix(path: str | Path) -> bool:
    """Tell a video file by its name."""
    return Path(path).suffix.lower() in _SUFFIXES


def check_sampling(fps: Any, num_frames: Any) -> None:
    """Check how frames of videos are to be chosen.

    Args:
        fps: Frames per second, or None.
        num_frames: Frames of a video, or None.

    Raises:
        ValueError: If a number is not positive, or both are given.
    """
    if fps is not None and num_frames is not None:
        raise ValueError(f"fps and num_frames exclude each other, got {fps} and {num_frames}; give one of them")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, Real) or not 0 < float(fps) < float("inf")):
        raise ValueError(f"fps must be a positive number, got {fps!r}")
    if num_frames is not None and (
        isinstance(num_frames, bool) or not isinstance(num_frames, Integral) or num_frames < 1
    ):
        raise ValueError(f"num_frames must be a positive integer, got {num_frames!r}")


class VideoFile:
    """A video in a file. It is read when its frames are asked for.

    Args:
        source: A path, or a file that is open for reading bytes and can seek.
    """

    def __init__(self, source: str | Path | BufferedIOBase) -> None:
        self.source = source

    def __repr__(self) -> str:
        name = str(self.source) if isinstance(self.source, str | Path) else getattr(self.source, "name", "video")
        return repr(str(name)[:200])

    def frames(self, *, fps: int | float | None = None, num_frames: int | None = None) -> Iterator[Image.Image]:
        """Decode frames, upright, in the order in which they are shown. One is held in memory at a time.

        Frames are found by their timestamps, not by counting, so that a variable frame rate does no harm.

        Args:
            fps: The frames that are shown after 0, 1/fps, 2/fps, ... seconds; the first one always, so that a short
                video has one.
            num_frames: Instead: that many, at the starts of parts of equal length; all, if the video has no more.
                Neither: all.

        Raises:
            ImportError: If PyAV is missing.
            ValueError: If there is no such file, or it cannot be read to its end as a video; if `fps` or `num_frames`
                is not positive, or both are given.
        """
        check_sampling(fps, num_frames)
        try:
            import av
        except ImportError as error:
            raise ImportError(
                "videos are read from files with PyAV; install it with: pip install flamingo-blocks[video]"
            ) from error
        if isinstance(self.source, str | Path) and not _is_file(self.source):
            raise ValueError(f"there is no video file {self!r}; videos are never fetched from elsewhere, load it first")
        try:
            with self._open() as file:
                # A file must not make FFmpeg open others, as a playlist does.
                options = {"protocol_whitelist": "none"}
                file.seek(0)
                with av.open(file, options=options, metadata_errors="ignore") as container:
                    stream = _video_stream(container)
                    span = _measure(container, stream)
                file.seek(0)
                with av.open(file, options=options, metadata_errors="ignore") as container:
                    stream = _video_stream(container)
                    if num_frames is not None and num_frames < span.frames:
                        yield from _shown_at(container, stream, span, span.duration / num_frames, num_frames)
                    elif fps is not None and num_frames is None:
                        step = 1 / Fraction(str(fps))  # 0.1 is a tenth, not the float nearest to it
                        yield from _shown_at(container, stream, span, step, math.ceil(span.duration / step))
                    else:
                        yield from map(_upright, _decode(container, stream))
        except Exception as error:  # decoders raise errors of many kinds
            raise ValueError(f"{self!r} cannot be read as a video: {error}") from error

    def _open(self) -> AbstractContextManager[Any]:
        return Path(self.source).open("rb") if isinstance(self.source, str | Path) else nullcontext(self.source)


class _Span(NamedTuple):
    """When the frames of a video are shown, in seconds."""

    start: Fraction
    duration: Fraction
    frames: int


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # longer than a path can be
        return False


def _video_stream(container: Any) -> Any:
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of a song is no video
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and stream.width * stream.height > 2 * limit:  # as Pillow guards images
                raise ValueError(f"its frames have {stream.width}x{stream.height} pixels, which may be an attack")
            return stream
    raise ValueError("it has no video stream")


def _step(stream: Any) -> int:
    """Tell how long a frame is shown that does not say so itself, in the stream's unit of time."""
    return max(1, round(1 / (stream.average_rate or 25) / _unit(stream)))


def _unit(stream: Any) -> Fraction:
    unit: Fraction = stream.time_base
    return unit


def _measure(container: Any, stream: Any) -> _Span:
    """Find out what is in a file without decoding it."""
    start: int | None = None
    end = count = 0
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:  # the last packet is empty
            continue
        if packet.is_corrupt:
            raise ValueError("it is damaged or truncated")
        time = packet.dts if packet.pts is None else packet.pts
        if time is None:
            time = end
        start = time if start is None else min(start, time)
        end = max(end, time + (packet.duration or _step(stream)))
        count += 1
    if start is None:
        raise ValueError("it has no frames")
    unit = _unit(stream)
    declared = _declared_end(container, stream, start)
    # Where a container lets it end anywhere, a truncated file ends without an error.
    if declared is not None and end * unit < min(declared - 1, declared * Fraction(9, 10)):
        raise ValueError(f"it is truncated, after {float(end * unit):.3g} of {float(declared):.3g} seconds")
    return _Span(start * unit, (end - start) * unit, count)


def _declared_end(container: Any, stream: Any, start: int) -> Fraction | None:
    """Tell when the last frame ends by what is declared: some declare a stream's length, others its end."""
    if stream.duration is not None:
        return (start + stream.duration) * _unit(stream)
    written = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if written is not None:
        hours, minutes, seconds = map(Fraction, written.groups())
        return 3600 * hours + 60 * minutes + seconds
    if container.duration is not None and len(container.streams) == 1:
        return Fraction(container.duration, 1_000_000)
    return None


def _decode(container: Any, stream: Any) -> Iterator[Any]:
    found = False
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise ValueError("a frame is damaged")
        found = True
        yield frame
    if not found:
        raise ValueError("no frame can be decoded")


def _shown_at(container: Any, stream: Any, span: _Span, step: Fraction, count: int) -> Iterator[Image.Image]:
    """Give the frames that are shown after 0, step, 2 step, ... seconds."""
    times = deque(span.start + i * step for i in range(count))
    shown: Any = None
    time = span.start
    for frame in _decode(container, stream):
        told = None if frame.pts is None else frame.pts * _unit(stream)
        if told is not None and (shown is None or told > time):
            time = told
        elif shown is not None:  # no timestamp, or one that goes back, as those of B-frames in AVI files
            time += (shown.duration or _step(stream)) * _unit(stream)
        while shown is not None and times and times[0] < time:
            times.popleft()
            yield _upright(shown)
        if not times:
            return
        shown = frame
    if shown is not None:
        for _ in times:
            yield _upright(shown)


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know all kinds of side data that FFmpeg gives
        return image.rotate(frame.rotation, expand=True) if frame.rotation else image
    if matrix is None:
        return image
    a, b, _, c, d = np.sign(np.frombuffer(bytes(matrix), dtype=np.int32))[:5].tolist()
    turn = _TURNS.get((a, b, c, d))
    return image if turn is None else image.transpose(turn)

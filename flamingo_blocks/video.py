"""Frames of video files, decoded one by one."""

import math
import re
import sys
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fractions import Fraction
from io import BufferedIOBase
from itertools import islice
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


def check_sampling(fps: Any, num_frames: Any, max_frames: Any = None, start: Any = 0) -> None:
    """Check how frames of videos are to be chosen.

    Args:
        fps: Frames per second, or None.
        num_frames: Frames of a video, or None.
        max_frames: The most frames of a video, or None.
        start: Seconds that are left out.

    Raises:
        ValueError: If a number is not positive, or `num_frames` is given beside `fps` or `max_frames`.
    """
    for name, value in (("fps", fps), ("max_frames", max_frames)):
        if value is not None and num_frames is not None:
            raise ValueError(
                f"{name} and num_frames exclude each other, got {value} and {num_frames}; give one of them"
            )
    if fps is not None and not (_is_real(fps) and 0 < float(fps) < math.inf):
        raise ValueError(f"fps must be a positive number, got {fps!r}")
    for name, value in (("num_frames", num_frames), ("max_frames", max_frames)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if not (_is_real(start) and 0 <= float(start) < math.inf):
        raise ValueError(f"start must be a number of seconds from 0 on, got {start!r}")


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


class VideoFile:
    """A video in a file. It is read when its frames are asked for.

    Args:
        source: A path, or a file that is open for reading bytes and can seek.

    Example:
        ```python
        from flamingo_blocks.video import VideoFile

        # 8 seconds from anywhere in a video, one frame of each, as in the paper's training
        def random_clip(video: VideoFile, uniform: float) -> list:
            start = uniform * max(0.0, video.duration() - 8)
            return list(video.frames(fps=1, max_frames=8, start=start))
        ```
    """

    def __init__(self, source: str | Path | BufferedIOBase) -> None:
        self.source = source

    def __repr__(self) -> str:
        name = str(self.source) if isinstance(self.source, str | Path) else getattr(self.source, "name", "video")
        return repr(str(name)[:200])

    def duration(self) -> float:
        """Tell how many seconds the video takes. Its frames are not decoded for that.

        Raises:
            ImportError: If PyAV is missing.
            ValueError: If there is no such file, or it cannot be read to its end as a video.
        """
        return float(self._measure().duration)

    def frames(
        self,
        *,
        fps: int | float | None = None,
        num_frames: int | None = None,
        max_frames: int | None = None,
        start: int | float = 0,
    ) -> Iterator[Image.Image]:
        """Decode frames, upright, in the order in which they are shown. One is held in memory at a time.

        Frames are found by their timestamps, not by counting, so that a variable frame rate does no harm. Decoding
        stops where no more are taken.

        Args:
            fps: The frames that are shown after 0, 1/fps, 2/fps, ... seconds; the first one always, so that a short
                video has one.
            num_frames: Instead: that many, at the starts of parts of equal length; all, if the video has no more.
                Neither: all.
            max_frames: The most frames to take: the first ones. Not with `num_frames`.
            start: Leave out what is shown before this moment, in seconds: the video begins with the frame that is shown
                then.

        Raises:
            ImportError: If PyAV is missing.
            ValueError: If there is no such file, or it cannot be read to its end as a video; if a number is not
                positive, `num_frames` is given beside `fps` or `max_frames`, or the video ends before `start`.
        """
        check_sampling(fps, num_frames, max_frames, start)
        span = self._measure()
        skipped = Fraction(str(start))
        if skipped >= span.duration:
            raise ValueError(
                f"start must be before the end of {self!r}, after {float(span.duration):g} seconds, got {start}"
            )
        begin, left = span.start + skipped, span.duration - skipped
        with self._opened() as (container, stream):
            timed = _timed(container, stream, span)
            if num_frames is not None and num_frames < span.frames_from(begin):
                chosen = _shown_at(timed, begin, left / num_frames, num_frames)
            elif fps is not None:
                step = 1 / Fraction(str(fps))  # 0.1 is a tenth, not the float nearest to it
                chosen = _shown_at(timed, begin, step, min(math.ceil(left / step), max_frames or sys.maxsize))
            else:
                chosen = islice(_shown_from(timed, begin), max_frames)
            yield from map(_upright, chosen)

    def _measure(self) -> "_Span":
        with self._opened() as (container, stream):
            return _measure(container, stream)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
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
                file.seek(0)
                # A file must not make FFmpeg open others, as a playlist does.
                options = {"protocol_whitelist": "none"}
                with av.open(file, options=options, metadata_errors="ignore") as container:
                    yield container, _video_stream(container)
        except Exception as error:  # decoders raise errors of many kinds
            raise ValueError(f"{self!r} cannot be read as a video: {error}") from error

    def _open(self) -> AbstractContextManager[Any]:
        return Path(self.source).open("rb") if isinstance(self.source, str | Path) else nullcontext(self.source)


class _Span(NamedTuple):
    """When the frames of a video are shown."""

    times: list[int]  # in order
    end: int
    unit: Fraction  # of time, in seconds

    @property
    def start(self) -> Fraction:
        return self.times[0] * self.unit

    @property
    def duration(self) -> Fraction:
        return (self.end - self.times[0]) * self.unit

    def frames_from(self, begin: Fraction) -> int:
        """Count the frames that are shown at a moment and after it."""
        moment = begin / self.unit
        later = bisect_left(self.times, moment)
        is_between = later == len(self.times) or self.times[later] != moment
        return len(self.times) - later + is_between


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
    times: list[int] = []
    end = 0
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:  # the last packet is empty
            continue
        if packet.is_corrupt:
            raise ValueError("it is damaged or truncated")
        time = packet.dts if packet.pts is None else packet.pts
        if time is None:
            time = end
        times.append(time)
        end = max(end, time + (packet.duration or _step(stream)))
    if not times:
        raise ValueError("it has no frames")
    times.sort()
    unit = _unit(stream)
    declared = _declared_end(container, stream, times[0])
    # Where a container lets it end anywhere, a truncated file ends without an error.
    if declared is not None and end * unit < min(declared - 1, declared * Fraction(9, 10)):
        raise ValueError(f"it is truncated, after {float(end * unit):.3g} of {float(declared):.3g} seconds")
    return _Span(times, end, unit)


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


def _timed(container: Any, stream: Any, span: _Span) -> Iterator[tuple[Fraction, Any]]:
    """Give each frame with the moment from which it is shown."""
    before: Any = None
    time = span.start
    for frame in _decode(container, stream):
        told = None if frame.pts is None else frame.pts * span.unit
        if told is not None and (before is None or told > time):
            time = told
        elif before is not None:  # no timestamp, or one that goes back, as those of B-frames in AVI files
            time += (before.duration or _step(stream)) * span.unit
        yield time, frame
        before = frame


def _shown_at(timed: Iterator[tuple[Fraction, Any]], begin: Fraction, step: Fraction, count: int) -> Iterator[Any]:
    """Give the frames that are shown after 0, step, 2 step, ... seconds."""
    given = 0
    shown: Any = None
    for time, frame in timed:
        while shown is not None and given < count and begin + given * step < time:
            given += 1
            yield shown
        if given == count:
            return
        shown = frame
    for _ in range(given, count):
        yield shown


def _shown_from(timed: Iterator[tuple[Fraction, Any]], begin: Fraction) -> Iterator[Any]:
    """Give the frame that is shown at a moment, and all after it."""
    shown: Any = None
    for time, frame in timed:
        if shown is not None and time > begin:
            yield shown
        shown = frame
    yield shown


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

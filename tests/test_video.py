import io
import struct
import sys
import tempfile
import wave
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flamingo_blocks import video
from flamingo_blocks.video import VideoFile, has_video_suffix
from tests.tiny_videos import CODECS, index_of, write_video


def indices(source: Any, **sampling: Any) -> list[int]:
    return [index_of(frame) for frame in VideoFile(source).frames(**sampling)]


def shown_at(times: list[int], moment: Fraction) -> int:
    """Which frame is seen at a moment: the last one that was shown before."""
    return max(i for i, time in enumerate(times) if time <= moment)


times_of_frames = st.lists(st.integers(1, 15), min_size=1, max_size=12).map(
    lambda gaps: [sum(gaps[:i]) for i in range(len(gaps))]
)


@given(times=times_of_frames, fps=st.sampled_from((1, 0.3, 0.5, 2, 3, 10, 12.5)))
def test_frames_are_those_shown_at_equal_intervals(times: list[int], fps: float) -> None:
    """Also where the frame rate varies. Times are tenths of a second."""
    end, step = times[-1] + 1, 10 / Fraction(str(fps))
    moments = [i * step for i in range(1000) if i * step < end]
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder, "video.mkv"), times)
        assert indices(path, fps=fps) == [shown_at(times, moment) for moment in moments]


@given(times=times_of_frames, num_frames=st.integers(1, 15))
def test_a_number_of_frames_is_spread_evenly(times: list[int], num_frames: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder, "video.mkv"), times)
        found = indices(path, num_frames=num_frames)
    if num_frames >= len(times):
        assert found == list(range(len(times))), "all, each once"
    else:
        assert found == [shown_at(times, Fraction(i * (times[-1] + 1), num_frames)) for i in range(num_frames)]


@given(
    times=times_of_frames,
    start=st.integers(0, 200),
    fps=st.sampled_from((None, 1, 0.3, 3)),
    max_frames=st.none() | st.integers(1, 6),
)
def test_frames_are_taken_from_a_start_on_up_to_the_most(
    times: list[int], start: int, fps: float | None, max_frames: int | None
) -> None:
    start %= times[-1] + 1
    if fps is None:
        expected = list(range(shown_at(times, Fraction(start)), len(times)))
    else:
        moments = [start + 10 * i / Fraction(str(fps)) for i in range(1000)]
        expected = [shown_at(times, moment) for moment in moments if moment < times[-1] + 1]
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder, "video.mkv"), times)
        assert indices(path, fps=fps, max_frames=max_frames, start=start / 10) == expected[:max_frames]


@given(times=times_of_frames, start=st.integers(0, 200), num_frames=st.integers(1, 15))
def test_a_number_of_frames_is_spread_over_what_comes_after_the_start(
    times: list[int], start: int, num_frames: int
) -> None:
    start %= times[-1] + 1
    left = list(range(shown_at(times, Fraction(start)), len(times)))
    if num_frames < len(left):
        step = Fraction(times[-1] + 1 - start, num_frames)
        left = [shown_at(times, start + i * step) for i in range(num_frames)]
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder, "video.mkv"), times)
        assert indices(path, num_frames=num_frames, start=start / 10) == left


@pytest.mark.parametrize("suffix", CODECS)
def test_the_duration_is_told_without_decoding(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / f"video{suffix}", 25)
    monkeypatch.setattr(video, "_decode", None)
    assert VideoFile(path).duration() == pytest.approx(2.5, abs=0.01)
    with pytest.raises(ValueError, match=r"start must be before the end of '.*video.*', after 2\.5 seconds, got 2\.6"):
        next(VideoFile(path).frames(start=2.6))


@pytest.mark.parametrize("sampling", [{"fps": 1, "max_frames": 2}, {"start": 0.9, "max_frames": 2}])
def test_what_comes_after_the_last_frame_taken_is_not_decoded(
    sampling: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "video.mkv", 100)
    decoded: list[Any] = []
    decode = video._decode

    def count(container: Any, stream: Any) -> Iterator[Any]:
        for frame in decode(container, stream):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(video, "_decode", count)
    assert indices(path, **sampling)[-1] == 10
    assert len(decoded) == 12, "and the one after it, which tells how long it is shown"


@pytest.mark.parametrize("suffix, codec", [*CODECS.items(), (".mp4", "libx264"), (".mkv", "libx264")])
def test_every_usual_container_is_read(suffix: str, codec: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / f"video{suffix}", 25, codec=codec)
    assert indices(path, fps=1) == [0, 10, 20]
    assert indices(str(path), num_frames=5) == [0, 5, 10, 15, 20]
    assert indices(path) == list(range(25))
    assert has_video_suffix(path) == (suffix != ".gif")
    assert indices(io.BytesIO(path.read_bytes()), fps=1) == [0, 10, 20]


def test_a_file_without_timestamps_is_counted_through(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", 25, codec="libx264")
    raw = tmp_path / "video.h264"
    import av

    with av.open(str(path)) as source, av.open(str(raw), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    assert indices(raw, fps=1) == [0, 10, 20]


@pytest.mark.parametrize("frames", [1, 3, 9])
def test_a_video_shorter_than_a_second_has_one_frame(frames: int, tmp_path: Path) -> None:
    assert indices(write_video(tmp_path / "video.mp4", frames), fps=1) == [0]


def test_no_other_frames_are_made_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long video must not be held in memory."""
    made: list[Any] = []
    upright = video._upright

    def count(frame: Any) -> Image.Image:
        made.append(frame)
        return upright(frame)

    monkeypatch.setattr(video, "_upright", count)
    frames = VideoFile(write_video(tmp_path / "video.mkv", 100)).frames(num_frames=4)
    for expected in range(1, 5):
        next(frames)
        assert len(made) == expected, "no frame before it is asked for"


# As in EXIF: what brings a stored picture upright, as the first two rows and columns of a display matrix.
ORIENTATIONS: dict[str, tuple[tuple[int, int, int, int], tuple[int, int]]] = {
    "as it is": ((1, 0, 0, 1), (0, 0)),
    "a quarter clockwise": ((0, 1, -1, 0), (1, 0)),
    "half": ((-1, 0, 0, -1), (1, 1)),
    "a quarter counterclockwise": ((0, -1, 1, 0), (0, 1)),
    "left to right": ((-1, 0, 0, 1), (1, 0)),
    "top to bottom": ((1, 0, 0, -1), (0, 1)),
    "transposed": ((0, 1, 1, 0), (0, 0)),
    "transversed": ((0, -1, -1, 0), (1, 1)),
}


def write_turned(path: Path, orientation: str) -> Path:
    a, b, c, d = ORIENTATIONS[orientation][0]
    write_video(path, 3)
    file = bytearray(path.read_bytes())
    start = file.find(b"tkhd") + 4 + 40  # version 0: the matrix of the track's header
    assert struct.unpack_from(">9i", file, start) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", file, start, *(65536 * n for n in (a, b, 0, c, d, 0, 0, 0, 16384)))
    path.write_bytes(file)
    return path


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_videos_are_turned_upright(orientation: str, tmp_path: Path) -> None:
    (a, *_), (right, lower) = ORIENTATIONS[orientation]
    (frame,) = VideoFile(write_turned(tmp_path / "video.mp4", orientation)).frames(fps=1)
    assert frame.size == ((32, 24) if a else (24, 32))
    width, height = frame.size
    grey = frame.convert("L")
    corners = {(x, y): grey.getpixel((x * (width - 1), y * (height - 1))) for x in (0, 1) for y in (0, 1)}
    assert max(corners, key=lambda corner: float(corners[corner])) == (right, lower)  # type: ignore[arg-type]


@pytest.mark.parametrize("orientation", list(ORIENTATIONS)[:4])
def test_frames_are_upright_also_where_their_side_data_cannot_be_read(orientation: str, tmp_path: Path) -> None:
    import av

    class Unreadable:
        def get(self, _: str) -> None:
            raise ValueError("31 is not a valid Type")

    class Frame:
        def __init__(self, frame: Any) -> None:
            self.to_image, self.rotation, self.side_data = frame.to_image, frame.rotation, Unreadable()

    with av.open(str(write_turned(tmp_path / "video.mp4", orientation))) as container:
        frame = next(container.decode(video=0))
    assert video._upright(Frame(frame)) == video._upright(frame)


# What is refused


def truncate(suffix: str, **options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = write_video(folder / f"video{suffix}", 100, **options)
        path.write_bytes(path.read_bytes()[: int(0.6 * path.stat().st_size)])
        return path

    return make


def damage(folder: Path) -> Path:
    path = write_video(folder / "video.mp4", 30, codec="libx264", options={"movflags": "faststart"})
    file = bytearray(path.read_bytes())
    start = file.find(b"mdat") + 4
    file[start:] = bytes(len(file) - start)
    path.write_bytes(file)
    return path


def sound(folder: Path) -> Path:
    path = folder / "video.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
        file.writeframes(bytes(8000))
    return path


def text(content: str, suffix: str = ".mp4") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_video(folder / "other.mp4", 10)
        path = folder / f"video{suffix}"
        path.write_text(content.format(other=folder / "other.mp4"))
        return path

    return make


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated mp4": (truncate(".mp4"), "no video stream|Invalid data"),
    "truncated mp4, index first": (truncate(".mp4", options={"movflags": "faststart"}), "damaged or truncated"),
    "truncated mkv": (truncate(".mkv"), "truncated"),
    "truncated webm": (truncate(".webm"), "truncated, after .* of 10 seconds"),
    "truncated avi": (truncate(".avi"), "damaged or truncated"),
    "damaged mp4": (damage, "Invalid data|damaged|decoded"),
    "sound": (sound, "it has no video stream"),
    "text": (text("a video"), "Invalid data"),
    "nothing": (text(""), "Invalid|End of file"),
    "a playlist": (
        text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n", ".m3u8"),
        "Invalid data|not permitted",
    ),
    "a list of files": (text("ffconcat version 1.0\nfile {other}\n"), "not permitted|Invalid"),
}


@pytest.mark.parametrize("sampling", [{"fps": 1}, {"num_frames": 4}, {}])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_cannot_be_read_to_its_end_is_refused_by_name(
    kind: str, sampling: dict[str, Any], tmp_path: Path
) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=rf"video\.\w+' cannot be read as a video: .*({message})"):
        indices(make(tmp_path), **sampling)


@pytest.mark.parametrize("source", ["nothing.mp4", ".", "https://example.org/a.mp4", "a" * 9000])
def test_a_file_that_is_not_there_is_refused_by_name(source: str) -> None:
    with pytest.raises(ValueError, match=f"there is no video file '{source[:200]}'; videos are never fetched"):
        indices(source)


def test_without_pyav_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "video.mp4", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install flamingo-blocks\[video\]"):
        indices(path)


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".mp4", ".mov"])
def test_a_video_may_start_late(suffix: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / f"late{suffix}", range(37, 57))
    assert [index_of(frame) for frame in VideoFile(path).frames(fps=5)] == list(range(0, 20, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"fps": -1},
        {"fps": 0},
        {"num_frames": 0},
        {"num_frames": -3},
        {"fps": 1, "num_frames": 2},
        {"max_frames": 0},
        {"max_frames": 3, "num_frames": 2},
        {"start": -0.1},
        {"start": float("nan")},
        {"start": float("inf")},
    ],
)
def test_impossible_choices_of_frames_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mkv", 3)
    with pytest.raises(ValueError, match=r"must be a (positive|number of seconds from 0)|exclude each other"):
        list(VideoFile(path).frames(**options))


def test_frames_of_more_pixels_than_pillow_allows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "video.mkv", 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 24 // 2 - 1)
    with pytest.raises(ValueError, match="its frames have 32x24 pixels, which may be an attack"):
        list(VideoFile(path).frames())

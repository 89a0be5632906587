"""Tiny video files, whose frames tell by their grey which one they are."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

CODECS = {".mp4": "mpeg4", ".mkv": "ffv1", ".avi": "mpeg4", ".webm": "libvpx", ".mov": "mpeg4", ".gif": "gif"}
PIXELS = {"ffv1": "bgr0", "gif": "rgb8"}
STEP = 10  # of grey, from frame to frame


def write_video(
    path: Path,
    frames: int | Sequence[int],
    *,
    rate: int = 10,
    codec: str | None = None,
    options: dict[str, str] | None = None,
    size: tuple[int, int] = (32, 24),
) -> Path:
    """Write a video.

    Args:
        path: Its suffix says which container it is.
        frames: Their number, or the times at which they are shown, in units of `1 / rate` seconds.
        rate: Frames per second.
        codec: None: the container's usual one. `ffv1` loses nothing.
        options: Of the container.
        size: Width and height.
    """
    codec = codec or CODECS[path.suffix]
    times = range(frames) if isinstance(frames, int) else frames
    with av.open(str(path), "w", options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.bit_rate = 4_000_000
        stream.pix_fmt = PIXELS.get(codec, "yuv420p")
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(i, size), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def picture(index: int, size: tuple[int, int]) -> np.ndarray:
    """A grey picture with a bright corner at the upper left."""
    pixels = np.full((size[1], size[0], 3), index * STEP % 256, np.uint8)
    pixels[: size[1] // 4, : size[0] // 4] = 255
    return pixels


def index_of(image: Image.Image) -> int:
    """Tell which frame an image is."""
    grey = np.asarray(image.convert("L"), dtype=float)
    height, width = grey.shape
    middle = grey[height // 2 - 2 : height // 2 + 2, width // 2 - 2 : width // 2 + 2]
    return round(middle.mean() / STEP)

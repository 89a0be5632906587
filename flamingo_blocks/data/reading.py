"""read_medium: from a stored image or video to the pixels that a vision encoder takes."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from flamingo_blocks.data.document import Medium


def read_medium(
    medium: Medium, image_processor: Any, *, fps: int | float = 1.0, max_frames: int = 8
) -> Float[Tensor, "frames channels height width"]:
    """Read an image, or the first frames of a video, and transform them.

    Args:
        medium: The image, which has one frame, or the video.
        image_processor: A `FlamingoImageProcessor`.
        fps: Frames of each second of a video.
        max_frames: That many first of these.

    Raises:
        ValueError: If it cannot be read.

    Source: Alayrac et al. 2022, section 2.1 (one frame per second, 8 frames in training).
    """
    if medium.kind == "image":
        return image_processor.transform([("image", medium.open())])
    from flamingo_blocks.video import VideoFile

    frames = VideoFile(medium.open()).frames(fps=fps, max_frames=max_frames)
    return image_processor.transform((f"frame {i}", frame) for i, frame in enumerate(frames))

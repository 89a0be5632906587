"""MediaFeatures: what every resampler does first with the features of a vision encoder.

Source: Alayrac et al. 2022 (Flamingo), section 2.1, appendices A.1.1 and B.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class MediaFeatures(nn.Module):
    """Bring features to a resampler's width and tell their frames apart.

    A learned temporal embedding is added to all patches of a frame. Videos of up to `max_frames` frames use the first
    embeddings; longer ones interpolate all of them linearly. The patches of a frame get no position.

    Args:
        dim: Width of the result.
        vision_dim: Width of the features; where it differs from `dim` they are normalised and projected.
        max_frames: Number of learned temporal embeddings. 0: frames are not told apart.
        max_media: Number of learned embeddings of a medium's place among those of its row. 0, as in the paper: none.

    Raises:
        ValueError: If one of the numbers is negative.

    Source: Alayrac et al. 2022, section 2.1; appendix B (8 frames in training, interpolated to 30). Differs from the
    paper: the projection of features whose width differs from `dim`; `max_media` is flamingo-pytorch's.
    """

    def __init__(self, *, dim: int, vision_dim: int, max_frames: int, max_media: int = 0) -> None:
        super().__init__()
        for name, number in (("max_frames", max_frames), ("max_media", max_media)):
            if number < 0:
                raise ValueError(f"{name} must not be negative, got {number}")
        self.dim = dim
        self.vision_dim = vision_dim
        self.max_frames = max_frames
        self.project: nn.Module = nn.Identity()
        if vision_dim != dim:
            self.project = nn.Sequential(nn.LayerNorm(vision_dim), nn.Linear(vision_dim, dim))
        self.max_media = max_media
        # Typed as those who have some need it.
        self.temporal_embeddings: Any = nn.Parameter(torch.empty(max_frames, dim)) if max_frames else None
        self.media_embeddings: Any = nn.Parameter(torch.empty(max_media, dim)) if max_media else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the embeddings anew."""
        for embeddings in (self.temporal_embeddings, self.media_embeddings):
            if embeddings is not None:
                nn.init.normal_(embeddings, std=0.02)

    def forward(
        self,
        features: Float[Tensor, "batch media frames patches {self.vision_dim}"],
        num_frames: Int[Tensor, "batch media"] | None = None,
    ) -> tuple[Float[Tensor, "batch media frames patches {self.dim}"], Bool[Tensor, "batch media frames"] | None]:
        """Project the features and add the embeddings.

        Args:
            features: Features of each frame, padded to the longest medium.
            num_frames: How many frames of each medium are real, from 0 to `frames`; the rest may hold anything. None:
                all are real.

        Returns:
            The features, and where they are real; None: everywhere.

        Raises:
            ValueError: If a shape is wrong, or a row has more than `max_media` media.
        """
        if features.ndim != 5 or features.shape[-1] != self.vision_dim:
            raise ValueError(
                f"features must have shape (batch, media, frames, patches, vision_dim={self.vision_dim}), "
                f"got {tuple(features.shape)}; an image is one frame"
            )
        features, is_real = clear_padding(features, num_frames)
        features = self.project(features.to(next(self.parameters(), features).dtype))
        if self.temporal_embeddings is not None:
            features = features + self._embed(features.shape[2], num_frames)
        if self.media_embeddings is not None:
            media = features.shape[1]
            if media > self.max_media:
                raise ValueError(f"a row must have at most max_media={self.max_media} media, got {media}")
            features = features + self.media_embeddings[:media, None, None]
        return features, is_real

    def _embed(
        self, frames: int, num_frames: Int[Tensor, "batch media"] | None
    ) -> Float[Tensor, "#batch #media frames 1 dim"]:
        """Embed each frame by its medium's own length: interpolation must not depend on padding."""
        embeddings, device = self.temporal_embeddings, self.temporal_embeddings.device
        if num_frames is None:
            num_frames = torch.full((1, 1), frames, device=device)
        last = self.max_frames - 1
        index = torch.arange(frames, device=device)
        # Up to max_frames, frame i has embedding i; beyond, positions shrink so that the last frame has the last one:
        # i * last / (length - 1), as a fraction of integers, to be exact in every dtype.
        is_long = num_frames[..., None] > self.max_frames
        numerator = torch.where(is_long, index * last, index)
        denominator = torch.where(is_long, num_frames[..., None] - 1, 1)
        below = (numerator // denominator).clamp(max=last)
        above = (below + 1).clamp(max=last)
        weight = (numerator % denominator).to(embeddings.dtype) / denominator
        return torch.lerp(embeddings[below], embeddings[above], weight[..., None])[..., None, :]


def clear_padding(
    features: Float[Tensor, "batch media frames patches vision_dim"], num_frames: Int[Tensor, "batch media"] | None
) -> tuple[Float[Tensor, "batch media frames patches vision_dim"], Bool[Tensor, "batch media frames"] | None]:
    """Set padding frames, which may hold anything, to zero.

    Args:
        features: Features of each frame, padded to the longest medium.
        num_frames: How many frames of each medium are real; None: all.

    Returns:
        The features, and where they are real; None: everywhere.

    Raises:
        ValueError: If `num_frames` has another shape than the media.
    """
    if num_frames is None:
        return features, None
    batch, media, frames = features.shape[:3]
    if num_frames.shape != (batch, media):
        raise ValueError(f"num_frames must have shape ({batch}, {media}), got {tuple(num_frames.shape)}")
    is_real = torch.arange(frames, device=features.device) < num_frames[..., None]
    return features.where(is_real[..., None, None], 0), is_real

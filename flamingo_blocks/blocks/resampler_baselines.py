"""What the paper compares its Perceiver Resampler with, an MLP and a Transformer; also a mean, and a projection.

Each takes what `PerceiverResampler` takes and gives what it gives, so that any of them can stand in its place. All but
the mean give one latent a patch, so that their output, other than the resampler's, grows with the image.

Source: Alayrac et al. 2022 (Flamingo), table 3 (vi). The paper does not tell how its two baselines treat video; here
each frame is processed and the real frames of a medium are averaged, patch by patch.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flamingo_blocks.blocks.feed_forward import FeedForward, SquaredReLU
from flamingo_blocks.blocks.media_features import MediaFeatures, clear_padding


class MeanPoolResampler(nn.Module):
    """Average the features of a medium: one latent, the least a bridge can do.

    Args:
        dim: Width of the result.
        vision_dim: Width of the features; None: `dim`.
        max_frames: Number of learned temporal embeddings; 0: frames are not told apart.
    """

    def __init__(self, *, dim: int, vision_dim: int | None = None, max_frames: int = 8) -> None:
        super().__init__()
        self.dim = dim
        self.vision_dim = dim if vision_dim is None else vision_dim
        self.features = MediaFeatures(dim=dim, vision_dim=self.vision_dim, max_frames=max_frames)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        features: Float[Tensor, "batch media frames patches {self.vision_dim}"],
        num_frames: Int[Tensor, "batch media"] | None = None,
    ) -> Float[Tensor, "batch media 1 {self.dim}"]:
        """Average each medium; arguments as for `PerceiverResampler`."""
        features, is_real = self.features(features.to(self.norm.weight.dtype), num_frames)
        return self.norm(_mean_over_frames(features, is_real).mean(dim=2, keepdim=True))


class LinearResampler(nn.Module):
    """Project each patch: one latent a patch, and nothing is learned where widths are equal.

    Args:
        dim: Width of the result.
        vision_dim: Width of the features; where it differs from `dim` they are projected. None: `dim`.

    Source: Llama-3.2-Vision; IDEFICS, with `use_resampler=False`, has no projection either.
    """

    def __init__(self, *, dim: int, vision_dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.vision_dim = dim if vision_dim is None else vision_dim
        self.project = nn.Identity() if self.vision_dim == dim else nn.Linear(self.vision_dim, dim)

    def forward(
        self,
        features: Float[Tensor, "batch media frames patches {self.vision_dim}"],
        num_frames: Int[Tensor, "batch media"] | None = None,
    ) -> Float[Tensor, "batch media latents {self.dim}"]:
        """Average the frames, then project each patch; arguments as for `PerceiverResampler`."""
        features, is_real = clear_padding(features.to(next(self.parameters(), features).dtype), num_frames)
        return self.project(_mean_over_frames(features, is_real))


class MLPResampler(nn.Module):
    """Send each patch through a feed-forward network: one latent a patch.

    Args:
        dim: Width of the result.
        vision_dim: Width of the features; None: `dim`.
        feed_forward: Makes the network for a width.
        max_frames: Number of learned temporal embeddings; 0: frames are not told apart.

    Source: Alayrac et al. 2022, table 3 (vi).
    """

    def __init__(
        self,
        *,
        dim: int,
        vision_dim: int | None = None,
        feed_forward: Callable[[int], nn.Module] = FeedForward,
        max_frames: int = 8,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.vision_dim = dim if vision_dim is None else vision_dim
        self.features = MediaFeatures(dim=dim, vision_dim=self.vision_dim, max_frames=max_frames)
        self.norm_feed_forward = nn.LayerNorm(dim)
        self.feed_forward = feed_forward(dim)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        features: Float[Tensor, "batch media frames patches {self.vision_dim}"],
        num_frames: Int[Tensor, "batch media"] | None = None,
    ) -> Float[Tensor, "batch media latents {self.dim}"]:
        """Map each patch, then average the frames; arguments as for `PerceiverResampler`."""
        features, is_real = self.features(features.to(self.norm.weight.dtype), num_frames)
        features = features + self.feed_forward(self.norm_feed_forward(features))
        return self.norm(_mean_over_frames(features, is_real))


class TransformerResampler(nn.Module):
    """Let the patches of all frames of a medium attend to one another: one latent a patch.

    Args:
        dim: Width of the result.
        vision_dim: Width of the features; None: `dim`.
        depth: Number of layers.
        heads: Attention heads, a divisor of `dim`.
        hidden: Width of the feed-forward networks; 4 * `dim` by default.
        max_frames: Number of learned temporal embeddings; 0: frames are not told apart.

    Attributes:
        gradient_checkpointing: As for `PerceiverResampler`.

    Raises:
        ValueError: If `heads` does not divide `dim`, or a size is not positive.

    Source: Alayrac et al. 2022, table 3 (vi). Layers are torch's, with norms before each part and squared ReLU.
    """

    def __init__(
        self,
        *,
        dim: int,
        vision_dim: int | None = None,
        depth: int = 6,
        heads: int = 16,
        hidden: int | None = None,
        max_frames: int = 8,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim={dim}, got {heads}")
        self.dim = dim
        self.vision_dim = dim if vision_dim is None else vision_dim
        self.features = MediaFeatures(dim=dim, vision_dim=self.vision_dim, max_frames=max_frames)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim,
                heads,
                dim_feedforward=4 * dim if hidden is None else hidden,
                dropout=0.0,
                activation=SquaredReLU(),
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.gradient_checkpointing = False

    def forward(
        self,
        features: Float[Tensor, "batch media frames patches {self.vision_dim}"],
        num_frames: Int[Tensor, "batch media"] | None = None,
    ) -> Float[Tensor, "batch media latents {self.dim}"]:
        """Mix the patches of each medium, then average the frames; arguments as for `PerceiverResampler`."""
        features, is_real = self.features(features.to(self.norm.weight.dtype), num_frames)
        batch, media, frames, patches, _ = features.shape
        ignore = None
        if is_real is not None:
            # A padding medium has nothing real to attend to: it attends to its padding instead of dividing by zero.
            ignore = ~is_real & is_real.any(-1, keepdim=True)
            ignore = rearrange(ignore, "batch media frames -> (batch media) frames").repeat_interleave(patches, dim=1)
        features = rearrange(features, "batch media frames patches dim -> (batch media) (frames patches) dim")
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                features = checkpoint(layer, features, src_key_padding_mask=ignore, use_reentrant=False)
            else:
                features = layer(features, src_key_padding_mask=ignore)
        features = features.unflatten(1, (frames, patches)).unflatten(0, (batch, media))
        return self.norm(_mean_over_frames(features, is_real))


def _mean_over_frames(
    features: Float[Tensor, "batch media frames patches dim"], is_real: Bool[Tensor, "batch media frames"] | None
) -> Float[Tensor, "batch media patches dim"]:
    if is_real is None:
        return features.mean(dim=2)
    weights = is_real.to(features.dtype)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    return (features * weights[..., None, None]).sum(dim=2)

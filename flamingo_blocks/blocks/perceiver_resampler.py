"""PerceiverResampler: any number of visual features in, a fixed number of latents out.

Source: Alayrac et al. 2022 (Flamingo), section 2.1, appendix A.1.1 and figure 5.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flamingo_blocks.blocks.feed_forward import FeedForward
from flamingo_blocks.blocks.media_features import MediaFeatures


class PerceiverResampler(nn.Module):
    """Turn the features of each medium, an image or a video, into a fixed number of latent vectors.

    A learned temporal embedding is added to all patches of a frame, then learned latents attend to the patches of all
    frames and to themselves, layer by layer. An image is a video of one frame.

    Args:
        dim: Width of the latents, and of the result. The paper: 1536.
        vision_dim: Width of the features; where it differs from `dim` they are normalised and projected first.
            None: `dim`.
        depth: Number of layers.
        heads: Attention heads.
        head_dim: Width of a head; `dim` / `heads` by default (96 in the paper).
        latents: Latent vectors a medium.
        feed_forward: Makes a layer's feed-forward network for a width.
        qk_norm: Makes a norm over head_dim for queries and for keys; none by default.
        max_frames: Number of learned temporal embeddings. A longer video interpolates them linearly. 0: frames are not
            told apart.
        max_media: Number of learned embeddings of a medium's place among those of its row. 0, as in the paper: none.

    Attributes:
        gradient_checkpointing: Recompute each layer in backward instead of keeping its activations. transformers sets
            it too, with checkpointing of a whole model.

    Raises:
        ValueError: If `heads` does not divide `dim` and no `head_dim` is given, or a size is not positive.

    Source: Alayrac et al. 2022, appendix A.1.1. Differs from the paper: LayerNorms on the inputs of each layer and on
    the result, which its pseudo-code leaves out; the projection of features whose width differs from `dim`.
    """

    def __init__(
        self,
        *,
        dim: int,
        vision_dim: int | None = None,
        depth: int = 6,
        heads: int = 16,
        head_dim: int | None = None,
        latents: int = 64,
        feed_forward: Callable[[int], nn.Module] = FeedForward,
        qk_norm: Callable[[int], nn.Module] | None = None,
        max_frames: int = 8,
        max_media: int = 0,
    ) -> None:
        super().__init__()
        for name, size in (("depth", depth), ("heads", heads), ("latents", latents)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.dim = dim
        self.vision_dim = dim if vision_dim is None else vision_dim
        self.features = MediaFeatures(dim=dim, vision_dim=self.vision_dim, max_frames=max_frames, max_media=max_media)
        if head_dim is None and dim % heads:
            raise ValueError(f"heads must divide dim={dim}, got {heads}; or give head_dim")
        head_dim = dim // heads if head_dim is None else head_dim
        self.latents = nn.Parameter(torch.empty(latents, dim))
        self.reset_parameters()
        self.layers = nn.ModuleList(
            PerceiverLayer(dim, heads=heads, head_dim=head_dim, feed_forward=feed_forward, qk_norm=qk_norm)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.gradient_checkpointing = False

    def reset_parameters(self) -> None:
        """Draw the latents anew."""
        nn.init.normal_(self.latents)

    def forward(
        self,
        features: Float[Tensor, "batch media frames patches {self.vision_dim}"],
        num_frames: Int[Tensor, "batch media"] | None = None,
    ) -> Float[Tensor, "batch media latents {self.dim}"]:
        """Resample each medium.

        Args:
            features: Visual features; the order of the patches does not matter, that of the frames does.
            num_frames: For media of different lengths, how many of the frames are real, from 0 to `frames`; the
                rest is padding, is never looked at and may hold anything. 0 marks a padding medium, whose latents mean
                nothing but are finite. None: all frames are real.

        Raises:
            ValueError: If a shape is wrong.
        """
        features, is_real = self.features(features.to(self.latents.dtype), num_frames)
        batch, media, _, patches, _ = features.shape
        mask = None
        if is_real is not None:
            mask = rearrange(is_real, "batch media frames -> (batch media) frames").repeat_interleave(patches, dim=1)
        features = rearrange(features, "batch media frames patches dim -> (batch media) (frames patches) dim")
        latents = self.latents.expand(batch * media, -1, -1)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                latents = checkpoint(layer, latents, features, mask, use_reentrant=False)
            else:
                latents = layer(latents, features, mask)
        return self.norm(latents).unflatten(0, (batch, media))


class PerceiverLayer(nn.Module):
    """One layer of the resampler: latents attend to features and latents, then a feed-forward, both residual.

    Args:
        dim: Width of latents and features.
        heads: Attention heads.
        head_dim: Width of a head.
        feed_forward: Makes the feed-forward network for a width.
        qk_norm: Makes a norm over head_dim for queries and for keys.

    Source: Alayrac et al. 2022, appendix A.1.1.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        feed_forward: Callable[[int], nn.Module],
        qk_norm: Callable[[int], nn.Module] | None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm_features = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.q_norm = nn.Identity() if qk_norm is None else qk_norm(head_dim)
        self.k_norm = nn.Identity() if qk_norm is None else qk_norm(head_dim)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)
        self.norm_feed_forward = nn.LayerNorm(dim)
        self.feed_forward = feed_forward(dim)

    def forward(
        self,
        latents: Float[Tensor, "media latents dim"],
        features: Float[Tensor, "media context dim"],
        mask: Bool[Tensor, "media context"] | None = None,
    ) -> Float[Tensor, "media latents dim"]:
        """Update the latents.

        Args:
            latents: The latents of each medium.
            features: Its features, all frames in one axis.
            mask: True where a feature is real; None: everywhere.
        """
        latents = latents + self._attend(self.norm_latents(latents), self.norm_features(features), mask)
        return latents + self.feed_forward(self.norm_feed_forward(latents))

    def _attend(self, latents: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        context = torch.cat([features, latents], dim=1)
        queries = rearrange(
            self.to_q(latents), "media latents (heads dim) -> media heads latents dim", heads=self.heads
        )
        keys, values = rearrange(
            self.to_kv(context), "media context (two heads dim) -> two media heads context dim", two=2, heads=self.heads
        )
        if mask is not None:
            mask = F.pad(mask, (0, latents.shape[1]), value=True)[:, None, None]
        output = F.scaled_dot_product_attention(self.q_norm(queries), self.k_norm(keys), values, attn_mask=mask)
        return self.to_out(rearrange(output, "media heads latents dim -> media latents (heads dim)"))

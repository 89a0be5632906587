"""The building blocks of Flamingo: they need torch, einops and jaxtyping alone."""

from flamingo_blocks.blocks.attention import Algorithm, KeyValues, attend_to_media, choose_algorithm
from flamingo_blocks.blocks.contrastive import ContrastiveLoss
from flamingo_blocks.blocks.feed_forward import FeedForward, SquaredReLU, SwiGLU
from flamingo_blocks.blocks.gated_cross_attention import GatedCrossAttentionBlock, TanhGate
from flamingo_blocks.blocks.media_features import MediaFeatures
from flamingo_blocks.blocks.media_mask import (
    Attend,
    MediaRun,
    MediaRuns,
    dense_media_mask,
    media_index,
    media_ranges,
    ranges_of_mask,
)
from flamingo_blocks.blocks.perceiver_resampler import PerceiverLayer, PerceiverResampler
from flamingo_blocks.blocks.resampler_baselines import (
    LinearResampler,
    MeanPoolResampler,
    MLPResampler,
    TransformerResampler,
)

__all__ = [
    "Algorithm",
    "Attend",
    "ContrastiveLoss",
    "FeedForward",
    "GatedCrossAttentionBlock",
    "KeyValues",
    "LinearResampler",
    "MLPResampler",
    "MeanPoolResampler",
    "MediaFeatures",
    "MediaRun",
    "MediaRuns",
    "PerceiverLayer",
    "PerceiverResampler",
    "SquaredReLU",
    "SwiGLU",
    "TanhGate",
    "TransformerResampler",
    "attend_to_media",
    "choose_algorithm",
    "dense_media_mask",
    "media_index",
    "media_ranges",
    "ranges_of_mask",
]

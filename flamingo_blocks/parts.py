"""Make the trained parts, resampler and blocks, from what a configuration or a file can hold: numbers and names.

The modules themselves take modules. Here, and nowhere else, names become modules.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from torch import nn

from flamingo_blocks.blocks import (
    FeedForward,
    GatedCrossAttentionBlock,
    LinearResampler,
    MeanPoolResampler,
    MLPResampler,
    PerceiverResampler,
    SquaredReLU,
    SwiGLU,
    TransformerResampler,
)

Activation = Literal["squared_relu", "gelu", "relu", "swiglu"]
Gating = Literal["tanh", "tanh_per_channel", "none"]
Norm = Literal["layer_norm", "rms_norm"]
Resampler = Literal["perceiver", "mlp", "transformer", "mean_pool", "linear"]
# What has the same name in a configuration.
_OF_BLOCKS = ("gating", "gate_init", "feed_forward_without_media")
_OF_RESAMPLERS = ("num_latents", "max_frames")


def make_block(
    *,
    dim: int,
    media_dim: int,
    heads: int,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    hidden: int | None = None,
    activation: Activation = "squared_relu",
    norm: Norm = "layer_norm",
    norm_eps: float = 1e-5,
    qk_norm: bool = False,
    gating: Gating = "tanh",
    gate_init: float = 0.0,
    feed_forward_without_media: bool = True,
) -> GatedCrossAttentionBlock:
    """Make a gated cross-attention block.

    Args:
        dim: Width of the language model's hidden states.
        media_dim: Width of the media's latents.
        heads: Query heads.
        head_dim: Width of a head; `dim` / `heads` by default.
        kv_heads: Heads of keys and values; `heads` by default.
        hidden: Width of the feed-forward network; 4 * `dim` by default.
        activation: Of the feed-forward network.
        norm: Kind of the norms.
        norm_eps: Added to the variance, in the norms.
        qk_norm: Whether queries and keys are normalised, head by head, by the same kind of norm.
        gating: See `FlamingoConfig.gating`.
        gate_init: Value of the gates' alpha at the start.
        feed_forward_without_media: See `GatedCrossAttentionBlock`.

    Raises:
        ValueError: If the numbers do not fit together.
    """
    make_norm = _norm(norm, norm_eps)
    block = GatedCrossAttentionBlock(
        dim=dim,
        media_dim=media_dim,
        heads=heads,
        head_dim=head_dim,
        kv_heads=kv_heads,
        norm=make_norm,
        qk_norm=make_norm if qk_norm else None,
        feed_forward=_feed_forward(activation, hidden),
        gate_per_channel=gating == "tanh_per_channel",
        gate_init=float(gate_init),
        feed_forward_without_media=feed_forward_without_media,
    )
    if gating == "none":
        gates: Any = block
        gates.gate, gates.gate_feed_forward = nn.Identity(), nn.Identity()
    return block


def make_resampler(
    kind: Resampler = "perceiver",
    *,
    dim: int,
    vision_dim: int,
    depth: int = 6,
    heads: int = 16,
    head_dim: int | None = None,
    hidden: int | None = None,
    activation: Activation = "squared_relu",
    qk_norm: bool = False,
    num_latents: int = 64,
    max_frames: int = 8,
    max_media: int = 0,
) -> Any:
    """Make a resampler.

    Args:
        kind: See `FlamingoConfig.resampler`.
        dim: Width of the latents.
        vision_dim: Width of the features.
        depth: Layers of a perceiver or transformer.
        heads: Their heads.
        head_dim: Width of a head of the perceiver; dim / heads, rounded down, by default.
        hidden: Width of feed-forward networks; 4 * `dim` by default.
        activation: Of the feed-forward networks of a perceiver or MLP.
        qk_norm: Whether a perceiver normalises queries and keys, head by head.
        num_latents: Latents of a medium, for the perceiver.
        max_frames: Number of learned temporal embeddings.
        max_media: See `PerceiverResampler`; whole models have none.

    Raises:
        ValueError: If there is no such resampler, or the numbers do not fit together.
    """
    sizes: dict[str, Any] = {"dim": dim, "vision_dim": vision_dim, "max_frames": max_frames}
    match kind:
        case "perceiver":
            return PerceiverResampler(
                **sizes,
                depth=depth,
                heads=heads,
                head_dim=head_dim or max(1, dim // max(1, heads)),
                latents=num_latents,
                feed_forward=_feed_forward(activation, hidden),
                qk_norm=nn.LayerNorm if qk_norm else None,
                max_media=max_media,
            )
        case "mlp":
            return MLPResampler(**sizes, feed_forward=_feed_forward(activation, hidden))
        case "transformer":
            return TransformerResampler(**sizes, depth=depth, heads=heads, hidden=hidden)
        case "mean_pool":
            return MeanPoolResampler(**sizes)
        case "linear":
            return LinearResampler(dim=dim, vision_dim=vision_dim)
    raise ValueError(f"resampler must be perceiver, mlp, transformer, mean_pool or linear, got {kind!r}")


def as_configured(block: Mapping[str, Any], resampler: Mapping[str, Any]) -> dict[str, Any]:
    """Name options of `make_block` and `make_resampler` as `FlamingoConfig` does.

    Args:
        block: Options of a block, without its widths.
        resampler: Options of a resampler, without its widths.
    """
    names = {name: f"cross_attention_{name}" for name in block} | {name: name for name in _OF_BLOCKS}
    options = {names[name]: value for name, value in block.items()}
    names = {name: f"resampler_{name}" for name in resampler} | {"kind": "resampler"}
    names |= {name: name for name in _OF_RESAMPLERS}
    return options | {names[name]: value for name, value in resampler.items()}


def _norm(kind: Norm, eps: float) -> Callable[[int], nn.Module]:
    match kind:
        case "layer_norm":
            return partial(nn.LayerNorm, eps=eps)
        case "rms_norm":
            return partial(nn.RMSNorm, eps=eps)
    raise ValueError(f"norm must be layer_norm or rms_norm, got {kind!r}")


def _feed_forward(activation: Activation, hidden: int | None) -> Callable[[int], nn.Module]:
    match activation:
        case "swiglu":
            return partial(SwiGLU, hidden=hidden)
        case "squared_relu":
            return partial(FeedForward, hidden=hidden, activation=SquaredReLU)
        case "gelu":
            return partial(FeedForward, hidden=hidden, activation=nn.GELU)
        case "relu":
            return partial(FeedForward, hidden=hidden, activation=nn.ReLU)
    raise ValueError(f"activation must be squared_relu, gelu, relu or swiglu, got {activation!r}")

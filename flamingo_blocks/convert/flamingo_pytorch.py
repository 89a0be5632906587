"""flamingo-pytorch, the first public implementation: single blocks and resamplers, to and fro.

It has no whole model and no released weights; people train with its modules, and OpenFlamingo's come from them.

Not copied: with `only_attend_immediate_media=False`, text before the first medium attends to all media, later ones
included. Here it sees none; see `flamingo_blocks.media_ranges` for the rules.

Source: github.com/lucidrains/flamingo-pytorch, version 0.1.2.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flamingo_blocks.blocks import GatedCrossAttentionBlock, PerceiverResampler
from flamingo_blocks.convert.renaming import Rename, listed, load_module, shape_of, to_theirs, under, under_each
from flamingo_blocks.parts import make_block, make_resampler

# Of the constructors there.
_ARGUMENTS = {"dim", "dim_head", "heads", "ff_mult", "only_attend_immediate_media"}
_ARGUMENTS |= {"depth", "num_latents", "num_media_embeds"}
# What both kinds of attention have by the same names, and their feed-forward networks, which hold their norms.
ATTENTION = [Rename(name, name) for name in ("to_q", "to_kv", "to_out")]
FEED_FORWARD = [
    Rename("0", "norm_feed_forward"),
    Rename("1", "feed_forward.to_hidden"),
    Rename("3", "feed_forward.to_out"),
]
BLOCK = [
    *under([Rename("norm", "norm"), *ATTENTION], theirs="attn.", ours=""),
    Rename("attn_gate", "gate.alpha"),
    *under(FEED_FORWARD, theirs="ff.", ours=""),
    Rename("ff_gate", "gate_feed_forward.alpha"),
]
_RESAMPLER_LAYER = [
    *under(
        [Rename("norm_media", "norm_features"), Rename("norm_latents", "norm_latents"), *ATTENTION],
        theirs="0.",
        ours="",
    ),
    *under(FEED_FORWARD, theirs="1.", ours=""),
]


def resampler_table(depth: int) -> list[Rename]:
    """Give the table for a resampler, without its embeddings.

    Args:
        depth: Number of layers.
    """
    layers = under_each(_RESAMPLER_LAYER, range(depth), theirs="layers.", ours="layers.")
    return [Rename("latents", "latents"), Rename("norm", "norm"), *layers]


def load_block(state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> GatedCrossAttentionBlock:
    """Load a gated cross-attention block.

    Args:
        state_dict: Of the block there.
        config: Arguments of its constructor, of which `dim_head`, or `heads`, is needed where the former is not 64; the
            others show in the tensors.

    Returns:
        The block, in eval mode.

    Raises:
        ValueError: If a tensor is left over, is missing or has the wrong shape.

    Example:
        ```python
        import torch
        from torch import nn

        from flamingo_blocks import GatedCrossAttentionBlock
        from flamingo_blocks.blocks import FeedForward
        from flamingo_blocks.convert import flamingo_pytorch

        trained = GatedCrossAttentionBlock(
            dim=64, media_dim=64, heads=2, head_dim=64, feed_forward=lambda dim: FeedForward(dim, activation=nn.GELU)
        )
        state_dict = flamingo_pytorch.to_flamingo_pytorch(trained)  # for its GatedCrossAttentionBlock(dim=64, heads=2)
        block = flamingo_pytorch.load_block(state_dict)
        assert torch.equal(block.to_q.weight, trained.to_q.weight)
        ```
    """
    sizes = block_sizes(state_dict, dim_head=_dim_head(config, state_dict, "attn.to_q.weight"))
    dim, media_dim = shape_of(state_dict, "attn.to_q.weight")[1], shape_of(state_dict, "attn.to_kv.weight")[1]
    return load_module(make_block(dim=dim, media_dim=media_dim, **sizes), BLOCK, state_dict)


def load_resampler(state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> PerceiverResampler:
    """Load a resampler.

    Its embeddings of a medium's place in its row are `features.media_embeddings` here: a row has no more media than
    there are embeddings.

    Args:
        state_dict: Of the resampler there.
        config: Arguments of its constructor, of which `dim_head`, or `heads`, is needed where the former is not 64; the
            others show in the tensors.

    Returns:
        The resampler, in eval mode. What is (batch, time, patches, dim) there is (batch, media, 1, patches, dim) here.

    Raises:
        ValueError: If a tensor is left over, is missing or has the wrong shape.
    """
    sizes = resampler_sizes(state_dict, dim_head=_dim_head(config, state_dict, "layers.0.0.to_q.weight"))
    dim, max_media = shape_of(state_dict, "latents")[1], shape_of(state_dict, "media_pos_emb")[0]
    resampler = make_resampler(dim=dim, vision_dim=dim, max_frames=0, max_media=max_media, **sizes)
    return load_module(resampler, _with_places(sizes["depth"]), state_dict)


def to_flamingo_pytorch(module: GatedCrossAttentionBlock | PerceiverResampler) -> dict[str, Tensor]:
    """Give the tensors of a block or resampler by their names there.

    Args:
        module: As loaded here: with GELU and LayerNorms, and a resampler that tells media apart, but not frames.

    Raises:
        ValueError: If it has tensors that have no place there. It lists them.
    """
    table = BLOCK if isinstance(module, GatedCrossAttentionBlock) else _with_places(len(module.layers))
    return to_theirs(table, module.state_dict())


def block_sizes(state_dict: Mapping[str, Tensor], *, dim_head: int = 64) -> dict[str, Any]:
    """Read the sizes of a block off its tensors, as `make_block` takes them.

    Args:
        state_dict: Of the block there.
        dim_head: Width of a head.

    Raises:
        ValueError: If a tensor is missing.
    """
    return {
        "heads": shape_of(state_dict, "attn.to_q.weight")[0] // dim_head,
        "head_dim": dim_head,
        "hidden": shape_of(state_dict, "ff.1.weight")[0],
        "activation": "gelu",
    }


def resampler_sizes(state_dict: Mapping[str, Tensor], *, dim_head: int = 64) -> dict[str, Any]:
    """Read the sizes of a resampler off its tensors, as `make_resampler` takes them.

    Args:
        state_dict: Of the resampler there.
        dim_head: Width of a head.

    Raises:
        ValueError: If a tensor is missing.
    """
    return {
        "depth": len({name.split(".")[1] for name in state_dict if name.startswith("layers.")}),
        "heads": shape_of(state_dict, "layers.0.0.to_q.weight")[0] // dim_head,
        "head_dim": dim_head,
        "hidden": shape_of(state_dict, "layers.0.1.1.weight")[0],
        "activation": "gelu",
        "num_latents": shape_of(state_dict, "latents")[0],
    }


def _dim_head(config: Mapping[str, Any] | None, state_dict: Mapping[str, Tensor], queries: str) -> int:
    """Find the width of a head by what a constructor's arguments say."""
    config, inner = dict(config or {}), shape_of(state_dict, queries)[0]
    if unknown := sorted(set(config) - _ARGUMENTS):
        raise ValueError(f"config must hold arguments of the module there, {listed(sorted(_ARGUMENTS))}, got {unknown}")
    dim_head = config.get("dim_head", inner // config["heads"] if config.get("heads") else 64)
    if dim_head < 1 or inner % dim_head or config.get("heads", inner // dim_head) * dim_head != inner:
        raise ValueError(f"config must have heads * dim_head = {inner}, the rows of {queries}, got {config}")
    return int(dim_head)


def _with_places(depth: int) -> list[Rename]:
    return [*resampler_table(depth), Rename("media_pos_emb", "features.media_embeddings", "media 1 dim -> media dim")]

"""Modules of other libraries, each beside ours with the same weights.

Where it can be, the two share the memory of their weights: matrix products take some percent more or less time by where
their operands happen to lie.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from flamingo_pytorch.flamingo_pytorch import GatedCrossAttentionBlock as FlamingoPytorchBlock
from flamingo_pytorch.flamingo_pytorch import PerceiverResampler as FlamingoPytorchResampler
from open_flamingo.src.helpers import GatedCrossAttentionBlock as OpenFlamingoBlock
from open_flamingo.src.helpers import PerceiverResampler as OpenFlamingoResampler
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer, _prepare_cross_attention_mask

from flamingo_blocks.blocks import (
    FeedForward,
    GatedCrossAttentionBlock,
    PerceiverResampler,
    SwiGLU,
    dense_media_mask,
    media_ranges,
)
from flamingo_blocks.convert.flamingo_pytorch import BLOCK, resampler_table
from flamingo_blocks.convert.idefics import block_table
from flamingo_blocks.convert.mllama import BLOCK as MLLAMA_BLOCK
from flamingo_blocks.convert.renaming import Rename, to_ours

LATENTS = 64
HEAD_DIM = 64
Block = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """Another library's block, and ours with the same weights.

    Attributes:
        name: Of the library or model.
        module: Theirs.
        ours: Ours.
        for_layout: Takes where the media are and does what their model does once a forward, such as building masks.
            Gives their block as a function of hidden states and media.
    """

    name: str
    module: nn.Module
    ours: GatedCrossAttentionBlock
    for_layout: Callable[[Tensor], Block]


def open_flamingo(*, dim: int, media_dim: int, heads: int = 8) -> Peer:
    """OpenFlamingo's block: einsum attention over all media under a mask that each block builds.

    Args:
        dim: Width of the text.
        media_dim: Width of the media.
        heads: Attention heads.
    """
    module = OpenFlamingoBlock(dim=dim, dim_visual=media_dim, dim_head=HEAD_DIM, heads=heads)
    ours = _paper_block(dim=dim, media_dim=media_dim, heads=heads)
    _randomize(module)
    _share(module, ours, BLOCK)
    return Peer("OpenFlamingo", module, ours, partial(_told_locations, module))


def flamingo_pytorch(*, dim: int, heads: int = 8) -> Peer:
    """The block of lucidrains, which OpenFlamingo's comes from.

    Args:
        dim: Width of text and media.
        heads: Attention heads.
    """
    module = FlamingoPytorchBlock(dim=dim, dim_head=HEAD_DIM, heads=heads)
    ours = _paper_block(dim=dim, media_dim=dim, heads=heads)
    _randomize(module)
    _share(module, ours, BLOCK)
    return Peer("flamingo-pytorch", module, ours, partial(_told_locations, module))


def _told_locations(module: nn.Module, is_media: Tensor) -> Block:
    return lambda hidden_states, media: module(hidden_states, media, media_locations=is_media)


def _paper_block(*, dim: int, media_dim: int, heads: int) -> GatedCrossAttentionBlock:
    return GatedCrossAttentionBlock(
        dim=dim,
        media_dim=media_dim,
        heads=heads,
        head_dim=HEAD_DIM,
        feed_forward=partial(FeedForward, activation=nn.GELU),
    )


def idefics(*, dim: int, media_dim: int, hidden: int) -> Peer:
    """IDEFICS' layer: RMSNorm, SwiGLU, torch's fused attention over all media under a mask that the model builds.

    Args:
        dim: Width of the text.
        media_dim: Width of the media.
        hidden: Width of the feed-forward network.
    """
    config = IdeficsConfig(
        hidden_size=dim,
        num_attention_heads=dim // HEAD_DIM,
        intermediate_size=hidden,
        alpha_type="float",
        vision_config={"embed_dim": media_dim},
    )
    config._attn_implementation = "sdpa"  # as the whole model chooses by itself
    module = IdeficsGatedCrossAttentionLayer(config, layer_idx=0)
    ours = GatedCrossAttentionBlock(
        dim=dim,
        media_dim=media_dim,
        heads=dim // HEAD_DIM,
        norm=partial(nn.RMSNorm, eps=config.rms_norm_eps),
        feed_forward=partial(SwiGLU, hidden=hidden),
    )
    _randomize(module)
    _share(module, ours, block_table("tanh"))

    def for_layout(is_media: Tensor) -> Block:
        dtype = module.alpha_dense.dtype
        is_seen = _mask(is_media).repeat_interleave(LATENTS, dim=-1)[:, None]
        mask = torch.where(is_seen, torch.zeros((), dtype=dtype, device=is_seen.device), torch.finfo(dtype).min)
        sees_any = (mask == 0.0).any(-1).to(dtype).squeeze(1)

        def block(hidden_states: Tensor, media: Tensor) -> Tensor:
            output: Tensor = module(
                hidden_states,
                image_hidden_states=media.flatten(1, 2),
                image_attention_mask=mask,
                cross_attention_gate=sees_any,
            )
            return output

        return block

    return Peer("IDEFICS", module, ours, for_layout)


def mllama(*, dim: int, hidden: int) -> Peer:
    """Llama-3.2-Vision's layer: as IDEFICS', with fewer heads of keys and values and norms on queries and keys.

    It is equal to ours where every token sees a medium; others see all media in it.

    Args:
        dim: Width of text and media.
        hidden: Width of the feed-forward network.
    """
    heads = dim // HEAD_DIM
    config = MllamaTextConfig(
        hidden_size=dim,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        intermediate_size=hidden,
    )
    config._attn_implementation = "sdpa"
    module = MllamaCrossAttentionDecoderLayer(config, layer_idx=0)
    norm = partial(nn.RMSNorm, eps=config.rms_norm_eps)
    ours = GatedCrossAttentionBlock(
        dim=dim,
        media_dim=dim,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        norm=norm,
        qk_norm=norm,
        feed_forward=partial(SwiGLU, hidden=hidden),
    )
    _randomize(module)
    _share(module, ours, MLLAMA_BLOCK)

    def for_layout(is_media: Tensor) -> Block:
        # The last axis is that of an image's tiles: one.
        dtype: Any = module.cross_attn_mlp_gate.dtype  # annotated as str there
        mask, sees_any = _prepare_cross_attention_mask(_mask(is_media)[..., None].float(), LATENTS, dtype)

        def block(hidden_states: Tensor, media: Tensor) -> Tensor:
            output: Tensor = module(
                hidden_states,
                cross_attention_states=media.flatten(1, 2),
                cross_attention_mask=mask,
                attention_mask=None,
                full_text_row_masked_out_mask=sees_any,
            )
            return output

        return block

    return Peer("Mllama", module, ours, for_layout)


def open_flamingo_resampler(*, dim: int, depth: int) -> tuple[nn.Module, PerceiverResampler]:
    """OpenFlamingo's resampler, which takes (batch, media, frames, patches, dim), and ours.

    Args:
        dim: Width.
        depth: Number of layers.
    """
    module = OpenFlamingoResampler(dim=dim, depth=depth, dim_head=HEAD_DIM, heads=8, num_latents=LATENTS)
    return module, _our_resampler(module, dim=dim, depth=depth)


def flamingo_pytorch_resampler(*, dim: int, depth: int) -> tuple[nn.Module, PerceiverResampler]:
    """The resampler of lucidrains, which takes (batch, media, patches, dim), and ours.

    Its embedding of a medium's place in the text, which the paper does not have, is zero.

    Args:
        dim: Width.
        depth: Number of layers.
    """
    module = FlamingoPytorchResampler(dim=dim, depth=depth, dim_head=HEAD_DIM, heads=8, num_latents=LATENTS)
    ours = _our_resampler(module, dim=dim, depth=depth)
    nn.init.zeros_(module.media_pos_emb)
    return module, ours


def _our_resampler(theirs: nn.Module, *, dim: int, depth: int) -> PerceiverResampler:
    _randomize(theirs)
    ours = PerceiverResampler(
        dim=dim,
        depth=depth,
        heads=8,
        head_dim=HEAD_DIM,
        latents=LATENTS,
        feed_forward=partial(FeedForward, activation=nn.GELU),
        max_frames=0,
    )
    _share(theirs, ours, resampler_table(depth))
    return ours


def _share(theirs: nn.Module, ours: nn.Module, renames: list[Rename]) -> None:
    """Give ours the weights of theirs, in the same memory where tensors are the same."""
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    tensors = {name: tensor for name, tensor in theirs.state_dict().items() if name != "media_pos_emb"}
    ours.load_state_dict(to_ours(renames, tensors, shapes), assign=True)


def _mask(is_media: Tensor) -> Tensor:
    return dense_media_mask(media_ranges(is_media), int(is_media.sum(1).max()))


def _randomize(module: Any) -> None:
    """Move vectors away from where they start: norms, and gates, which would hide everything at zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.numel() == 1:
            nn.init.constant_(parameter, 0.5)
        elif parameter.ndim == 1:
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1, generator=generator)

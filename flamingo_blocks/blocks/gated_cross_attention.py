"""GATED XATTN-DENSE: the layer that lets a frozen language model see, and that starts as the identity.

Source: Alayrac et al. 2022 (Flamingo), section 2.2, appendix A.1.2 and figure 4.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from flamingo_blocks.blocks.attention import Algorithm, KeyValues, attend_to_media
from flamingo_blocks.blocks.feed_forward import FeedForward
from flamingo_blocks.blocks.media_mask import MediaRuns


class TanhGate(nn.Module):
    """Scale by the tanh of a learned number, which starts at 0.

    Args:
        dim: Width of the input for a gate per channel; None for one gate.
        init: Value of alpha at the start.

    Source: Alayrac et al. 2022, section 2.2. Differs from the paper: a gate per channel is IDEFICS'.
    """

    def __init__(self, dim: int | None = None, *, init: float = 0.0) -> None:
        super().__init__()
        self.init = init
        # Never 0-dimensional: FSDP2 cannot shard scalars.
        self.alpha = nn.Parameter(torch.empty(dim or 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set alpha to what it starts with."""
        nn.init.constant_(self.alpha, self.init)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Return tanh(alpha) * x."""
        return self.alpha.tanh() * x


class GatedCrossAttentionBlock(nn.Module):
    """Cross-attention over media and a feed-forward, each behind a tanh gate and a residual connection.

    It stands before a frozen decoder layer. With both gates at 0, where they start, it returns its input bit for bit,
    as long as what it computes is finite.

    Args:
        dim: Width of the language model's hidden states.
        media_dim: Width of the media's latents.
        heads: Query heads.
        head_dim: Width of a head; `dim` / `heads` by default.
        kv_heads: Heads of keys and values, a divisor of `heads`; `heads` by default.
        norm: Makes the norms before attention and feed-forward for a width.
        qk_norm: Makes a norm over head_dim for queries and for keys; none by default.
        feed_forward: Makes the feed-forward network for a width.
        gate_per_channel: One gate a channel instead of one a sub-layer.
        gate_init: Value of both gates' alpha at the start.
        feed_forward_without_media: Whether tokens that see no medium go through the feed-forward. False leaves them as
            they are.
        algorithm: To force an algorithm of attention by its name, see `choose_algorithm`. It can be set later, too.

    Raises:
        ValueError: If `heads` does not divide `dim` and no `head_dim` is given, or `kv_heads` does not divide `heads`.

    Example:
        ```python
        import torch
        from flamingo_blocks import GatedCrossAttentionBlock, MediaRuns, media_ranges

        block = GatedCrossAttentionBlock(dim=64, media_dim=32, heads=4)
        is_image = torch.tensor([[False, True, False, False, True, False]])
        runs = MediaRuns.from_ranges(media_ranges(is_image))
        hidden_states = block(torch.randn(1, 6, 64), torch.randn(1, 2, 8, 32), runs)
        ```

    Source: Alayrac et al. 2022, section 2.2 and appendix A.1.2. Differs from the paper: no; its defaults are the
    paper's, the options are those that other models of the family need.
    """

    def __init__(
        self,
        *,
        dim: int,
        media_dim: int,
        heads: int,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        qk_norm: Callable[[int], nn.Module] | None = None,
        feed_forward: Callable[[int], nn.Module] = FeedForward,
        gate_per_channel: bool = False,
        gate_init: float = 0.0,
        feed_forward_without_media: bool = True,
        algorithm: Algorithm | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or (head_dim is None and dim % heads):
            raise ValueError(f"heads must divide dim={dim}, got {heads}; or give head_dim")
        head_dim = dim // heads if head_dim is None else head_dim
        kv_heads = heads if kv_heads is None else kv_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads={heads}, got {kv_heads}")
        self.dim = dim
        self.media_dim = media_dim
        self.heads = heads
        self.head_dim = head_dim
        self.kv_heads = kv_heads
        self.feed_forward_without_media = feed_forward_without_media
        self.algorithm = algorithm
        gate_dim = dim if gate_per_channel else None
        self.norm = norm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(media_dim, 2 * kv_heads * head_dim, bias=False)
        self.q_norm = nn.Identity() if qk_norm is None else qk_norm(head_dim)
        self.k_norm = nn.Identity() if qk_norm is None else qk_norm(head_dim)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)
        self.gate = TanhGate(gate_dim, init=gate_init)
        self.norm_feed_forward = norm(dim)
        self.feed_forward = feed_forward(dim)
        self.gate_feed_forward = TanhGate(gate_dim, init=gate_init)

    def project_media(self, media: Float[Tensor, "batch media latents {self.media_dim}"]) -> KeyValues:
        """Project media to this block's keys and values, to be passed to `forward` again and again.

        Args:
            media: The media's latents, in the order of their `<image>` tokens.

        Raises:
            ValueError: If the shape is wrong.
        """
        if media.ndim != 4 or media.shape[-1] != self.media_dim:
            raise ValueError(
                f"media must have shape (batch, media, latents, media_dim={self.media_dim}), got {tuple(media.shape)}"
            )
        keys, values = rearrange(
            self.to_kv(media.to(self._dtype)),
            "batch media latents (two heads dim) -> two batch media latents heads dim",
            two=2,
            heads=self.kv_heads,
        )
        return KeyValues(self.k_norm(keys), values)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch text {self.dim}"],
        media: Float[Tensor, "batch media latents {self.media_dim}"] | KeyValues,
        runs: MediaRuns,
    ) -> Float[Tensor, "batch text {self.dim}"]:
        """Add to the hidden states what the tokens see.

        Args:
            hidden_states: The language model's residual stream. It may be of another dtype than this block (a
                bfloat16 language model with float32 blocks): it keeps its own.
            media: The media's latents, or what `project_media` made of them.
            runs: What each token sees. A token that sees nothing takes no attention, only the feed-forward, or not even
                that, see `feed_forward_without_media`.

        Raises:
            ValueError: If a shape is wrong, or `runs` does not fit the other two.
        """
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.dim:
            raise ValueError(
                f"hidden_states must have shape (batch, text, dim={self.dim}), got {tuple(hidden_states.shape)}"
            )
        if not isinstance(media, KeyValues):
            # The class' own: what FSDP2 puts around it frees the weights again, which are still needed here.
            media = type(self).project_media(self, media)
        hidden_states = hidden_states + self.attend(hidden_states, media, runs)
        update = self.feed_forward(self.norm_feed_forward(hidden_states.to(self._dtype)))
        update = self.gate_feed_forward(update).to(hidden_states.dtype)
        if not self.feed_forward_without_media:
            update = update.where(runs.sees_something[..., None], 0)
        return hidden_states + update

    def attend(
        self, hidden_states: Float[Tensor, "batch text {self.dim}"], media: KeyValues, runs: MediaRuns
    ) -> Float[Tensor, "batch text {self.dim}"]:
        """Give what the attention of this block, behind its gate, adds to the hidden states.

        Args:
            hidden_states: As for `forward`.
            media: What `project_media` made of the media.
            runs: As for `forward`.
        """
        queries = self.to_q(self.norm(hidden_states.to(self._dtype))).unflatten(-1, (self.heads, self.head_dim))
        attention = attend_to_media(self.q_norm(queries), media, runs, algorithm=self.algorithm).flatten(2)
        return self.gate(self.to_out(attention)).to(hidden_states.dtype)

    @property
    def _dtype(self) -> torch.dtype:
        # The first parameter is a norm's, which keeps a floating dtype even where linear layers are quantised.
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

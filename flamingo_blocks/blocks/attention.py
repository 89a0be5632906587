"""Attention of text tokens over media: one entry point, several exact algorithms behind it.

Every token sees a contiguous range of media, most often one medium. The cost of the algorithms that use the run table
grows with the tokens and with what each token sees, not with the number of media in the batch.

Legend: `text` tokens, `media` per row, `latents` per medium, `heads` of queries, `kv_heads` of keys and values.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from flamingo_blocks.blocks.media_mask import MediaRuns, dense_media_mask

Algorithm = Literal["loop", "dense"]


@dataclass(frozen=True, eq=False)
class KeyValues:
    """Keys and values of every medium for one layer: projected once per prompt and kept while decoding."""

    keys: Float[Tensor, "batch media latents kv_heads head_dim"]
    values: Float[Tensor, "batch media latents kv_heads head_dim"]


def attend_to_media(
    queries: Float[Tensor, "batch text heads head_dim"],
    media: KeyValues,
    runs: MediaRuns,
    *,
    algorithm: Algorithm | None = None,
) -> Float[Tensor, "batch text heads head_dim"]:
    """Let each text token attend to the latents of the media in its range, and to nothing else.

    A token whose range is empty gets exactly zero, and passes no gradient on. Scores are scaled by 1/sqrt(head_dim).

    Args:
        queries: One vector a token and head.
        media: Keys and values; each kv head serves heads / kv_heads neighbouring heads. NaN in a medium reaches the
            tokens that see it, in `dense` in all heads, and no others.
        runs: What each token sees.
        algorithm: `"loop"` or `"dense"`, to force one (see `choose_algorithm`). All are exact.

    Raises:
        ValueError: If shapes do not fit, if `runs` names a medium that is not there (not checked under
            `torch.compile`), or if `"loop"` is forced on runs that were built there and so have no table.
    """
    _check_shapes(queries, media, runs)
    if algorithm is None:
        algorithm = choose_algorithm(queries, media, runs)
    match algorithm:
        case "loop":
            return _loop_over_runs(queries, media, runs)
        case "dense":
            return _dense(queries, media, runs)
    raise ValueError(f"algorithm must be one of {', '.join(map(repr, get_args(Algorithm)))}, got {algorithm!r}")


def choose_algorithm(
    queries: Float[Tensor, "batch text heads head_dim"], media: KeyValues, runs: MediaRuns
) -> Algorithm:
    """Name the algorithm that `attend_to_media` uses for these inputs.

    - `"loop"`: one maskless attention per run, which computes nothing in vain. The choice on CPU where runs are long or
      media large.
    - `"dense"`: all tokens against all media under a mask. The reference; needs no run table, so it has static shapes
      for `torch.compile`, and one kernel on devices where a launch per run would cost more. Also the choice on CPU
      where there is so little to compute that a call per run would take longer.
    """
    if torch.compiler.is_compiling() or runs.table is None or queries.device.type != "cpu":
        return "dense"
    _, num_media, latents, _, _ = media.keys.shape
    multiply_adds = 2 * queries.numel() * num_media * latents
    return "dense" if multiply_adds < _MULTIPLY_ADDS_PER_CALL * len(runs.table) else "loop"


# One call of attention takes about as long as so many multiply-adds within a call.
_MULTIPLY_ADDS_PER_CALL = 2**18


def _loop_over_runs(
    queries: Float[Tensor, "batch text heads head_dim"], media: KeyValues, runs: MediaRuns
) -> Float[Tensor, "batch text heads head_dim"]:
    if runs.table is None:
        raise ValueError('algorithm "loop" needs a run table, which torch.compile does not build; use "dense"')
    num_media = media.keys.shape[1]
    # One split and one unbind: slicing per run instead would cost backward a full-size zero tensor for each slice.
    pieces = queries.flatten(0, 1).split([run.length for run in runs.table])
    keys, values = media.keys.flatten(0, 1).unbind(), media.values.flatten(0, 1).unbind()
    outputs = []
    for piece, run in zip(pieces, runs.table, strict=True):
        if run.media_start == run.media_stop:
            outputs.append(torch.zeros_like(piece))
            continue
        seen = slice(run.row * num_media + run.media_start, run.row * num_media + run.media_stop)
        outputs.append(_attend(piece[None], _join(keys[seen])[None], _join(values[seen])[None])[0])
    return torch.cat(outputs).view_as(queries) if outputs else torch.zeros_like(queries)


def _join(media: tuple[Tensor, ...]) -> Tensor:
    return media[0] if len(media) == 1 else torch.cat(media)


def _dense(
    queries: Float[Tensor, "batch text heads head_dim"], media: KeyValues, runs: MediaRuns
) -> Float[Tensor, "batch text heads head_dim"]:
    _, num_media, latents, _, _ = media.keys.shape
    if num_media == 0:
        return torch.zeros_like(queries)
    mask = dense_media_mask(runs.ranges, num_media)
    # Kernels differ in what they return where everything is masked, some NaN, also as gradient: such tokens attend
    # everywhere here and are set to zero afterwards.
    sees_something = mask.any(-1, keepdim=True)
    # A medium that is not finite may not take part, since a weight of zero times NaN is NaN: it is zeroed here, and the
    # tokens that see it are set to NaN afterwards.
    is_finite = (media.keys.isfinite() & media.values.isfinite()).flatten(2).all(-1)
    sees_nan = (mask & ~is_finite[:, None]).any(-1, keepdim=True)
    output = _attend(
        queries,
        media.keys.where(is_finite[..., None, None, None], 0).flatten(1, 2),
        media.values.where(is_finite[..., None, None, None], 0).flatten(1, 2),
        (mask | ~sees_something).repeat_interleave(latents, dim=-1)[:, None],
    )
    return output.where(sees_something[..., None], 0).where(~sees_nan[..., None], torch.nan)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    # The kernels want heads before tokens. Plain transposes: this runs once per run.
    output = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=queries.shape[2] != keys.shape[2],
    )
    return output.transpose(1, 2)


def _check_shapes(queries: Tensor, media: KeyValues, runs: MediaRuns) -> None:
    batch, text, heads, head_dim = queries.shape
    if media.values.shape != media.keys.shape:
        raise ValueError(
            f"media.values must have the shape of media.keys, {tuple(media.keys.shape)}, "
            f"got {tuple(media.values.shape)}"
        )
    if media.keys.shape[0] != batch or media.keys.shape[-1] != head_dim:
        raise ValueError(
            f"media.keys must have shape (batch={batch}, media, latents, kv_heads, head_dim={head_dim}), "
            f"got {tuple(media.keys.shape)}"
        )
    if heads % media.keys.shape[3]:
        raise ValueError(f"kv_heads must divide heads={heads}, got {media.keys.shape[3]}")
    if runs.ranges.shape[:2] != (batch, text):
        raise ValueError(
            f"runs must be built for (batch={batch}, text={text}), got {tuple(runs.ranges.shape[:2])}; "
            "build them from this batch's media_locations"
        )
    # Under torch.compile the table must not even be looked at: the graph would be guarded by its values.
    if not torch.compiler.is_compiling() and runs.media_stop > media.keys.shape[1]:
        raise ValueError(
            f"runs name {runs.media_stop} media in a row, but there are {media.keys.shape[1]}; "
            "there are more <image> tokens than media"
        )

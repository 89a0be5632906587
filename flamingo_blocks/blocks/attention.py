"""Attention of text tokens over media: one entry point, several exact algorithms behind it.

Every token sees a contiguous range of media, most often one medium; other masks take the dense path. The cost of the
algorithms that use the run table grows with the tokens and with what each token sees, not with the number of media in
the batch.

Legend: `text` tokens, `media` per row, `latents` per medium, `heads` of queries, `kv_heads` of keys and values.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from flamingo_blocks.blocks.media_mask import MediaRuns

Algorithm = Literal["loop", "tiles", "varlen", "dense"]


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
    """Let each text token attend to the latents of the media in its range or mask, and to nothing else.

    A token that sees nothing gets exactly zero, and passes no gradient on. Scores are scaled by 1/sqrt(head_dim).

    Args:
        queries: One vector a token and head.
        media: Keys and values; each kv head serves heads / kv_heads neighbouring heads. NaN in a medium reaches the
            tokens that see it, in `dense` in all heads, and no others.
        runs: What each token sees.
        algorithm: To force one by its name, see `choose_algorithm`. All are exact.

    Raises:
        ValueError: If shapes do not fit, if `runs` names a medium that is not there (not checked under
            `torch.compile`), or if the algorithm that is forced cannot work with these runs.
    """
    _check_shapes(queries, media, runs)
    if algorithm is None:
        algorithm = choose_algorithm(queries, media, runs)
    if algorithm not in _ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(map(repr, _ALGORITHMS))}, got {algorithm!r}")
    if runs.mask is not None and algorithm != "dense":
        raise ValueError(
            f'algorithm "{algorithm}" needs ranges, but runs hold a mask: tokens see media that are not neighbours, or '
            'MediaRuns.from_mask was called under torch.compile; use "dense"'
        )
    if 0 in (*queries.shape, media.keys.shape[1]):
        return torch.zeros_like(queries)
    run, dtype = _ALGORITHMS[algorithm], queries.dtype
    if queries.device.type == "cpu" and dtype in _HALF and torch.is_grad_enabled():
        # The kernel's backward is by far slower in half precision than in float32, and less exact.
        with torch.autocast("cpu", enabled=False):
            return run(queries.float(), KeyValues(media.keys.float(), media.values.float()), runs).to(dtype)
    return run(queries, media, runs)


def choose_algorithm(
    queries: Float[Tensor, "batch text heads head_dim"], media: KeyValues, runs: MediaRuns
) -> Algorithm:
    """Name the algorithm that `attend_to_media` uses for these inputs.

    - `"loop"`: one maskless attention per run, which computes nothing in vain. The choice on CPU.
    - `"varlen"`: one kernel for all runs, if they are in order (see `MediaRuns`). The choice on CUDA in half precision.
    - `"tiles"`: tokens that see the same medium are gathered into tiles of equal length, if runs are in order. It needs
      no table, so its shapes are static: the choice under `torch.compile`, and wherever the first two are not.
    - `"dense"`: all tokens against all media under a mask. The reference; the choice where all tokens see all media,
      so that no mask is needed; where there is so little to compute that a call per run would take longer; and, instead
      of tiles, where there is one token or one medium, or runs are not in order. The only one where runs hold a mask.
    """
    num_media, latents = media.keys.shape[1:3]
    static = torch.compiler.is_compiling() or runs.table is None
    if not static and runs.sees_all(num_media):
        return "dense"
    if not static and runs.media_stop == 0 and torch.is_grad_enabled():
        return "dense"  # nobody sees anything: gradients are zero, not absent, as distributed training wants them
    if not static and queries.device.type == "cpu":
        multiply_adds = 2 * queries.numel() * num_media * latents
        return "dense" if multiply_adds < _MULTIPLY_ADDS_PER_CALL * len(runs.table or ()) else "loop"
    if not runs.in_order or queries.shape[1] == 1 or num_media == 1:
        return "dense"
    return "tiles" if static or not _has_varlen_kernel(queries) else "varlen"


def _has_varlen_kernel(queries: Tensor) -> bool:
    if queries.device.type != "cuda" or queries.dtype not in _HALF or queries.shape[-1] not in range(8, 257, 8):
        return False
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability() >= (8, 0)


_HALF = (torch.bfloat16, torch.float16)
# One call of attention takes about as long as so many multiply-adds within a call.
_MULTIPLY_ADDS_PER_CALL = 2**18
_TILE = 32  # tokens


def _loop(
    queries: Float[Tensor, "batch text heads head_dim"], media: KeyValues, runs: MediaRuns
) -> Float[Tensor, "batch text heads head_dim"]:
    if runs.table is None:
        raise ValueError(
            'algorithm "loop" needs a run table, which torch.compile does not build; use "tiles" or "dense"'
        )
    num_media = media.keys.shape[1]
    # One split for all runs: a slice for each would cost backward a full-size tensor of zeros for each.
    pieces = queries.flatten(0, 1)[None].split([run.length for run in runs.table], dim=1)
    keys, values = media.keys.flatten(0, 1).split(1), media.values.flatten(0, 1).split(1)
    outputs = []
    for piece, run in zip(pieces, runs.table, strict=True):
        if run.media_start == run.media_stop:
            outputs.append(torch.zeros_like(piece))
            continue
        seen = slice(run.row * num_media + run.media_start, run.row * num_media + run.media_stop)
        outputs.append(_attend(piece, _join(keys[seen]), _join(values[seen])))
    return torch.cat(outputs, dim=1).view_as(queries)


def _join(media: tuple[Tensor, ...]) -> Tensor:
    return media[0] if len(media) == 1 else torch.cat(media, dim=1)


def _tiles(
    queries: Float[Tensor, "batch text heads head_dim"], media: KeyValues, runs: MediaRuns
) -> Float[Tensor, "batch text heads head_dim"]:
    _check_order("tiles", runs)
    batch, text, _, _ = queries.shape
    num_media = media.keys.shape[1]
    segments = runs.segments(num_media)
    first_token, end_token = segments.ends[:-1], segments.ends[1:]
    tiles = (end_token - first_token + _TILE - 1) // _TILE
    end_tile = tiles.cumsum(0)
    first_tile = end_tile - tiles
    own = segments.medium + num_media * torch.arange(batch, device=queries.device)[:, None]
    # As many tiles as any layout may need. Those that are left over, and the rest of a medium's last tile, repeat a
    # token with its own medium; what comes out of them is not read.
    tile = torch.arange(batch * (text // _TILE + num_media), device=queries.device)
    medium = torch.searchsorted(end_tile, tile, right=True).minimum(own[-1, -1])
    token = (first_token[medium] + (tile - first_tile[medium]) * _TILE)[:, None]
    token = (token + torch.arange(_TILE, device=queries.device)).minimum(end_token[medium, None] - 1)
    output = _attend(
        segments.clear(queries).flatten(0, 1)[token],
        media.keys.flatten(0, 1)[medium],
        media.values.flatten(0, 1)[medium],
    )
    within = torch.arange(batch * text, device=queries.device).view(batch, text) - first_token[own]
    return segments.clear(output.flatten(0, 1)[first_tile[own] * _TILE + within])


def _varlen(
    queries: Float[Tensor, "batch text heads head_dim"], media: KeyValues, runs: MediaRuns
) -> Float[Tensor, "batch text heads head_dim"]:
    _check_order("varlen", runs)
    # Not on top: importing it is slow, and it is of no use without CUDA.
    from torch.nn.attention import varlen

    batch, text, heads, _ = queries.shape
    num_media, latents, kv_heads = media.keys.shape[1:4]
    segments = runs.segments(num_media)
    media_ends = torch.arange(0, batch * num_media * latents + 1, latents, device=queries.device, dtype=torch.int32)
    keys, values = media.keys.flatten(0, 2), media.values.flatten(0, 2)
    if kv_heads != heads:  # older kernels want as many
        keys, values = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (keys, values))
    queries_in_a_row = segments.clear(queries).flatten(0, 1)
    try:
        output: Any = varlen.varlen_attn(queries_in_a_row, keys, values, segments.ends, media_ends, text, latents)
    except NotImplementedError as error:
        raise ValueError(
            'algorithm "varlen" needs half precision on a CUDA device, got '
            f'{queries.dtype} on {queries.device.type}; use "loop", "tiles" or "dense"'
        ) from error
    return segments.clear(output.view_as(queries))


def _dense(
    queries: Float[Tensor, "batch text heads head_dim"], media: KeyValues, runs: MediaRuns
) -> Float[Tensor, "batch text heads head_dim"]:
    num_media, latents = media.keys.shape[1:3]
    if not torch.compiler.is_compiling() and runs.sees_all(num_media):
        return _attend(queries, media.keys.flatten(1, 2), media.values.flatten(1, 2))
    mask = runs.dense_mask(num_media)
    # Kernels differ in what they return where everything is masked, some NaN, also as gradient: such tokens attend
    # everywhere here and are set to zero afterwards.
    sees_something = mask.any(-1, keepdim=True)
    # A medium that is not finite may not take part, since a weight of zero times NaN is NaN: it is zeroed here, and the
    # tokens that see it are set to NaN afterwards.
    is_finite = (media.keys.isfinite() & media.values.isfinite()).flatten(2).all(-1)
    sees_nan = (mask & ~is_finite[:, None]).any(-1, keepdim=True)
    output = _attend(
        queries.where(sees_something[..., None], 0),
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


def _check_order(algorithm: Algorithm, runs: MediaRuns) -> None:
    if not runs.in_order:
        raise ValueError(
            f'algorithm "{algorithm}" needs runs in order, see MediaRuns: each token may see one medium only, and none '
            'before that of an earlier token; use "dense"'
        )


_ALGORITHMS = {"loop": _loop, "tiles": _tiles, "varlen": _varlen, "dense": _dense}


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

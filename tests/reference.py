"""Slow and plain versions of what the library computes: one loop for each axis, no masks, no batching."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_blocks import GatedCrossAttentionBlock, PerceiverResampler
from flamingo_blocks.blocks import KeyValues


def media_ranges(media_locations: list[bool], document_ids: list[int], attend: str) -> list[tuple[int, int]]:
    """What each token of one row sees, by the definition in words."""
    media = [position for position, is_medium in enumerate(media_locations) if is_medium]
    ranges = []
    for token in range(len(media_locations)):
        first = last = token
        while first > 0 and document_ids[first - 1] == document_ids[token]:
            first -= 1
        while last + 1 < len(document_ids) and document_ids[last + 1] == document_ids[token]:
            last += 1
        before = [i for i, position in enumerate(media) if first <= position <= token]
        after = [i for i, position in enumerate(media) if token < position <= last]
        if attend == "all_previous":
            seen = before
        elif attend == "last" or media_locations[token]:
            seen = before[-1:]
        else:
            seen = after[:1]
        ranges.append((seen[0], seen[-1] + 1) if seen else (0, 0))
    return ranges


class Window(NamedTuple):
    """An example, as lists; media are told by the places of their parts."""

    input_ids: list[int]
    labels: list[int]
    media_ranges: list[tuple[int, int]]
    media: list[int]


def windows(
    parts: list[list[int] | None],
    *,
    image: int,
    end_of_chunk: int,
    before: list[int],
    max_tokens: int,
    max_media: int,
    attend: str,
) -> list[Window]:
    """All windows that a document may be seen through; its parts are texts, or None for a medium."""
    tokens: list[tuple[int, int]] = []  # id, and the part that it is of
    for place, part in enumerate(parts):
        if part is None:
            tokens += ([(end_of_chunk, -1)] if place else []) + [(image, place)]
        else:
            tokens += [(word, place) for word in part]
    tokens.append((end_of_chunk, -1))
    length = max_tokens - len(before)
    found = []
    for start in range(max(1, len(tokens) - length + 1)):
        ids, labels = list(before), [-100] * len(before)
        media: list[int] = []
        for token, place in tokens[start : start + length]:
            if token == image:
                if len(media) == max_media:
                    continue
                media.append(place)
            labels.append(token if ids and token != image else -100)
            ids.append(token)
        ranges = media_ranges([token == image for token in ids], [0] * len(ids), attend)
        found.append(Window(ids, labels, ranges, media))
    return found


def attend_to_media(queries: Tensor, media: KeyValues, ranges: Tensor) -> Tensor:
    seen = [[list(range(start, stop)) for start, stop in row] for row in ranges.tolist()]
    return attend_to_seen_media(queries, media, seen)


def attend_to_seen_media(queries: Tensor, media: KeyValues, seen: list[list[list[int]]]) -> Tensor:
    """The same, for any media that each token of each row sees."""
    batch, text, heads, head_dim = queries.shape
    kv_heads = media.keys.shape[3]
    rows = []
    for row in range(batch):
        tokens = []
        for token in range(text):
            own = torch.tensor(seen[row][token], dtype=torch.long)
            outputs = []
            for head in range(heads):
                kv_head = head // (heads // kv_heads)
                keys = media.keys[row, own, :, kv_head].reshape(-1, head_dim)
                values = media.values[row, own, :, kv_head].reshape(-1, head_dim)
                weights = (keys @ queries[row, token, head] / math.sqrt(head_dim)).softmax(0)
                outputs.append(weights @ values)
            tokens.append(torch.stack(outputs))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def gated_cross_attention_block(
    block: GatedCrossAttentionBlock, hidden_states: Tensor, media: Tensor, ranges: Tensor
) -> Tensor:
    """The paper's two lines, with the block's own weights."""
    inner = block.kv_heads * block.head_dim
    keys = block.to_kv(media)[..., :inner].unflatten(-1, (block.kv_heads, -1))
    values = block.to_kv(media)[..., inner:].unflatten(-1, (block.kv_heads, -1))
    queries = block.q_norm(block.to_q(block.norm(hidden_states)).unflatten(-1, (block.heads, -1)))
    attention = attend_to_media(queries, KeyValues(block.k_norm(keys), values), ranges)
    y = hidden_states + torch.tanh(block.gate.alpha) * block.to_out(attention.flatten(2))
    return y + torch.tanh(block.gate_feed_forward.alpha) * block.feed_forward(block.norm_feed_forward(y))


def temporal_embedding(embeddings: Tensor, frame: int, frames: int) -> Tensor:
    """The embedding of one frame of a video of so many frames."""
    if frames <= len(embeddings):
        return embeddings[frame]
    position = frame * (len(embeddings) - 1) / (frames - 1)
    below = min(int(position), max(len(embeddings) - 2, 0))
    above = min(below + 1, len(embeddings) - 1)
    return embeddings[below] + (position - below) * (embeddings[above] - embeddings[below])


def resample_medium(resampler: PerceiverResampler, features: Tensor) -> Tensor:
    """The resampler on one medium without padding: (frames, patches, vision_dim) -> (latents, dim)."""
    frames = features.shape[0]
    x = resampler.features.project(features)
    x = torch.stack(
        [x[i] + temporal_embedding(resampler.features.temporal_embeddings, i, frames) for i in range(frames)]
    )
    x = x.flatten(0, 1)
    latents = resampler.latents
    for layer in resampler.layers:
        q_input, x_input = layer.norm_latents(latents), layer.norm_features(x)  # type: ignore[operator]
        context = torch.cat([x_input, q_input])
        queries = layer.to_q(q_input).unflatten(-1, (layer.heads, -1))  # type: ignore[operator]
        keys, values = layer.to_kv(context).chunk(2, dim=-1)  # type: ignore[operator]
        keys, values = keys.unflatten(-1, (layer.heads, -1)), values.unflatten(-1, (layer.heads, -1))
        queries, keys = layer.q_norm(queries), layer.k_norm(keys)  # type: ignore[operator]
        heads = []
        for head in range(queries.shape[1]):
            scores = queries[:, head] @ keys[:, head].T / math.sqrt(queries.shape[-1])
            heads.append(scores.softmax(-1) @ values[:, head])
        latents = latents + layer.to_out(torch.cat(heads, dim=-1))  # type: ignore[operator]
        latents = latents + layer.feed_forward(layer.norm_feed_forward(latents))  # type: ignore[operator]
    return resampler.norm(latents)


def contrastive_loss(images: Tensor, texts: Tensor, positives: Tensor, scale: float, label_smoothing: float) -> Tensor:
    """CLIP's loss, pair by pair."""

    def one_side(a: Tensor, b: Tensor, positives: Tensor) -> Tensor:
        losses = []
        for i in range(len(a)):
            scores = torch.stack([scale * F.cosine_similarity(a[i], b[j], dim=0) for j in range(len(b))])
            log_probabilities = scores - scores.exp().sum().log()
            own = [log_probabilities[j] for j in range(len(b)) if positives[i, j]]
            target = (1 - label_smoothing) * sum(own) / len(own)
            losses.append(-(target + label_smoothing * log_probabilities.mean()))
        return torch.stack(losses).mean()

    return (one_side(images, texts, positives) + one_side(texts, images, positives.T)) / 2


def lucidrains_block(tensors: dict[str, Tensor], hidden_states: Tensor, media: Tensor, is_media: Tensor) -> Tensor:
    """flamingo-pytorch's block, and OpenFlamingo's, from its tensors, under the rule "last".

    Source: flamingo-pytorch 0.1.2, GatedCrossAttentionBlock.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    rows = []
    for hidden, images, places in zip(hidden_states, media, is_media.tolist(), strict=True):
        tokens, seen = [], -1
        for token, is_image in zip(hidden, places, strict=True):
            seen += is_image
            if seen >= 0:
                query = (tensors["attn.to_q.weight"] @ norm(token, "attn.norm")).unflatten(0, (-1, 64))
                keys, values = (images[seen] @ tensors["attn.to_kv.weight"].T).unflatten(1, (2, -1, 64)).unbind(1)
                weights = (torch.einsum("hd,nhd->hn", query, keys) / 8).softmax(-1)
                attended = torch.einsum("hn,nhd->hd", weights, values).flatten()
                token = token + tensors["attn_gate"].tanh() * (tensors["attn.to_out.weight"] @ attended)
            update = tensors["ff.3.weight"] @ F.gelu(tensors["ff.1.weight"] @ norm(token, "ff.0"))
            tokens.append(token + tensors["ff_gate"].tanh() * update)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def lucidrains_resampler(tensors: dict[str, Tensor], features: Tensor) -> Tensor:
    """The resampler of flamingo-pytorch and OpenFlamingo for one medium, (context, dim), without embeddings.

    Source: flamingo-pytorch 0.1.2, PerceiverResampler.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    latents = tensors["latents"]
    for i in range(len({name.split(".")[1] for name in tensors if name.startswith("layers.")})):
        queries = norm(latents, f"layers.{i}.0.norm_latents")
        context = torch.cat([norm(features, f"layers.{i}.0.norm_media"), queries])
        queries = (queries @ tensors[f"layers.{i}.0.to_q.weight"].T).unflatten(1, (-1, 64))
        keys, values = (context @ tensors[f"layers.{i}.0.to_kv.weight"].T).unflatten(1, (2, -1, 64)).unbind(1)
        weights = (torch.einsum("qhd,nhd->hqn", queries, keys) / 8).softmax(-1)
        attended = torch.einsum("hqn,nhd->qhd", weights, values).flatten(1)
        latents = latents + attended @ tensors[f"layers.{i}.0.to_out.weight"].T
        hidden = F.gelu(norm(latents, f"layers.{i}.1.0") @ tensors[f"layers.{i}.1.1.weight"].T)
        latents = latents + hidden @ tensors[f"layers.{i}.1.3.weight"].T
    return norm(latents, "norm")


# ------------------------------------------------------------ flamingo-mini: github.com/dhansmair/flamingo-mini
# Its formulas on its own tensors by name, since its code does not run on current versions of transformers.

_MINI_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "sqrelu": lambda x: F.relu(x) ** 2,
}


def _mini_norm(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)


def _mini_feed_forward(weights: Mapping[str, Tensor], name: str, x: Tensor, act: str) -> Tensor:
    """utils.py, FeedForward."""
    hidden = _mini_norm(weights, f"{name}.0", x) @ weights[f"{name}.1.weight"].T
    return _MINI_ACTIVATIONS[act](hidden) @ weights[f"{name}.3.weight"].T


def flamingo_mini_block(
    weights: Mapping[str, Tensor],
    name: str,
    y: Tensor,
    media: Tensor,
    media_locations: Tensor,
    config: Mapping[str, Any],
) -> Tensor:
    """gated_cross_attention.py, GatedCrossAttentionBlock: y (batch text dim), media (batch media latents dim)."""
    heads, head_dim = config["xattn_heads"], config["xattn_dim_head"]
    queries = _mini_norm(weights, f"{name}.attn.norm", y) @ weights[f"{name}.attn.to_q.weight"].T
    keys, values = (media.flatten(1, 2) @ weights[f"{name}.attn.to_kv.weight"].T).chunk(2, dim=-1)
    queries, keys, values = (x.unflatten(-1, (heads, head_dim)).transpose(1, 2) for x in (queries, keys, values))
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(head_dim)
    text_time = media_locations.long().cumsum(1)[:, None, :, None]
    media_time = (torch.arange(media.shape[1]) + 1).repeat_interleave(media.shape[2])
    scores = scores.masked_fill(text_time != media_time, -torch.finfo(scores.dtype).max)
    attention = scores.softmax(-1).masked_fill(text_time == 0, 0) @ values
    attention = attention.transpose(1, 2).flatten(2) @ weights[f"{name}.attn.to_out.weight"].T
    y = y + torch.tanh(weights[f"{name}.alpha_attn"]) * attention
    return y + torch.tanh(weights[f"{name}.alpha_ffw"]) * _mini_feed_forward(
        weights, f"{name}.ffw", y, config["xattn_act"]
    )


def flamingo_mini_resampler(weights: Mapping[str, Tensor], features: Tensor, config: Mapping[str, Any]) -> Tensor:
    """perceiver_resampler.py, for one medium: (frames, patches, dim) -> (latents, dim)."""
    features = (features + weights["resampler.time_pos_emb"][: len(features)]).flatten(0, 1)
    latents = weights["resampler.latents"]
    shape = (config["resampler_heads"], config["resampler_dim_head"])
    for i in range(config["resampler_depth"]):
        name = f"resampler.layers.{i}"
        normed = _mini_norm(weights, f"{name}.0.norm_latents", latents)
        context = torch.cat([_mini_norm(weights, f"{name}.0.norm_media", features), normed])
        queries, keys, values = (
            (x @ weights[f"{name}.0.{to}.weight"].T).unflatten(-1, shape).transpose(0, 1)
            for x, to in ((normed, "to_q"), (context, "to_k"), (context, "to_v"))
        )
        attention = (queries @ keys.transpose(-1, -2) / math.sqrt(shape[1])).softmax(-1) @ values
        latents = latents + attention.transpose(0, 1).flatten(1) @ weights[f"{name}.0.to_out.weight"].T
        latents = latents + _mini_feed_forward(weights, f"{name}.1", latents, config["resampler_act"])
    return _mini_norm(weights, "resampler.norm", latents)


class _MiniLayer(nn.Module):
    """gated_cross_attention.py, ModifiedLMBlock: a decoder layer behind a block."""

    def __init__(self, layer: nn.Module, block: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.block = block

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(self.block(hidden_states), *args, **kwargs)


def flamingo_mini_logits(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    lm: Any,
    layers: str,
    encode: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    media: Sequence[Sequence[Tensor]],
    *,
    attention_mask: Tensor,
    media_locations: Tensor,
) -> Tensor:
    """modeling_flamingo.py, FlamingoBaseModel.forward.

    Args:
        weights: The tensors there, without `flamingo.`.
        config: The configuration there.
        lm: The language model without its head. Its layers are exchanged and put back.
        layers: Name of its list of layers.
        encode: CLIP: frames to features, class token first.
        input_ids: (batch, text)
        media: For each row its media, of (frames, channels, height, width).
        attention_mask: (batch, text)
        media_locations: (batch, text), True at the `<` of each medium.
    """
    shape = (config["resampler_num_latents"], config["dim_visual"])
    latents = torch.zeros(len(media), max(1, *map(len, media)), *shape, dtype=weights["lm_head.weight"].dtype)
    for row, frames_of in enumerate(media):
        for i, frames in enumerate(frames_of):
            latents[row, i] = flamingo_mini_resampler(weights, encode(frames), config)
    modules = lm.get_submodule(layers)
    originals = list(modules)
    for i in range(0, len(originals), config["xattn_every"]):
        name = f"lm.{layers}.{i}.xattn_block"
        modules[i] = _MiniLayer(
            originals[i],
            lambda y, name=name: flamingo_mini_block(weights, name, y, latents, media_locations, config),  # type: ignore[misc]
        )
    try:
        hidden_states = lm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    finally:
        for i, layer in enumerate(originals):
            modules[i] = layer
    return hidden_states @ weights["lm_head.weight"].T

"""Slow and plain versions of what the library computes: one loop for each axis, no masks, no batching."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

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

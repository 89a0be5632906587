"""RICES, retrieval-based in-context example selection: support whose media look most like those of the query.

Likeness is the cosine of vectors that are made once, of what the frozen vision encoder sees.

Source: Alayrac et al. 2022 (Flamingo), section 2.5 and appendix A.2; the method is that of Yang et al. 2021 (PICa).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flamingo_blocks.data.feature_cache import hash_tensors
from flamingo_blocks.data.writing import written_whole
from flamingo_blocks.evaluation.prompts import Example
from flamingo_blocks.evaluation.support import check_keys, media_identity, nearest_last, without_query

_FORMAT = 1
_DECIMALS = 9  # of a cosine: the rest is rounding, which must not break ties


class RicesSupport:
    """Choose the examples whose media look most like the query's. The most similar one comes last.

    Of examples that are equally similar, the earlier one counts as more so. Nothing is drawn: the seed changes nothing.

    Args:
        examples: Those to choose from.
        vectors: A vector an example, by its key; see `media_vectors`.
        query_vectors: The same for queries. None: the queries are among the examples.

    Raises:
        ValueError: If two examples have the same key, or a vector is missing, is not finite, or has another size.

    Example:
        ```python
        import torch
        from flamingo_blocks.evaluation import Example, RicesSupport

        examples = [Example(name, (f"{name}.png",), (name,)) for name in ("cat", "dog", "car")]
        vectors = {"cat": torch.tensor([1.0, 0.1]), "dog": torch.tensor([1.0, 0.3]), "car": torch.tensor([0.0, 1.0])}
        select = RicesSupport(examples, vectors, {"kitten": torch.tensor([2.0, 0.1])})
        support = select(Example("kitten", ("kitten.png",), ("kitten",)), shots=2, seed=0)
        assert [example.key for example in support] == ["dog", "cat"]
        ```

    Source: Alayrac et al. 2022, section 2.5.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        vectors: Mapping[str, Float[Tensor, " dim"]],
        query_vectors: Mapping[str, Float[Tensor, " dim"]] | None = None,
    ) -> None:
        check_keys(examples)
        self._examples = list(examples)
        self._query_vectors = vectors if query_vectors is None else query_vectors
        rows = [_find(vectors, example, "vectors") for example in examples]
        for example, row in zip(examples, rows, strict=True):
            if len(row) != len(rows[0]):
                raise ValueError(
                    f"vectors must have one size, but that of example {examples[0].key!r} has {len(rows[0])}, that of "
                    f"{example.key!r} {len(row)}; make them with one encoder"
                )
        self._matrix = torch.stack(rows) if rows else torch.zeros(0, 0)
        self._lengths = self._matrix.norm(dim=1).clamp_min(torch.finfo().tiny)
        # The most that can be left out for one query: its media's examples, and one that has its key.
        self._spare = 1 + max(Counter(media_identity(example.media) for example in examples).values(), default=0)

    def __call__(self, query: Example, *, shots: int, seed: int = 0) -> list[Example]:  # noqa: ARG002
        """See `SupportSelector`."""
        vector = _find(self._query_vectors, query, "query_vectors")
        if not self._examples:
            return nearest_last([], query, shots)
        count, dim = self._matrix.shape
        if len(vector) != dim:
            raise ValueError(
                f"query_vectors must have the size of the examples' vectors, {dim}, got {len(vector)} for "
                f"{query.key!r}; make them with one encoder"
            )
        # Query by query, so that the numbers, and what they choose, do not depend on the other queries. Float32 is
        # enough to find who may be chosen; float64 then tells what is more similar from what is only rounded.
        unit = F.normalize(vector.double(), dim=0)
        rough = self._matrix @ unit.float() / self._lengths
        last = rough.topk(min(max(shots, 0) + self._spare, count)).values[-1]
        near = (rough >= last - 4 * dim * torch.finfo().eps).nonzero()[:, 0]
        similarity = (F.normalize(self._matrix[near].double(), dim=1) @ unit).round(decimals=_DECIMALS)
        order = near[similarity.argsort(descending=True, stable=True)].tolist()
        return nearest_last(without_query((self._examples[i] for i in order), query), query, shots)


def media_vectors(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    path: str | Path | None = None,
    fingerprint: str | None = None,
    progress: bool = True,
) -> dict[str, Float[Tensor, " dim"]]:
    """Make a vector for each example: the mean of its media's, of length 1 each, as of all frames and patches.

    Args:
        model: A model with a `vision_encoder`, as a Flamingo; or what makes features (frames, patches, dim) or vectors
            (frames, dim) of pixels (frames, channels, height, width).
        processor: The model's processor; or what makes pixels of a medium, with any axes before the last three.
        examples: Their media. Each that differs is encoded once.
        batch_size: How many media are read, and frames encoded, at once.
        path: A safetensors file, with a tensor an example. If it is there, it is read, and nothing is encoded; if not,
            it is written.
        fingerprint: Tells encoder and processor from others. It is needed with a `path` where one of them is a
            function, which cannot tell what it does; a module tells its weights, a processor its settings.
        progress: Show a progress bar.

    Returns:
        The vectors in float32 on the CPU, by the examples' keys.

    Raises:
        ValueError: If the model has no vision encoder, an example has no media, two have the same key, the encoder's
            result has the wrong shape or is not finite, or the file at `path` is damaged or stale: made with another
            encoder or processor, or of other examples. Of a medium in a file, name and size count; of one in memory,
            nothing but its example's key.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_keys(examples)
    for example in examples:
        if not example.media:
            raise ValueError(f"example {example.key!r} has no media, by which it could be compared; leave it out")
    encoder = getattr(model, "vision_encoder", model)
    if hasattr(encoder, "generate"):
        raise ValueError(
            f"model must have a vision_encoder, or be one, got {type(model).__name__}, which writes text; pass "
            "a function that makes features of pixels with its vision tower"
        )
    if path is None:
        return _encode_examples(encoder, processor, examples, batch_size, progress)
    from safetensors.torch import load_file, save_file

    path = Path(path)
    wanted = _fingerprint(encoder, processor, examples, fingerprint)
    if path.exists():
        _check_file(path, wanted)
        return load_file(path)
    vectors = _encode_examples(encoder, processor, examples, batch_size, progress)
    with written_whole(path) as part:
        save_file(vectors, part, metadata=wanted)
    return vectors


def _encode_examples(
    encoder: Any, processor: Any, examples: Sequence[Example], batch_size: int, progress: bool
) -> dict[str, Tensor]:
    from tqdm import tqdm

    media = {media_identity(medium): medium for example in examples for medium in example.media}
    device = next(encoder.parameters(), torch.empty(0)).device if isinstance(encoder, nn.Module) else None
    of_media: dict[Hashable, Tensor] = {}
    names = list(media)
    starts = range(0, len(names), batch_size)
    for start in tqdm(starts, desc="media vectors", unit=" batches", disable=not progress):
        batch = names[start : start + batch_size]
        pixels = [_read(processor, media[name]) for name in batch]
        frames = torch.cat([_encode(encoder, part.to(device)) for part in torch.cat(pixels).split(batch_size)])
        for name, of_medium in zip(batch, frames.split([len(part) for part in pixels]), strict=True):
            of_media[name] = F.normalize(of_medium.mean(0), dim=-1)
    return {
        example.key: torch.stack([of_media[media_identity(medium)] for medium in example.media]).mean(0)
        for example in examples
    }


def _read(processor: Any, medium: Any) -> Tensor:
    """Make frames of a medium, just as for a prompt."""
    token = getattr(processor, "image_token", None)
    if token is None:
        pixels: Tensor = processor(medium)
    else:
        pixels = processor(text=[token], images=[[medium]], return_tensors="pt")["pixel_values"]
    return pixels.reshape(-1, *pixels.shape[-3:])


def _encode(encode: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """Make a vector of each frame."""
    with torch.no_grad():
        features = encode(pixels)
    if features.ndim not in (2, 3) or len(features) != len(pixels):
        raise ValueError(
            f"the encoder must give features (frames, patches, dim) or vectors (frames, dim) for {len(pixels)} frames, "
            f"got {tuple(features.shape)}; wrap it in a function that does"
        )
    features = features.to("cpu", torch.float32)
    if not features.isfinite().all():
        raise ValueError("the encoder's features must be finite, got some that are not; try another dtype")
    return features.mean(1) if features.ndim == 3 else features


def _find(vectors: Mapping[str, Tensor], example: Example, name: str) -> Tensor:
    vector = vectors.get(example.key)
    if vector is None:
        raise ValueError(f"{name} has none for example {example.key!r}; make them with media_vectors")
    if vector.ndim != 1 or not vector.isfinite().all():
        raise ValueError(
            f"{name} must be finite, with one axis, got shape {tuple(vector.shape)} for example {example.key!r}, "
            f"{'finite' if vector.isfinite().all() else 'not finite'}"
        )
    return vector.detach().to("cpu", torch.float32)


# ---------------------------------------------------------------- the file


def _fingerprint(encoder: Any, processor: Any, examples: Sequence[Example], given: str | None) -> dict[str, str]:
    """Tell all that vectors depend on."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(ascii((example.key, [_describe(medium) for medium in example.media])).encode())
    common = {"format": str(_FORMAT), "examples": digest.hexdigest()}
    if given is not None:
        return common | {"fingerprint": given}
    image_processor = getattr(processor, "image_processor", processor)
    if not isinstance(encoder, nn.Module) or not hasattr(image_processor, "to_dict"):
        raise ValueError(
            "fingerprint must be given with a path where the encoder is no module or the processor has no settings "
            f"(to_dict), got {type(encoder).__name__} and {type(processor).__name__}; name what they do, e.g. by the "
            "checkpoint and the size of images"
        )
    sampling = {name: getattr(processor, name, None) for name in ("fps", "num_frames", "max_frames")}
    return common | {
        "architecture": hashlib.sha256(f"{encoder!r} {getattr(encoder, 'layout', None)}".encode()).hexdigest(),
        "weights": hash_tensors(encoder.state_dict()),
        "processor": json.dumps(image_processor.to_dict() | sampling, sort_keys=True, default=str),
    }


def _describe(medium: Any) -> Any:
    if isinstance(medium, list | tuple):
        return [_describe(part) for part in medium]
    source = getattr(medium, "source", medium)
    if not isinstance(source, str | Path):
        return None
    file = Path(source)
    return file.name, file.stat().st_size if file.is_file() else None


def _check_file(path: Path, wanted: Mapping[str, str]) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}; delete it, and make it again") from error
    differences = [
        f"{name} is {value}, but {found.get(name, 'nothing')} in the file"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"{path} is stale, it holds vectors of something else: {'; '.join(differences)}. Delete it, or write "
            "another file"
        )

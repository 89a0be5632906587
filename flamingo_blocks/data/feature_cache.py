"""Feature cache: what a frozen vision encoder makes of media, written once and read in every epoch.

A cache is a directory of shards, which are safetensors files: one tensor a medium, by its `Medium.digest()`. What was
encoded how stands in each shard, so that a cache of another encoder, or of other images, is never taken for this one's.
"""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flamingo_blocks.data.document import CorruptSample, Document, Medium
from flamingo_blocks.data.reading import read_medium
from flamingo_blocks.data.source import check_corrupt
from flamingo_blocks.data.writing import written_whole

logger = logging.getLogger(__name__)

_FORMAT = 1


class FeatureCache:
    """Read the features of media that `write_feature_cache` wrote.

    It gives what the encoder would, in the dtype that was written. It can be shared among threads, and goes to data
    workers as a path. The files are mapped into memory; what is held besides is a name for each medium, about 400 bytes
    of it. To open it, the weights of the encoder are read once, but neither images nor features.

    A shard that was cut short is found when the cache is opened. There are no checksums of features: shards are synced
    to disk before they get their names, and bits that change later are left to the file system.

    Args:
        path: The directory.
        vision_encoder: The encoder whose features are wanted, e.g. `model.vision_encoder`, before it is wrapped for
            several processes.
        image_processor: What makes the pixels for it, e.g. `processor.image_processor`.
        fps: Frames of each second of a video.
        max_frames: That many first of these.

    Raises:
        ValueError: If there is no cache, a shard of it is damaged, or it was not written with all of these; the message
            says what differs.

    Example:
        ```python
        # write_feature_cache(path, documents, vision_encoder=model.vision_encoder, image_processor=...)
        # cache = FeatureCache(path, vision_encoder=model.vision_encoder, image_processor=...)
        # features = cache(Medium("image", Path("cat.jpg")))  # frames patches vision_dim
        # model(input_ids, vision_features=features[None, None])
        ```
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vision_encoder: nn.Module,
        image_processor: Any,
        fps: int | float = 1.0,
        max_frames: int = 8,
    ) -> None:
        self._path = Path(path).absolute()
        self._fingerprint = _fingerprint(vision_encoder, image_processor, fps, max_frames)
        self._open()

    def _open(self) -> None:
        self._shards = _open_shards(self._path, self._fingerprint)
        if not self._shards:
            raise ValueError(f"{self._path} holds no feature cache; write one with write_feature_cache")
        self._shard_of = {key: shard for shard in self._shards for key in shard.keys()}  # noqa: SIM118

    def __len__(self) -> int:
        """Tell how many media there are."""
        return len(self._shard_of)

    def __call__(self, medium: Medium) -> Float[Tensor, "frames patches vision_dim"]:
        """Give the features of a medium.

        Args:
            medium: Its bytes are read, but not decoded.

        Raises:
            ValueError: If they are not in the cache.
            OSError: If there is no such file.
        """
        key = _key(medium)
        shard = self._shard_of.get(key)
        if shard is None:
            raise ValueError(
                f"{self._path} has no features of {_name(medium)}; write_feature_cache adds what is missing, but for "
                "what is corrupt"
            )
        # A part of a mapped file would take the whole file along, to wherever a data worker sends it.
        features: Tensor = shard.get_tensor(key).clone()
        return features

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_fingerprint": self._fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


@dataclass(frozen=True)
class CacheReport:
    """What `write_feature_cache` did.

    Attributes:
        written: How many media were encoded and written.
        known: How many were there already, or came again.
        corrupt: Those that cannot be read, and why.
    """

    written: int
    known: int
    corrupt: tuple[CorruptSample, ...]


def write_feature_cache(
    path: str | Path,
    media: Iterable[Medium | Document | CorruptSample],
    *,
    vision_encoder: nn.Module,
    image_processor: Any,
    fps: int | float = 1.0,
    max_frames: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 32,
    shard_bytes: int = 2**28,
    threads: int = 4,
    rank: int = 0,
    max_corrupt: float = 0.1,
    progress: bool = True,
) -> CacheReport:
    """Encode media, each that differs once, and write their features.

    What is in the cache already is not encoded again. So it can be killed, and run again: finished shards are kept, and
    at most the last one is lost. It can be run again with more media, too.

    Args:
        path: The directory. It is made, if need be.
        media: Media, or documents with them.
        vision_encoder: A frozen `VisionEncoder`, on the device where it should work. It runs in its own dtype, also
            within autocast.
        image_processor: Makes pixels of images: a `FlamingoImageProcessor`.
        fps: Frames of each second of a video.
        max_frames: That many first of these.
        dtype: Of the features in the cache.
        batch_size: How many frames are encoded at once.
        shard_bytes: A shard is written when there are features of so many bytes; they are held until then.
        threads: How many of them load and transform media.
        rank: Number of this writer, where several write different media into one cache at once.
        max_corrupt: The share of media that may be corrupt; beyond, writing stops with an error.
        progress: Show a progress bar.

    Returns:
        What was done. Each corrupt medium is logged, too.

    Raises:
        ValueError: If the cache was begun with another encoder, transform, sampling or dtype; the encoder is not
            frozen; features are not finite; or a number is out of range.
        RuntimeError: If too many media are corrupt. What was written before is kept.
        OSError: If it cannot be written. Finished shards are kept.
        ImportError: If there is a video, and PyAV is missing.
    """
    from tqdm import tqdm

    for name, number in (("batch_size", batch_size), ("shard_bytes", shard_bytes), ("threads", threads)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if rank < 0:
        raise ValueError(f"rank must not be negative, got {rank}")
    if not 0 <= max_corrupt <= 1:
        raise ValueError(f"max_corrupt must be in 0..1, got {max_corrupt}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be one of floating-point numbers, e.g. torch.bfloat16, got {dtype}")
    fingerprint = _fingerprint(vision_encoder, image_processor, fps, max_frames)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    writer = _ShardWriter(path, rank, fingerprint | {"stored dtype": str(dtype)}, shard_bytes)
    known = writer.known
    pending: list[tuple[str, Tensor]] = []
    corrupt: list[CorruptSample] = []
    read = again = 0

    def load(medium: Medium | CorruptSample) -> tuple[str, Tensor | None] | CorruptSample:
        if isinstance(medium, CorruptSample):
            return medium
        try:
            key = _key(medium)
            return key, None if key in known else read_medium(medium, image_processor, fps=fps, max_frames=max_frames)
        except (ValueError, OSError) as error:
            return CorruptSample(_name(medium), f"{type(error).__name__}: {error}")

    def encode() -> None:
        features = _encode(vision_encoder, [pixels for _, pixels in pending], batch_size, dtype)
        for (key, _), of_medium in zip(pending, features, strict=True):
            if not of_medium.isfinite().all():
                raise ValueError(f"the features of the medium {key} are not finite in {dtype}; try another dtype")
            writer.add(key, of_medium)
        pending.clear()

    for found in tqdm(_ahead(load, _media(media), threads), desc="features", unit=" media", disable=not progress):
        read += 1
        if isinstance(found, CorruptSample):
            corrupt.append(found)
            logger.warning("skipped %s: %s", found.key, found.error)
            check_corrupt("media", len(corrupt), read, max_corrupt=max_corrupt, last=found)
            continue
        key, pixels = found
        if pixels is None or key in known:
            again += 1
            continue
        known.add(key)
        pending.append((key, pixels))
        if sum(len(pixels) for _, pixels in pending) >= batch_size:
            encode()
    if pending:
        encode()
    writer.finish()
    return CacheReport(read - again - len(corrupt), again, tuple(corrupt))


class _ShardWriter:
    """Collects features, and writes a shard when there are enough for one."""

    def __init__(self, path: Path, rank: int, fingerprint: dict[str, str], shard_bytes: int) -> None:
        self.known = {key for shard in _open_shards(path, fingerprint) for key in shard.keys()}  # noqa: SIM118
        self._path, self._rank, self._fingerprint, self._shard_bytes = path, rank, fingerprint, shard_bytes
        self._features: dict[str, Tensor] = {}
        self._bytes = 0
        self._number = 0
        for file in path.glob(f"{rank:05d}-*.safetensors"):
            self._number = max(self._number, 1 + int(file.stem.partition("-")[2]))
        for unfinished in path.glob(f"{rank:05d}-*.part"):
            unfinished.unlink()

    def add(self, key: str, features: Tensor) -> None:
        self._features[key] = features
        self._bytes += features.nbytes
        if self._bytes >= self._shard_bytes:
            self.finish()

    def finish(self) -> None:
        """Write a shard that is either there as a whole, or not at all."""
        from safetensors.torch import save_file

        if not self._features:
            return
        file = self._path / f"{self._rank:05d}-{self._number:06d}.safetensors"
        with written_whole(file) as part:
            save_file(self._features, part, metadata=self._fingerprint)
        self._features, self._bytes, self._number = {}, 0, self._number + 1


def _open_shards(path: Path, fingerprint: dict[str, str]) -> list[Any]:
    """Map the shards of a cache into memory, and see that they hold what is wanted."""
    from safetensors import SafetensorError, safe_open

    shards = []
    for file in sorted(path.glob("*.safetensors")):
        try:
            shard: Any = safe_open(file, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{file} is damaged or cut short: {error}; delete it, and run write_feature_cache again, which writes "
                "what is missing"
            ) from error
        found = shard.metadata() or {}
        differences = [
            f"{name} is {wanted}, but {found.get(name, 'nothing')} in the cache"
            for name, wanted in fingerprint.items()
            if found.get(name) != wanted
        ]
        if differences:
            raise ValueError(
                f"{file} is stale, it holds features of something else: {'; '.join(differences)}. Open it with what it "
                "was written for, or write another cache"
            )
        shards.append(shard)
    return shards


def _fingerprint(vision_encoder: nn.Module, image_processor: Any, fps: int | float, max_frames: int) -> dict[str, str]:
    """Tell all that features depend on, but for the medium. Weights count to the last bit."""
    if not fps > 0 or max_frames < 1:
        raise ValueError(f"fps must be positive and max_frames at least 1, got {fps} and {max_frames}")
    encoder: Any = vision_encoder
    backbone = getattr(encoder, "backbone", None)
    if not isinstance(backbone, nn.Module) or not encoder.is_frozen:
        raise ValueError(
            f"vision_encoder must be a VisionEncoder that is frozen, got {type(encoder).__name__}; what one that is "
            "trained makes of a medium changes with each step"
        )
    pretrained: Any = getattr(backbone, "pretrained_cfg", None) or {}
    name = f"{type(backbone).__name__} {pretrained.get('architecture', '')}".strip()
    options = ("image_size", "channels", "keep_prefix_tokens", "final_norm", "output_dtype", "layout")
    return {
        "format": str(_FORMAT),
        "architecture": f"{name} {hashlib.sha256(repr(backbone).encode()).hexdigest()[:16]}",
        "weights": hash_tensors(backbone.state_dict()),
        "dtype": str(next(backbone.parameters(), torch.empty(0)).dtype),
        **{option: str(getattr(encoder, option)) for option in options},
        **{
            f"the image processor's {setting}": json.dumps(value, sort_keys=True)
            for setting, value in sorted(image_processor.to_dict().items())
        },
        "fps": str(float(fps)),
        "max_frames": str(max_frames),
    }


def hash_tensors(tensors: dict[str, Any]) -> str:
    """Give a SHA-256 of a state_dict, to the last bit.

    Args:
        tensors: By their names.

    Raises:
        ValueError: If a tensor is on the meta device, so that it has no numbers.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor):  # a module's extra state
            digest.update(f"{name} {tensor!r}".encode())
            continue
        if tensor.is_meta:
            raise ValueError(f"vision_encoder has no weights yet: {name} is on the meta device")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _key(medium: Medium) -> str:
    """Name a medium's features: the bytes of a GIF may be an image or a video."""
    return medium.digest() if medium.kind == "image" else f"{medium.digest()} {medium.kind}"


def _name(medium: Medium) -> str:
    where = medium.source if isinstance(medium.source, Path) else f"with the digest {medium.digest()}"
    return f"the {medium.kind} {where}"


def _media(items: Iterable[Medium | Document | CorruptSample]) -> Iterator[Medium | CorruptSample]:
    for item in items:
        if isinstance(item, Document):
            yield from item.media
        elif isinstance(item, Medium | CorruptSample):
            yield item
        else:
            raise ValueError(f"media must be Medium or Document objects, got {type(item).__name__}")


def _ahead(load: Callable[[Any], Any], media: Iterable[Any], threads: int) -> Iterator[Any]:
    """Load media in threads, some ahead, in their order."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Any]] = deque()
        for medium in media:
            waiting.append(pool.submit(load, medium))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _encode(encoder: nn.Module, media: list[Tensor], batch_size: int, dtype: torch.dtype) -> list[Tensor]:
    """Encode frames of several media together. Each result has memory of its own, which can be let go."""
    device = next(encoder.parameters(), torch.empty(0)).device
    with torch.autocast(device.type, enabled=False):
        batches = torch.cat(media).split(batch_size)
        features = torch.cat([encoder(batch.to(device)).to("cpu", dtype) for batch in batches])
    return [part.clone() for part in features.split([len(pixels) for pixels in media])]

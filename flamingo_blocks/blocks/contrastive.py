"""CLIP's two-term contrastive loss: the pre-training stage of Flamingo's vision encoder.

Source: Radford et al. 2021 (CLIP), section 2.3; Alayrac et al. 2022 (Flamingo), appendix B.1.3; several positives a row
as in Khosla et al. 2020 (supervised contrastive learning), L_out.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, distributed, nn


class ContrastiveLoss(nn.Module):
    """Pull the embeddings of matching images and texts together, push the others apart; the temperature is learned.

    Args:
        temperature: Its value at the start.
        max_scale: Upper bound of 1 / temperature, CLIP's guard against instability.
        label_smoothing: Share of the target that is spread evenly over all candidates (0.1 in Flamingo).
        gather: Where `torch.distributed` is initialised, compare with the embeddings of all processes. Each process
            then returns the loss of the whole batch, and the mean of their gradients, which DistributedDataParallel and
            FSDP take, is the gradient of one process with the whole batch. For the temperature, this module must be a
            part of what they wrap. A process may have fewer images or texts than another, or none; it holds the logits
            of its own alone.

    Raises:
        ValueError: If `temperature` is below 1 / `max_scale`.

    Source: Radford et al. 2021, section 2.3. Differs from CLIP: a row may have several positives.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        max_scale: float = 100.0,
        label_smoothing: float = 0.0,
        gather: bool = False,
    ) -> None:
        super().__init__()
        if temperature < 1 / max_scale:
            raise ValueError(f"temperature must be at least 1 / max_scale = {1 / max_scale}, got {temperature}")
        self.max_scale = max_scale
        self.label_smoothing = label_smoothing
        self.gather = gather
        # Never 0-dimensional: FSDP2 cannot shard scalars.
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))

    def forward(
        self,
        image_embeddings: Float[Tensor, "images dim"],
        text_embeddings: Float[Tensor, "texts dim"],
        positives: Bool[Tensor, "images texts"] | None = None,
        *,
        image_ids: Int[Tensor, " images"] | None = None,
        text_ids: Int[Tensor, " texts"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean of the image-to-text and the text-to-image cross-entropy, in nats.

        Args:
            image_embeddings: Normalised here; any length will do.
            text_embeddings: Normalised here.
            positives: True where an image and a text match; the target is spread evenly over the positives. None, and
                no ids: the i-th image matches the i-th text.
            image_ids: Another way to say it, which also holds between processes: an image and a text match if they have
                the same number, such as a hash of the caption.
            text_ids: The numbers of the texts.

        Raises:
            ValueError: If shapes do not fit, the batch is empty, or an image or a text has no positive. What only
                several processes together can get wrong is raised by all of them.
        """
        _check_shapes(image_embeddings, text_embeddings, positives, image_ids, text_ids)
        # Autocast would make logits of 16 bits, too coarse for values of about 100.
        with torch.autocast(image_embeddings.device.type, enabled=False):
            # Beyond the bound the gradient still passes, so that the temperature can come back.
            excess = (self.log_scale - math.log(self.max_scale)).clamp(min=0).detach()
            scale = (self.log_scale - excess).exp()
            images = F.normalize(image_embeddings.to(scale.dtype), dim=-1)
            texts = F.normalize(text_embeddings.to(scale.dtype), dim=-1)
            if self.gather and distributed.is_available() and distributed.is_initialized():
                share = self._loss(scale, _gather_batch(images, texts, positives, image_ids, text_ids))
                # Its gradient is a sum over processes, which makes up for the mean that comes after it.
                return _gather_rows(share[None], [1] * distributed.get_world_size()).sum()
            return self._loss(scale, _local_batch(images, texts, positives, image_ids, text_ids))

    def _loss(self, scale: Tensor, batch: "_Batch") -> Tensor:
        image_to_text = self._cross_entropy(scale * batch.images @ batch.all_texts.T, batch.texts_of_images)
        text_to_image = self._cross_entropy(scale * batch.texts @ batch.all_images.T, batch.images_of_texts)
        return (image_to_text / len(batch.all_images) + text_to_image / len(batch.all_texts)) / 2

    def _cross_entropy(self, logits: Tensor, positives: Tensor) -> Tensor:
        target = positives / positives.sum(-1, keepdim=True)
        return F.cross_entropy(logits, target.to(logits.dtype), label_smoothing=self.label_smoothing, reduction="sum")


@dataclass
class _Batch:
    """The images and texts of this process, those of all processes, and which of all match which of its own."""

    images: Tensor
    texts: Tensor
    all_images: Tensor
    all_texts: Tensor
    texts_of_images: Tensor
    images_of_texts: Tensor


def _check_shapes(
    images: Tensor, texts: Tensor, positives: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None
) -> None:
    if images.ndim != 2 or texts.ndim != 2 or texts.shape[1] != images.shape[1]:
        raise ValueError(
            "image_embeddings and text_embeddings must have shapes (images, dim) and (texts, dim), "
            f"got {tuple(images.shape)} and {tuple(texts.shape)}"
        )
    shape = (len(images), len(texts))
    if positives is not None and positives.shape != shape:
        raise ValueError(f"positives must have shape (images, texts) = {shape}, got {tuple(positives.shape)}")
    if (image_ids is None) != (text_ids is None) or (positives is not None and image_ids is not None):
        raise ValueError("give both image_ids and text_ids, or positives, or none of the three")
    if image_ids is not None and text_ids is not None:
        found = (tuple(image_ids.shape), tuple(text_ids.shape))
        if found != ((shape[0],), (shape[1],)):
            raise ValueError(f"image_ids and text_ids must be one for each of {shape}, got shapes {found}")


def _local_batch(
    images: Tensor, texts: Tensor, positives: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None
) -> _Batch:
    """Compare within this process."""
    _check_counts([len(images)], [len(texts)], is_paired=positives is None and image_ids is None)
    if image_ids is None or text_ids is None:
        image_ids = text_ids = torch.arange(len(images), device=images.device)
    if positives is None:
        positives = image_ids[:, None] == text_ids
    if not torch.compiler.is_compiling():
        _check_matches(positives.any(1), positives.any(0))
    return _Batch(images, texts, images, texts, positives, positives.T)


def _gather_batch(
    images: Tensor, texts: Tensor, positives: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None
) -> _Batch:
    """Compare with all processes. They first agree on what comes, so that none waits for one that has failed."""
    processes, rank = distributed.get_world_size(), distributed.get_rank()
    own = [len(images), len(texts), images.shape[1], positives is not None, image_ids is not None]
    facts = _gather_rows(torch.tensor([own], device=images.device), [1] * processes)
    image_counts, text_counts, dims, have_positives, have_ids = facts.T.tolist()
    if any(have_positives):
        raise ValueError("positives cannot tell what matches in other processes; give image_ids and text_ids instead")
    if len(set(dims)) > 1 or len(set(have_ids)) > 1:
        raise ValueError(f"processes must agree on dim, got {dims}, and on whether they give ids, got {have_ids}")
    _check_counts(image_counts, text_counts, is_paired=image_ids is None)
    if image_ids is None or text_ids is None:
        start = sum(image_counts[:rank])
        image_ids = text_ids = torch.arange(start, start + len(images), device=images.device)
    all_image_ids = _gather_rows(image_ids.long(), image_counts)
    all_text_ids = _gather_rows(text_ids.long(), text_counts)
    _check_matches(torch.isin(all_image_ids, all_text_ids), torch.isin(all_text_ids, all_image_ids))
    return _Batch(
        images,
        texts,
        _gather_rows(images, image_counts),
        _gather_rows(texts, text_counts),
        image_ids[:, None] == all_text_ids,
        text_ids[:, None] == all_image_ids,
    )


def _check_counts(images: list[int], texts: list[int], *, is_paired: bool) -> None:
    if not sum(images) or not sum(texts):
        raise ValueError("image_embeddings and text_embeddings must not be empty")
    if is_paired and images != texts:
        raise ValueError(f"without positives or ids there must be as many texts as images, got {texts}, {images}")


def _check_matches(*has_match: Tensor) -> None:
    if not all(each.all() for each in has_match):
        raise ValueError("every image and every text must have a positive; drop those that have none")


def _gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    return _GatherRows.apply(rows, counts)


class _GatherRows(torch.autograd.Function):
    """The rows of all processes, of which each has its own number. A row's gradient is the sum of what all send it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        total = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total.split(ctx.counts)[distributed.get_rank()], None

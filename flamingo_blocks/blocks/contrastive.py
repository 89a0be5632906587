"""CLIP's two-term contrastive loss: the pre-training stage of Flamingo's vision encoder.

Source: Radford et al. 2021 (CLIP), section 2.3; Alayrac et al. 2022 (Flamingo), appendix B.1.3; several positives a row
as in Khosla et al. 2020 (supervised contrastive learning), L_out.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class ContrastiveLoss(nn.Module):
    """Pull the embeddings of matching images and texts together, push the others apart; the temperature is learned.

    One process: embeddings are compared within the batch that is passed in.

    Args:
        temperature: Its value at the start.
        max_scale: Upper bound of 1 / temperature, CLIP's guard against instability.
        label_smoothing: Share of the target that is spread evenly over all candidates (0.1 in Flamingo).

    Raises:
        ValueError: If `temperature` is below 1 / `max_scale`.

    Source: Radford et al. 2021, section 2.3. Differs from CLIP: a row may have several positives.
    """

    def __init__(self, *, temperature: float = 0.07, max_scale: float = 100.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if temperature < 1 / max_scale:
            raise ValueError(f"temperature must be at least 1 / max_scale = {1 / max_scale}, got {temperature}")
        self.max_scale = max_scale
        self.label_smoothing = label_smoothing
        # Never 0-dimensional: FSDP2 cannot shard scalars.
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))

    def forward(
        self,
        image_embeddings: Float[Tensor, "images dim"],
        text_embeddings: Float[Tensor, "texts dim"],
        positives: Bool[Tensor, "images texts"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean of the image-to-text and the text-to-image cross-entropy, in nats.

        Args:
            image_embeddings: Normalised here; any length will do.
            text_embeddings: Normalised here.
            positives: True where an image and a text match; the target is spread evenly over the positives. None: the
                i-th image matches the i-th text.

        Raises:
            ValueError: If shapes do not fit, the batch is empty, or an image or a text has no positive.
        """
        if image_embeddings.ndim != 2 or text_embeddings.shape[1:] != image_embeddings.shape[1:]:
            raise ValueError(
                "image_embeddings and text_embeddings must have shapes (images, dim) and (texts, dim), "
                f"got {tuple(image_embeddings.shape)} and {tuple(text_embeddings.shape)}"
            )
        if not len(image_embeddings) or not len(text_embeddings):
            raise ValueError("image_embeddings and text_embeddings must not be empty")
        shape = (len(image_embeddings), len(text_embeddings))
        if positives is None:
            if shape[0] != shape[1]:
                raise ValueError(f"without positives there must be as many texts as images, got {shape[1]}, {shape[0]}")
            positives = torch.eye(shape[0], dtype=torch.bool, device=image_embeddings.device)
        if positives.shape != shape:
            raise ValueError(f"positives must have shape (images, texts) = {shape}, got {tuple(positives.shape)}")
        if not torch.compiler.is_compiling() and not (positives.any(0).all() and positives.any(1).all()):
            raise ValueError("every image and every text must have a positive; drop those that have none")
        # Beyond the bound the gradient still passes, so that the temperature can come back.
        excess = (self.log_scale - math.log(self.max_scale)).clamp(min=0).detach()
        scale = (self.log_scale - excess).exp()
        images = F.normalize(image_embeddings.to(scale.dtype), dim=-1)
        texts = F.normalize(text_embeddings.to(scale.dtype), dim=-1)
        logits = scale * images @ texts.T
        image_to_text, text_to_image = (
            self._cross_entropy(logits, positives),
            self._cross_entropy(logits.T, positives.T),
        )
        return (image_to_text + text_to_image) / 2

    def _cross_entropy(self, logits: Tensor, positives: Tensor) -> Tensor:
        target = positives / positives.sum(-1, keepdim=True)
        return F.cross_entropy(logits, target.to(logits.dtype), label_smoothing=self.label_smoothing)

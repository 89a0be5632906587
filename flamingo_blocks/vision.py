"""VisionEncoder: any timm model as an encoder of images into visual tokens, frozen unless asked otherwise.

timm's backbones return feature maps or token sequences, with the channels in different places and with class tokens in
front or not. What a backbone does is found out once, from the shapes of a pass without computation, and never guessed.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class TokenLayout:
    """How a backbone's `forward_features` lays out its result.

    Attributes:
        axes: Order of the axes: batch N, channels C, height H, width W, tokens L.
        prefix_tokens: Class and register tokens in front of the patches.
        grid: Patches along height and width.
        dim: Width of a token.
    """

    axes: Literal["NCHW", "NHWC", "NLC"]
    prefix_tokens: int
    grid: tuple[int, int]
    dim: int

    def to_tokens(self, features: Tensor) -> Tensor:
        """Rearrange a backbone's result to (media, patches, vision_dim), patches row by row."""
        match self.axes:
            case "NCHW":
                return features.flatten(2).transpose(1, 2)
            case "NHWC":
                return features.flatten(1, 2)
            case "NLC":
                return features[:, self.prefix_tokens :]


class VisionEncoder(nn.Module):
    """Encode images with a timm model that stays frozen: no gradient, no training mode, no moving statistics.

    `unfreeze` ends this, for fine-tuning or ablations.

    Args:
        backbone: A timm model.
        image_size: Height and width of the images. None: what the model was made for.
        channels: Of the images.
        output_dtype: Of the tokens; None: the backbone's.

    Attributes:
        layout: What the backbone returns for such images.
        vision_dim: Width of a token.
        is_frozen: Whether the backbone is frozen.

    Raises:
        ValueError: If the backbone takes no images of this size, or does not return a grid of tokens.

    Example:
        ```python
        import torch
        from flamingo_blocks import VisionEncoder

        encoder = VisionEncoder.from_timm("test_vit", image_size=160)
        tokens = encoder(torch.randn(2, 3, 160, 160))  # (media, patches, vision_dim)
        ```

    Source: Alayrac et al. 2022, section 2.1: a frozen NFNet-F6 whose final grid is flattened. Differs from the paper:
    any backbone will do.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int | tuple[int, int] | None = None,
        channels: int = 3,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if image_size is None:
            image_size = _native_size(backbone)
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.channels = channels
        self.output_dtype = output_dtype
        self.layout = find_layout(backbone, (channels, *self.image_size))
        # Typed as what it is to callers: timm's models share methods but no class.
        self.backbone: Any = backbone
        self.freeze()

    @classmethod
    def from_timm(
        cls,
        name: str,
        *,
        pretrained: bool = False,
        image_size: int | tuple[int, int] | None = None,
        channels: int = 3,
        output_dtype: torch.dtype | None = None,
        model_args: Mapping[str, Any] | None = None,
    ) -> "VisionEncoder":
        """Make the encoder from a timm model name, e.g. `"nfnet_f6"` or `"vit_base_patch16_clip_224.openai"`.

        Args:
            name: As for `timm.create_model`; ids of models on a hub, with their prefix, too.
            pretrained: Load timm's weights for it.
            image_size: Height and width of the images. A model that is built for one size is built for this one.
            channels: Of the images.
            output_dtype: Of the tokens; None: the backbone's.
            model_args: Further arguments of `timm.create_model`, e.g. `{"output_stride": 8}`.

        Raises:
            ValueError: As the constructor.
        """
        import timm

        model_args = dict(model_args or {})

        def create(**arguments: Any) -> nn.Module:
            arguments = {"num_classes": 0, "in_chans": channels, **model_args, **arguments}
            return timm.create_model(name, pretrained=pretrained, **arguments)

        backbone = create() if image_size is None else _create_for_size(create, image_size)
        return cls(backbone, image_size=image_size, channels=channels, output_dtype=output_dtype)

    @property
    def vision_dim(self) -> int:
        """Width of a token."""
        return self.layout.dim

    def freeze(self) -> None:
        """Freeze the backbone for good: also when somebody calls `train` or asks for gradients."""
        self.is_frozen = True
        self.backbone.requires_grad_(False).eval()

    def unfreeze(self) -> None:
        """Let the backbone be trained, with its own statistics and dropout."""
        self.is_frozen = False
        self.backbone.requires_grad_(True).train(self.training)

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Set the mode of this module, but leave a frozen backbone in eval mode: its statistics must not move."""
        super().train(mode)
        if self.is_frozen:
            self.backbone.eval()
        return self

    def forward(
        self, images: Float[Tensor, "media channels height width"]
    ) -> Float[Tensor, "media patches vision_dim"]:
        """Encode images, or the frames of videos, one by one.

        Args:
            images: Normalised as the backbone expects (`timm.data.resolve_model_data_config`).

        Raises:
            ValueError: If the images are not of this encoder's size.
        """
        if images.shape[1:] != (self.channels, *self.image_size):
            raise ValueError(
                f"images must have shape (media, {self.channels}, {', '.join(map(str, self.image_size))}), "
                f"got {tuple(images.shape)}"
            )
        dtype = next(self.backbone.parameters()).dtype
        with torch.no_grad() if self.is_frozen else nullcontext():
            features = self.backbone.forward_features(images.to(dtype))
        return self.layout.to_tokens(features).to(self.output_dtype or dtype)


def find_layout(backbone: nn.Module, input_size: tuple[int, int, int]) -> TokenLayout:
    """Find out how a timm model's `forward_features` lays out its result.

    The model is copied to the meta device and run there, which takes neither memory nor arithmetic.

    Args:
        backbone: A timm model; it is not changed.
        input_size: Channels, height and width of an image.

    Raises:
        ValueError: If the model does not take such images, or its result is not a grid of tokens.
    """
    name = type(backbone).__name__
    if not hasattr(backbone, "forward_features"):
        raise ValueError(f"{name} has no forward_features; a backbone must be a timm model")
    skeleton = _on_meta(backbone)
    # Two images, lest an axis of one be mistaken for the batch.
    images = torch.empty(2, *input_size, device="meta", dtype=next(skeleton.parameters()).dtype)
    try:
        with torch.no_grad():
            features = skeleton.forward_features(images)
        intermediate = _intermediate_shape(skeleton, images)
    except Exception as error:
        raise ValueError(f"{name} does not take images of size {input_size}: {error}") from error
    shape = tuple(features.shape) if isinstance(features, Tensor) else None
    layout = None
    if shape is not None and len(shape) == 4:
        layout = _map_layout(shape, skeleton, intermediate)
    elif shape is not None and len(shape) == 3:
        declared = getattr(skeleton, "num_prefix_tokens", None)
        layout = _sequence_layout(shape, declared, intermediate)
    if layout is None:
        raise ValueError(
            f"{name}.forward_features does not return a grid of tokens that can be told from its shape, "
            f"{shape or type(features).__name__}"
        )
    return layout


def _map_layout(shape: tuple[int, ...], skeleton: Any, intermediate: tuple[int, ...] | None) -> TokenLayout | None:
    """Tell NCHW from NHWC: by what the model declares, else by its last intermediate map, else by its width."""
    _, first, second, third = shape
    declared = getattr(skeleton, "output_fmt", None)
    axes = str(getattr(declared, "value", declared))
    if axes not in ("NCHW", "NHWC"):
        if intermediate is not None:
            # It is always NCHW. Layers after it may change the width, but neither the grid nor its place.
            grid = intermediate[2:]
            is_nchw, is_nhwc = (second, third) == grid, (first, second) == grid
        else:
            width = getattr(skeleton, "num_features", None)
            is_nchw, is_nhwc = first == width, third == width
        if is_nchw == is_nhwc:
            return None
        axes = "NCHW" if is_nchw else "NHWC"
    if axes == "NCHW":
        return TokenLayout("NCHW", 0, (second, third), first)
    return TokenLayout("NHWC", 0, (first, second), third)


def _sequence_layout(
    shape: tuple[int, ...], declared: int | None, intermediate: tuple[int, ...] | None
) -> TokenLayout | None:
    """Split tokens into prefix and grid: the last intermediate map has the grid, what is left over is prefix."""
    _, tokens, dim = shape
    if intermediate is None:
        return None
    height, width = intermediate[2:]
    prefix_tokens = tokens - height * width
    if prefix_tokens < 0 or prefix_tokens > 16 or (declared is not None and declared != prefix_tokens):
        return None
    return TokenLayout("NLC", prefix_tokens, (height, width), dim)


def _intermediate_shape(skeleton: Any, images: Tensor) -> tuple[int, ...] | None:
    if not hasattr(skeleton, "forward_intermediates"):
        return None
    with torch.no_grad():
        features = skeleton.forward_intermediates(images, indices=1, intermediates_only=True, output_fmt="NCHW")
    shape = tuple(features[-1].shape)
    return shape if len(shape) == 4 else None


def _on_meta(backbone: nn.Module) -> Any:
    """Copy a module without its data."""
    tensors = [*backbone.parameters(), *backbone.buffers()]
    memo: dict[int, object] = {id(tensor): _empty_like(tensor) for tensor in tensors}
    return copy.deepcopy(backbone, memo).eval()


def _empty_like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _native_size(backbone: nn.Module) -> tuple[int, int]:
    config = getattr(backbone, "pretrained_cfg", None) or {}
    if "input_size" not in config:
        raise ValueError(f"{type(backbone).__name__} does not say for which size it was made; give image_size")
    _, height, width = config["input_size"]
    return height, width


def _create_for_size(create: Callable[..., nn.Module], image_size: int | tuple[int, int]) -> nn.Module:
    try:
        return create(img_size=image_size)
    except TypeError:
        # Convolutional models take no such argument, and any size.
        return create()
    except AssertionError as error:
        raise ValueError(f"timm cannot build this model for images of size {image_size}: {error}") from error

"""VisionEncoder: any backbone as an encoder of images into visual tokens, frozen unless asked otherwise.

timm's backbones return maps, token sequences or lists of them, with the channels in different places and with class
tokens in front or not. What a backbone does is found out once, from the shapes of a pass without computation, and never
guessed.
"""

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Returns = Literal["tokens", "map"]
Method = Literal["forward_features", "forward_intermediates", "tokens_before_norm", "forward"]
Shape = tuple[int, ...]
Size = tuple[int, int]
InputSize = tuple[int, int, int]
MOST_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class TokenLayout:
    """How a backbone lays out its result.

    Attributes:
        axes: Order of the axes: batch N, channels C, height H, width W, tokens L.
        prefix_tokens: Class and register tokens in front of the patches.
        patches: Tokens of an image, without the prefix.
        dim: Width of a token.
        grid: Patches along height and width. None: a module that returns tokens does not say.
        method: What of the backbone is called. `"forward_intermediates"`: where `forward_features` gives class tokens
            alone, the patches are the last intermediate map, which has not passed a final norm.
            `"tokens_before_norm"`: where the final norm is left out.
    """

    axes: Literal["NCHW", "NHWC", "NLC", "NCL"]
    prefix_tokens: int
    patches: int
    dim: int
    grid: Size | None
    method: Method = "forward_features"

    def to_tokens(self, features: Tensor) -> Tensor:
        """Rearrange a backbone's result to (media, patches, vision_dim), patches row by row."""
        match self.axes:
            case "NCHW":
                return features.flatten(2).transpose(1, 2)
            case "NHWC":
                return features.flatten(1, 2)
            case "NLC":
                return features[:, self.prefix_tokens :]
            case "NCL":
                return features.transpose(1, 2)


class VisionEncoder(nn.Module):
    """Encode images with a backbone that stays frozen: no gradient, no training mode, no moving statistics.

    `unfreeze` ends this, for fine-tuning or ablations.

    Args:
        backbone: A timm model; or any module, if `returns` says what it returns.
        image_size: Height and width of the images. None: what the timm model was made for.
        channels: Of the images.
        output_dtype: Of the tokens; None: the backbone's.
        returns: What calling the backbone returns: `"tokens"` (batch, patches, dim) or a `"map"` (batch, dim, height,
            width), as they are or as the `last_hidden_state` of an output of transformers. None: it is a timm model,
            and its `forward_features` is examined.
        prefix_tokens: How many tokens stand before the patches, if `returns="tokens"`; e.g. 1 class token.
        keep_prefix_tokens: Give class and register tokens, too, in front of the patches, as IDEFICS does.
        final_norm: False: give tokens as they are before the final norm, as OpenFlamingo does. For timm's vision
            transformers and others that have tokens there.

    Attributes:
        layout: What the backbone returns for such images.
        vision_dim: Width of a token.
        is_frozen: Whether the backbone is frozen.

    Raises:
        ValueError: If the backbone takes no images of this size, or does not return a grid of tokens, or not what
            `returns` says, or it cannot give tokens before its final norm.

    Example:
        ```python
        import torch
        from flamingo_blocks import VisionEncoder

        encoder = VisionEncoder.from_timm("test_vit", image_size=160)
        tokens = encoder(torch.randn(2, 3, 160, 160))  # (media, patches, vision_dim)

        stem = torch.nn.Conv2d(3, 64, kernel_size=16, stride=16)
        assert VisionEncoder(stem, image_size=160, returns="map").layout.grid == (10, 10)
        ```

    Source: Alayrac et al. 2022, section 2.1: a frozen NFNet-F6 whose final grid is flattened. Differs from the paper:
    any backbone will do.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int | Size | None = None,
        channels: int = 3,
        output_dtype: torch.dtype | None = None,
        returns: Returns | None = None,
        prefix_tokens: int = 0,
        keep_prefix_tokens: bool = False,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        name, native = type(backbone).__name__, _native_size(backbone)
        size = native if image_size is None else _pair(image_size)
        if size is None:
            raise ValueError(f"{name} does not say for which size it was made; give image_size")

        def layout_for(size: Size) -> TokenLayout:
            return find_layout(backbone, (channels, *size), returns=returns, prefix_tokens=prefix_tokens)

        try:
            self.layout = layout_for(size)
        except ValueError as error:
            if returns is not None:
                raise
            raise _name_sizes(error, name, size, native, layout_for) from error.__cause__
        if not final_norm:
            self._leave_out_norm(backbone, (channels, *size))
        if keep_prefix_tokens:
            tokens = self.layout.prefix_tokens + self.layout.patches
            self.layout = replace(self.layout, prefix_tokens=0, patches=tokens, grid=None)
        self.image_size = size
        self.channels = channels
        self.output_dtype = output_dtype
        self.keep_prefix_tokens = keep_prefix_tokens
        self.final_norm = final_norm
        # Typed as what it is to callers: backbones share methods but no class.
        self.backbone: Any = backbone
        self.freeze()

    @classmethod
    def from_timm(
        cls,
        name: str,
        *,
        pretrained: bool = False,
        image_size: int | Size | None = None,
        channels: int = 3,
        output_dtype: torch.dtype | None = None,
        model_args: Mapping[str, Any] | None = None,
        keep_prefix_tokens: bool = False,
        final_norm: bool = True,
    ) -> "VisionEncoder":
        """Make the encoder from a timm model name, e.g. `"nfnet_f6"` or `"vit_base_patch16_clip_224.openai"`.

        Args:
            name: As for `timm.create_model`; ids of models on a hub, with their prefix, too.
            pretrained: Load timm's weights for it.
            image_size: Height and width of the images. A model that is built for one size is built for this one.
            channels: Of the images.
            output_dtype: Of the tokens; None: the backbone's.
            model_args: Further arguments of `timm.create_model`, e.g. `{"output_stride": 8}`.
            keep_prefix_tokens: As for the constructor.
            final_norm: As for the constructor.

        Raises:
            ValueError: As the constructor. Where the size is to blame, it names sizes that the model can be built for.
        """
        import timm

        arguments = {"num_classes": 0, "in_chans": channels, "pretrained": pretrained, **(model_args or {})}
        create = partial(timm.create_model, name, **arguments)
        options: dict[str, Any] = {
            "channels": channels,
            "output_dtype": output_dtype,
            "keep_prefix_tokens": keep_prefix_tokens,
            "final_norm": final_norm,
        }
        if image_size is None:
            return cls(create(), **options)
        size = _pair(image_size)

        def layout_for(size: Size) -> TokenLayout:
            with torch.device("meta"):
                backbone = _create_for_size(partial(create, pretrained=False), (channels, *size))
            return find_layout(backbone, (channels, *size))

        try:
            backbone = _create_for_size(create, (channels, *size))
        except Exception as error:
            native = None
            with suppress(Exception), torch.device("meta"):
                native = _native_size(create(pretrained=False))
            if native is None:
                raise  # whatever is wrong, it is not the size
            raise _name_sizes(error, name, size, native, layout_for) from error.__cause__
        return cls(backbone, image_size=size, **options)

    def _leave_out_norm(self, backbone: nn.Module, input_size: InputSize) -> None:
        name, layout = type(backbone).__name__, self.layout
        before = replace(layout, method="tokens_before_norm")
        try:
            if layout.axes != "NLC" or layout.method != "forward_features":
                raise ValueError("it has no sequence of tokens")
            shape = _shape(_on_meta(backbone), before.method, input_size)
            if shape != (2, layout.prefix_tokens + layout.patches, layout.dim):
                raise ValueError(f"they would be {shape} for 2 images")
        except ValueError as error:
            raise ValueError(
                f"{name} cannot give tokens before its final norm, leave out final_norm=False: {error}"
            ) from error
        self.layout = before

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
        norm = None if self.final_norm else getattr(self.backbone, "norm", None)
        if isinstance(norm, nn.Module):  # it would never get a gradient
            norm.requires_grad_(False)

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
        dtype = next(self.backbone.parameters(), images).dtype
        with torch.no_grad() if self.is_frozen else nullcontext():
            features = _run(self.backbone, self.layout.method, images.to(dtype))
        return self.layout.to_tokens(features).to(self.output_dtype or dtype)


def find_layout(
    backbone: nn.Module, input_size: InputSize, *, returns: Returns | None = None, prefix_tokens: int = 0
) -> TokenLayout:
    """Find out how a backbone lays out its result.

    A copy is run on the meta device, which takes neither memory nor arithmetic. Where a timm model returns several
    streams of tokens, the last one counts: that of the last stage, or of the deepest branch.

    A timm model that cuts images into patches leaves out what remains at the border. That is an error here, unless it
    was made for this very size.

    Args:
        backbone: It is not changed.
        input_size: Channels, height and width of an image.
        returns: As for `VisionEncoder`. Where a module cannot run on the meta device, a copy is run on zeros instead.
        prefix_tokens: As for `VisionEncoder`.

    Raises:
        ValueError: If the model does not take such images, or its result is not a grid of tokens, or not what `returns`
            says.
    """
    name = type(backbone).__name__
    if returns is not None:
        return _declared_layout(backbone, input_size, returns, prefix_tokens)
    if prefix_tokens:
        raise ValueError(f'prefix_tokens is for returns="tokens", got {prefix_tokens}; in timm models they are found')
    if not hasattr(backbone, "forward_features"):
        raise ValueError(
            f"{name} has no forward_features, so it is no timm model; say what calling it returns: "
            'returns="tokens" or returns="map"'
        )
    skeleton = _on_meta(backbone)
    patches_cut_off = _note_patches_cut_off(skeleton, input_size)
    shape = _shape(skeleton, "forward_features", input_size)
    if patches_cut_off and input_size[1:] != _native_size(backbone):
        raise ValueError(f"its patches of {_times(patches_cut_off[0])} would leave out a border")
    try:
        intermediate: Shape | None = _shape(skeleton, "forward_intermediates", input_size)
    except ValueError:
        # Older versions of timm have none for this model, or it reads values, which the meta device lacks.
        intermediate = None
    layout = None
    if len(shape) == 4:
        output_fmt, width = getattr(skeleton, "output_fmt", None), getattr(skeleton, "num_features", None)
        layout = _map_layout(shape, str(getattr(output_fmt, "value", output_fmt)), width, intermediate)
    elif len(shape) == 3:
        declared = getattr(skeleton, "num_prefix_tokens", None)
        layout = _sequence_layout(shape, declared, intermediate, input_size[1:])
    if layout is None:
        raise ValueError(
            f"{name}.forward_features does not return a grid of tokens that can be told from its shape, {shape}"
        )
    return layout


def _map_layout(shape: Shape, output_fmt: str, width: int | None, intermediate: Shape | None) -> TokenLayout | None:
    """Tell NCHW from NHWC: by what the model declares, else by its last intermediate map, else by its width."""
    _, first, second, third = shape
    nchw = TokenLayout("NCHW", 0, second * third, first, (second, third))
    nhwc = TokenLayout("NHWC", 0, first * second, third, (first, second))
    if output_fmt in ("NCHW", "NHWC"):
        return nchw if output_fmt == "NCHW" else nhwc
    # An intermediate map is always NCHW. Most layers after it change neither the grid nor its place.
    fits = [layout for layout in (nchw, nhwc) if intermediate is not None and layout.grid == intermediate[2:]]
    if len(fits) != 1:
        fits = [layout for layout in (nchw, nhwc) if layout.dim == width]
    return fits[0] if len(fits) == 1 else None


def _sequence_layout(shape: Shape, declared: int | None, intermediate: Shape | None, image: Size) -> TokenLayout | None:
    """Find the grid of a sequence: the last intermediate map has it, or it follows from the shape of the image."""
    _, tokens, dim = shape
    if intermediate is None or len(intermediate) != 4:
        # A class token and one for distillation are the most that models without further notice have.
        prefixes = (0, 1, 2) if declared is None else (declared,)
        found = [(prefix, grid) for prefix in prefixes if (grid := _grid_like(image, tokens - prefix))]
        if len(found) != 1:
            return None
        prefix, grid = found[0]
        return TokenLayout("NLC", prefix, tokens - prefix, dim, grid)
    _, channels, height, width = intermediate
    patches = height * width
    if (tokens, dim) == (channels, patches) and channels != patches:
        return TokenLayout("NCL", 0, patches, channels, (height, width))
    prefix = tokens - patches
    if 0 <= prefix <= MOST_PREFIX_TOKENS and declared in (None, prefix):
        return TokenLayout("NLC", prefix, patches, dim, (height, width))
    if tokens <= 2:
        return TokenLayout("NCHW", 0, patches, channels, (height, width), "forward_intermediates")
    # Blocks of merge x merge patches may have become one token.
    merged = tokens - declared if declared is not None else 0
    merge = math.isqrt(patches // merged) if merged > 0 else 0
    if merge > 1 and merge**2 * merged == patches and height % merge == width % merge == 0:
        return TokenLayout("NLC", tokens - merged, merged, dim, (height // merge, width // merge))
    return None


def _grid_like(image: Size, patches: int) -> Size | None:
    """The grid of so many patches that has exactly the image's aspect ratio; fewer than 4 might be class tokens."""
    if patches < 4:
        return None
    common = math.gcd(*image)
    height, width = image[0] // common, image[1] // common
    times = math.isqrt(patches // (height * width))
    return (times * height, times * width) if times and times**2 * height * width == patches else None


def _declared_layout(backbone: nn.Module, input_size: InputSize, returns: Returns, prefix_tokens: int) -> TokenLayout:
    if returns not in ("tokens", "map"):
        raise ValueError(f'returns must be "tokens", "map" or None, got {returns!r}')
    name = type(backbone).__name__
    try:
        shape = _shape(_on_meta(backbone), "forward", input_size)
    except ValueError:
        # The meta copy fails where a module reads values, or keeps tensors that are neither parameters nor buffers.
        shape = _shape(copy.deepcopy(backbone).eval(), "forward", input_size)
    axes = "(batch, patches, dim)" if returns == "tokens" else "(batch, dim, height, width)"
    if len(shape) != axes.count(",") + 1:
        raise ValueError(f"returns={returns!r} means {axes}, but {name} returns {shape} for 2 images")
    if returns == "map":
        if prefix_tokens:
            raise ValueError(f'prefix_tokens is for returns="tokens", got {prefix_tokens}')
        _, dim, height, width = shape
        return TokenLayout("NCHW", 0, height * width, dim, (height, width), "forward")
    _, tokens, dim = shape
    if not 0 <= prefix_tokens < tokens:
        raise ValueError(
            f"prefix_tokens must be less than the {tokens} tokens that {name} returns, got {prefix_tokens}"
        )
    return TokenLayout("NLC", prefix_tokens, tokens - prefix_tokens, dim, None, "forward")


def _shape(backbone: nn.Module, method: Method, input_size: InputSize) -> Shape:
    """Shape of the result for two images: for one, another axis might be mistaken for the batch."""
    name = type(backbone).__name__
    first = next(backbone.parameters(), torch.empty(0))
    images = torch.zeros(2, *input_size, device=first.device, dtype=first.dtype)
    try:
        with torch.no_grad():
            result = _run(backbone, method, images)
    except Exception as error:
        raise ValueError(f"{name} does not take images of size {input_size}: {error}") from error
    if not isinstance(result, Tensor) or result.shape[:1] != (2,):
        found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"{name}.{method} must return a tensor with the batch first, got {found} for 2 images")
    return tuple(result.shape)


def _run(backbone: Any, method: Method, images: Tensor) -> Any:
    match method:
        case "forward":
            result = backbone(images)
            return result if isinstance(result, Tensor) else result.last_hidden_state
        case "forward_features":
            result = backbone.forward_features(images)
        case "forward_intermediates":
            result = backbone.forward_intermediates(images, indices=1, intermediates_only=True, output_fmt="NCHW")
        case "tokens_before_norm":
            (last,) = backbone.forward_intermediates(
                images, indices=1, return_prefix_tokens=True, norm=False, output_fmt="NLC", intermediates_only=True
            )
            # A pair, where there are prefix tokens.
            return torch.cat([last[1], last[0]], dim=1) if isinstance(last, tuple) else last
    while isinstance(result, list | tuple):
        result = result[-1]
    return result


def _note_patches_cut_off(skeleton: nn.Module, input_size: InputSize) -> list[Size]:
    """Collect, in passes to come, the sizes of patches that do not fill the image."""
    found: list[Size] = []

    def note(conv: Any, inputs: Any, output: Tensor) -> None:
        is_patches = conv.kernel_size == conv.stride and inputs[0].shape[1:] == input_size
        if is_patches and any(
            count * side < whole
            for count, side, whole in zip(output.shape[2:], conv.stride, input_size[1:], strict=True)
        ):
            found.append(conv.stride)

    for module in skeleton.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    return found


def _on_meta(backbone: nn.Module) -> Any:
    """Copy a module without its data."""
    tensors = [*backbone.parameters(), *backbone.buffers()]
    memo: dict[int, object] = {id(tensor): _empty_like(tensor) for tensor in tensors}
    return copy.deepcopy(backbone, memo).eval()


def _empty_like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _native_size(backbone: nn.Module) -> Size | None:
    config = getattr(backbone, "pretrained_cfg", None) or {}
    return (config["input_size"][1], config["input_size"][2]) if "input_size" in config else None


def _create_for_size(create: Callable[..., nn.Module], input_size: InputSize) -> nn.Module:
    """Build a timm model for this size; where it is not built for a size, or not for this one, it may take it still."""
    try:
        backbone = create(img_size=input_size[1:])
        find_layout(backbone, input_size)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        backbone = create()
        try:
            find_layout(backbone, input_size)
        except ValueError:
            if isinstance(error, TypeError):
                raise
            raise error from error.__cause__
    return backbone


def _name_sizes(
    error: Exception, name: str, size: Size, native: Size | None, layout_for: Callable[[Size], TokenLayout]
) -> Exception:
    """Say which sizes are taken: the native one, and the next smaller and larger. Or is the size not to blame?"""

    def is_taken(size: Size) -> bool:
        try:
            layout_for(size)
        except Exception:
            return False
        return True

    smaller, larger = set[Size](), set[Size]()
    # What patches, strides and windows usually ask for.
    for unit in {14, 16, 32, 48, 64, *(side // 2 for side in native or ())}:
        if unit <= min(size):
            smaller.add((size[0] // unit * unit, size[1] // unit * unit))
        larger.add((-(-size[0] // unit) * unit, -(-size[1] // unit) * unit))
    candidates = [[native] if native else [], sorted(smaller, reverse=True), sorted(larger)]
    taken = {size for sizes in candidates for size in [next(filter(is_taken, sizes), None)] if size is not None}
    if not taken or is_taken(size):
        return error  # it is not the size
    *others, last = map(_times, sorted(taken))
    reason = str(error.__cause__ or error)
    return ValueError(
        f"{name} does not take images of {_times(size)}; it takes {', '.join(others)}{' and ' if others else ''}{last}"
        f"{': ' if reason else ''}{reason}"
    )


def _times(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _pair(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else size

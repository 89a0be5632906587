"""What `VisionEncoder` is checked for with each timm model; see vision_encoders.py, which writes down the results."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import timm
import torch
from timm.models import _registry as registry
from torch import Tensor, nn

from flamingo_blocks.vision import VisionEncoder, find_layout
from tests.coverage.sweep import Result

SIZE = 320
# Where, as fractions of height and width, images are changed. No place is on the diagonal, lest a swap go unseen.
PLACES = [(0.3, 0.7), (0.7, 0.3), (0.2, 0.4), (0.8, 0.6)]
# How many models to average over, and the size of the change. One draw of weights may be inconclusive where several are
# not; a large change may be felt everywhere where a small one is not. All places must be hit, so luck does not do.
TRIALS = ((1, 2.0), (8, 2.0), (8, 0.05))


def check_layout(name: str) -> Result:
    """Find the layout at the size that a model was made for, and try 320x320, all on the meta device."""
    warnings.filterwarnings("ignore")
    with torch.device("meta"):
        backbone: Any = timm.create_model(name, num_classes=0)
    channels, *size = backbone.pretrained_cfg["input_size"]
    result: Result = {
        "module": module_of(name),
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "layout": asdict(find_layout(backbone, backbone.pretrained_cfg["input_size"])),
        "native": size,
    }
    try:
        with torch.device("meta"):
            encoder = VisionEncoder.from_timm(name, image_size=SIZE, channels=channels)
    except ValueError as error:
        return result | {"at_320": "refused", "refusal": str(error)}
    assert encoder.image_size == (SIZE, SIZE)
    try:
        find_layout(backbone, (channels, SIZE, SIZE))
    except ValueError:
        return result | {"at_320": "built for it"}
    return result | {"at_320": "as it is"}


def check_forward(name: str) -> Result:
    """Encode images: at 320x320, or at the size that the model was made for."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    encoder = make_encoder(name)
    result: Result = {
        "image_size": encoder.image_size,
        "patches": encoder.layout.patches,
        "dim": encoder.vision_dim,
        "frozen": is_frozen(encoder),
    }
    for models, size in TRIALS:
        result["distances"] = distances(name, models, size)
        if max(result["distances"]) <= 1:
            return result
    if prepare := PREPARATIONS.get(module_of(name)):
        result["distances_prepared"] = distances(name, *TRIALS[1], prepare)
    return result


def make_encoder(name: str) -> VisionEncoder:
    try:
        return VisionEncoder.from_timm(name, image_size=SIZE)
    except ValueError:
        return VisionEncoder.from_timm(name)


def is_frozen(encoder: VisionEncoder) -> dict[str, bool]:
    """Check what a frozen encoder promises, also in training."""
    tensors = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    encoder.train()
    images = random_images(encoder, 1).requires_grad_()
    tokens = encoder(images)
    encoder.output_dtype = torch.bfloat16
    narrow = encoder(images)
    encoder.output_dtype = None
    return {
        "shape": tokens.shape == (1, encoder.layout.patches, encoder.vision_dim),
        "finite": bool(tokens.isfinite().all()),
        "no gradient": not tokens.requires_grad and not any(p.requires_grad for p in encoder.parameters()),
        "unmoved": all(torch.equal(tensor, before[name]) for name, tensor in tensors.items()),
        "dtype": tokens.dtype == torch.float32 and narrow.dtype == torch.bfloat16,
    }


def distances(name: str, models: int, size: float, prepare: Callable[[nn.Module], None] | None = None) -> list[int]:
    """How far from each changed place, in tokens, the token stands that changes most; diagonal steps count as one."""
    total = torch.zeros(())
    for seed in range(models):
        torch.manual_seed(seed)
        encoder = make_encoder(name)
        if prepare is not None:
            prepare(encoder.backbone)
        use_statistics_of(encoder, random_images(encoder, 8))
        changes = relative_changes(encoder, size)
        total = total + changes
    grid = changes.shape[1:]
    found = []
    for change, cell in zip(total, cells(grid), strict=True):
        row, column = divmod(int(change.argmax()), grid[1])
        found.append(max(abs(row - cell[0]), abs(column - cell[1])))
    return found


def relative_changes(encoder: VisionEncoder, size: float) -> Tensor:
    """Each token's share in all change, (places, height, width), when one place of a random image is changed."""
    assert encoder.layout.grid is not None
    images = random_images(encoder, 1)
    before = encoder(images)
    changes = []
    for cell in cells(encoder.layout.grid):
        after = encoder(change_cell(images, cell, encoder.layout.grid, size))
        change = (after - before).double().square().sum(-1)[0]
        changes.append((change / change.sum()).unflatten(0, encoder.layout.grid))
    return torch.stack(changes)


def cells(grid: Sequence[int]) -> list[tuple[int, int]]:
    return [(int(down * grid[0]), int(across * grid[1])) for down, across in PLACES]


def use_statistics_of(encoder: VisionEncoder, images: Tensor) -> None:
    """Give batch normalisation the statistics of these images: with those it starts with, signals vanish or explode."""
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    encoder(images)
    encoder.eval()


def random_images(encoder: VisionEncoder, count: int) -> Tensor:
    return torch.randn(count, encoder.channels, *encoder.image_size)


def change_cell(images: Tensor, cell: tuple[int, int], grid: tuple[int, int], size: float) -> Tensor:
    """Add noise to that part of each image which one token of a grid stands for."""
    height, width = images.shape[2:]
    rows, columns = (
        slice(place * side // count, (place + 1) * side // count)
        for place, side, count in zip(cell, (height, width), grid, strict=True)
    )
    changed = images.clone()
    changed[..., rows, columns] += size * torch.randn_like(changed[..., rows, columns])
    return changed


def module_of(name: str) -> str:
    return registry._model_to_module[name]


@torch.no_grad()
def narrow_kernels(backbone: nn.Module) -> None:
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            offset = torch.arange(module.kernel_size[0]) - module.kernel_size[0] // 2
            bell = torch.exp(-(offset**2) / 2)
            module.weight *= bell[:, None] * bell


def count_padding(backbone: nn.Module) -> None:
    for module in backbone.modules():
        if isinstance(module, nn.AvgPool2d):
            module.count_include_pad = True


def wrap_around(backbone: nn.Module) -> None:
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


# Networks that mix places while their weights are random, and what to change so that this is seen to be the cause.
PREPARATIONS: dict[str, Callable[[nn.Module], None]] = {
    "convmixer": narrow_kernels,
    "metaformer": count_padding,
    "coat": wrap_around,
}

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from flamingo_blocks import VisionEncoder
from flamingo_blocks.vision import TokenLayout, find_layout


def _create(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=0, **arguments)


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "vit": _create("test_vit"),
    "nfnet": _create("test_nfnet"),
    "resnet": _create("test_resnet"),
    "convnext": _create("test_convnext"),
    "swin": _create("swin_tiny_patch4_window7_224", embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4)),
    "eva02": _create("eva02_tiny_patch14_224", depth=2, embed_dim=48, num_heads=3),
}
LAYOUTS = {
    "vit": TokenLayout("NLC", 1, (10, 10), 64),
    "nfnet": TokenLayout("NCHW", 0, (5, 5), 192),
    "resnet": TokenLayout("NCHW", 0, (5, 5), 96),
    "convnext": TokenLayout("NCHW", 0, (5, 5), 64),
    "swin": TokenLayout("NHWC", 0, (7, 7), 128),
    "eva02": TokenLayout("NLC", 1, (16, 16), 48),
}
every_backbone = pytest.mark.parametrize("name", BACKBONES)


def make_encoder(name: str) -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(BACKBONES[name]())


def random_images(encoder: VisionEncoder, media: int = 1) -> Tensor:
    return torch.randn(media, encoder.channels, *encoder.image_size)


@every_backbone
def test_the_layout_is_found_and_gives_tokens_of_that_shape(name: str) -> None:
    encoder = make_encoder(name)
    assert encoder.layout == LAYOUTS[name]
    tokens = encoder(random_images(encoder, 2))
    height, width = encoder.layout.grid
    assert tokens.shape == (2, height * width, encoder.vision_dim)
    assert tokens.isfinite().all()


@every_backbone
@pytest.mark.parametrize("cell", [(0.3, 0.7), (0.7, 0.3)])
def test_a_change_in_the_image_is_largest_in_the_token_at_its_place(name: str, cell: tuple[float, float]) -> None:
    """A right shape with rows and columns swapped, or shifted by a class token, would pass for right otherwise."""
    encoder = make_encoder(name)
    (height, width), grid = encoder.image_size, encoder.layout.grid
    row, column = int(cell[0] * grid[0]), int(cell[1] * grid[1])
    rows = slice(row * height // grid[0], (row + 1) * height // grid[0])
    columns = slice(column * width // grid[1], (column + 1) * width // grid[1])
    images = random_images(encoder)
    changed = images.clone()
    changed[..., rows, columns] = 2 * torch.randn_like(changed[..., rows, columns])
    change = (encoder(changed) - encoder(images)).norm(dim=-1)[0].unflatten(0, grid)
    assert divmod(int(change.argmax()), grid[1]) == (row, column)


@every_backbone
def test_frozen_for_good(name: str) -> None:
    encoder = make_encoder(name)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.train()
    assert encoder.training
    assert not any(module.training for module in encoder.backbone.modules())
    images = random_images(encoder, 2).requires_grad_()
    assert not encoder(images).requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_images_of_a_batch_are_encoded_independently() -> None:
    encoder = make_encoder("resnet")
    images = random_images(encoder, 3)
    together = encoder(images)
    for i in range(3):
        torch.testing.assert_close(encoder(images[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "swin_tiny_patch4_window7_224"])
def test_a_model_is_built_for_the_size_asked_for(name: str) -> None:
    encoder = VisionEncoder.from_timm(name, image_size=320)
    assert encoder.image_size == (320, 320)
    height, width = encoder.layout.grid
    assert height == width >= 10
    assert encoder(random_images(encoder)).shape == (1, height * width, encoder.vision_dim)


def test_images_need_not_be_square_or_coloured() -> None:
    encoder = VisionEncoder.from_timm("test_vit", image_size=(64, 96), channels=1)
    assert encoder.layout.grid == (4, 6)
    assert encoder(torch.randn(2, 1, 64, 96)).shape == (2, 24, encoder.vision_dim)


def test_the_dtype_of_tokens_is_the_backbones_or_the_one_asked_for() -> None:
    images = torch.randn(1, 3, 160, 160)
    assert VisionEncoder(BACKBONES["vit"]().bfloat16())(images).dtype == torch.bfloat16
    encoder = VisionEncoder(BACKBONES["vit"]().bfloat16(), output_dtype=torch.float32)
    assert encoder(images).dtype == torch.float32


def test_finding_the_layout_leaves_the_model_alone() -> None:
    backbone = BACKBONES["nfnet"]().train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    find_layout(backbone, (3, 160, 160))
    assert backbone.training
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_nan_is_passed_on() -> None:
    encoder = make_encoder("vit")
    nn.init.constant_(encoder.backbone.norm.weight, torch.nan)
    assert encoder(random_images(encoder)).isnan().all()


@pytest.mark.parametrize("name", ["pit_ti_224", "crossvit_9_240"])
def test_a_result_that_is_not_a_grid_is_refused(name: str) -> None:
    with torch.device("meta"):
        backbone = timm.create_model(name, num_classes=0)
    with pytest.raises(ValueError, match=r"forward_features does not return a grid of tokens"):
        VisionEncoder(backbone)


def test_bad_input_is_refused() -> None:
    encoder = make_encoder("vit")
    with pytest.raises(ValueError, match=r"images must have shape \(media, 3, 160, 160\), got \(1, 3, 64, 160\)"):
        encoder(torch.zeros(1, 3, 64, 160))
    with pytest.raises(ValueError, match="Linear has no forward_features; a backbone must be a timm model"):
        VisionEncoder(nn.Linear(2, 2), image_size=32)
    with pytest.raises(ValueError, match="Linear does not say for which size it was made; give image_size"):
        VisionEncoder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Eva does not take images of size \(3, 64, 64\): Input height"):
        VisionEncoder(BACKBONES["eva02"](), image_size=64)


def test_a_size_that_timm_cannot_build_is_refused() -> None:
    with pytest.raises(ValueError, match=r"timm cannot build this model for images of size \(224, 288\)"):
        VisionEncoder.from_timm("mvitv2_tiny", image_size=(224, 288))


@pytest.mark.unchecked
def test_a_wrong_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images must have shape .* got \(3, 160, 160\)"):
        make_encoder("vit")(torch.zeros(3, 160, 160))

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

from flamingo_blocks import VisionEncoder
from flamingo_blocks.vision import TokenLayout, find_layout


def _create(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=0, **arguments)


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "vit": _create("test_vit"),
    "siglip": _create("vit_base_patch16_siglip_224", depth=2, embed_dim=48, num_heads=3),
    "eva02": _create("eva02_tiny_patch14_224", depth=2, embed_dim=48, num_heads=3),
    "nfnet": _create("test_nfnet"),
    "resnet": _create("test_resnet"),
    "convnext": _create("test_convnext"),
    "swin": _create("swin_tiny_patch4_window7_224", embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4)),
    "maxvit": _create("maxvit_rmlp_pico_rw_256", depths=(1, 1, 1, 1)),
    # Class tokens alone, and beside them a map.
    "pit": _create("pit_ti_224", base_dims=(16, 16, 16), depth=(1, 1, 1), heads=(1, 2, 2)),
    # Two streams of tokens.
    "crossvit": _create("crossvit_9_240", embed_dim=(16, 32), num_heads=(2, 2), depth=((1, 1, 0),)),
}
LAYOUTS = {
    "vit": TokenLayout("NLC", 1, 100, 64, (10, 10)),
    "siglip": TokenLayout("NLC", 0, 196, 48, (14, 14)),
    "eva02": TokenLayout("NLC", 1, 256, 48, (16, 16)),
    "nfnet": TokenLayout("NCHW", 0, 25, 192, (5, 5)),
    "resnet": TokenLayout("NCHW", 0, 25, 96, (5, 5)),
    "convnext": TokenLayout("NCHW", 0, 25, 64, (5, 5)),
    "swin": TokenLayout("NHWC", 0, 49, 128, (7, 7)),
    "maxvit": TokenLayout("NCHW", 0, 64, 256, (8, 8)),
    "pit": TokenLayout("NCHW", 0, 49, 32, (7, 7), "forward_intermediates"),
    "crossvit": TokenLayout("NLC", 1, 196, 32, (14, 14)),
}
every_backbone = pytest.mark.parametrize("name", BACKBONES)


def make_encoder(name: str) -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(BACKBONES[name]())


def random_images(encoder: VisionEncoder, media: int = 1) -> Tensor:
    return torch.randn(media, encoder.channels, *encoder.image_size)


def grid_of(encoder: VisionEncoder) -> tuple[int, int]:
    assert encoder.layout.grid is not None
    return encoder.layout.grid


def cell_that_changes_most(encoder: VisionEncoder, cell: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """The cell whose token changes most when one cell of an image does."""
    height, width = encoder.image_size
    rows, columns = (
        slice(place * side // count, (place + 1) * side // count)
        for place, side, count in zip(cell, (height, width), grid, strict=True)
    )
    images = random_images(encoder)
    changed = images.clone()
    changed[..., rows, columns] = 2 * torch.randn_like(changed[..., rows, columns])
    change = (encoder(changed) - encoder(images)).norm(dim=-1)[0]
    row, column = divmod(int(change.argmax()), grid[1])
    return row, column


@every_backbone
def test_the_layout_is_found_and_gives_tokens_of_that_shape(name: str) -> None:
    encoder = make_encoder(name)
    assert encoder.layout == LAYOUTS[name]
    tokens = encoder(random_images(encoder, 2))
    height, width = grid_of(encoder)
    assert tokens.shape == (2, height * width, encoder.vision_dim) == (2, encoder.layout.patches, encoder.layout.dim)
    assert tokens.isfinite().all()


@every_backbone
@pytest.mark.parametrize("place", [(0.3, 0.7), (0.7, 0.3)])
def test_a_change_in_the_image_is_largest_in_the_token_at_its_place(name: str, place: tuple[float, float]) -> None:
    """A right shape with rows and columns swapped, or shifted by a class token, would pass for right otherwise."""
    encoder = make_encoder(name)
    grid = grid_of(encoder)
    cell = (int(place[0] * grid[0]), int(place[1] * grid[1]))
    assert cell_that_changes_most(encoder, cell, grid) == cell


@every_backbone
def test_frozen_for_good(name: str) -> None:
    encoder = make_encoder(name)
    tensors = {
        **dict(encoder.named_parameters()),
        **dict(encoder.named_buffers()),
    }  # the buffers that are not saved, too
    before = {key: value.clone() for key, value in tensors.items()}
    encoder.train()
    assert encoder.training
    assert not any(module.training for module in encoder.backbone.modules())
    images = random_images(encoder, 2).requires_grad_()
    assert not encoder(images).requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    for key, value in tensors.items():
        assert torch.equal(value, before[key]), key


def test_unfreezing_lets_gradients_through_and_statistics_move() -> None:
    encoder = make_encoder("resnet").train()
    encoder.unfreeze()
    assert encoder.backbone.training
    before = {key: value.clone() for key, value in encoder.named_buffers()}
    images = random_images(encoder, 2).requires_grad_()
    encoder(images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.any()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert all(not torch.equal(value, before[key]) for key, value in encoder.named_buffers())
    encoder.freeze()
    assert not encoder(images).requires_grad
    assert not encoder.train().backbone.training


def test_images_of_a_batch_are_encoded_independently() -> None:
    encoder = make_encoder("resnet")
    images = random_images(encoder, 3)
    together = encoder(images)
    for i in range(3):
        torch.testing.assert_close(encoder(images[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["pit", "crossvit", "swin"])
def test_a_copy_encodes_the_same(name: str) -> None:
    encoder = make_encoder(name)
    images = random_images(encoder)
    assert torch.equal(copy.deepcopy(encoder)(images), encoder(images))


def test_every_order_of_the_axes_gives_the_same_tokens() -> None:
    tokens = torch.arange(2 * 6 * 4).view(2, 6, 4)
    class_token = tokens.new_full((2, 1, 4), -1)
    grid = tokens.unflatten(1, (2, 3))
    results = {
        TokenLayout("NLC", 1, 6, 4, (2, 3)): torch.cat([class_token, tokens], dim=1),
        TokenLayout("NCL", 0, 6, 4, (2, 3)): tokens.mT,
        TokenLayout("NHWC", 0, 6, 4, (2, 3)): grid,
        TokenLayout("NCHW", 0, 6, 4, (2, 3)): grid.movedim(-1, 1),
    }
    for layout, features in results.items():
        assert torch.equal(layout.to_tokens(features), tokens), layout


# ---------------------------------------------------------------- what shapes can tell


class Returning(nn.Module):
    """Pretends to be a timm model: only the shapes of what it returns matter."""

    def __init__(self, features: Any, intermediate: Any = None, **attributes: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.features, self.intermediate = features, intermediate
        for name, value in attributes.items():
            setattr(self, name, value)

    def _make(self, images: Tensor, shape: Any) -> Any:
        if isinstance(shape, list):
            return [self._make(images, part) for part in shape]
        return images.new_zeros(len(images), *shape)

    def forward_features(self, images: Tensor) -> Any:
        return self._make(images, self.features)

    def forward_intermediates(self, images: Tensor, **_: Any) -> Any:
        if self.intermediate is None:
            raise AttributeError("forward_intermediates")
        return [self._make(images, self.intermediate)]


def layout_of(
    features: Any, intermediate: Any = None, image: tuple[int, int] = (64, 64), **attributes: Any
) -> TokenLayout:
    return find_layout(Returning(features, intermediate, **attributes), (3, *image))


def test_the_layout_of_a_map_follows_from_declaration_intermediate_map_or_width() -> None:
    nchw, nhwc = TokenLayout("NCHW", 0, 24, 8, (4, 6)), TokenLayout("NHWC", 0, 24, 8, (4, 6))
    assert layout_of((8, 4, 6), output_fmt="NCHW") == nchw
    assert layout_of((4, 6, 8), output_fmt="NHWC") == nhwc
    assert layout_of((8, 4, 6), (5, 4, 6)) == nchw
    assert layout_of((4, 6, 8), (5, 4, 6)) == nhwc
    assert layout_of((8, 4, 6), num_features=8) == nchw
    assert layout_of((4, 6, 8), num_features=8) == nhwc
    # Layers after the intermediate map may change the grid: then the width tells.
    assert layout_of((8, 4, 6), (5, 2, 3), num_features=8) == nchw


def test_the_layout_of_tokens_follows_from_the_intermediate_map() -> None:
    assert layout_of((24, 8), (8, 4, 6)) == TokenLayout("NLC", 0, 24, 8, (4, 6))
    assert layout_of((29, 8), (8, 4, 6), num_prefix_tokens=5) == TokenLayout("NLC", 5, 24, 8, (4, 6))
    # The width may differ from the map's.
    assert layout_of((25, 16), (8, 4, 6)) == TokenLayout("NLC", 1, 24, 16, (4, 6))
    assert layout_of((25, 24), (25, 4, 6)) == TokenLayout("NCL", 0, 24, 25, (4, 6))
    # As many tokens as features: in timm the tokens come first.
    assert layout_of((24, 24), (24, 4, 6)) == TokenLayout("NLC", 0, 24, 24, (4, 6))


def test_merged_patches_give_a_coarser_grid() -> None:
    assert layout_of((6, 8), (8, 4, 6), num_prefix_tokens=0) == TokenLayout("NLC", 0, 6, 8, (2, 3))
    assert layout_of((7, 8), (8, 4, 6), num_prefix_tokens=1) == TokenLayout("NLC", 1, 6, 8, (2, 3))


def test_without_an_intermediate_map_the_grid_follows_from_the_images_aspect_ratio() -> None:
    assert layout_of((24, 8), image=(64, 96)) == TokenLayout("NLC", 0, 24, 8, (4, 6))
    assert layout_of((25, 8), image=(64, 96)) == TokenLayout("NLC", 1, 24, 8, (4, 6))
    assert layout_of((29, 8), image=(96, 64), num_prefix_tokens=5) == TokenLayout("NLC", 5, 24, 8, (6, 4))


def test_of_several_streams_the_last_one_counts() -> None:
    assert layout_of([(64, 8), (16, 32)], [(8, 8, 8), (32, 4, 4)]) == TokenLayout("NLC", 0, 16, 32, (4, 4))
    assert layout_of([(8, 64), (32, 16)], (32, 4, 4)) == TokenLayout("NCL", 0, 16, 32, (4, 4))


def test_class_tokens_alone_give_way_to_the_intermediate_map() -> None:
    expected = TokenLayout("NCHW", 0, 24, 8, (4, 6), "forward_intermediates")
    assert layout_of((1, 8), (8, 4, 6)) == layout_of((2, 8), (8, 4, 6)) == expected


@pytest.mark.parametrize(
    ("features", "intermediate", "attributes"),
    [
        pytest.param((8,), None, {}, id="pooled"),
        pytest.param((8,), (8, 4, 4), {}, id="pooled, with an intermediate map"),
        pytest.param((1, 8), None, {}, id="class token alone"),
        pytest.param((2, 8), None, {}, id="two class tokens alone"),
        pytest.param((24, 8), None, {}, id="not the image's aspect ratio"),
        pytest.param((20, 8), None, {}, id="more than class tokens beside a grid"),
        pytest.param((17, 8), None, {"num_prefix_tokens": 0}, id="not the prefix declared, without a map"),
        pytest.param((17, 8), (8, 4, 4), {"num_prefix_tokens": 2}, id="not the prefix declared"),
        pytest.param((4, 8), (8, 4, 4), {}, id="fewer tokens, and no word that they are merged"),
        pytest.param((33, 8), (8, 4, 4), {}, id="too many in front"),
        pytest.param((4, 4, 4), None, {"num_features": 4}, id="a cube"),
        pytest.param((8, 4, 4), None, {}, id="a map of unknown width"),
    ],
)
def test_a_result_without_a_certain_grid_is_refused(features: Any, intermediate: Any, attributes: Any) -> None:
    with pytest.raises(ValueError, match=r"Returning.forward_features does not return a grid of tokens"):
        layout_of(features, intermediate, **attributes)


def test_a_result_that_is_no_tensor_with_the_batch_first_is_refused() -> None:
    class Swapped(Returning):
        def forward_features(self, images: Tensor) -> Any:
            return images.new_zeros(16, len(images), 8)

    class Named(Returning):
        def forward_features(self, images: Tensor) -> Any:
            return {"features": images}

    with pytest.raises(ValueError, match=r"must return a tensor with the batch first, got \(16, 2, 8\) for 2 images"):
        find_layout(Swapped(()), (3, 64, 64))
    with pytest.raises(ValueError, match="must return a tensor with the batch first, got dict for 2 images"):
        find_layout(Named(()), (3, 64, 64))


def test_finding_the_layout_leaves_the_model_alone() -> None:
    backbone = BACKBONES["nfnet"]().train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    find_layout(backbone, (3, 160, 160))
    assert backbone.training
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


# ---------------------------------------------------------------- any module


def make_vit() -> nn.Module:
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=64)
    return ViTModel(config, add_pooling_layer=False)


def make_clip() -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=64, patch_size=16))


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, kernel_size=16, stride=16)

    def forward(self, images: Tensor) -> Tensor:
        return self.convolution(images).flatten(2).transpose(1, 2)


ANY_MODULE: dict[str, tuple[Callable[[], nn.Module], Literal["tokens", "map"], int]] = {
    "tokens": (Patches, "tokens", 0),
    "map": (lambda: nn.Sequential(nn.Conv2d(3, 8, kernel_size=16, stride=16), nn.BatchNorm2d(8)), "map", 0),
    "map without parameters": (lambda: nn.AvgPool2d(16), "map", 0),
    "vit of transformers": (make_vit, "tokens", 1),
    "clip of transformers": (make_clip, "tokens", 1),
}
every_module = pytest.mark.parametrize("name", ANY_MODULE)


def make_any(name: str) -> VisionEncoder:
    torch.manual_seed(0)
    make, returns, prefix_tokens = ANY_MODULE[name]
    return VisionEncoder(make(), image_size=(64, 64), returns=returns, prefix_tokens=prefix_tokens)


@every_module
def test_any_module_that_says_what_it_returns_gives_tokens_in_their_place(name: str) -> None:
    encoder = make_any(name)
    assert encoder.layout.patches == 16
    assert encoder.layout.grid == ((4, 4) if ANY_MODULE[name][1] == "map" else None)
    assert encoder(random_images(encoder, 2)).shape == (2, 16, encoder.vision_dim)
    assert cell_that_changes_most(encoder, (1, 2), (4, 4)) == (1, 2)
    assert cell_that_changes_most(encoder, (2, 0), (4, 4)) == (2, 0)


@every_module
def test_any_module_is_frozen_for_good(name: str) -> None:
    encoder = make_any(name).train()
    before = {key: value.clone() for key, value in encoder.named_buffers()}
    assert not any(module.training for module in encoder.backbone.modules())
    images = random_images(encoder, 2).requires_grad_()
    assert not encoder(images).requires_grad
    assert all(torch.equal(value, before[key]) for key, value in encoder.named_buffers())


@pytest.mark.parametrize("reads", ["values", "a tensor of its own"])
def test_a_module_that_cannot_run_without_data_is_run_on_zeros(reads: str) -> None:
    class Reading(Patches):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.mean = torch.zeros(3, 1, 1)

        def forward(self, images: Tensor) -> Tensor:
            images = self.norm(images)
            if reads == "values":
                assert images.amax().item() < 100
            else:
                images = images - self.mean
            return super().forward(images)

    backbone = Reading().train()
    layout = find_layout(backbone, (3, 64, 96), returns="tokens")
    assert layout == TokenLayout("NLC", 0, 24, 8, None, "forward")
    assert backbone.training
    assert torch.equal(backbone.norm.running_var, torch.ones(3))  # type: ignore[arg-type]


def test_a_module_that_returns_something_else_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'map' means \(batch, dim, height, width\), but Patches returns \(2, 16, 8\)"
    ):
        VisionEncoder(Patches(), image_size=64, returns="map")
    with pytest.raises(
        ValueError, match=r"'tokens' means \(batch, patches, dim\), but AvgPool2d returns \(2, 3, 4, 4\)"
    ):
        VisionEncoder(nn.AvgPool2d(16), image_size=64, returns="tokens")
    with pytest.raises(ValueError, match="prefix_tokens must be less than the 16 tokens that Patches returns, got 16"):
        VisionEncoder(Patches(), image_size=64, returns="tokens", prefix_tokens=16)
    with pytest.raises(ValueError, match='prefix_tokens is for returns="tokens", got 1'):
        VisionEncoder(nn.AvgPool2d(16), image_size=64, returns="map", prefix_tokens=1)
    with pytest.raises(ValueError, match='prefix_tokens is for returns="tokens", got 1; in timm models they are found'):
        VisionEncoder(BACKBONES["vit"](), prefix_tokens=1)
    with pytest.raises(ValueError, match=r"ViTModel does not take images of size \(3, 48, 48\)"):
        VisionEncoder(make_vit(), image_size=48, returns="tokens")


@pytest.mark.unchecked
def test_an_unknown_kind_of_result_is_refused() -> None:
    with pytest.raises(ValueError, match='returns must be "tokens", "map" or None, got \'pixels\''):
        VisionEncoder(Patches(), image_size=64, returns="pixels")  # type: ignore[arg-type]


# ---------------------------------------------------------------- sizes and dtypes


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "swin_tiny_patch4_window7_224", "pit_ti_224"])
def test_a_model_is_built_for_the_size_asked_for(name: str) -> None:
    encoder = VisionEncoder.from_timm(name, image_size=320)
    assert encoder.image_size == (320, 320)
    height, width = grid_of(encoder)
    assert height == width >= 10
    assert encoder(random_images(encoder)).shape == (1, height * width, encoder.vision_dim)


def test_images_need_not_be_square_or_coloured() -> None:
    encoder = VisionEncoder.from_timm("test_vit", image_size=(64, 96), channels=1)
    assert encoder.layout.grid == (4, 6)
    assert encoder(torch.randn(2, 1, 64, 96)).shape == (2, 24, encoder.vision_dim)


def test_a_size_that_cannot_be_built_may_still_be_taken() -> None:
    with torch.device("meta"):
        assert VisionEncoder.from_timm("mvitv2_tiny", image_size=(224, 288)).layout.grid == (7, 9)


SMALL = {"depth": 1, "embed_dim": 48, "num_heads": 3}


@pytest.mark.parametrize(
    ("name", "model_args", "image_size", "message"),
    [
        ("halonet26t", {}, 320, "halonet26t does not take images of 320x320; it takes 256x256$"),
        ("efficientformer_l1", {"depths": (1, 1, 1, 1)}, 320, "l1 does not take images of 320x320; it takes 224x224: "),
        (
            "vit_so400m_patch14_siglip_gap_896",
            SMALL,
            320,
            "it takes 308x308, 322x322 and 896x896: its patches of 14x14",
        ),
        ("eva02_tiny_patch14_224", SMALL, (224, 320), "takes 224x224, 224x308 and 224x322: its patches of 14x14"),
    ],
)
def test_a_size_that_is_not_taken_is_refused_with_sizes_that_are(
    name: str, model_args: dict[str, Any], image_size: Any, message: str
) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        VisionEncoder.from_timm(name, image_size=image_size, model_args=model_args)


def test_a_model_that_is_built_already_is_refused_with_the_sizes_that_it_takes() -> None:
    with pytest.raises(ValueError, match="Eva does not take images of 64x64; it takes 224x224: Input height"):
        VisionEncoder(BACKBONES["eva02"](), image_size=64)


def test_patches_that_leave_out_a_border_are_refused_unless_the_model_was_made_so() -> None:
    message = "takes 308x308, 322x322 and 518x518: its patches of 14x14 would leave out a border"
    with pytest.raises(ValueError, match=message):
        VisionEncoder.from_timm("vit_small_patch14_dinov2", image_size=320, model_args=SMALL)
    made_so = VisionEncoder.from_timm("vit_so400m_patch14_siglip_384", image_size=384, model_args=SMALL)
    assert made_so.layout.grid == (27, 27)


@pytest.mark.parametrize("image_size", [None, 64])
def test_an_error_that_is_not_the_sizes_is_passed_on(image_size: int | None) -> None:
    with pytest.raises(RuntimeError, match="Unknown model"):
        VisionEncoder.from_timm("resnet1800", image_size=image_size)
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        VisionEncoder.from_timm("test_resnet", image_size=image_size, model_args={"widht": 2})
    missing = {"pretrained_cfg_overlay": {"file": "missing.safetensors"}}
    with pytest.raises(FileNotFoundError):
        VisionEncoder.from_timm("test_resnet", pretrained=True, image_size=image_size, model_args=missing)


@pytest.mark.parametrize("name, prefix", [("vit", 1), ("eva02", 1), ("siglip", 0), ("convnext", 0)])
def test_prefix_tokens_can_be_kept_in_front(name: str, prefix: int) -> None:
    backbone = make_encoder(name).backbone
    without, kept = VisionEncoder(backbone), VisionEncoder(backbone, keep_prefix_tokens=True)
    images = random_images(without, 2)
    tokens = kept(images)
    assert tokens.shape[1] == kept.layout.patches == without.layout.patches + prefix
    assert torch.equal(tokens[:, prefix:], without(images))


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_the_final_norm_can_be_left_out_and_the_backbone_stays_what_it_is(name: str) -> None:
    backbone: Any = make_encoder(name).backbone
    nn.init.normal_(backbone.norm.weight)
    normed = VisionEncoder(backbone, keep_prefix_tokens=True)
    images = random_images(normed, 2)
    expected, names = normed(images), list(backbone.state_dict())
    raw = VisionEncoder(backbone, keep_prefix_tokens=True, final_norm=False)
    assert not torch.allclose(raw(images), expected)
    torch.testing.assert_close(backbone.norm(raw(images)), expected)
    patches = VisionEncoder(backbone, final_norm=False)
    assert torch.equal(patches(images), raw(images)[:, -patches.layout.patches :])
    assert torch.equal(normed(images), expected)
    assert list(backbone.state_dict()) == names
    raw.unfreeze()
    raw(images).sum().backward()
    assert not any(p.requires_grad for p in backbone.norm.parameters()), "it would have no gradient"
    assert all(p.grad is not None for p in backbone.blocks.parameters())


@pytest.mark.parametrize("name", ["resnet", "convnext", "swin", "crossvit", "pit"])
def test_a_backbone_without_tokens_before_a_final_norm_is_refused(name: str) -> None:
    backbone = make_encoder(name).backbone
    with pytest.raises(ValueError, match="cannot give tokens before its final norm, leave out final_norm=False"):
        VisionEncoder(backbone, final_norm=False)


def test_the_dtype_of_tokens_is_the_backbones_or_the_one_asked_for() -> None:
    images = torch.randn(1, 3, 160, 160)
    assert VisionEncoder(BACKBONES["vit"]().bfloat16())(images).dtype == torch.bfloat16
    encoder = VisionEncoder(BACKBONES["vit"]().bfloat16(), output_dtype=torch.float32)
    assert encoder(images).dtype == torch.float32


def test_nan_is_passed_on() -> None:
    encoder = make_encoder("vit")
    nn.init.constant_(encoder.backbone.norm.weight, torch.nan)
    assert encoder(random_images(encoder)).isnan().all()


def test_bad_input_is_refused() -> None:
    encoder = make_encoder("vit")
    with pytest.raises(ValueError, match=r"images must have shape \(media, 3, 160, 160\), got \(1, 3, 64, 160\)"):
        encoder(torch.zeros(1, 3, 64, 160))
    with pytest.raises(
        ValueError, match=r'Linear has no forward_features, so it is no timm model; say .* returns="tokens"'
    ):
        VisionEncoder(nn.Linear(2, 2), image_size=32)
    with pytest.raises(ValueError, match="Linear does not say for which size it was made; give image_size"):
        VisionEncoder(nn.Linear(2, 2))


@pytest.mark.unchecked
def test_a_wrong_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images must have shape .* got \(3, 160, 160\)"):
        make_encoder("vit")(torch.zeros(3, 160, 160))


@pytest.mark.unchecked
@pytest.mark.parametrize("name", ["pit", "crossvit"])
def test_encoding_compiles_to_one_graph(name: str) -> None:
    encoder = make_encoder(name)
    compiled: Any = torch.compile(encoder, fullgraph=True, backend="eager")
    images = random_images(encoder)
    torch.testing.assert_close(compiled(images), encoder(images))


@pytest.mark.unchecked
@every_module
def test_encoding_with_any_module_compiles_to_one_graph(name: str) -> None:
    encoder = make_any(name)
    compiled: Any = torch.compile(encoder, fullgraph=True, backend="eager")
    images = random_images(encoder)
    torch.testing.assert_close(compiled(images), encoder(images))

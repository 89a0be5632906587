"""Names and numbers of a configuration become modules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flamingo_blocks import FlamingoForConditionalGeneration
from flamingo_blocks.blocks import FeedForward, SquaredReLU, SwiGLU
from flamingo_blocks.parts import make_block, make_resampler
from tests.tiny_flamingo import Prompt, make_flamingo

SIZES: dict[str, Any] = {"dim": 8, "media_dim": 6, "heads": 2}


@pytest.mark.parametrize("name, kind", [("squared_relu", SquaredReLU), ("gelu", nn.GELU), ("relu", nn.ReLU)])
def test_activations(name: Any, kind: type[nn.Module]) -> None:
    for network in (
        make_block(**SIZES, activation=name, hidden=5).feed_forward,
        make_resampler(dim=8, vision_dim=8, heads=2, activation=name, hidden=5).layers[0].feed_forward,
        make_resampler("mlp", dim=8, vision_dim=8, activation=name, hidden=5).feed_forward,
    ):
        assert type(network) is FeedForward
        assert type(network.activation) is kind
        assert network.to_hidden.out_features == 5


def test_swiglu_is_a_network_of_its_own() -> None:
    block = make_block(**SIZES, activation="swiglu", hidden=5)
    assert type(block.feed_forward) is SwiGLU
    assert block.feed_forward.to_gate.out_features == 5


@pytest.mark.parametrize("name, kind", [("layer_norm", nn.LayerNorm), ("rms_norm", nn.RMSNorm)])
def test_norms(name: Any, kind: type[nn.Module]) -> None:
    block = make_block(**SIZES, norm=name, norm_eps=1e-3, qk_norm=True)
    norms: list[Any] = [block.norm, block.norm_feed_forward, block.q_norm, block.k_norm]
    assert all(type(norm) is kind and norm.eps == 1e-3 for norm in norms)
    assert [norm.normalized_shape[0] for norm in norms] == [8, 8, 4, 4]
    assert type(make_block(**SIZES, norm=name).q_norm) is nn.Identity


def test_a_perceiver_normalises_queries_and_keys_if_asked_to() -> None:
    for asked, kind in ((True, nn.LayerNorm), (False, nn.Identity)):
        layer = make_resampler(dim=8, vision_dim=8, heads=2, qk_norm=asked).layers[0]
        assert type(layer.q_norm) is type(layer.k_norm) is kind


@pytest.mark.parametrize(
    "options, message",
    [
        ({"activation": "swish"}, "activation must be squared_relu, gelu, relu or swiglu, got 'swish'"),
        ({"norm": "batch_norm"}, "norm must be layer_norm or rms_norm, got 'batch_norm'"),
    ],
)
@pytest.mark.unchecked
def test_unknown_names_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_block(**SIZES, **options)


@pytest.mark.unchecked
def test_unknown_resamplers_are_refused() -> None:
    kind: Any = "pool"
    with pytest.raises(
        ValueError, match="resampler must be perceiver, mlp, transformer, mean_pool or linear, got 'pool'"
    ):
        make_resampler(kind, dim=8, vision_dim=8)


def test_what_a_configuration_says_is_built_saved_and_loaded(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "cross_attention_activation": "swiglu",
        "cross_attention_norm": "rms_norm",
        "cross_attention_norm_eps": 1e-3,
        "cross_attention_qk_norm": True,
        "feed_forward_without_media": False,
        "resampler_activation": "gelu",
        "resampler_qk_norm": True,
        "max_frames": 0,
    }
    model, _ = make_flamingo(**options)
    block, layer = model.injector.blocks["0"], model.resampler.layers[0]
    assert type(block.feed_forward) is SwiGLU
    assert type(block.norm) is type(block.k_norm) is nn.RMSNorm
    assert block.norm.eps == 1e-3
    assert not block.feed_forward_without_media
    assert type(layer.feed_forward.activation) is nn.GELU
    assert type(layer.q_norm) is nn.LayerNorm
    assert model.resampler.features.temporal_embeddings is None
    model.save_pretrained(tmp_path)
    again = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    inputs = Prompt.make(model).inputs
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)

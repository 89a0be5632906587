from typing import Any

import pytest
import torch
from torch import nn

from flamingo_blocks import GatedCrossAttentionBlock, PerceiverResampler, parameter_groups
from flamingo_blocks.blocks import SwiGLU, TransformerResampler
from tests.tiny_flamingo import VISION, make_flamingo
from tests.tiny_language_models import CONFIGS


def names(model: nn.Module, **options: Any) -> tuple[set[str], set[str]]:
    """Names of the parameters with and without weight decay; every trained one must be in one group, once."""
    groups = parameter_groups(model, **options)
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [[of[id(parameter)] for parameter in group["params"]] for group in groups]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(found[0] + found[1]) == sorted(trained)
    assert len(found) == 2
    return set(found[0]), set(found[1])


def test_only_the_blocks_matrices_decay() -> None:
    model, _ = make_flamingo()
    decayed, others = names(model)
    matrices = ("to_q", "to_kv", "to_out", "feed_forward.to_hidden", "feed_forward.to_out")
    assert decayed == {f"injector.blocks.{i}.{matrix}.weight" for i in range(3) for matrix in matrices}
    for kind in ("gate.alpha", "gate_feed_forward.alpha", "norm.weight", "norm_feed_forward.bias"):
        assert f"injector.blocks.0.{kind}" in others
    for name in ("new_tokens.embeddings.weight", "new_tokens.head.weight", "resampler.latents"):
        assert name in others
    assert {name for name, _ in model.resampler.named_parameters(prefix="resampler")} < others


def test_the_groups_have_the_weight_decay_asked_for_and_the_models_order() -> None:
    model, _ = make_flamingo()
    assert [group["weight_decay"] for group in parameter_groups(model)] == [0.1, 0.0]
    assert [group["weight_decay"] for group in parameter_groups(model, weight_decay=0.3)] == [0.3, 0.0]
    order = [id(parameter) for parameter in model.parameters()]
    for group in parameter_groups(model):
        places = [order.index(id(parameter)) for parameter in group["params"]]
        assert places == sorted(places)
        assert places


@pytest.mark.parametrize("gating", ["tanh", "tanh_per_channel", "none"])
@pytest.mark.parametrize("resampler", ["perceiver", "mlp", "transformer", "mean_pool", "linear"])
def test_no_ablation_lets_a_gate_or_a_resampler_decay(gating: Any, resampler: Any) -> None:
    model, _ = make_flamingo(gating=gating, resampler=resampler)
    decayed, _ = names(model)
    assert all(name.startswith("injector.blocks") and name.endswith("weight") for name in decayed)
    assert all("norm" not in name.split(".")[-2] for name in decayed)


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_of_an_unfrozen_language_model_do_not_decay_nor_does_a_tied_head(name: str) -> None:
    model, _ = make_flamingo(name, freeze=("vision_encoder",))
    decayed, others = names(model.language_model)
    embedding, head = (m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    of = {id(parameter): key for key, parameter in model.language_model.named_parameters()}
    assert of[id(embedding)] in others
    assert (of[id(head)] in others) == (head is embedding)
    assert all(model.language_model.get_parameter(key).ndim > 1 for key in decayed)
    assert any(key.rsplit(".", 1)[0].endswith(("down_proj", "fc2", "c_proj", "4h_to_h", "out_proj")) for key in decayed)


@pytest.mark.parametrize("vision", VISION)
def test_an_unfrozen_vision_encoder_decays_as_timm_has_it(vision: str) -> None:
    model, _ = make_flamingo(vision=vision, freeze=("language_model",))
    backbone: Any = model.vision_encoder.backbone
    decayed, _ = names(backbone)
    assert decayed
    assert not decayed & set(backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ())
    assert all(backbone.get_parameter(key).ndim > 1 for key in decayed)
    assert not any(key.endswith(("bias", "gain", "gamma", "pos_embed", "cls_token", "bias_table")) for key in decayed)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda model: nn.Sequential(nn.Sequential(model))])
def test_wrappers_change_names_but_no_group(wrap: Any) -> None:
    model, _ = make_flamingo()
    expected, found = parameter_groups(model), parameter_groups(wrap(model))
    for first, second in zip(expected, found, strict=True):
        assert [id(p) for p in first["params"]] == [id(p) for p in second["params"]]


def test_single_blocks_have_groups_too() -> None:
    block = GatedCrossAttentionBlock(dim=8, media_dim=8, heads=2, qk_norm=nn.RMSNorm, feed_forward=SwiGLU)
    decayed, _ = names(block)
    feed_forward = {f"feed_forward.{name}.weight" for name in ("to_gate", "to_hidden", "to_out")}
    assert decayed == {"to_q.weight", "to_kv.weight", "to_out.weight", *feed_forward}
    assert names(PerceiverResampler(dim=8, heads=2, depth=1))[0] == set()
    assert names(TransformerResampler(dim=8, heads=2, depth=1))[0] == set()


def test_what_is_frozen_is_in_no_group_and_nothing_trained_is_an_error() -> None:
    model, _ = make_flamingo()
    model.injector.requires_grad_(False)
    assert not any(name.startswith("injector") for group in names(model) for name in group)
    with pytest.raises(ValueError, match="no parameter that is trained"):
        parameter_groups(model.requires_grad_(False))


def test_an_optimizer_shrinks_the_decayed_and_no_other() -> None:
    model, _ = make_flamingo()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    decayed, _ = names(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if name in decayed else 1.0))

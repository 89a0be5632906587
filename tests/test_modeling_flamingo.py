import copy
import dataclasses
import io
import itertools
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import DynamicCache

from flamingo_blocks import FlamingoForConditionalGeneration, MediaCache, VisionEncoder, media_ranges
from flamingo_blocks.blocks import (
    LinearResampler,
    MeanPoolResampler,
    MLPResampler,
    PerceiverResampler,
    TransformerResampler,
    dense_media_mask,
    ranges_of_mask,
)
from flamingo_blocks.configuration_flamingo import CACHE_NAMES
from tests.tiny_flamingo import VISION, Prompt, make_flamingo, make_tokenizer
from tests.tiny_language_models import CONFIGS, VOCAB, make_lm
from tests.tiny_videos import write_video

every_lm = pytest.mark.parametrize("name", CONFIGS)
# Every language model and every backbone at least once; each with each in the long run.
PAIRS = [*zip(CONFIGS, [*VISION, "vit"], strict=True), ("gpt2", "swin"), ("qwen3", "nfnet")]
if os.environ.get("HYPOTHESIS_PROFILE") == "long":
    PAIRS = list(itertools.product(CONFIGS, VISION))
every_pair = pytest.mark.parametrize(("lm", "vision"), PAIRS)
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def cache_of(output: Any) -> Any:
    """Get the language model's cache, whose name depends on the version of transformers."""
    return next(output[name] for name in CACHE_NAMES if name in output)


# ---------------------------------------------------------------- gate zero


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_zero_is_the_base_lm_bit_for_bit(lm: str, vision: str, dtype: torch.dtype) -> None:
    model, _ = make_flamingo(lm, vision, open_gates=False, dtype=dtype, image_token_is_new=False)
    base, prompt = make_lm(lm, dtype=dtype).requires_grad_(False), Prompt.make(model)
    expected = base(prompt.input_ids, output_hidden_states=True)
    output = model(**prompt.inputs, output_hidden_states=True)
    assert output.logits.shape[-1] == VOCAB + 1
    assert torch.equal(output.logits[..., :VOCAB], expected.logits)
    assert all(map(torch.equal, output.hidden_states, expected.hidden_states))


@every_pair
def test_gate_zero_generates_what_the_base_lm_generates(lm: str, vision: str) -> None:
    model, _ = make_flamingo(lm, vision, open_gates=False, image_token_is_new=False)
    base, prompt = make_lm(lm).requires_grad_(False), Prompt.make(model)
    mask = torch.ones_like(prompt.input_ids)
    # Two tokens more than the processor would need, to see them go different ways if they can.
    options = {**GREEDY, "max_new_tokens": 7, "suppress_tokens": None}
    expected = base.generate(prompt.input_ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(**prompt.inputs, **options), expected)


@every_lm
def test_text_alone_is_the_base_lms(name: str) -> None:
    model, _ = make_flamingo(name, open_gates=False)
    base = make_lm(name).requires_grad_(False)
    input_ids = torch.randint(10, VOCAB, (2, 7))
    mask = torch.ones_like(input_ids)
    mask[0, :2] = 0
    output, expected = model(input_ids, attention_mask=mask), base(input_ids, attention_mask=mask)
    assert torch.equal(output.logits[..., :VOCAB], expected.logits)
    mask.fill_(1)
    generated = model.generate(input_ids, attention_mask=mask, **GREEDY)
    assert torch.equal(generated, base.generate(input_ids, attention_mask=mask, **GREEDY))


# ---------------------------------------------------------------- open gates


@every_pair
def test_open_gates_make_the_images_matter_from_their_token_on(lm: str, vision: str) -> None:
    model, _ = make_flamingo(lm, vision)
    prompt = Prompt.make(model)
    with torch.no_grad():
        before = model(**prompt.inputs).logits
        prompt.pixel_values[0, 1, 0] += 1
        after = model(**prompt.inputs).logits
    changed = (before - after).abs().amax(-1) > 1e-6
    assert changed[0].tolist() == [False] * 4 + [True] * 4
    assert not changed[1].any()


@every_pair
def test_cached_decoding_equals_the_full_forward(lm: str, vision: str) -> None:
    model, _ = make_flamingo(lm, vision)
    prompt = Prompt.make(model)
    output = model.generate(
        **prompt.inputs, **GREEDY, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    full = model(output.sequences, prompt.pixel_values, prompt.num_frames, use_cache=False).logits
    torch.testing.assert_close(torch.stack(output.logits, 1), full[:, 7:-1], atol=2e-5, rtol=1e-5)
    uncached = model.generate(**prompt.inputs, **GREEDY, eos_token_id=None, use_cache=False)
    assert torch.equal(uncached, output.sequences)


@every_lm
def test_a_padded_row_equals_the_unpadded_row(name: str) -> None:
    model, _ = make_flamingo(name)
    prompt = Prompt.make(model)
    inputs = prompt.inputs
    # Row 1 is three tokens shorter than row 0.
    inputs["input_ids"][1, 5:] = 2
    for side in ("right", "left"):
        shift = 3 if side == "left" else 0
        input_ids, mask = inputs["input_ids"].clone(), torch.ones_like(inputs["input_ids"])
        input_ids[1] = input_ids[1].roll(shift)
        mask[1] = torch.cat([torch.zeros(3), torch.ones(5)] if shift else [torch.ones(5), torch.zeros(3)])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            together = model(**{**inputs, "input_ids": input_ids, "attention_mask": mask}, position_ids=positions)
            alone = model(prompt.input_ids[1:, :5], prompt.pixel_values[1:, :1, :1])
        torch.testing.assert_close(together.logits[1, shift : 5 + shift], alone.logits[0], atol=2e-5, rtol=1e-5)
    generated = model.generate(**{**inputs, "input_ids": input_ids, "attention_mask": mask}, **GREEDY)
    row = prompt.row(1)
    expected = model.generate(row.input_ids[:, :5], pixel_values=row.pixel_values, num_frames=row.num_frames, **GREEDY)
    assert torch.equal(generated[1, 8 : 8 + expected.shape[1] - 5], expected[0, 5:])


def test_rows_are_independent_also_those_without_media() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    prompt.input_ids[1, 3] = 7
    prompt.num_frames[1] = 0
    with torch.no_grad():
        together = model(**prompt.inputs).logits
        torch.testing.assert_close(model(prompt.input_ids[1:]).logits, together[1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(**prompt.row(0).inputs).logits, together[:1], atol=1e-5, rtol=1e-5)


def test_the_papers_30_frames_of_a_file_get_interpolated_temporal_embeddings(tmp_path: Path) -> None:
    model, processor = make_flamingo("llama")
    path = write_video(tmp_path / "video.mkv", 120)
    inputs = processor(text="<image> w20 w21", videos=path, fps=3, max_frames=30)
    assert inputs["num_frames"].tolist() == [[30]]
    name = "resampler.features.temporal_embeddings"
    state = model.state_dict()
    learned = F.interpolate(state[name].T[None], size=30, mode="linear", align_corners=True)[0].T
    longer, _ = make_flamingo("llama", max_frames=30)
    longer.load_state_dict(state | {name: learned})
    torch.testing.assert_close(model(**inputs).logits, longer(**inputs).logits)
    longer.load_state_dict(state | {name: learned.flip(0)})
    assert not torch.allclose(model(**inputs).logits, longer(**inputs).logits), "they matter"


def test_padding_frames_and_media_are_not_encoded_and_may_hold_anything() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    expected = model(**prompt.inputs).logits
    encoded: list[int] = []
    model.vision_encoder.register_forward_pre_hook(lambda _, images: encoded.append(len(images[0])))
    prompt.pixel_values[0, 0, 1] = prompt.pixel_values[1, 0, 1] = prompt.pixel_values[1, 1] = torch.nan
    assert torch.equal(model(**prompt.inputs).logits, expected)
    assert encoded == [4], "1 + 2 frames in the first row, 1 in the second"
    padded = torch.cat([prompt.pixel_values, prompt.pixel_values[:, :1]], dim=1)
    num_frames = F.pad(prompt.num_frames, (0, 1))
    torch.testing.assert_close(model(prompt.input_ids, padded, num_frames).logits, expected)


def test_features_in_place_of_pixels_give_the_same() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    features = model.vision_encoder(prompt.pixel_values.flatten(0, 2)).unflatten(0, (2, 2, 2))
    output = model(prompt.input_ids, vision_features=features, num_frames=prompt.num_frames)
    torch.testing.assert_close(output.logits, model(**prompt.inputs).logits)


@pytest.mark.parametrize("attend", ["last", "all_previous", "next"])
def test_the_configured_rule_decides_what_a_token_sees(attend: Any) -> None:
    model, _ = make_flamingo(attend=attend)
    prompt = Prompt.make(model)
    ranges = media_ranges(prompt.is_image, attend=attend)
    with torch.no_grad():
        implicit = model(**prompt.inputs, use_cache=False).logits
        torch.testing.assert_close(model(**prompt.inputs, use_cache=True).logits, implicit)
        torch.testing.assert_close(model(**prompt.inputs, media_ranges=ranges).logits, implicit)
        nothing = model(**prompt.inputs, media_ranges=torch.zeros_like(ranges), use_cache=False).logits
    assert not torch.allclose(nothing, implicit)


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_documents_do_not_see_each_others_media(use_cache: bool) -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    document_ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]])
    ranges = media_ranges(prompt.is_image, document_ids=document_ids)
    output = model(**prompt.inputs, document_ids=document_ids, use_cache=use_cache).logits
    torch.testing.assert_close(output, model(**prompt.inputs, media_ranges=ranges).logits)
    assert not torch.allclose(output, model(**prompt.inputs).logits)


@pytest.mark.parametrize("attend", ["last", "all_previous", "next"])
@pytest.mark.parametrize("use_cache", [False, True, None])
@pytest.mark.parametrize("training", [False, True])
def test_a_mask_that_spells_out_what_the_rule_says_changes_nothing(
    attend: Any, use_cache: bool | None, training: bool
) -> None:
    model, _ = make_flamingo(attend=attend)
    model.train(training)
    prompt = Prompt.make(model)
    mask = dense_media_mask(media_ranges(prompt.is_image, attend=attend), 2)
    output = model(**prompt.inputs, media_mask=mask, use_cache=use_cache)
    expected = model(**prompt.inputs, use_cache=use_cache)
    assert torch.equal(output.logits, expected.logits)
    assert (output.media_cache is None) == (expected.media_cache is None)


def test_the_order_of_media_does_not_matter_under_a_mask() -> None:
    """So a mask that no ranges can say equals ranges over media that were brought together, gradients included."""
    model, _ = make_flamingo(dtype=torch.float64)
    model.double()
    prompt, later = Prompt.make(model), Prompt.make(model, seed=1)
    pixel_values = torch.cat([prompt.pixel_values, later.pixel_values], dim=1).double()
    num_frames = torch.tensor([[2, 1, 1, 2], [1, 2, 1, 0]])
    order = torch.tensor([[2, 0, 3, 1], [2, 0, 1, 3]])
    rows = torch.arange(2)[:, None]
    ranges = torch.tensor([[0, 0], [0, 2], [1, 3], [0, 1], [0, 2], [1, 2], [2, 3], [0, 3]]).expand(2, -1, -1)
    mask = torch.zeros(2, 8, 4, dtype=torch.bool).scatter(
        2, order[:, None].expand(-1, 8, -1), dense_media_mask(ranges, 4)
    )
    with pytest.raises(ValueError, match="at row 0, token 1 it names"):
        ranges_of_mask(mask)

    def run(media: Tensor, frames: Tensor, **seen: Tensor) -> list[Tensor]:
        model.zero_grad()
        output = model(prompt.input_ids, media, frames, labels=prompt.input_ids, **seen)
        output.loss.backward()
        return [output.logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    model.train()
    found = run(pixel_values, num_frames, media_mask=mask)
    expected = run(pixel_values[rows, order], num_frames[rows, order], media_ranges=ranges)
    torch.testing.assert_close(found, expected)
    nn.Module.eval(model)
    with torch.no_grad():
        output = model(prompt.input_ids, pixel_values, num_frames, media_mask=mask)
    torch.testing.assert_close(output.logits, expected[0])
    assert output.media_cache is None


def test_text_in_pieces_with_masks_equals_the_full_forward() -> None:
    """Several media for one `<image>`, as tiles are; a mask counts the media of earlier pieces, too."""
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    prompt.num_frames = torch.tensor([[1, 2], [2, 1]])
    mask = torch.zeros(2, 8, 2, dtype=torch.bool)
    mask[0, 1:6] = mask[1, 3:, 1] = mask[0, 7, 0] = True
    with torch.no_grad():
        full = model(**prompt.inputs, media_mask=mask, use_cache=False).logits
        first = model(prompt.input_ids[:, :4], prompt.pixel_values, prompt.num_frames, media_mask=mask[:, :4])
        caches = {"cache": cache_of(first), "media_cache": first.media_cache}
        second = model(prompt.input_ids[:, 4:], **caches, media_mask=mask[:, 4:])
    found = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(found, full, atol=2e-5, rtol=1e-5)


def test_rows_that_share_media_may_share_a_row_of_the_mask() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    with torch.no_grad():
        first = model(prompt.input_ids[:, :4], prompt.pixel_values[:, :1], prompt.num_frames[:, :1])
        cache = cache_of(first)
        cache.batch_repeat_interleave(2)
        more = torch.tensor([[50, 51], [52, 53], [54, 55], [56, 57]])
        ranges = torch.tensor([[[0, 1], [0, 0]], [[0, 0], [0, 1]]])
        outputs = [
            model(more, cache=copy.deepcopy(cache), media_cache=first.media_cache, **seen).logits
            for seen in ({"media_ranges": ranges}, {"media_mask": dense_media_mask(ranges, 1)})
        ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("use_cache", [False, True])
def test_embeddings_may_stand_for_ids(use_cache: bool) -> None:
    model, _ = make_flamingo(image_token_is_new=False)
    prompt = Prompt.make(model)
    embeddings = model.get_input_embeddings()(prompt.input_ids)
    ranges = media_ranges(prompt.is_image)
    output = model(
        inputs_embeds=embeddings,
        pixel_values=prompt.pixel_values,
        num_frames=prompt.num_frames,
        media_ranges=ranges,
        use_cache=use_cache,
    )
    torch.testing.assert_close(output.logits, model(**prompt.inputs).logits)


# ---------------------------------------------------------------- training


def test_the_loss_is_the_mean_over_the_labels() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    labels = prompt.input_ids.masked_fill(prompt.is_image, -100)
    labels[0, 3] = VOCAB + 1
    output = model(**prompt.inputs, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    over_four = model(**prompt.inputs, labels=labels, num_items_in_batch=4).loss
    torch.testing.assert_close(over_four, expected * (labels[:, 1:] != -100).sum() / 4)


@every_pair
def test_a_training_step_moves_what_is_trained_and_nothing_else(lm: str, vision: str) -> None:
    model, _ = make_flamingo(lm, vision, open_gates=False)
    model.train()
    before = copy.deepcopy(model.state_dict())
    prompt = Prompt.make(model)
    prompt.input_ids[:, -1] = VOCAB + 1
    # Behind closed gates, only the gates and the new tokens move at first: two steps.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(**prompt.inputs, labels=prompt.input_ids).loss.backward()
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert trained(model) == {n for n in before if n.startswith(("resampler", "injector", "new_tokens"))}
    # One temporal embedding a frame of the longest medium, more are never used; all other trained parameters move.
    assert moved == trained(model)


@pytest.mark.parametrize("freeze", [("vision_encoder",), ("language_model",), ()])
def test_parts_that_are_not_frozen_are_trained(freeze: Any) -> None:
    model, _ = make_flamingo(freeze=freeze)
    model.train()
    prompt = Prompt.make(model)
    model(**prompt.inputs, labels=prompt.input_ids).loss.backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert ("language_model.model.layers.0.mlp.up_proj.weight" in gradients) == ("language_model" not in freeze)
    assert ("vision_encoder.backbone.patch_embed.proj.weight" in gradients) == ("vision_encoder" not in freeze)
    assert model.vision_encoder.backbone.training == ("vision_encoder" not in freeze)


@pytest.mark.parametrize("resampler", ["perceiver", "transformer"])
@pytest.mark.parametrize("freeze", [("language_model", "vision_encoder"), ()])
def test_checkpointing_recomputes_every_layer_and_gives_equal_gradients(resampler: Any, freeze: Any) -> None:
    def gradients(*, checkpointed: bool) -> dict[str, Tensor]:
        model: Any = make_flamingo(resampler=resampler, freeze=freeze, resampler_depth=2)[0].double().train()
        if checkpointed:
            # The older name is all that older versions know.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        calls = Counter[nn.Module]()
        layers = [*model.injector.blocks.values(), *model.resampler.layers, *model.language_model.model.layers]
        for layer in layers:  # the attention or the like in it: what is called again has no hooks of its own
            next(layer.children()).register_forward_hook(lambda module, *_: calls.update([module]))
        first, second = Prompt.make(model, seed=0), Prompt.make(model, seed=1)
        losses = [model(**p.inputs, labels=p.input_ids).loss for p in (first, second)]
        sum(losses).backward()
        assert len(calls) == len(layers)
        assert min(calls.values()) >= 4 if checkpointed else set(calls.values()) == {2}
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(checkpointed=False), gradients(checkpointed=True)
    assert expected.keys() == found.keys()
    assert any(name.startswith("vision_encoder") for name in found) == (not freeze)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize(
    ("resampler", "kind", "latents"),
    [
        ("perceiver", PerceiverResampler, 3),
        ("mlp", MLPResampler, 4),
        ("transformer", TransformerResampler, 4),
        ("mean_pool", MeanPoolResampler, 1),
        ("linear", LinearResampler, 4),
    ],
)
def test_every_kind_of_resampler_has_its_place(resampler: Any, kind: Any, latents: int) -> None:
    model, _ = make_flamingo(resampler=resampler)
    assert type(model.resampler) is kind
    prompt = Prompt.make(model)
    assert model.encode_media(prompt.pixel_values, prompt.num_frames).shape == (2, 2, latents, 16)
    model(**prompt.inputs, labels=prompt.input_ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.resampler.parameters())


def test_a_resampler_without_parameters_runs_with_media_and_without() -> None:
    model, _ = make_flamingo(resampler="linear", resampler_dim=64)  # as wide as the features
    prompt = Prompt.make(model)
    assert not list(model.resampler.parameters())
    before = model(**prompt.inputs).logits
    changed = model(**{**prompt.inputs, "pixel_values": prompt.pixel_values + 1}).logits
    assert not torch.allclose(before, changed)
    model.generate(prompt.input_ids.clamp(max=VOCAB - 1), max_new_tokens=2)


@pytest.mark.parametrize("resampler", ["mlp", "transformer", "mean_pool", "linear", "perceiver"])
def test_half_precision_features_meet_a_resampler_without_temporal_embeddings(resampler: Any) -> None:
    model, _ = make_flamingo(resampler=resampler, max_frames=0, resampler_dim=None, dtype=torch.bfloat16)
    model.vision_encoder.to(torch.bfloat16)
    prompt = Prompt.make(model)
    both = model.encode_media(prompt.pixel_values, prompt.num_frames)
    assert both.dtype == torch.float32 or resampler == "linear"  # which has no parameters here
    alone = model.encode_media(prompt.pixel_values[:1, 1:], prompt.num_frames[:1, 1:])
    torch.testing.assert_close(both[0, 1], alone[0, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", [{"keep_prefix_tokens": True}, {"final_norm": False}])
def test_a_vision_encoder_that_is_not_as_configured_is_refused(option: Any) -> None:
    model, _ = make_flamingo()
    encoder = VisionEncoder(model.vision_encoder.backbone, image_size=32, **option)
    language_model = model.eject()
    with pytest.raises(ValueError, match=f"vision_encoder has {next(iter(option))}=.*but config.vision_config says"):
        FlamingoForConditionalGeneration(model.config, language_model=language_model, vision_encoder=encoder)


def test_ranges_over_a_cache_may_not_name_padding() -> None:
    model, _ = make_flamingo()
    prompt, cache, media_cache = Prompt.make(model), DynamicCache(), MediaCache(keep_all=True)
    caches: dict[str, Any] = {model._cache_name: cache, "media_cache": media_cache}
    model(**prompt.inputs, **caches)  # the second row has one medium, and padding
    following = torch.full((2, 1), 11)
    for told in (
        {"media_ranges": torch.tensor([[[0, 2]], [[0, 2]]])},
        {"media_mask": torch.ones(2, 1, 2, dtype=torch.bool)},
    ):
        with pytest.raises(ValueError, match="row 1 of media_cache holds 1 media, but its tokens are to see"):
            model(following, **caches, **told)
    model(following, **caches, media_ranges=torch.tensor([[[0, 2]], [[0, 1]]]))


def test_text_whose_ranges_are_told_may_come_with_an_empty_cache() -> None:
    model, _ = make_flamingo()
    input_ids, nothing = torch.randint(10, 40, (2, 5)), torch.zeros(2, 5, 2, dtype=torch.long)
    expected = model(input_ids, media_ranges=nothing, use_cache=False).logits
    assert torch.equal(model(input_ids, media_ranges=nothing, media_cache=MediaCache()).logits, expected)
    with pytest.raises(ValueError, match="document_ids tell what tokens see"):
        model(input_ids, media_ranges=nothing, document_ids=torch.zeros(2, 5, dtype=torch.long))


def test_tokens_without_media_can_be_left_to_the_language_model() -> None:
    model, _ = make_flamingo(feed_forward_without_media=False)
    prompt = Prompt.make(model)
    first = int(prompt.is_image[0].int().argmax())
    found = model(**prompt.inputs).logits[0]
    plain = model.eject()(prompt.input_ids.clamp(max=VOCAB - 1)).logits[0]
    assert torch.equal(found[:first, :VOCAB], plain[:first])
    assert not torch.allclose(found[first:, :VOCAB], plain[first:])


def test_without_gates_the_model_does_not_start_as_the_language_model() -> None:
    prompt = Prompt.make(make_flamingo()[0])
    outputs = {}
    for gating in ("tanh", "tanh_per_channel", "none"):
        model, _ = make_flamingo(gating=gating, open_gates=False)
        outputs[gating] = model(**prompt.inputs).logits
        gates = [p for name, p in model.injector.named_parameters() if name.endswith("alpha")]
        assert {gate.numel() for gate in gates} == {"tanh": {1}, "tanh_per_channel": {32}, "none": set()}[gating]
    assert torch.equal(outputs["tanh"], outputs["tanh_per_channel"])
    assert not torch.allclose(outputs["tanh"], outputs["none"])


# ---------------------------------------------------------------- names of the cache


@every_lm
def test_a_cache_goes_by_any_name(name: str) -> None:
    model, _ = make_flamingo(name)
    prompt = Prompt.make(model)
    with torch.no_grad():
        full = model(**prompt.inputs, use_cache=False).logits
        for cache_name in ("cache", "past_key_values", "cache_params"):
            first = model(prompt.input_ids[:, :-1], prompt.pixel_values, prompt.num_frames)
            caches = {cache_name: cache_of(first), "media_cache": first.media_cache}
            last = model(prompt.input_ids[:, -1:], **caches)
            torch.testing.assert_close(last.logits[:, 0], full[:, -1], atol=2e-5, rtol=1e-5)


@every_lm
@pytest.mark.filterwarnings("error::FutureWarning")
def test_no_name_is_used_that_transformers_deprecates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda _, message, *__: messages.append(message))
    model, _ = make_flamingo(name)
    prompt = Prompt.make(model)
    model(**prompt.inputs).to_tuple()
    for beams in (1, 2):
        model.generate(**prompt.inputs, **GREEDY, num_beams=beams)
    assert not [message for message in messages if "deprecated" in message]


@every_lm
def test_the_output_survives_the_copies_that_ddp_and_fsdp_make(name: str) -> None:
    model, _ = make_flamingo(name)
    prompt = Prompt.make(model)
    output = model(**prompt.inputs, labels=prompt.input_ids, output_hidden_states=True)
    for copied in (tree_unflatten(*tree_flatten(output)), dataclasses.replace(output)):
        assert type(copied) is type(output)
        assert list(copied) == list(output)
        assert torch.equal(copied.logits, output.logits)
        assert copied.media_cache is output.media_cache


def test_the_older_name_finds_the_cache_in_the_output() -> None:
    model, _ = make_flamingo()
    output = model(**Prompt.make(model).inputs)
    assert output.past_key_values is cache_of(output)
    assert output.past_key_values.get_seq_length() == 8


# ---------------------------------------------------------------- save, load, copy


@pytest.mark.parametrize(
    ("lm", "vision", "dtype"),
    [*((*pair, torch.float32) for pair in PAIRS), *((*pair, torch.bfloat16) for pair in PAIRS[-2:])],
)
def test_save_and_load_give_the_same_bits_and_the_same_frozen_set(
    lm: str, vision: str, dtype: torch.dtype, tmp_path: Any
) -> None:
    model, _ = make_flamingo(lm, vision, dtype=dtype)
    prompt = Prompt.make(model)
    model.save_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert {n: (t.dtype, t.shape) for n, t in loaded.state_dict().items()} == {
        n: (t.dtype, t.shape) for n, t in model.state_dict().items()
    }
    assert torch.equal(loaded(**prompt.inputs).logits, model(**prompt.inputs).logits)
    assert trained(loaded) == trained(model)
    assert not loaded.vision_encoder.backbone.training
    found = loaded.config.to_dict()
    for name, value in model.config.to_dict().items():
        if name not in ("text_config", "vision_config", "_name_or_path"):  # they tell where they came from
            assert found[name] == value, name
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert torch.equal(loaded.generate(**prompt.inputs, **GREEDY), model.generate(**prompt.inputs, **GREEDY))


def test_what_was_trained_is_trained_again_after_loading(tmp_path: Any) -> None:
    model, _ = make_flamingo(freeze=())
    model.save_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert trained(loaded) == trained(model) == set(dict(model.named_parameters()))


def test_dtype_of_loading_is_the_language_models_and_the_frozen_encoders(tmp_path: Any) -> None:
    model, _ = make_flamingo()
    model.save_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.language_model.dtype == loaded.dtype == torch.bfloat16
    assert next(loaded.vision_encoder.parameters()).dtype == torch.bfloat16
    assert next(loaded.injector.parameters()).dtype == torch.float32
    model.injector.bfloat16()
    with pytest.raises(ValueError, match=r"must be of one dtype to be saved, got torch\.bfloat16, torch\.float32"):
        model.save_pretrained(tmp_path)


def test_a_configuration_may_serve_several_language_models() -> None:
    model, _ = make_flamingo()
    config = copy.deepcopy(model.config)
    before = config.to_dict()
    for _ in range(2):
        other = FlamingoForConditionalGeneration(config, language_model=make_lm("llama"))
        assert other.config.text_config is other.language_model.config
    assert config.to_dict() == before


def test_a_backbone_that_timm_cannot_name_is_passed_again(tmp_path: Any) -> None:
    from timm.models.nfnet import NfCfg, NormFreeNet

    def backbone() -> nn.Module:
        return NormFreeNet(
            NfCfg(depths=(1, 1, 1, 1), channels=(8, 8, 8, 16), stem_chs=8, num_features=0), num_classes=0
        )

    tokenizer, lm = make_tokenizer(), make_lm("llama")
    from flamingo_blocks import build_flamingo

    model, _ = build_flamingo(
        lm, VisionEncoder(backbone(), image_size=32), tokenizer=tokenizer, resampler_depth=1, resampler_heads=2
    )
    assert model.config.vision_config.architecture is None  # type: ignore[union-attr]
    model.save_pretrained(tmp_path)
    prompt = Prompt.make(model)
    with pytest.raises(ValueError, match="timm cannot make by name; make one yourself and pass it as vision_encoder="):
        FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(
        tmp_path, vision_encoder=VisionEncoder(backbone(), image_size=32)
    )
    assert torch.equal(loaded(**prompt.inputs).logits, model(**prompt.inputs).logits)


def test_a_backbone_that_is_passed_keeps_the_buffers_that_no_file_holds(tmp_path: Any) -> None:
    model, _ = make_flamingo("llama", "swin")
    model.save_pretrained(tmp_path)
    prompt = Prompt.make(model)
    loaded = FlamingoForConditionalGeneration.from_pretrained(
        tmp_path, vision_encoder=copy.deepcopy(model.vision_encoder)
    )
    assert torch.equal(loaded(**prompt.inputs).logits, model(**prompt.inputs).logits)
    with pytest.raises(ValueError, match="language_model cannot be passed to from_pretrained"):
        FlamingoForConditionalGeneration.from_pretrained(tmp_path, language_model=make_lm("llama"))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_whole_and_separate(how: str) -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    expected = model(**prompt.inputs).logits
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(other(**prompt.inputs).logits, expected)


def test_the_language_model_is_itself_outside_of_the_model() -> None:
    model, _ = make_flamingo()
    base = make_lm("llama").requires_grad_(False)
    input_ids = torch.randint(10, VOCAB, (2, 7))
    assert torch.equal(model.language_model(input_ids).logits, base(input_ids).logits)
    assert list(model.language_model.state_dict()) == list(base.state_dict())


@every_lm
def test_eject_gives_the_language_model_back(name: str) -> None:
    model, _ = make_flamingo(name)
    prompt = Prompt.make(model)
    inside = model(**prompt.inputs).logits
    lm, base = model.eject(), make_lm(name).requires_grad_(False)
    assert lm is model.language_model
    for module, other in zip(lm.modules(), base.modules(), strict=True):
        assert type(module) is type(other)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            assert not getattr(module, hooks)
    input_ids = torch.randint(10, VOCAB, (2, 7))
    assert torch.equal(lm(input_ids).logits, base(input_ids).logits)
    again: Any = FlamingoForConditionalGeneration(model.config, language_model=lm, vision_encoder=model.vision_encoder)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(**prompt.inputs).logits, inside)


# ---------------------------------------------------------------- what people look at


def test_the_summary_tells_parts_counts_and_layers() -> None:
    model, _ = make_flamingo(cross_attention_every=2)
    summary = model.summary()
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    last = next(line for line in summary.splitlines() if line.startswith("total"))
    assert f"{total:,}" in last
    assert f"{frozen:,}" in last
    assert "blocks before 2 of 3 decoder layers (model.layers): 0, 2" in summary
    assert "32x32 to 2x2 patches of 64 features" in summary
    assert "attention over media: dense for 256 tokens and 5 images, dense for the next token" in summary, "it is tiny"
    assert max(map(len, summary.splitlines())) <= 120
    assert len(repr(model)) < 300
    assert "LlamaForCausalLM" in repr(model)
    larger, _ = make_flamingo(num_latents=64)
    assert "attention over media: loop for 256 tokens and 5 images, dense for the next token" in larger.summary()
    for block in larger.injector.blocks.values():
        block.algorithm = "tiles"  # type: ignore[assignment]
    assert "attention over media: tiles for 256 tokens" in larger.summary()


# ---------------------------------------------------------------- bad input


def test_counts_of_image_tokens_and_media_that_differ_name_the_row() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    prompt.input_ids[1, 3] = 7
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="row 1 has 0 <image> tokens but 1 media"):
            call(**prompt.inputs)
        with pytest.raises(ValueError, match="row 0 has 2 <image> tokens but 0 media"):
            call(input_ids=prompt.input_ids)
    with pytest.raises(ValueError, match="row 0 has 2 <image> tokens but 0 media"):
        model(prompt.input_ids, use_cache=False)


@pytest.mark.parametrize(
    ("num_frames", "message"),
    [
        ([[3, 1], [1, 0]], r"num_frames must be in 0\.\.2, the frames there are"),
        ([[-1, 1], [1, 0]], r"num_frames must be in 0\.\.2"),
        ([[1, 1], [0, 1]], "padding media, of 0 frames, must come last in their row"),
    ],
)
def test_impossible_numbers_of_frames_are_refused(num_frames: list[list[int]], message: str) -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    prompt.num_frames = torch.tensor(num_frames)
    with pytest.raises(ValueError, match=message):
        model.encode_media(prompt.pixel_values, prompt.num_frames)
    features = torch.zeros(2, 2, 2, 4, 64)
    with pytest.raises(ValueError, match=message):
        model.encode_media(num_frames=prompt.num_frames, vision_features=features)


def test_a_mask_that_no_ranges_can_say_is_kept_in_no_cache() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    media: dict[str, Any] = {"pixel_values": torch.cat([prompt.pixel_values] * 2, dim=1)}
    mask = torch.ones(2, 8, 4, dtype=torch.bool)
    mask[1, 5, 2] = False
    calls: list[dict[str, Any]] = [{"use_cache": True}, {"cache": DynamicCache()}, {"media_cache": MediaCache()}]
    for options in calls:
        with pytest.raises(ValueError, match=r"with caches.*row 1, token 5 it names \[0, 1, 3\].*use_cache=False"):
            model(prompt.input_ids, **media, **options, media_mask=mask)
    with pytest.raises(ValueError, match=r"as in generate.*row 1, token 5 it names \[0, 1, 3\]"):
        model.generate(prompt.input_ids, **media, media_mask=mask)
    ranges = torch.zeros(2, 8, 2, dtype=torch.long)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="give either media_ranges or media_mask"):
            call(prompt.input_ids, **media, media_mask=mask, media_ranges=ranges)


@pytest.mark.parametrize("use_cache", [False, True])
def test_media_that_are_not_there_are_seen_by_nobody(use_cache: bool) -> None:
    """Row 1 has a medium and padding. What is refused leaves a cache as it was."""
    model, _ = make_flamingo()
    prompt, media_cache = Prompt.make(model), MediaCache()
    ranges = torch.tensor([0, 2]).expand(2, 8, 2)
    gaps = torch.tensor([True, False, True]).expand(2, 8, 3)
    options: dict[str, Any] = {"media_cache": media_cache} if use_cache else {"use_cache": False}
    seen: list[dict[str, Any]] = [{"media_ranges": ranges}, {"media_mask": dense_media_mask(ranges, 2)}]
    for each in seen:
        with pytest.raises(ValueError, match="row 1 has 1 media, but its tokens are to see 2"):
            model(**prompt.inputs, **options, **each)
        with pytest.raises(ValueError, match="row 1 has 1 media, but its tokens are to see 2"):
            model.generate(**prompt.inputs, **each)
    assert media_cache.rows == 0
    with pytest.raises(ValueError, match="row 0 has 2 media, but its tokens are to see 3"):
        model(**prompt.inputs, media_mask=gaps)
    with pytest.raises(ValueError, match="row 0 has 0 media, but its tokens are to see 3"):
        model(prompt.input_ids, media_mask=gaps)
    with pytest.raises(ValueError, match="ranges or mask have 1 rows, but there are 2 rows of text"):
        model(**prompt.inputs, use_cache=False, media_ranges=ranges[:1])


def test_only_one_of_the_two_caches_is_an_error() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    cache, media_cache = DynamicCache(), MediaCache()
    text = model.generate(**prompt.inputs, cache=cache, media_cache=media_cache, **GREEDY)
    with pytest.raises(ValueError, match="and media_cache must hold the same earlier text"):
        model.generate(text, cache=cache, **GREEDY)
    with pytest.raises(ValueError, match="and media_cache must hold the same earlier text"):
        model.generate(text, media_cache=media_cache, **GREEDY)
    with pytest.raises(ValueError, match="holds earlier text, but not its media; pass media_cache="):
        model(text[:, -1:], cache=cache)
    with pytest.raises(ValueError, match="media_cache holds the media of earlier text, but that text is in no cache"):
        model(**prompt.inputs, media_cache=media_cache)


def test_calls_that_would_run_but_not_do_what_was_meant_are_refused() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    with pytest.raises(TypeError, match="forward has no argument 'num_frame'; did you mean 'num_frames'"):
        model(prompt.input_ids, prompt.pixel_values, num_frame=prompt.num_frames)
    generate: Any = model.generate
    with pytest.raises(ValueError, match=r"generate takes no document_ids: .* say with media_ranges="):
        generate(**prompt.inputs, document_ids=prompt.input_ids)
    for call in (model, generate):
        with pytest.raises(ValueError, match="cache and past_key_values are names of the same cache"):
            call(**prompt.inputs, cache=DynamicCache(), past_key_values=DynamicCache())
    cache, media_cache = DynamicCache(), MediaCache()
    text = model.generate(**prompt.inputs, cache=cache, media_cache=media_cache, **GREEDY)
    with pytest.raises(ValueError, match="there is no new text: input_ids have 2 tokens, "):
        model.generate(text[:, -2:], cache=cache, media_cache=media_cache, **GREEDY)
    model.eject()
    with pytest.raises(RuntimeError, match=r"the blocks were taken out of the language model by eject\(\)"):
        model(**prompt.inputs)


def test_a_refused_call_leaves_the_cache_as_it_was() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    cache, media_cache = DynamicCache(), MediaCache()
    options: dict[str, Any] = {**GREEDY, "eos_token_id": None}
    text = model.generate(**prompt.inputs, cache=cache, media_cache=media_cache, **options)
    text = torch.cat([text, torch.tensor([[prompt.image_token_id], [7]])], dim=1)
    new: dict[str, Any] = {
        "pixel_values": prompt.pixel_values[:, :1],
        "cache": cache,
        "media_cache": media_cache,
    }
    with pytest.raises(ValueError, match="row 1 has 0 <image> tokens but 1 media"):
        model.generate(text, **new, **options)
    num_frames = torch.tensor([[1], [0]])
    with pytest.raises(ValueError, match="temprature"):
        model.generate(text, num_frames=num_frames, **new, **options, temprature=1.0)
    generated = model.generate(text, num_frames=num_frames, **new, **options)
    pixel_values = torch.cat([prompt.pixel_values, prompt.pixel_values[:, :1]], dim=1)
    num_frames = torch.tensor([[1, 2, 1], [1, 0, 0]])
    expected = model.generate(text, pixel_values=pixel_values, num_frames=num_frames, **options)
    assert torch.equal(generated, expected)


def test_new_media_may_come_with_ranges_of_their_own() -> None:
    """Also where the cache has earlier media: ranges count over all of them."""
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    with torch.no_grad():
        full = model(**prompt.inputs, use_cache=False).logits
        first = model(prompt.input_ids[:, :4], prompt.pixel_values[:, :1], prompt.num_frames[:, :1])
        second = model(
            prompt.input_ids[:, 4:],
            prompt.pixel_values[:, 1:],
            torch.tensor([[2], [0]]),
            cache=cache_of(first),
            media_cache=first.media_cache,
            media_ranges=media_ranges(prompt.is_image)[:, 4:],
        )
    torch.testing.assert_close(second.logits, full[:, 4:], atol=2e-5, rtol=1e-5)


def test_return_dict_is_as_in_transformers() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    output = model(**prompt.inputs, return_dict=None)
    as_tuple = model(**prompt.inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.logits)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_missing_text_and_other_misuse_is_refused() -> None:
    model, _ = make_flamingo()
    enable: Any = model.gradient_checkpointing_enable
    with pytest.raises(ValueError, match="checkpointing must not be reentrant here"):
        enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    no_media = torch.zeros(2, 0, 1, 3, 32, 32)
    assert model(torch.full((2, 3), 9), no_media).logits.shape == (2, 3, VOCAB + 2)
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="the language model's tables are never resized"):
        model.resize_token_embeddings(200)
    embeddings: Any = model.get_input_embeddings()
    for same in (None, VOCAB + 2):  # with the new tokens, as many as the tokenizer has
        assert model.resize_token_embeddings(same) is embeddings
    assert embeddings.weight.shape == (VOCAB, 32)
    with pytest.raises(ValueError, match="give either pixel_values or vision_features"):
        model.encode_media()


@pytest.mark.unchecked
def test_wrong_shapes_are_refused() -> None:
    model, _ = make_flamingo()
    prompt = Prompt.make(model)
    with pytest.raises(ValueError, match=r"labels must have the text's shape, \(2, 8\), got \(2, 7\)"):
        model(**prompt.inputs, labels=prompt.input_ids[:, :-1])
    with pytest.raises(ValueError, match=r"pixel_values must have shape \(batch, media, frames, channels"):
        model(prompt.input_ids, prompt.pixel_values[:, :, 0])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="the media have 1 rows, but the text 2"):
            call(prompt.input_ids, pixel_values=prompt.pixel_values[:1])
    with pytest.raises(ValueError, match=r"num_frames must have shape \(2, 2\), got \(2, 1\)"):
        model(prompt.input_ids, prompt.pixel_values, prompt.num_frames[:, :1])
    for wrong in (prompt.num_frames.float(), prompt.num_frames.bool()):
        with pytest.raises(ValueError, match="num_frames must be integers, got torch"):
            model(prompt.input_ids, prompt.pixel_values, wrong)
    with pytest.raises(ValueError, match="images must have shape"):
        model(prompt.input_ids, prompt.pixel_values[..., :-1], prompt.num_frames)

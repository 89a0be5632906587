"""OpenFlamingo's checkpoints: names, places, tables of embeddings. `make parity` compares with OpenFlamingo itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flamingo_blocks import FlamingoForConditionalGeneration, MediaRuns, media_ranges
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig
from flamingo_blocks.convert import open_flamingo
from flamingo_blocks.convert.checkpoint import Config
from tests import reference
from tests.convert import test_flamingo_pytorch as parts
from tests.strategies import random_tensor
from tests.tiny_flamingo import make_tokenizer
from tests.tiny_language_models import DEPTH, PATHS, VOCAB, WIDTH, make_lm

VISION_DIM = 16
VISION = FlamingoVisionConfig(
    architecture="test_vit",
    model_args={"embed_dim": VISION_DIM, "num_heads": 2, "depth": 1},
    image_size=32,
    final_norm=False,
)
TABLES = {
    "opt": {"model.decoder.embed_tokens.weight": 16},
    "gpt_neox": {"gpt_neox.embed_in.weight": WIDTH, "embed_out.weight": WIDTH},
    "gpt2": {"transformer.wte.weight": WIDTH},
}
END_OF_CHUNK, IMAGE = VOCAB, VOCAB + 1


def block(seed: int) -> dict[str, Tensor]:
    dims = {parts.DIM: WIDTH, 7: VISION_DIM}
    tensors = parts.block_tensors(media_dim=7)
    return {
        name: random_tensor(seed + i, *(dims.get(size, size) for size in tensor.shape)).float() / 4
        for i, (name, tensor) in enumerate(tensors.items())
    }


def resampler() -> dict[str, Tensor]:
    tensors = parts.resampler_tensors()
    return {
        name: random_tensor(i, *(VISION_DIM if size == parts.DIM else size for size in tensor.shape)).float() / 4
        for i, (name, tensor) in enumerate(tensors.items())
    }


def checkpoint(lm: str = "opt", *, every: int = 1, rows: int = VOCAB + 2) -> dict[str, Tensor]:
    """What a released file holds."""
    tensors = {f"perceiver.{name}": tensor for name, tensor in resampler().items()}
    for i in range(DEPTH):
        if (i + 1) % every == 0:
            prefix = f"lang_encoder.{PATHS[lm]}.{i}.gated_cross_attn_layer."
            tensors |= {prefix + name: tensor for name, tensor in block(i).items()}
    for seed, (name, width) in enumerate(TABLES[lm].items()):
        tensors[f"lang_encoder.{name}"] = random_tensor(seed, rows, width).float()
    return tensors


def load(tensors: Any, lm: str = "opt", config: Config | None = None, **options: Any) -> tuple[Any, Any]:
    return open_flamingo.load_flamingo(
        tensors,
        config,
        **{"tokenizer": make_tokenizer(), "language_model": make_lm(lm), "vision_encoder": VISION} | options,
    )


def inputs() -> dict[str, Tensor]:
    input_ids = torch.tensor([[5, IMAGE, 7, END_OF_CHUNK, IMAGE, 9]])
    return {"input_ids": input_ids, "pixel_values": random_tensor(0, 1, 2, 1, 3, 32, 32).float()}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("lm", TABLES)
def test_a_checkpoint_comes_back_as_it_was(lm: str, every: int) -> None:
    tensors = checkpoint(lm, every=every)
    model, _ = load(tensors, lm, {"cross_attn_every_n_layers": every})
    written = open_flamingo.to_open_flamingo(model)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_blocks_stand_where_the_checkpoint_has_them_and_compute_what_they_do_there() -> None:
    tensors = checkpoint(every=2)
    blocks = open_flamingo.load_blocks(tensors, {"cross_attn_every_n_layers": 2})
    model, _ = load(tensors)
    assert list(blocks) == [1] == list(model.injector.layer_indices)
    hidden, media = random_tensor(0, 1, 4, WIDTH).float(), random_tensor(1, 1, 2, 3, VISION_DIM).float()
    is_image = torch.tensor([[False, True, False, True]])
    expected = reference.lucidrains_block(block(1), hidden, media, is_image)
    for found in (blocks[1], model.injector.blocks["1"]):
        torch.testing.assert_close(found(hidden, media, MediaRuns.from_ranges(media_ranges(is_image))), expected)


def test_the_resampler_computes_what_it_does_there() -> None:
    tensors = checkpoint()
    features = random_tensor(0, 1, 1, 1, 5, VISION_DIM).float()
    expected = reference.lucidrains_resampler(resampler(), features[0, 0, 0])
    for found in (open_flamingo.load_resampler(tensors), load(tensors)[0].resampler):
        torch.testing.assert_close(found(features)[0, 0], expected)


@pytest.mark.parametrize("lm", TABLES)
def test_every_table_is_the_checkpoints(lm: str) -> None:
    tensors = checkpoint(lm)
    model, processor = load(tensors, lm)
    names = list(TABLES[lm])
    table, head = tensors[f"lang_encoder.{names[0]}"], tensors[f"lang_encoder.{names[-1]}"]
    assert (processor.image_token_id, model.config.end_of_chunk_token_id) == (IMAGE, END_OF_CHUNK)
    assert torch.equal(model.language_model.get_input_embeddings().weight, table[:VOCAB])
    assert torch.equal(model.language_model.get_output_embeddings().weight, head[:VOCAB])
    assert torch.equal(model.new_tokens.embeddings.weight, table[VOCAB:])
    assert (model.new_tokens.head is None) == (lm != "gpt_neox")
    if model.new_tokens.head is not None:
        assert torch.equal(model.new_tokens.head.weight, head[VOCAB:])
        assert model.new_tokens.head.bias is None


@pytest.mark.parametrize("lm", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("rows", [VOCAB + 2, VOCAB + 1, VOCAB - 3])
def test_new_tokens_may_lie_within_a_padded_vocabulary(lm: str, rows: int) -> None:
    """The tokenizer knows fewer words than the language model, so that there tables grow less, or are even cut."""
    tokenizer = make_tokenizer(size=rows - 2)
    tensors = checkpoint(lm, rows=rows)
    model, processor = load(tensors, lm, tokenizer=tokenizer)
    assert processor.image_token_id == rows - 1
    input_ids = torch.tensor([[5, rows - 1, 7, rows - 2]])
    logits = model(input_ids, pixel_values=inputs()["pixel_values"][:, :1]).logits
    assert logits.shape[-1] == rows
    assert torch.equal(model.new_tokens.embeddings.weight, tensors[f"lang_encoder.{next(iter(TABLES[lm]))}"][-2:])
    written = open_flamingo.to_open_flamingo(model)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_a_tokenizer_without_padding_gets_its_own_token_for_it() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tensors = checkpoint(rows=VOCAB + 3)
    model, processor = load(tensors, tokenizer=tokenizer)
    assert processor.tokenizer.pad_token == "<PAD>"
    assert model.config.new_token_ids == [END_OF_CHUNK, IMAGE, VOCAB + 2]
    assert model.generation_config.pad_token_id == VOCAB + 2
    written = open_flamingo.to_open_flamingo(model)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_a_head_that_the_checkpoint_lacks_is_the_language_models_with_means_for_new_tokens() -> None:
    tensors = checkpoint("gpt_neox")
    del tensors["lang_encoder.embed_out.weight"]
    lm = make_lm("gpt_neox")
    head = lm.get_output_embeddings().weight.detach().clone()
    model, _ = load(tensors, "gpt_neox", language_model=lm)
    assert torch.equal(model.language_model.get_output_embeddings().weight, head)
    torch.testing.assert_close(model.new_tokens.head.weight, head.mean(0).expand(2, -1))


def test_names_of_version_1_of_otter_and_of_wrappers_are_known() -> None:
    tensors = checkpoint()
    expected = load(tensors)[0](**inputs()).logits
    path = f"lang_encoder.{PATHS['opt']}."
    changes: dict[str, Callable[[str], str]] = {
        "version 1": lambda name: (
            name.replace(path, "lang_encoder.gated_cross_attn_layers.").replace("gated_cross_attn_layer.", "")
            if "gated" in name
            else name
        ),
        "Otter": lambda name: name.replace(".ff.", ".feed_forward."),
        "wrappers": lambda name: f"module.{name.replace('attn.', '_checkpoint_wrapped_module.attn.')}",
    }
    for change in changes.values():
        renamed = {change(name): tensor for name, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        assert torch.equal(load(renamed)[0](**inputs()).logits, expected)
    both = tensors | {changes["version 1"](name): tensor for name, tensor in tensors.items()}
    assert torch.equal(load(both)[0](**inputs()).logits, expected)
    name = "lang_encoder.gated_cross_attn_layers.0.attn_gate"
    with pytest.raises(ValueError, match=f"{name} is there twice"):
        load(both | {name: torch.ones(1)})


def test_a_checkpoint_may_hold_the_whole_language_model() -> None:
    tensors = checkpoint()
    lm = make_lm("opt")
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = f"{PATHS['opt']}."
    for name, tensor in lm.state_dict().items():
        index, _, rest = name.removeprefix(path).partition(".")
        theirs = f"{path}{index}.decoder_layer.{rest}" if name.startswith(path) else name
        tensors.setdefault(f"lang_encoder.{theirs}", tensor)
    tensors["lang_encoder.lm_head.weight"] = tensors["lang_encoder.model.decoder.embed_tokens.weight"]
    model, _ = load(tensors)
    name = "model.decoder.layers.1.fc1.weight"
    assert torch.equal(model.language_model.state_dict()[name], lm.state_dict()[name])
    with pytest.raises(ValueError, match=r"no place: model.decoder.layers.1.fc3.weight"):
        load(tensors | {"lang_encoder.model.decoder.layers.1.decoder_layer.fc3.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="must be the table of embeddings"):
        load(tensors | {"lang_encoder.lm_head.weight": torch.ones(VOCAB + 2, 16)})


def test_a_model_that_is_saved_comes_back(tmp_path: Path) -> None:
    model, processor = load(checkpoint())
    model.save_pretrained(tmp_path)
    again = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs()).logits, model(**inputs()).logits)
    assert not again.vision_encoder.final_norm
    assert processor.end_of_chunk_token == "<|endofchunk|>"


@pytest.mark.parametrize("attend", ["last", "all_previous", "next"])
def test_what_a_token_sees_is_as_asked(attend: Any) -> None:
    model, _ = load(checkpoint(), attend=attend)
    assert model.config.attend == attend


def test_dtypes_are_as_asked() -> None:
    model, _ = load(checkpoint(), dtype=torch.bfloat16, language_model=make_lm("opt", dtype=torch.bfloat16))
    assert {p.dtype for part in (model.injector, model.resampler, model.new_tokens) for p in part.parameters()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize(
    "change, config, message",
    [
        ({"other.weight": torch.ones(1)}, None, r"none of OpenFlamingo's: other.weight"),
        ({"perceiver.other": torch.ones(1)}, None, r"no place: perceiver.other"),
        ({"perceiver.media_time_embs": torch.ones(3, 1, 16)}, None, r"perceiver.media_time_embs, by which"),
        ({"perceiver.norm.bias": None}, None, r"missing: resampler.norm.bias here"),
        ({"perceiver.norm.bias": torch.ones(3)}, None, r"resampler.norm.bias: \(3,\) instead of \(16,\)"),
        ({"lang_encoder.model.decoder.layers.0.gated_cross_attn_layer.attn_gate": None}, None, "missing: .*gate.alpha"),
        ({"lang_encoder.model.decoder.embed_tokens.weight": None}, None, "holds the embeddings of the new tokens"),
        ({}, {"cross_attn_every_n_layers": 2}, r"=2, but the checkpoint has blocks before layers \[0, 2\]"),
        ({}, {"cross_attn_every": 2}, "got cross_attn_every; known are cache_dir, "),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor | None], config: Any, message: str) -> None:
    tensors = {name: tensor for name, tensor in (checkpoint() | change).items() if tensor is not None}
    lm = make_lm("opt")
    with pytest.raises(ValueError, match=message):
        load(tensors, config=config, language_model=lm)
    lm(input_ids=torch.tensor([[5, 6]]))  # no blocks were left in it


def test_backbones_that_nobody_names_are_asked_for() -> None:
    tensors = checkpoint()
    with pytest.raises(ValueError, match=r"give language_model, or config\['lang_encoder_path'\]"):
        load(tensors, language_model=None)
    with pytest.raises(ValueError, match=r"give tokenizer, or config\['tokenizer_path'\]"):
        load(tensors, tokenizer=None)
    with pytest.raises(ValueError, match=r"give vision_encoder: .*'RN50'"):
        load(tensors, config={"clip_vision_encoder_path": "RN50"}, vision_encoder=None)


def test_released_models_are_known_by_name_and_by_path(tmp_path: Path) -> None:
    name = "OpenFlamingo-4B-vitl-rpj3b-langinstruct"
    file = tmp_path / f"models--openflamingo--{name}" / "checkpoint.pt"
    file.parent.mkdir()
    expected = open_flamingo.RELEASED[name]
    assert expected["cross_attn_every_n_layers"] == 2
    assert open_flamingo._find_config(None, file) == expected
    assert open_flamingo._find_config(f"openflamingo/{name}", {}) == expected
    assert open_flamingo._find_config(None, tmp_path / "own.pt") == {}
    (tmp_path / "own.json").write_text(json.dumps({"cross_attn_every_n_layers": 3}))
    assert open_flamingo._find_config(tmp_path / "own.json", file) == {"cross_attn_every_n_layers": 3}


@pytest.mark.parametrize("lm", TABLES)
def test_what_was_trained_here_is_written_and_read_again(lm: str) -> None:
    model, _ = load(checkpoint(lm), lm)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    prompt = inputs()
    before = model(**prompt).logits
    model(**prompt, labels=prompt["input_ids"]).loss.backward()
    optimizer.step()
    again, _ = load(open_flamingo.to_open_flamingo(model), lm)
    expected = model(**prompt).logits
    assert torch.equal(again(**prompt).logits, expected)
    assert not torch.allclose(expected, before)


def test_new_tokens_of_another_kind_than_the_language_models_are_not_written() -> None:
    model, _ = load(checkpoint())
    model.config.new_token_head = "linear"
    with pytest.raises(ValueError, match="new_token_head must be 'tied' for this language model, got 'linear'"):
        open_flamingo.to_open_flamingo(model)


def test_names_of_otters_resampler_are_known() -> None:
    tensors = checkpoint()
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("perceiver.layers."):
            perceiver, layers, index, part, rest = name.split(".", 4)
            name = ".".join([perceiver, layers, index, *(["feed_forward"] if part == "1" else []), rest])
        renamed[name.replace(".ff.", ".feed_forward.")] = tensor
    assert "perceiver.layers.0.to_q.weight" in renamed
    assert "perceiver.layers.0.feed_forward.3.weight" in renamed
    assert torch.equal(load(renamed)[0](**inputs()).logits, load(tensors)[0](**inputs()).logits)


def test_numbers_that_older_versions_saved_are_left_out() -> None:
    tensors = checkpoint("gpt_neox")
    layer = "lang_encoder.gpt_neox.layers.0.decoder_layer.attention."
    derived = {f"{layer}rotary_emb.inv_freq": torch.ones(4), f"{layer}bias": torch.ones(1, 1, 8, 8)}
    derived[f"{layer}masked_bias"] = torch.tensor(-1e9)
    model, _ = load(tensors | derived, "gpt_neox")
    assert torch.equal(model(**inputs()).logits, load(tensors, "gpt_neox")[0](**inputs()).logits)
    with pytest.raises(ValueError, match=r"no place: gpt_neox\.layers\.0\.attention\.scale"):
        load(tensors | {f"{layer}scale": torch.ones(1)}, "gpt_neox")


def test_a_load_that_fails_changes_no_language_model() -> None:
    model, _ = load(checkpoint())
    expected = model(**inputs()).logits
    other = {name: tensor + 1 for name, tensor in checkpoint().items()}
    with pytest.raises(ValueError, match="already has blocks injected"):
        load(other, language_model=model.language_model)
    assert torch.equal(model(**inputs()).logits, expected)
    lm = make_lm("gpt_neox")
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    wrong = checkpoint("gpt_neox", rows=VOCAB - 3) | {"perceiver.norm.bias": torch.ones(3)}
    with pytest.raises(ValueError, match="instead of"):
        load(wrong, "gpt_neox", language_model=lm, tokenizer=make_tokenizer(size=VOCAB - 5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())


@pytest.mark.parametrize("lm", TABLES)
def test_the_rest_of_the_language_model_is_written_if_asked_for(lm: str) -> None:
    tensors = checkpoint(lm)
    model, _ = load(tensors, lm)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    expected = model(**inputs()).logits
    written = open_flamingo.to_open_flamingo(model, language_model=True)
    assert written.keys() > tensors.keys()
    assert torch.equal(load(written, lm)[0](**inputs()).logits, expected)
    alone = open_flamingo.to_open_flamingo(model)
    assert alone.keys() == tensors.keys()
    assert not torch.allclose(load(alone, lm)[0](**inputs()).logits, expected)


def test_an_adapter_does_not_name_a_language_model_that_was_cut(tmp_path: Path) -> None:
    make_lm("gpt_neox").save_pretrained(tmp_path)
    rows = VOCAB - 3
    tensors = checkpoint("gpt_neox", rows=rows)
    head = "lang_encoder.embed_out.weight"
    lm = make_lm("gpt_neox")
    tensors["lang_encoder.gpt_neox.embed_in.weight"] = lm.get_input_embeddings().weight[:rows].detach()
    tensors[head] = lm.get_output_embeddings().weight[:rows].detach()
    options: dict[str, Any] = {"language_model": str(tmp_path), "tokenizer": make_tokenizer(size=rows - 2)}
    assert load(tensors, "gpt_neox", **options)[0].language_model.config.name_or_path == ""


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lang_encoder.gpt_neox.embed_in.weight": (VOCAB + 2, 7)}, r"embed_in.weight must have shape \(101, 32\)"),
        ({"lang_encoder.embed_out.weight": (VOCAB, WIDTH)}, r"embed_out.weight must have shape \(101, 32\)"),
        ({"lang_encoder.embed_out.bias": (VOCAB + 2,)}, r"embed_out.bias must have shape None"),
    ],
)
def test_tables_of_another_language_model_are_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    tensors = checkpoint("gpt_neox") | {name: torch.ones(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        load(tensors, "gpt_neox")


def test_backbones_of_another_width_and_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gives 16 features and a language model of width 32, got 64 and 32"):
        load(checkpoint(), vision_encoder=FlamingoVisionConfig(architecture="test_vit", image_size=32))
    with pytest.raises(ValueError, match=r"has 100 tokens, but the tokenizer gives .* the id 100; this is another"):
        load(checkpoint("gpt_neox", rows=VOCAB + 1), "gpt_neox")
    with pytest.raises(ValueError, match="cross_attn_every_n_layers must be a positive number, got 0"):
        load(checkpoint(), config={"cross_attn_every_n_layers": 0})

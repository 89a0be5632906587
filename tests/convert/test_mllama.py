"""Llama-3.2-Vision against transformers' own, in double precision, with random weights and open gates."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AddedToken,
    GenerationConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessor,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mllama.image_processing_mllama import build_aspect_ratio_mask, convert_aspect_ratios_to_ids
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    MllamaTextRMSNorm,
    _prepare_cross_attention_mask,
)
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from flamingo_blocks import FlamingoForConditionalGeneration, FlamingoProcessor, MediaRuns
from flamingo_blocks.configuration_flamingo import CACHE_NAMES
from flamingo_blocks.convert import mllama
from flamingo_blocks.convert.__main__ import main
from flamingo_blocks.convert.assembly import CLIP_MEAN, CLIP_STD
from tests.strategies import random_tensor, randomize
from tests.tiny_flamingo import make_flamingo, make_tokenizer

VOCAB, TILE, TILES, PATCHES = 64, 28, 4, 5
IMAGE = VOCAB
BOS, PAD = 0, 2
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_global_layers": 2,
    "attention_heads": 2,
    "intermediate_size": 24,
    "vision_output_dim": 48,
    "image_size": TILE,
    "patch_size": 14,
    "intermediate_layers_indices": [0, 2],
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "cross_attention_layers": [1, 4],
    "bos_token_id": BOS,
    "eos_token_id": 1,
    "pad_token_id": PAD,
    "rms_norm_eps": 1e-3,
    # As in the released files, with a length that texts here exceed.
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8,
        "rope_type": "llama3",
    },
}
STATISTICS: dict[str, Any] = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
# Rows of text with the tiles, high and wide, of their images: text first, images side by side and apart; one image
# first; no image. The second row is the longest.
TEXT_FIRST = ([BOS, 5, IMAGE, 6, 7, IMAGE, IMAGE, 8, 9], [(1, 2), (1, 1), (3, 1)])
IMAGE_FIRST = ([IMAGE, BOS, 20, 21, 22, IMAGE, 23, 24, 25, 26, 27], [(2, 2), (1, 3)])
TWO_FIRST = ([IMAGE, IMAGE, BOS, 30, 31], [(2, 1), (1, 1)])
NO_IMAGE: tuple[list[int], list[tuple[int, int]]] = ([BOS, 10, 11, 12], [])
ALL_ROWS = (TEXT_FIRST, IMAGE_FIRST, NO_IMAGE, TWO_FIRST)


def make_config(**text: Any) -> MllamaConfig:
    return MllamaConfig(vision_config=VISION, text_config=TEXT | text, image_token_index=IMAGE)


def tokenizer(*, end_of_turn: bool = True) -> PreTrainedTokenizerFast:
    """One of 64 tokens and the image token."""
    words = make_tokenizer(size=VOCAB, specials=("<|eot_id|>",) if end_of_turn else ())
    words.add_tokens([AddedToken("<|image|>", special=True, normalized=False)], special_tokens=True)
    return words


@cache
def original(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model: Any = MllamaForConditionalGeneration(make_config()).eval()
    model.requires_grad_(False)
    randomize(model, 2)
    for name, parameter in model.named_parameters():
        # So that text makes a difference, and not the weights alone.
        if "norm" in name and name.endswith("weight"):
            parameter += 1
        elif "layers" in name and parameter.ndim == 2:
            parameter /= 2
    return model.to(dtype)


@cache
def converted(unseeing: mllama.Unseeing = "zero", dtype: torch.dtype = torch.float64) -> Any:
    return load(dtype, unseeing=unseeing)[0]


def load(stored: torch.dtype = torch.float64, **options: Any) -> tuple[Any, FlamingoProcessor]:
    state_dict = {name: tensor.clone() for name, tensor in original(stored).state_dict().items()}
    return mllama.load_flamingo(state_dict, make_config(), **{"tokenizer": tokenizer()} | options)


@dataclass
class Batch:
    """What transformers' processor makes of rows of text with images, by its own functions."""

    input_ids: Tensor
    attention_mask: Tensor
    of_images: dict[str, Tensor]

    @classmethod
    def make(cls, *rows: tuple[list[int], list[tuple[int, int]]], side: str = "right") -> "Batch":
        length = max(len(ids) for ids, _ in rows)
        texts, masks = [], []
        for ids, _ in rows:
            padding = length - len(ids)
            before, after = (padding, 0) if side == "left" else (0, padding)
            texts.append([*[PAD] * before, *ids, *[PAD] * after])
            masks.append([*[0] * before, *[1] * len(ids), *[0] * after])
        ratios = [images for _, images in rows]
        num_tiles = [[height * width for height, width in images] for images in ratios]
        of_images = {}
        if any(ratios):
            pixel_values = random_tensor(3, len(rows), max(map(len, ratios)), TILES, 3, TILE, TILE)
            for row, tiles in enumerate(num_tiles):
                for image in range(pixel_values.shape[1]):
                    pixel_values[row, image, tiles[image] if image < len(tiles) else 0 :] = 0
            seen = convert_sparse_cross_attention_mask_to_dense(
                [get_cross_attention_token_mask(text, IMAGE) for text in texts], num_tiles, TILES, length
            )
            of_images = {
                "pixel_values": pixel_values,
                "aspect_ratio_ids": convert_aspect_ratios_to_ids(ratios, TILES),
                "aspect_ratio_mask": build_aspect_ratio_mask(ratios, TILES),
                "cross_attention_mask": torch.from_numpy(seen),
            }
        return cls(torch.tensor(texts), torch.tensor(masks), of_images)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.of_images}

    @property
    def is_text(self) -> Tensor:
        return self.attention_mask.bool()

    @property
    def sees_something(self) -> Tensor:
        return self.of_images["cross_attention_mask"].flatten(2).any(-1)


@pytest.fixture(autouse=True)
def _exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms in the dtype of their input: transformers' round to single precision, also what is double."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)

    monkeypatch.setattr(MllamaTextRMSNorm, "forward", forward)
    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture
def _metas_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the original do as Meta's own code: both parts of a layer are zero where nothing is seen."""

    def forward(
        layer: Any,
        hidden_states: Tensor,
        cross_attention_states: Tensor,
        cross_attention_mask: Tensor,
        attention_mask: Any,  # noqa: ARG001
        full_text_row_masked_out_mask: Tensor,
        **others: Any,
    ) -> Tensor:
        sees_something = full_text_row_masked_out_mask[:, 0]
        attention, _ = layer.cross_attn(
            layer.input_layernorm(hidden_states),
            cross_attention_states=cross_attention_states,
            attention_mask=cross_attention_mask,
            **{name: others[name] for name in CACHE_NAMES if name in others},
        )
        hidden_states = hidden_states + layer.cross_attn_attn_gate.tanh() * sees_something * attention
        update = layer.mlp(layer.post_attention_layernorm(hidden_states))
        return hidden_states + layer.cross_attn_mlp_gate.tanh() * sees_something * update

    monkeypatch.setattr(MllamaCrossAttentionDecoderLayer, "forward", forward)


@torch.no_grad()
def logits(model: Any, batch: Batch) -> Tensor:
    inputs = batch.inputs
    if isinstance(model, FlamingoForConditionalGeneration):
        inputs = mllama.to_inputs(model, inputs)
    return torch.as_tensor(model(**inputs, use_cache=False).logits[..., :VOCAB])


def assert_equal_at(where: Tensor, found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1, "else there is nothing to compare"
    torch.testing.assert_close(found[where], expected[where], rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------ the whole model


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_transformers_where_all_text_sees_images(side: str) -> None:
    batch = Batch.make(IMAGE_FIRST, TWO_FIRST, side=side)
    assert batch.sees_something[batch.is_text].all()
    assert_equal_at(batch.is_text, logits(converted(), batch), logits(original(), batch))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.usefixtures("_metas_rule")
def test_logits_are_those_of_metas_rule_wherever_images_stand(side: str) -> None:
    batch = Batch.make(*ALL_ROWS, side=side)
    assert_equal_at(batch.is_text, logits(converted(), batch), logits(original(), batch))


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_that_see_nothing_are_as_in_transformers_if_asked_for(side: str) -> None:
    batch = Batch.make(*ALL_ROWS, side=side)
    expected = logits(original(), batch)
    assert_equal_at(batch.is_text, logits(converted("transformers"), batch), expected)
    unseeing = batch.is_text & ~batch.sees_something
    assert ((logits(converted(), batch) - expected)[unseeing].abs().amax(-1) > 1e-3).all(), "its way, not ours"


@pytest.mark.parametrize("unseeing", ["zero", "transformers"])
def test_text_alone_passes_no_block(unseeing: mllama.Unseeing) -> None:
    batch = Batch.make(NO_IMAGE, ([BOS, 40, 41, 42, 43, 44], []))
    assert_equal_at(batch.is_text, logits(converted(unseeing), batch), logits(original(), batch))


def test_text_without_image_is_the_same_beside_text_with_one() -> None:
    row, length = 2, len(NO_IMAGE[0])
    alone, beside = logits(converted(), Batch.make(NO_IMAGE)), logits(converted(), Batch.make(*ALL_ROWS))
    torch.testing.assert_close(beside[row, :length], alone[0], rtol=1e-10, atol=1e-10)


def test_the_new_tokens_logits_take_nothing_from_the_others() -> None:
    batch = Batch.make(IMAGE_FIRST)
    with torch.no_grad():
        whole = converted()(**mllama.to_inputs(converted(), batch.inputs)).logits
    assert whole.shape[-1] == VOCAB + 8
    assert torch.equal(whole.softmax(-1)[..., :VOCAB], whole[..., :VOCAB].softmax(-1))


@pytest.mark.parametrize("unseeing", ["zero", "transformers"])
def test_greedy_tokens_are_those_of_the_original(unseeing: mllama.Unseeing, request: pytest.FixtureRequest) -> None:
    if unseeing == "zero":
        request.getfixturevalue("_metas_rule")
    batch = Batch.make(*ALL_ROWS, side="left")
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=PAD, eos_token_id=VOCAB + 7)
    expected = original().generate(**batch.inputs, generation_config=greedy)
    model = converted(unseeing)
    found = model.generate(**mllama.to_inputs(model, batch.inputs), generation_config=greedy)
    assert torch.equal(found, expected)
    assert len(found[:, -8:].unique()) > 8, "else there is nothing to compare"


@pytest.mark.parametrize("unseeing", ["zero", "transformers"])
def test_cached_decoding_equals_full_forward(unseeing: mllama.Unseeing) -> None:
    model, batch = converted(unseeing), Batch.make(*ALL_ROWS, side="left")
    inputs = mllama.to_inputs(model, batch.inputs)
    options = GenerationConfig(
        max_new_tokens=4, do_sample=False, pad_token_id=PAD, output_logits=True, return_dict_in_generate=True
    )
    output = model.generate(**inputs, generation_config=options)
    seen = inputs["media_mask"]
    inputs["media_mask"] = torch.cat([seen, seen[:, -1:].expand(-1, 4, -1)], dim=1)
    inputs["attention_mask"] = F.pad(inputs["attention_mask"], (0, 4), value=1)
    position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        full = model(**inputs | {"input_ids": output.sequences, "position_ids": position_ids}).logits
    # transformers rounds what it gives.
    torch.testing.assert_close(torch.stack(output.logits, dim=1), full[:, -5:-1].float(), rtol=1e-6, atol=1e-6)


def make_processor() -> MllamaProcessor:
    return MllamaProcessor(MllamaImageProcessor(size={"height": TILE, "width": TILE}, **STATISTICS), tokenizer())


def picture(height: int, width: int) -> Image.Image:
    pixels = (random_tensor(height * width, height, width, 3).sigmoid() * 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_what_transformers_processor_returns_is_understood() -> None:
    batch = make_processor()(
        images=[[picture(20, 90), picture(60, 50)], [picture(28, 28)]],
        text=["<|image|> <|image|> w5 w6", "<|image|> w7 w8 w9"],
        padding=True,
        return_tensors="pt",
    )
    model = load(torch.float32)[0]
    with torch.no_grad():
        expected = original(torch.float32)(**batch).logits
        found = model(**mllama.to_inputs(model, batch)).logits[..., :VOCAB]
    where = batch["attention_mask"].bool()
    torch.testing.assert_close(found[where], expected[where], rtol=1e-4, atol=1e-4)


def test_other_inputs_are_passed_on() -> None:
    batch = Batch.make(IMAGE_FIRST).inputs
    inputs = mllama.to_inputs(converted(), batch | {"labels": batch["input_ids"]})
    assert inputs.keys() == {
        *("input_ids", "attention_mask", "labels"),
        *("vision_features", "num_frames", "media_mask"),
    }
    assert inputs["vision_features"].shape == (1, 7, 1, PATCHES, 48)


# ------------------------------------------------------------ the vision encoder


def test_an_image_of_one_tile_has_the_features_of_transformers() -> None:
    images = random_tensor(5, 2, 3, TILE, TILE)
    tiles = torch.zeros(2, 1, TILES, 3, TILE, TILE, dtype=torch.float64)
    tiles[:, 0, 0] = images
    expected = original().model.vision_model(
        tiles, convert_aspect_ratios_to_ids([[(1, 1)]] * 2, TILES), build_aspect_ratio_mask([[(1, 1)]] * 2, TILES)
    )
    found = converted().vision_encoder(images)
    assert_equal_at(torch.ones(2, PATCHES, dtype=torch.bool), found, expected.last_hidden_state[:, 0, 0])


@pytest.mark.parametrize("size", [TILE, TILE // 2])
def test_our_processor_makes_what_transformers_makes_of_an_image_of_one_tile(size: int) -> None:
    model, processor = load(torch.float32)
    expected = make_processor()(images=[[picture(size, size)]], text=["<|image|> w5"], return_tensors="pt")
    found = processor(images=[[picture(size, size)]], text=["<|image|> w5"])
    torch.testing.assert_close(found["pixel_values"][:, 0, 0], expected["pixel_values"][:, 0, 0], rtol=0, atol=1e-5)
    text = {name: expected[name] for name in ("input_ids", "attention_mask")}  # with <bos> behind the image
    with torch.no_grad():
        ours = model(**found | text).logits[..., :VOCAB]
        theirs = original(torch.float32)(**expected).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_our_processor_brings_images_of_any_shape_to_one_tile() -> None:
    inputs = load(torch.float32)[1](images=[[picture(20, 90)]], text=["<|image|>"])
    assert inputs["pixel_values"].shape == (1, 1, 1, 3, TILE, TILE)


def test_padding_images_are_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, model = [], converted()
    encode = mllama.MllamaVision.encode_tiles

    def count(self: Any, pixel_values: Tensor, *args: Any) -> Tensor:
        encoded.append(len(pixel_values))
        return encode(self, pixel_values, *args)

    monkeypatch.setattr(mllama.MllamaVision, "encode_tiles", count)
    mllama.to_inputs(model, Batch.make(*ALL_ROWS).inputs)
    assert encoded == [3 + 2 + 2]


def test_there_are_gradients_only_where_the_vision_encoder_is_trained() -> None:
    model, batch = load()[0], Batch.make(IMAGE_FIRST).inputs
    assert not mllama.to_inputs(model, batch)["vision_features"].requires_grad
    model.vision_encoder.unfreeze()
    assert mllama.to_inputs(model, batch)["vision_features"].requires_grad


# ------------------------------------------------------------ blocks


def test_a_block_is_a_layer_of_the_original() -> None:
    blocks = mllama.load_blocks(original().state_dict(), make_config())
    assert sorted(blocks) == [1, 3]
    hidden_states, media = random_tensor(0, 4, 11, 32), random_tensor(1, 4, 3 * TILES, PATCHES, 32)
    seen = Batch.make(*ALL_ROWS).of_images["cross_attention_mask"]
    dtype: Any = torch.float64
    mask, sees_something = _prepare_cross_attention_mask(seen, PATCHES, dtype)
    runs = MediaRuns.from_mask(seen.flatten(2).bool())
    for index, theirs in ((1, 1), (3, 4)):
        expected = original().model.language_model.layers[theirs](
            hidden_states,
            cross_attention_states=media.flatten(1, 2),
            cross_attention_mask=mask,
            attention_mask=None,
            full_text_row_masked_out_mask=sees_something,
        )
        where = runs.sees_something
        assert_equal_at(where, blocks[index](hidden_states, media, runs), expected)
        assert torch.equal(blocks[index](hidden_states, media, runs)[~where], hidden_states[~where])
        assert not blocks[index].training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_by_themselves_are_those_of_the_model(dtype: torch.dtype) -> None:
    state_dict = original(dtype).state_dict()
    blocks, model = mllama.load_blocks(state_dict, make_config().to_dict()), load(dtype)[0]
    assert mllama.load_resampler(state_dict, make_config()) is None
    assert {str(index) for index in blocks} == set(model.injector.blocks)
    for index, block in blocks.items():
        inside = model.injector.blocks[str(index)]
        assert repr(block) == repr(inside)
        assert block.feed_forward_without_media == inside.feed_forward_without_media
        assert_same(block.state_dict(), inside.state_dict())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


# ------------------------------------------------------------ files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_round_trips(dtype: torch.dtype) -> None:
    assert_same(mllama.to_mllama(load(dtype)[0], "transformers"), original(dtype).state_dict())


def test_released_files_round_trip(tmp_path: Path) -> None:
    original(torch.float32).save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 5
    model, _ = mllama.load_flamingo(tmp_path)
    assert_same(model.state_dict(), load(torch.float32)[0].state_dict())
    files = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert "language_model.model.layers.1.cross_attn.k_proj.weight" in files
    assert_same(mllama.to_mllama(model), files)
    config = json.loads((tmp_path / "config.json").read_text())
    blocks = mllama.load_blocks(files, config)
    assert_same(blocks[3].state_dict(), model.injector.blocks["3"].state_dict())


def test_the_command_line_converts_released_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    tokenizer().save_pretrained(tmp_path / "theirs")
    main(["mllama", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")])
    assert "make_vision_encoder(" in capsys.readouterr().out.splitlines()[-1]
    loaded = FlamingoForConditionalGeneration.from_pretrained(
        tmp_path / "ours", vision_encoder=mllama.make_vision_encoder(tmp_path / "ours"), dtype="auto"
    )
    assert_same(loaded.state_dict(), load(torch.bfloat16)[0].state_dict())


@pytest.mark.unchecked  # see tests/test_processing_flamingo.py::test_a_processor_round_trips
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_is_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    model, processor = load(dtype)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_pretrained(
        tmp_path, vision_encoder=mllama.make_vision_encoder(tmp_path), dtype=dtype
    )
    assert_same(loaded.state_dict(), model.state_dict())
    assert_same(mllama.to_mllama(loaded, "transformers"), original(dtype).state_dict())
    batch = Batch.make(*ALL_ROWS)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    mllama.set_unseeing(loaded, "transformers")
    expected = logits(converted("transformers", dtype), batch)
    assert torch.equal(logits(loaded, batch), expected)
    with pytest.raises(ValueError, match="pass it as vision_encoder="):
        FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert FlamingoProcessor.from_pretrained(tmp_path).image_token == "<|image|>"


def test_what_has_no_logit_there_is_not_named_for_training() -> None:
    names = converted().trained_module_names()
    assert "new_tokens.embeddings" in names
    assert "new_tokens.head" not in names


def test_an_adapter_holds_what_is_not_frozen(tmp_path: Path) -> None:
    model, batch = load(torch.float32)[0], Batch.make(*ALL_ROWS)
    model.save_adapter(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_adapter(
        tmp_path, language_model=load(torch.float32)[0].eject(), vision_encoder=load(torch.float32)[0].vision_encoder
    )
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_dtype_is_that_of_the_checkpoint_or_the_given_one() -> None:
    assert {p.dtype for p in load(torch.bfloat16)[0].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(torch.float32, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_what_the_family_has_no_place_for_cannot_be_trained_unseen() -> None:
    model = load(torch.float32)[0]
    assert [name for name, p in model.named_parameters() if name.startswith("new_tokens") and p.requires_grad] == [
        "new_tokens.embeddings.weight"
    ]
    model.new_tokens.head.weight[0, 0] = 1
    with pytest.raises(ValueError, match=r"new_tokens\.head\.weight was trained"):
        mllama.to_mllama(model)


# ------------------------------------------------------------ errors


def test_tensors_that_do_not_fit_are_listed() -> None:
    tensors = dict(original(torch.float32).state_dict())
    options: dict[str, Any] = {"config": make_config(), "tokenizer": tokenizer()}
    layer = "model.language_model.layers.4.cross_attn"
    for name in (f"{layer}.bias", "model.vision_model.bias", "model.bias"):
        with pytest.raises(ValueError, match=rf"no place: {name}"):
            mllama.load_flamingo({**tensors, name: torch.zeros(1)}, **options)
    with pytest.raises(ValueError, match=rf"no place: {layer}\.bias"):
        mllama.load_blocks({**tensors, f"{layer}.bias": torch.zeros(1)}, make_config())
    for name in (f"{layer}.v_proj.weight", "model.vision_model.class_embedding", "lm_head.weight"):
        fewer = {key: tensor for key, tensor in tensors.items() if key != name}
        with pytest.raises(ValueError, match="are missing: "):
            mllama.load_flamingo(fewer, **options)
    wrong = {**tensors, "model.multi_modal_projector.bias": torch.zeros(31)}
    with pytest.raises(ValueError, match=r"other shapes .*resampler\.project\.bias: \(31,\) instead of \(32,\)"):
        mllama.load_flamingo(wrong, **options)


@pytest.mark.parametrize("layers", [[1, 2], [1, 5], []])
def test_layers_that_no_block_can_stand_for_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="one without cross-attention behind"):
        mllama.load_blocks(original().state_dict(), make_config(cross_attention_layers=layers))


def test_configurations_of_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="model_type \"mllama\", got 'llama'"):
        mllama.load_blocks({}, {"model_type": "llama"})
    with pytest.raises(ValueError, match="hidden_act must be \"silu\", got 'gelu'"):
        mllama.load_blocks({}, make_config(hidden_act="gelu"))
    with pytest.raises(ValueError, match="got that of another Flamingo"):
        mllama.make_vision_encoder(make_flamingo()[0].config)


def test_tokenizers_of_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have <\|image\|> as token 64"):
        load(torch.float32, tokenizer=make_tokenizer(size=VOCAB))
    with pytest.raises(ValueError, match="tokenizer must be given with tensors"):
        load(torch.float32, tokenizer=None)


def test_chunks_end_as_the_tokenizer_has_it() -> None:
    assert load(torch.float32)[1].end_of_chunk_token == "<|eot_id|>"
    model, processor = load(torch.float32, tokenizer=tokenizer(end_of_turn=False))
    assert processor.end_of_chunk_token == "<eos>"
    assert model.config.end_of_chunk_token_id == 1


@pytest.mark.unchecked
def test_options_that_are_unknown_are_refused() -> None:
    model = converted()
    with pytest.raises(ValueError, match="unseeing must be one of 'zero', 'transformers'"):
        mllama.set_unseeing(model, "meta")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names must be one of 'released', 'transformers'"):
        mllama.to_mllama(model, "ours")  # type: ignore[arg-type]


def test_batches_that_are_not_whole_are_refused() -> None:
    model, batch = converted(), Batch.make(IMAGE_FIRST).inputs
    with pytest.raises(ValueError, match="no aspect_ratio_ids, cross_attention_mask"):
        mllama.to_inputs(model, batch | {"aspect_ratio_ids": None, "cross_attention_mask": None})
    with pytest.raises(ValueError, match=r"a converted Llama-3\.2-Vision, got one with a"):
        mllama.to_inputs(make_flamingo()[0], batch)
    batch["cross_attention_mask"][:, -1] = 1
    with pytest.raises(ValueError, match="tiles that aspect_ratio_mask says are padding"):
        mllama.to_inputs(model, batch)

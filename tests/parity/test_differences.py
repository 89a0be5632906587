"""What docs/migrating.md and docs/comparison.md say about other implementations, seen in their own code."""

import base64
import copy
import io
import json
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import open_flamingo
import pytest
import torch
from flamingo_pytorch import FlamingoPaLM
from flamingo_pytorch.flamingo_pytorch import GatedCrossAttentionBlock as FlamingoPytorchBlock
from flamingo_pytorch.flamingo_pytorch import PerceiverResampler as FlamingoPytorchResampler
from open_flamingo.src.factory import _infer_decoder_layers_attr_name
from open_flamingo.src.helpers import GatedCrossAttentionBlock as OpenFlamingoBlock
from PIL import Image
from torch import Tensor, nn

from flamingo_blocks import MediaRuns, media_ranges
from flamingo_blocks.convert import flamingo_pytorch
from flamingo_blocks.data import Medium, document_from_mmc4
from flamingo_blocks.language import find_decoder_layers
from tests.convert import test_idefics, test_mllama
from tests.parity.test_open_flamingo import IMAGE_SIZE, load, make_original, prompts
from tests.strategies import randomize
from tests.tiny_language_models import make_lm

DIM, MEDIA, LATENTS = 16, 2, 3
BLOCKS: dict[str, Any] = {
    "flamingo-pytorch": FlamingoPytorchBlock,
    "OpenFlamingo": lambda **options: OpenFlamingoBlock(dim_visual=DIM, **options),
}
IS_IMAGE = torch.tensor([[False, True, False, True, False]])


def make_block(name: str, **options: Any) -> Any:
    block = BLOCKS[name](dim=DIM, dim_head=8, heads=2, **options).double()
    randomize(block, 0)
    return block


def make_inputs(media: int) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(1, IS_IMAGE.shape[1], DIM, dtype=torch.float64)
    return hidden, torch.randn(1, media, LATENTS, DIM, dtype=torch.float64)


def count_calls(modules: dict[str, nn.Module]) -> Counter[str]:
    calls: Counter[str] = Counter()
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


# ------------------------------------------------------------ what text sees


@pytest.mark.parametrize("name", BLOCKS)
def test_under_all_previous_text_before_the_first_image_sees_all_images_there_and_none_here(name: str) -> None:
    theirs = make_block(name, only_attend_immediate_media=False)
    ours = flamingo_pytorch.load_block(theirs.state_dict(), {"dim_head": 8})
    hidden, media = make_inputs(MEDIA)
    other = media + torch.arange(MEDIA)[:, None, None]  # the second image is another one
    runs = MediaRuns.from_ranges(media_ranges(IS_IMAGE, attend="all_previous"))

    def changed(block: Any, told: Any) -> list[bool]:
        changes = block(hidden, media, told) - block(hidden, other, told)
        return [bool(change > 1e-6) for change in changes[0].abs().amax(-1)]

    assert changed(theirs, IS_IMAGE) == [True, False, False, True, True]
    assert changed(ours, runs) == [False, False, False, True, True]


@pytest.mark.parametrize("name", BLOCKS)
def test_an_image_token_without_image_sees_all_images_alike_there_and_is_an_error_here(name: str) -> None:
    theirs, (hidden, media) = make_block(name).attn, make_inputs(1)
    values = theirs.to_kv(media.flatten(1, 2)).chunk(2, dim=-1)[1]
    found = theirs(hidden, media, media_locations=IS_IMAGE)
    torch.testing.assert_close(found[:, 3:], theirs.to_out(values.mean(1, keepdim=True)).expand(-1, 2, -1))
    with pytest.raises(ValueError, match="row 0"):
        MediaRuns.from_ranges(media_ranges(IS_IMAGE), num_media=torch.tensor([1]))


def test_without_places_a_block_of_flamingo_pytorch_sees_everything() -> None:
    theirs, (hidden, media) = make_block("flamingo-pytorch"), make_inputs(MEDIA)
    ours = flamingo_pytorch.load_block(theirs.state_dict(), {"dim_head": 8})
    runs = MediaRuns.from_ranges(torch.tensor([0, MEDIA]).expand(1, hidden.shape[1], 2))
    torch.testing.assert_close(ours(hidden, media, runs), theirs(hidden, media), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------ flamingo-pytorch


def test_its_resampler_tells_places_apart_and_takes_no_more_than_it_has() -> None:
    resampler = FlamingoPytorchResampler(dim=DIM, depth=1)
    features = torch.randn(1, 1, 5, DIM)
    first, second = resampler(features.expand(-1, 2, -1, -1))[0]
    assert not torch.allclose(first, second), "the same image twice"
    with pytest.raises(RuntimeError):
        resampler(features.expand(-1, 5, -1, -1))


def test_its_palm_wants_an_encoder_and_takes_no_features() -> None:
    sizes: dict[str, Any] = {"dim": DIM, "num_tokens": 9, "depth": 1}
    with pytest.raises(AttributeError, match="eval"):
        FlamingoPaLM(**sizes)
    palm, text = FlamingoPaLM(**sizes, img_encoder=nn.Linear(DIM, DIM)), torch.tensor([[3, 4]])
    assert palm(text, images=torch.randn(1, 1, 5, DIM)).shape == (1, 2, 9)
    with pytest.raises(NameError, match="video"):
        palm(text, embeds=torch.randn(1, 1, 5, DIM))
    palm(text)
    assert all(parameter.requires_grad for parameter in palm.img_encoder.parameters()), "trained on text, it thaws"


# ------------------------------------------------------------ OpenFlamingo


def test_language_models_are_known_by_parts_of_their_class_names_there_and_by_structure_here() -> None:
    lm = make_lm("gpt2")
    with pytest.raises(ValueError, match="attribute name"):
        _infer_decoder_layers_attr_name(lm)
    assert find_decoder_layers(lm)[0] == "transformer.h"


def test_its_generate_encodes_once_and_projects_at_each_step() -> None:
    original, plain, options = make_original("opt", every=1)
    inputs, steps = prompts(load(original, plain, options)[0], padding="left"), 4
    keys_and_values = original.lang_encoder.gated_cross_attn_layers[0].attn.to_kv
    parts = {"vision": original.vision_encoder, "resampler": original.perceiver, "keys": keys_and_values}
    calls = count_calls(parts)
    ids, mask, pixels = (inputs[name] for name in ("input_ids", "attention_mask", "pixel_values"))
    original.generate(pixels, ids, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
    assert calls == {"vision": 1, "resampler": 1, "keys": steps}


@torch.no_grad()
def test_a_row_that_generates_an_image_token_changes_the_other_rows_there() -> None:
    original, plain, options = make_original("opt", every=1)
    model, _ = load(original, plain, options)
    inputs, mask = prompts(model), torch.ones(2, 10, dtype=torch.int64)

    def step(token: int) -> Tensor:
        """The first row's logits, beside a second row that has generated a token."""
        original.cache_media(inputs["input_ids"], inputs["pixel_values"])
        lm: Any = original.lang_encoder
        past = lm(input_ids=inputs["input_ids"], attention_mask=mask[:, :9], use_cache=True).past_key_values
        output = lm(input_ids=torch.tensor([[7], [token]]), attention_mask=mask, past_key_values=past)
        original.uncache_media()
        logits: Tensor = output.logits[0]
        return logits

    assert torch.equal(step(8), step(9))
    assert not torch.allclose(step(8), step(model.config.image_token_id))


def test_generating_without_padding_fails_there_with_this_transformers_and_leaves_images_behind() -> None:
    original, *_ = make_original("opt", every=1)
    ids = torch.tensor([[original.media_token_id, 7]])
    with pytest.raises(TypeError, match="attention_mask"):
        original.generate(
            torch.zeros(1, 1, 1, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64),
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=2,
        )
    assert original.lang_encoder._use_cached_vision_x
    with pytest.raises(AssertionError, match="None when media has been cached"):
        original(torch.zeros(1, 1, 1, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64), ids, torch.ones_like(ids))


def test_text_alone_and_videos_are_refused_there() -> None:
    original, *_ = make_original("opt", every=1)
    ids = torch.tensor([[original.media_token_id, 7]])
    with pytest.raises(AssertionError, match="Must provide"):
        original(None, ids, torch.ones_like(ids))
    video = torch.zeros(1, 1, 2, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    with pytest.raises(AssertionError, match="single frame"):
        original(video, ids, torch.ones_like(ids))


def test_images_of_mmc4_come_in_the_order_of_the_file_there_and_of_the_sentences_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = import_training_data(monkeypatch)
    monkeypatch.setattr(data, "MIN_KB", -1)
    monkeypatch.setattr(
        data,
        "preprocess_image",
        lambda images, _: torch.tensor([image.getpixel((0, 0)) for image in images])[..., None, None],
    )
    colours = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    files = {name: png(colour) for name, colour in colours.items()}
    record = {
        "text_list": ["Sky.", "Rose."],
        "image_info": [
            {"image_name": name, "matched_text_index": place, "image_base64": base64.b64encode(files[name]).decode()}
            for name, place in (("red", 1), ("blue", 0))
        ],
        "similarity_matrix": [[0.0, 1.0], [1.0, 0.0]],
    }
    texts: list[str] = []

    class Words:
        eos_token, additional_special_tokens, additional_special_tokens_ids = "", ["<image>"], [1]

        def __call__(self, text: str, **_: Any) -> dict[str, Tensor]:
            texts.append(text)
            return {"input_ids": torch.tensor([[1, 2, 1, 2]]), "attention_mask": torch.ones(1, 4)}

    images, _ = data.preprocess_interleaved([json.dumps(record)], Words(), None, 0.24, 1, 2)
    assert texts == ["<image>Sky.<|endofchunk|><image>Rose.<|endofchunk|>"]
    assert [tuple(image.flatten().tolist()) for image in images] == [colours["red"], colours["blue"]]
    document = document_from_mmc4(record, resolve=files.get)
    assert [part for part in document.parts if isinstance(part, Medium)] == [
        Medium("image", files[name]) for name in ("blue", "red")
    ]


def import_training_data(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of its training script, which is run from its own folder."""
    folder = Path(open_flamingo.__file__).parent / "train"
    monkeypatch.syspath_prepend(folder)
    spec: Any = spec_from_file_location("open_flamingo_training_data", folder / "data.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


# ------------------------------------------------------------ transformers


@pytest.mark.filterwarnings("ignore")
def test_idefics_resamples_and_projects_at_each_step_and_encodes_once() -> None:
    original, steps = copy.deepcopy(test_idefics.original_of("base")), 4
    parts = {
        "vision": original.model.vision_model,
        "resampler": original.model.perceiver_resampler,
        "keys": original.model.gated_cross_attn_layers[0].cross_attn.k_proj,
    }
    calls, prompt = count_calls(parts), test_idefics.Prompt.make(original.config.additional_vocab_size)
    original.generate(**prompt.theirs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
    assert calls == {"vision": 1, "resampler": steps, "keys": steps}


def test_idefics_with_additional_tokens_takes_no_labels() -> None:
    prompt = test_idefics.Prompt.make(test_idefics.original_of("base").config.additional_vocab_size)
    with pytest.raises(RuntimeError, match="shape"):
        test_idefics.original_of("base")(**prompt.theirs, labels=prompt.input_ids)
    with pytest.raises(ValueError, match="pixel_values"):
        test_idefics.original_of("base")(prompt.input_ids, prompt.attention_mask)


def test_mllama_projects_once() -> None:
    original, steps = copy.deepcopy(test_mllama.original()), 4
    batch = test_mllama.Batch.make(test_mllama.IMAGE_FIRST, test_mllama.TWO_FIRST, side="left")
    parts = {
        "vision": original.model.vision_model,
        "keys": original.model.language_model.layers[1].cross_attn.k_proj,
    }
    calls = count_calls(parts)
    original.generate(**batch.inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
    assert calls == {"vision": 1, "keys": 1}

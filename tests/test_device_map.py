"""accelerate's device maps: parts of a model on other devices, or on disk until they are called."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from flamingo_blocks import FlamingoForConditionalGeneration
from tests.tiny_flamingo import Prompt, make_flamingo

OTHERS = ("language_model", "injector", "new_tokens")
PARTS = ("vision_encoder", "resampler", *OTHERS)


def on_disk(*parts: str) -> dict[str, str]:
    return {part: "disk" if part in parts else "cpu" for part in PARTS}


def check_equal(model: Any, loaded: Any) -> None:
    prompt = Prompt.make(model)
    with torch.no_grad():
        assert torch.equal(loaded(**prompt.inputs).logits, model(**prompt.inputs).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(**prompt.inputs, **options), model.generate(**prompt.inputs, **options))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, *map(on_disk, OTHERS), on_disk(*OTHERS)], ids=str)
def test_a_model_may_lie_anywhere(name: str, device_map: Any, tmp_path: Path) -> None:
    model, _ = make_flamingo(name, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    loaded = FlamingoForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    if isinstance(device_map, dict) and "" not in device_map:
        for part, device in device_map.items():
            devices = {parameter.device.type for parameter in loaded.get_submodule(part).parameters()}
            assert devices == {"meta" if device == "disk" else "cpu"}
    check_equal(model, loaded)
    for key, parameter in model.named_parameters():
        found = loaded.get_parameter(key)
        assert (found.requires_grad, found.dtype) == (parameter.requires_grad, parameter.dtype)


@pytest.mark.parametrize("part", ["vision_encoder", "resampler"])
def test_what_reads_weights_without_a_call_is_not_offloaded(part: str, tmp_path: Path) -> None:
    """EVA02 and torch's Transformer layers read weights of modules that they do not call: they would give anything."""
    model, _ = make_flamingo(vision="eva02", resampler="transformer")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=f"device_map offloads the {part}"):
        FlamingoForConditionalGeneration.from_pretrained(
            tmp_path / "model", device_map=on_disk(part, "injector"), offload_folder=tmp_path / "offload"
        )


def test_an_automatic_map_splits_no_block() -> None:
    model, _ = make_flamingo(cross_attention_hidden=256)
    sizes = accelerate.utils.compute_module_sizes(model)
    largest = max(sizes[name] for name in ("vision_encoder", "injector.blocks.0"))
    memory: dict[int | str, int] = {device: int(1.1 * largest) for device in range(8)}
    device_map = accelerate.infer_auto_device_map(
        model, max_memory=memory, no_split_module_classes=list(model._no_split_modules)
    )
    assert len(set(device_map.values())) > 2, "it is split somewhere"
    whole = {"vision_encoder", *(f"injector.blocks.{i}" for i in range(3))}
    whole |= {f"language_model.model.layers.{i}" for i in range(3)}
    for name in whole:
        assert not any(key.startswith(f"{name}.") for key in device_map), f"{name} is split"

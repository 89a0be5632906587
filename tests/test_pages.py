"""Code of the pages that wants the network or the reader's own files, run with small stand-ins under the same names.

The other code of the pages is a test where it stands.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, dynamic_module_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flamingo_blocks import GatedCrossAttentionBlock, MediaRuns, build_flamingo, media_ranges
from flamingo_blocks.convert import flamingo_mini
from tests.convert import test_flamingo_mini, test_idefics, test_mllama, test_open_flamingo
from tests.tiny_flamingo import make_flamingo, make_tokenizer
from tests.tiny_language_models import CONFIGS, DEPTH
from tests.tiny_videos import write_video

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(?:python notest|\{\.python notest\})\n(.*?)^```", re.DOTALL | re.MULTILINE)
# That page has a test of its own, which compares the errors, too.
PAGES = {ROOT / "README.md", *(ROOT / "docs").rglob("*.md")} - {ROOT / "docs" / "debug_shapes.md"}
CODE = {
    page.relative_to(ROOT).as_posix(): fences for page in sorted(PAGES) if (fences := FENCE.findall(page.read_text()))
}
# As people run it: without checks of shapes at run time.
pytestmark = pytest.mark.unchecked


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to be in, where paths are named as ids are; backbones of timm's names, but small and random."""
    create = timm.create_model

    def small(name: str, **options: Any) -> Any:
        if not options.pop("pretrained") or "/" in name:
            return create(name, **options)
        assert any(name in (known, known.partition(".")[0]) for known in timm.list_pretrained()), name
        return create("test_vit", embed_dim=test_open_flamingo.VISION_DIM, num_heads=2, depth=1, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", small)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: name)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: f"{name}/{file}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setitem(flamingo_mini.CLIP, test_flamingo_mini.CONFIG["clip_model_type"], ("", test_flamingo_mini.CLIP))
    for mapping in (CONFIG_MAPPING, AutoModelForCausalLM._model_mapping):
        monkeypatch.setattr(mapping, "_extra_content", {**mapping._extra_content})


def write_language_model(path: str, kind: str = "llama", *, layers: int = 4) -> None:
    config = CONFIGS[kind]()
    config.num_hidden_layers = layers
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)


def readme() -> dict[str, Any]:
    write_language_model("HuggingFaceTB/SmolLM2-135M")
    Image.new("RGB", (40, 30)).save("cat.jpg")
    test_idefics.write(test_idefics.original_of("instruct"), Path("HuggingFaceM4/idefics-9b-instruct"))
    return {}


def migrating() -> dict[str, Any]:
    write_language_model("facebook/opt-1.3b", "opt")
    return {"build_flamingo": build_flamingo, "create_model_and_transforms": lambda **_: (None, None, None)}


def lora_and_quantised() -> dict[str, Any]:
    write_language_model("HuggingFaceTB/SmolLM2-135M")
    return {"torch": torch, "build_flamingo": build_flamingo, "Int8WeightOnlyConfig": Int8WeightOnlyConfig}


def one_block() -> dict[str, Any]:
    decoder = nn.Module()
    decoder.embedding = nn.Embedding(8, 16)
    decoder.blocks = nn.ModuleList([GatedCrossAttentionBlock(dim=16, media_dim=8, heads=2)])
    return {
        "torch": torch,
        "MediaRuns": MediaRuns,
        "media_ranges": media_ranges,
        "decoder": decoder,
        "latents": torch.randn(1, 2, 3, 8),
        "input_ids": torch.tensor([[0, 5, 6, 0, 7]]),
        "IMAGE": 0,
    }


def released_checkpoints() -> dict[str, Any]:
    model, processor = make_flamingo()
    model.save_pretrained("idefics")
    processor.save_pretrained("idefics")

    released = Path("openflamingo/OpenFlamingo-4B-vitl-rpj3b")
    released.mkdir(parents=True)
    torch.save(test_open_flamingo.checkpoint("gpt_neox", every=2), released / "checkpoint.pt")
    write_language_model("togethercomputer/RedPajama-INCITE-Base-3B-v1", "gpt_neox", layers=DEPTH)

    test_idefics.write(test_idefics.original_of("instruct"), Path("HuggingFaceM4/idefics-9b-instruct"))

    mini = Path("dhansmair/flamingo-mini")
    mini.mkdir(parents=True)
    original = test_flamingo_mini.make_original("opt")
    torch.save(original.weights, mini / "pytorch_model.bin")
    (mini / "config.json").write_text(json.dumps(original.config | {"lm": "facebook/opt-125m"}))
    original.lm.config.save_pretrained("facebook/opt-125m")
    test_flamingo_mini.tokenizer().save_pretrained("facebook/opt-125m")

    llama = "meta-llama/Llama-3.2-11B-Vision-Instruct"
    test_mllama.original(torch.float32).save_pretrained(llama)
    test_mllama.make_processor().save_pretrained(llama)
    return {"cat": test_mllama.picture(20, 90), "dog": test_mllama.picture(60, 50)}


def training() -> dict[str, Any]:
    write_language_model("HuggingFaceTB/SmolLM2-135M")
    backbone = timm.create_model("test_vit", pretrained=False, num_classes=0)
    timm.models.save_for_hf(backbone, "runs/vision_encoder/vision_encoder", safe_serialization=True)
    return {"build_flamingo": build_flamingo}


def whole_model() -> dict[str, Any]:
    write_language_model("HuggingFaceTB/SmolLM2-135M")
    write_video(Path("dog.mp4"), 40)
    for name in ("cat.png", "cats.png"):
        Image.new("RGB", (40, 30)).save(name)
    return {}


def wrap_language_model() -> dict[str, Any]:
    write_language_model("owner/model")
    own: dict[str, Any] = {"model_type": "owners", "architectures": ["OwnersForCausalLM"]}
    own |= {"auto_map": {"AutoConfig": "owners.OwnersConfig", "AutoModelForCausalLM": "owners.OwnersForCausalLM"}}
    Path("owner/model/config.json").write_text(json.dumps(CONFIGS["llama"]().to_dict() | own))
    Path("owner/model/owners.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnersConfig(LlamaConfig):\n    model_type = 'owners'\n"
        "class OwnersForCausalLM(LlamaForCausalLM):\n    config_class = OwnersConfig\n"
    )
    return {"build_flamingo": build_flamingo}


STAND_INS: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": readme,
    "docs/lora_and_quantised.md": lora_and_quantised,
    "docs/migrating.md": migrating,
    "docs/one_block.md": one_block,
    "docs/released_checkpoints.md": released_checkpoints,
    "docs/training.md": training,
    "docs/whole_model.md": whole_model,
    "docs/wrap_language_model.md": wrap_language_model,
}


@pytest.mark.parametrize("page", CODE)
def test_code_that_wants_the_network_runs_with_what_it_would_find_there(page: str) -> None:
    names = STAND_INS[page]()
    for code in CODE[page]:
        exec(compile(code, page, "exec"), names)

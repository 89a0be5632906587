"""Adapters: what was trained, and nothing else, beside the backbones that it was trained beside."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from flamingo_blocks import FlamingoForConditionalGeneration, FlamingoProcessor, VisionEncoder, build_flamingo
from flamingo_blocks.adapter import RECORD, WEIGHTS
from tests.strategies import randomize
from tests.tiny_flamingo import SIZES, Prompt, make_flamingo, make_tokenizer
from tests.tiny_language_models import make_lm

WEIGHT = "injector.blocks.0.to_q.weight"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def backbones_of(model: FlamingoForConditionalGeneration) -> dict[str, Any]:
    """The backbones, as one has them who has not built a Flamingo yet."""
    model = copy.deepcopy(model)
    backbones = {"language_model": model.eject(), "vision_encoder": model.vision_encoder}
    backbones["vision_encoder"].unfreeze()
    backbones["language_model"].requires_grad_(True)
    return backbones


def load(path: Path, model: FlamingoForConditionalGeneration, **options: Any) -> FlamingoForConditionalGeneration:
    return FlamingoForConditionalGeneration.from_adapter(path, **backbones_of(model) | options)


def assert_same(one: FlamingoForConditionalGeneration, other: FlamingoForConditionalGeneration) -> None:
    tensors, expected = one.state_dict(), other.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert trained(one) == trained(other)
    prompt = Prompt.make(other)
    assert torch.equal(one(**prompt.inputs).logits, other(**prompt.inputs).logits)
    assert one.generation_config.to_dict() == other.generation_config.to_dict()
    assert not one.training


@pytest.fixture
def saved(tmp_path: Path) -> tuple[FlamingoForConditionalGeneration, Path]:
    model, _ = make_flamingo()
    model.generation_config.max_new_tokens = 7
    model.save_adapter(tmp_path)
    return model, tmp_path


# ---------------------------------------------------------------- save and load


@pytest.mark.parametrize(
    ("lm", "vision", "options"),
    [
        ("llama", "nfnet", {}),
        ("gpt2", "swin", {"gating": "tanh_per_channel", "cross_attention_every": 2}),
        ("opt", "vit", {"freeze": ("vision_encoder",)}),
        ("gemma3", "resnet", {"freeze": ("language_model",)}),
        ("mamba", "resnet", {"freeze": (), "resampler": "mean_pool"}),
        ("qwen3", "vit", {"dtype": torch.bfloat16}),
    ],
)
def test_an_adapter_round_trips(lm: str, vision: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, _ = make_flamingo(lm, vision, **options)
    if "vision_encoder" not in (model.config.freeze or ()):
        randomize(model.vision_encoder, 1)  # its statistics, too
    before = copy.deepcopy(model)
    model.save_adapter(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / WEIGHTS)
    own = {n for n in model.state_dict() if n.startswith(("resampler", "injector", "new_tokens"))}
    assert own <= stored.keys()
    for part in ("language_model", "vision_encoder"):
        assert any(name.startswith(part) for name in stored) == (part not in (model.config.freeze or ()))
    assert_same(model, before)
    assert_same(load(tmp_path, model), model)


def test_backbones_that_were_trained_come_from_the_adapter_alone(tmp_path: Path) -> None:
    model, _ = make_flamingo("gpt2", "resnet", freeze=())
    randomize(model.language_model, 1)
    model.save_adapter(tmp_path)
    assert_same(FlamingoForConditionalGeneration.from_adapter(tmp_path), model)


def test_single_parameters_of_a_frozen_backbone_may_have_been_trained(tmp_path: Path) -> None:
    model, _ = make_flamingo()
    backbones = backbones_of(model)
    nn.init.constant_(model.language_model.model.norm.weight.requires_grad_(), 1.5)
    model.resampler.requires_grad_(False)  # and what was trained before may be frozen now
    model.save_adapter(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_adapter(tmp_path, **backbones)
    assert_same(loaded, model)
    assert "language_model.model.norm.weight" in trained(loaded)
    assert not any(name.startswith("resampler") for name in trained(loaded))


def test_a_vision_encoder_without_parameters_will_do(tmp_path: Path) -> None:
    encoder = VisionEncoder(nn.Flatten(2), image_size=(4, 8), channels=1, returns="tokens")
    model, _ = build_flamingo(make_lm("llama"), encoder, tokenizer=make_tokenizer(), **SIZES)
    randomize(model.injector, 0)
    model.save_adapter(tmp_path)
    loaded = FlamingoForConditionalGeneration.from_adapter(
        tmp_path, language_model=make_lm("llama"), vision_encoder=copy.deepcopy(encoder)
    )
    prompt = {
        "input_ids": torch.tensor([[model.config.image_token_id, 5]]),
        "pixel_values": torch.randn(1, 1, 3, 1, 4, 8),
    }
    assert torch.equal(loaded(**prompt).logits, model(**prompt).logits)


def test_its_size_is_that_of_what_was_trained(tmp_path: Path) -> None:
    model, _ = make_flamingo(resampler_dim=64, cross_attention_hidden=512)
    model.save_adapter(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    expected = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert expected < size < 1.05 * expected


def test_an_earlier_adapter_is_replaced(saved: tuple[FlamingoForConditionalGeneration, Path]) -> None:
    model, path = saved
    randomize(model.injector, 7)
    model.save_adapter(path)
    assert_same(load(path, model), model)
    assert {file.name for file in path.iterdir()} == {"config.json", "generation_config.json", WEIGHTS, RECORD}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backbones_may_be_of_another_dtype(
    dtype: torch.dtype, saved: tuple[FlamingoForConditionalGeneration, Path]
) -> None:
    model, path = saved
    half = {part: backbone.to(dtype) for part, backbone in backbones_of(model).items()}
    loaded = FlamingoForConditionalGeneration.from_adapter(path, **half)
    assert loaded.language_model.dtype == dtype
    assert {p.dtype for p in loaded.injector.parameters()} == {torch.float32}
    assert torch.equal(loaded.get_parameter(WEIGHT), model.get_parameter(WEIGHT))
    with pytest.raises(ValueError, match="dtype is for backbones that are loaded here"):
        load(path, model, dtype=dtype)


def test_a_quantised_language_model_is_known_again(saved: tuple[FlamingoForConditionalGeneration, Path]) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, path = saved
    backbones = backbones_of(model)
    quantize_(backbones["language_model"], Int8WeightOnlyConfig())
    loaded = FlamingoForConditionalGeneration.from_adapter(path, **backbones)
    assert type(loaded.language_model.lm_head.weight) is not nn.Parameter
    prompt = Prompt.make(model)
    expected = model(**prompt.inputs).logits
    assert 0 < (loaded(**prompt.inputs).logits - expected).abs().max() < 0.1 * expected.std()
    loaded.save_adapter(path)  # and the other way round
    assert_same(load(path, model), model)
    backbones = backbones_of(model)
    other_numbers(backbones["language_model"], "model.norm.weight")
    quantize_(backbones["language_model"], Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds other numbers"):
        FlamingoForConditionalGeneration.from_adapter(path, **backbones)


def test_a_language_model_that_was_trained_is_cast_if_asked_for(tmp_path: Path) -> None:
    model, _ = make_flamingo(freeze=("vision_encoder",))
    model.save_adapter(tmp_path)
    vision_encoder = backbones_of(model)["vision_encoder"]
    loaded = FlamingoForConditionalGeneration.from_adapter(
        tmp_path, vision_encoder=vision_encoder, dtype=torch.bfloat16
    )
    expected = model.language_model.lm_head.weight.bfloat16()
    assert torch.equal(loaded.language_model.lm_head.weight, expected)


# ---------------------------------------------------------------- where the backbones come from


def save_backbones(path: Path) -> tuple[Path, Path]:
    lm, backbone = path / "lm", path / "backbone"
    make_lm("llama").save_pretrained(lm)
    make_tokenizer().save_pretrained(lm)
    made: Any = timm.create_model("test_vit", num_classes=0)
    timm.models.save_for_hf(made, str(backbone), safe_serialization=True)
    return lm, backbone


def test_backbones_are_found_where_they_were(tmp_path: Path) -> None:
    lm, backbone = save_backbones(tmp_path)
    model, processor = build_flamingo(lm, backbone, image_size=32, **SIZES)
    randomize(model.injector, 0)
    # A whole checkpoint in between knows still where they were.
    model.save_pretrained(tmp_path / "whole")
    model = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "whole")
    model.save_adapter(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    assert_same(FlamingoForConditionalGeneration.from_adapter(tmp_path / "adapter"), model)
    half = FlamingoForConditionalGeneration.from_adapter(tmp_path / "adapter", dtype="bfloat16")
    assert half.language_model.dtype == next(half.vision_encoder.parameters()).dtype == torch.bfloat16
    FlamingoProcessor.from_pretrained(tmp_path / "adapter")
    # They may have moved since.
    moved: dict[str, Any] = {
        "language_model": str(lm.rename(tmp_path / "a")),
        "vision_encoder": backbone.rename(tmp_path / "b"),
    }
    assert_same(FlamingoForConditionalGeneration.from_adapter(tmp_path / "adapter", **moved), model)
    FlamingoForConditionalGeneration.from_adapter(tmp_path / "adapter", **moved).save_adapter(tmp_path / "again")
    assert_same(FlamingoForConditionalGeneration.from_adapter(tmp_path / "again"), model)
    with pytest.raises(OSError, match=r"(?s)language_model='.*lm' could not be loaded"):
        FlamingoForConditionalGeneration.from_adapter(tmp_path / "adapter")


def fake_hub(path: Path, monkeypatch: pytest.MonkeyPatch, repos: dict[str, Path]) -> None:
    """Fill a cache of the hub, as if the files had been downloaded at `COMMIT`; nothing else can be had."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(path))
    for repo, source in repos.items():
        root = path / f"models--{repo.replace('/', '--')}"
        shutil.copytree(source, root / "snapshots" / COMMIT)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(COMMIT)


def test_ids_and_revisions_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, backbone = save_backbones(tmp_path)
    repos = {"somebody/llama": lm, "timm/test_vit.r160_in1k": backbone}
    fake_hub(tmp_path / "hub", monkeypatch, repos)
    model, _ = build_flamingo("somebody/llama", "test_vit", image_size=32, **SIZES)
    model.save_adapter(tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / RECORD).read_text())
    for part, name in (("language_model", "somebody/llama"), ("vision_encoder", "test_vit")):
        assert (record[part]["name_or_path"], record[part]["revision"]) == (name, COMMIT)
    # Main has moved on.
    for repo in repos:
        refs = tmp_path / "hub" / f"models--{repo.replace('/', '--')}" / "refs" / "main"
        refs.write_text(COMMIT[::-1])
    assert_same(FlamingoForConditionalGeneration.from_adapter(tmp_path / "adapter"), model)


def test_a_backbone_without_a_name_must_be_passed(saved: tuple[FlamingoForConditionalGeneration, Path]) -> None:
    model, path = saved
    for part in ("language_model", "vision_encoder"):
        with pytest.raises(ValueError, match=f"does not say where its {part} is.* pass {part}="):
            load(path, model, **{part: None})


# ---------------------------------------------------------------- other backbones


def other_numbers(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        model.get_parameter(name).mul_(1.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda b: b.update(language_model=make_lm("gpt2")),
            "language_model is not the one .*it is a GPT2LMHeadModel, not a LlamaForCausalLM",
        ),
        (
            lambda b: other_numbers(b["language_model"], "model.layers.1.mlp.up_proj.weight"),
            r"model\.layers\.1\.mlp\.up_proj\.weight holds other numbers\. Load that one",
        ),
        (
            lambda b: other_numbers(b["language_model"].to(torch.bfloat16), "model.layers.1.mlp.up_proj.weight"),
            r"model\.layers\.1\.mlp\.up_proj\.weight holds other numbers\. Load that one",
        ),
        (
            lambda b: b["language_model"].model.layers.append(copy.deepcopy(b["language_model"].model.layers[0])),
            r"it has model\.layers\.3\.self_attn\.q_proj\.weight, which that one had not; .*and 6 more",
        ),
        (
            lambda b: b["language_model"].model.layers.__delitem__(2),
            r"it has no model\.layers\.2\.self_attn\.q_proj\.weight",
        ),
        (
            lambda b: setattr(b["language_model"].model.norm, "weight", nn.Parameter(torch.ones(31))),
            r"model\.norm\.weight has shape 31, not 32",
        ),
        (
            lambda b: b.update(vision_encoder=VisionEncoder.from_timm("test_resnet", image_size=32)),
            "vision_encoder is not the one .* a model without a name: it is a ResNet, not a VisionTransformer",
        ),
        (
            lambda b: other_numbers(b["vision_encoder"], "backbone.patch_embed.proj.weight"),
            r"vision_encoder is not .*backbone\.patch_embed\.proj\.weight holds other numbers",
        ),
    ],
)
def test_other_backbones_are_refused_and_left_alone(
    change: Callable[[dict[str, Any]], Any],
    message: str,
    saved: tuple[FlamingoForConditionalGeneration, Path],
) -> None:
    model, path = saved
    backbones = backbones_of(model)
    change(backbones)
    assert_untouched(backbones, path, message)


def test_moved_statistics_are_another_backbone(tmp_path: Path) -> None:
    model, _ = make_flamingo("llama", "resnet")
    model.save_adapter(tmp_path)
    backbones = backbones_of(model)
    backbones["vision_encoder"].backbone.bn1.running_mean.add_(1)
    assert_untouched(backbones, tmp_path, r"backbone\.bn1\.running_mean holds other numbers")


def assert_untouched(backbones: dict[str, Any], path: Path, message: str) -> None:
    """Loading is refused, and the backbones are as they were."""
    backbones["language_model"].train()
    before = copy.deepcopy(backbones)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        FlamingoForConditionalGeneration.from_adapter(path, **backbones)
    for part, backbone in backbones.items():
        for name, expected in before[part].named_parameters():
            parameter = backbone.get_parameter(name)
            assert torch.equal(parameter, expected)
            assert parameter.requires_grad == expected.requires_grad
        assert getattr(backbone, "is_frozen", None) == getattr(before[part], "is_frozen", None)
        assert [m.training for m in backbone.modules()] == [m.training for m in before[part].modules()]
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in backbone.modules())
    assert backbones["language_model"].config.to_dict() == before["language_model"].config.to_dict()


def test_the_same_numbers_in_another_model_are_another_backbone(
    saved: tuple[FlamingoForConditionalGeneration, Path],
) -> None:
    model, path = saved
    config = copy.deepcopy(model.language_model.config)
    config.num_attention_heads = config.num_key_value_heads = 2
    config.head_dim = 16
    other = type(model.language_model)(config)
    other.load_state_dict(model.language_model.state_dict())
    backbones = backbones_of(model) | {"language_model": other.requires_grad_(True)}
    assert_untouched(backbones, path, "its config's num_attention_heads is 2, not 4")
    backbones = backbones_of(model)
    backbones["vision_encoder"].output_dtype = torch.bfloat16
    assert_untouched(backbones, path, "in bfloat16, not TokenLayout.* in its own dtype")


def test_tensors_that_cannot_be_written_to_are_refused(tmp_path: Path) -> None:
    from accelerate import cpu_offload
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, _ = make_flamingo()
    backbones = backbones_of(model)
    model.language_model.model.layers[1].mlp.up_proj.weight.requires_grad_()
    model.save_adapter(tmp_path)
    quantised = copy.deepcopy(backbones)
    quantize_(quantised["language_model"], Int8WeightOnlyConfig())
    message = r"layers\.1\.mlp\.up_proj\.weight cannot be written to, since it is offloaded or quantised"
    with pytest.raises(ValueError, match=message):
        FlamingoForConditionalGeneration.from_adapter(tmp_path, **quantised)
    assert not any(module._forward_pre_hooks for module in quantised["language_model"].modules())
    cpu_offload(backbones["language_model"].model.layers[1], torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        FlamingoForConditionalGeneration.from_adapter(tmp_path, **backbones)


def test_what_was_trained_and_frozen_again_is_not_lost(tmp_path: Path) -> None:
    model, _ = make_flamingo()
    model.language_model.model.norm.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match=r"language_model has changed since.*model\.norm\.weight holds other numbers"):
        model.save_adapter(tmp_path)
    model.language_model.model.norm.requires_grad_()
    model.save_adapter(tmp_path)
    model.save_pretrained(tmp_path / "whole")
    loaded = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "whole")
    loaded.to(torch.bfloat16).save_adapter(tmp_path / "half")  # another dtype is no change


# ---------------------------------------------------------------- damaged files


def test_an_adapter_that_cannot_be_written_leaves_the_earlier_one(
    saved: tuple[FlamingoForConditionalGeneration, Path],
) -> None:
    model, path = saved
    before = copy.deepcopy(model)
    model.config.attend = "all_previous"
    model.generation_config.temperature = 0.5
    with pytest.raises(ValueError, match="temperature"):
        model.save_adapter(path)
    assert {file.name for file in path.iterdir()} == {"config.json", "generation_config.json", WEIGHTS, RECORD}
    assert_same(load(path, before), before)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = safetensors.torch.load_file(path / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, path / WEIGHTS)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    record = json.loads((path / RECORD).read_text())
    change(record)
    (path / RECORD).write_text(json.dumps(record))


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


GATE = "injector.blocks.0.gate.alpha"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: cut(path / WEIGHTS, 0.9), f"{WEIGHTS} is damaged: .*copy the adapter again"),
        (lambda path: cut(path / WEIGHTS, 0.01), f"{WEIGHTS} is damaged"),
        (lambda path: cut(path / WEIGHTS, 0), f"{WEIGHTS} is damaged"),
        (lambda path: cut(path / RECORD, 0.5), f"{RECORD} is damaged: .*copy the adapter again"),
        (lambda path: (path / RECORD).write_text("[]"), f"{RECORD} is damaged"),
        (lambda path: (path / RECORD).write_text('{"format": 1}'), f"{RECORD} is damaged"),
        (lambda path: edit(path, lambda r: r["language_model"].update(dtype="float31")), f"{RECORD} is damaged"),
        (lambda path: edit(path, lambda r: r["language_model"].update(tensors=None)), f"{RECORD} is damaged"),
        (lambda path: (path / RECORD).write_text('{"format": 2}'), "is of format 2, this version reads 1"),
        (lambda path: cut(path / "config.json", 0.5), r"config\.json"),
        (lambda path: cut(path / "generation_config.json", 0.5), r"generation_config\.json"),
        (lambda path: rewrite(path, lambda t: t.pop(GATE)), f"does not fit config.json: {GATE} is missing"),
        (
            lambda path: rewrite(path, lambda t: t.update(extra=torch.ones(2))),
            "does not fit config.json: extra is nothing that was trained",
        ),
        (
            lambda path: rewrite(path, lambda t: t.update({GATE: torch.ones(2)})),
            rf"{GATE} has shape \(2,\), should have \(1,\)",
        ),
        (
            lambda path: rewrite(path, lambda t: t.update({GATE: t[GATE].half()})),
            f"{GATE} is float16, should be float32",
        ),
        (
            lambda path: rewrite(path, lambda t: [t.pop(name) for name in sorted(t)[:5]]),
            r"is missing; .* is missing; .* is missing; and 2 more; copy the adapter again",
        ),
    ],
)
def test_damaged_files_are_refused_and_leave_the_backbones_alone(
    damage: Callable[[Path], Any], message: str, saved: tuple[FlamingoForConditionalGeneration, Path]
) -> None:
    model, path = saved
    damage(path)
    with pytest.raises((ValueError, OSError), match=f"(?s){message}"):
        load(path, model)
    if "does not fit" in message or "should" in message:
        assert_untouched(backbones_of(model), path, message)


@pytest.mark.parametrize("name", [WEIGHTS, RECORD, "config.json"])
def test_a_missing_file_is_named(name: str, saved: tuple[FlamingoForConditionalGeneration, Path]) -> None:
    model, path = saved
    (path / name).unlink()
    with pytest.raises(OSError, match=name):
        load(path, model)


@pytest.mark.parametrize("name", ["/no/such/directory", "nobody/has-this"])
def test_a_name_that_is_no_adapter_says_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(tmp_path, monkeypatch, {})
    with pytest.raises(OSError, match=f"'{name}' holds no adapter: it is no directory that save_adapter wrote"):
        FlamingoForConditionalGeneration.from_adapter(name)


def test_a_whole_checkpoint_and_an_adapter_are_not_confused(tmp_path: Path) -> None:
    model, _ = make_flamingo()
    model.save_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"holds an adapter, without the backbones; load it with .*from_adapter"):
        FlamingoForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "whole", max_shard_size="100KB")
    with pytest.raises(OSError, match=RECORD):
        FlamingoForConditionalGeneration.from_adapter(tmp_path / "whole")
    model.save_adapter(tmp_path / "whole")  # both in one place
    assert_same(FlamingoForConditionalGeneration.from_pretrained(tmp_path / "whole"), model)


def test_an_unknown_option_is_refused(saved: tuple[FlamingoForConditionalGeneration, Path]) -> None:
    model, path = saved
    with pytest.raises(TypeError, match="has no option 'languge_model'; did you mean 'language_model'"):
        load(path, model, languge_model=3)


def test_a_model_with_peft_inside_is_saved_by_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = make_flamingo()
    wrapped: Any = get_peft_model(model, LoraConfig(target_modules=r"language_model\..*q_proj"))
    for save in (wrapped.save_adapter, model.save_pretrained):
        with pytest.raises(ValueError, match="save everything that is trained with PEFT's own save_pretrained, or"):
            save(tmp_path)

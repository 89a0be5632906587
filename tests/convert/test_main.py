"""The command line: what it writes, what it checks and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flamingo_blocks import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_blocks.convert import open_flamingo
from flamingo_blocks.convert.__main__ import check_tensors, main
from tests.convert.test_open_flamingo import VISION_DIM, checkpoint
from tests.convert.test_open_flamingo import inputs as make_inputs
from tests.tiny_flamingo import make_tokenizer
from tests.tiny_language_models import make_lm


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A released checkpoint, its language model with tokenizer, and its vision encoder."""
    path = tmp_path_factory.mktemp("released")
    torch.save(checkpoint(), path / "checkpoint.pt")
    make_lm("opt").save_pretrained(path / "lm")
    make_tokenizer().save_pretrained(path / "lm")
    arguments: dict[str, Any] = {"embed_dim": VISION_DIM, "num_heads": 2, "depth": 1, "img_size": 32}
    backbone = timm.create_model("test_vit", num_classes=0, **arguments)
    timm.models.save_for_hf(backbone, str(path / "vision"), model_args=arguments, safe_serialization=True)
    return {name: str(path / name) for name in ("checkpoint.pt", "lm", "vision")}


def command(files: dict[str, str], out: Path, *others: str) -> list[str]:
    backbones = ["--language-model", files["lm"], "--tokenizer", files["lm"], "--vision-encoder", files["vision"]]
    return ["open_flamingo", files["checkpoint.pt"], "--out", str(out), *backbones, *others]


@pytest.mark.unchecked  # see tests/test_processing_flamingo.py::test_a_processor_round_trips
def test_a_checkpoint_is_converted(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main(command(files, out))
    model = FlamingoForConditionalGeneration.from_pretrained(out)
    expected, _ = open_flamingo.load_flamingo(
        files["checkpoint.pt"],
        tokenizer=AutoTokenizer.from_pretrained(files["lm"]),
        language_model=files["lm"],
        vision_encoder=files["vision"],
    )
    inputs = make_inputs()
    assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
    processor: Any = FlamingoProcessor.from_pretrained(out)
    assert processor.image_token_id == model.config.image_token_id
    said = capsys.readouterr().out
    count = len(checkpoint())
    assert f"{count} of {count} tensors are written back bit for bit" in said
    assert "blocks before 3 of 3 decoder layers" in said


def test_an_adapter_names_the_language_model_only_if_its_table_is_as_it_was(
    files: dict[str, str], tmp_path: Path
) -> None:
    lm: Any = AutoModelForCausalLM.from_pretrained(files["lm"])
    name = "lang_encoder.model.decoder.embed_tokens.weight"
    tensors = checkpoint()
    for own in (False, True):
        if own:
            tensors[name][: lm.config.vocab_size] = lm.get_input_embeddings().weight
        backbones: dict[str, Any] = {"language_model": files["lm"], "vision_encoder": files["vision"]}
        model, _ = open_flamingo.load_flamingo(tensors, tokenizer=files["lm"], **backbones)
        assert model.language_model.config.name_or_path == (files["lm"] if own else "")
        model.save_adapter(tmp_path / str(own))
        others: dict[str, Any] = (
            {} if own else {"language_model": model.language_model, "vision_encoder": model.vision_encoder}
        )
        if not own:
            model.eject()
        again: Any = FlamingoForConditionalGeneration.from_adapter(tmp_path / str(own), **others)
        assert not again.vision_encoder.final_norm
        if own:
            assert torch.equal(again(**make_inputs()).logits, model(**make_inputs()).logits)


def test_options_reach_the_family(files: dict[str, str], tmp_path: Path) -> None:
    main(command(files, tmp_path / "out", "--dtype", "bfloat16", "--attend", "all_previous"))
    model: Any = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.config.attend == "all_previous"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "others, message",
    [
        (["--dtype", "int8"], "must be a floating-point dtype of torch, e.g. bfloat16, got 'int8'"),
        (["--attend", "first"], "invalid choice: 'first'"),
    ],
)
def test_wrong_options_are_refused(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], others: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main(command(files, tmp_path / "out", *others))
    assert message in capsys.readouterr().err


def test_nothing_is_overwritten(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit):
        main(command(files, tmp_path))
    assert "--out must be a new or empty directory" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_ends_the_command(files: dict[str, str], tmp_path: Path) -> None:
    torch.save(checkpoint() | {"other": torch.ones(1)}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="error: these tensors are none of OpenFlamingo's: other"):
        main(command({**files, "checkpoint.pt": str(tmp_path / "checkpoint.pt")}, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_differs_is_named() -> None:
    tensors = {"a": torch.ones(2), "b": torch.ones(2)}
    assert check_tensors(tensors, tensors | {"c": torch.ones(1)}) == 2
    with pytest.raises(ValueError, match="not those of the checkpoint: b"):
        check_tensors(tensors, tensors | {"b": torch.zeros(2)})

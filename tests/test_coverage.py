"""A fixed sample of `make coverage`: one language model of each kind through every law, and the sweep itself."""

from pathlib import Path
from typing import Any

import pytest

from tests.coverage import sweep as sweeping
from tests.coverage.language_checks import LAWS, UNCACHED, check, make_flamingo
from tests.coverage.sweep import sweep, table

SAMPLE = [
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
    "OPTForCausalLM",
    "GPTNeoXForCausalLM",
    "MptForCausalLM",
    "MambaForCausalLM",
    "JambaForCausalLM",
    "MixtralForCausalLM",  # mixture of experts
    "BloomForCausalLM",  # its layers return tuples
    "DeepseekV4ForCausalLM",  # several residual streams
]


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("architecture", SAMPLE)
def test_every_law_holds_for_one_language_model_of_each_kind(architecture: str, law: str) -> None:
    assert LAWS[law][1](architecture) in (None, "")


@pytest.mark.parametrize("law", ["generation", "open", "cached", "causal", "copies", "new tokens"])
def test_layers_that_are_called_by_keyword_hold_the_laws_of_inference(law: str) -> None:
    assert LAWS[law][1]("ReformerModelWithLMHead") in (None, "")


def test_a_backward_that_gives_blocks_no_gradient_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="does not require grad"):
        LAWS["gradient"][1]("ReformerModelWithLMHead")


def test_where_the_cache_is_wrong_text_is_generated_without() -> None:
    assert LAWS["generation"][1]("RwkvForCausalLM") == UNCACHED
    assert LAWS["cached"][1]("RwkvForCausalLM") == UNCACHED


def test_where_generating_counts_positions_otherwise_the_forward_counts() -> None:
    assert not make_flamingo("RobertaForCausalLM").config.decoding_position_ids
    assert LAWS["generation"][1]("RobertaForCausalLM") in (None, "")
    assert LAWS["cached"][1]("RobertaForCausalLM") in (None, "")


def test_where_generating_is_no_forward_it_is_refused() -> None:
    with pytest.raises(ValueError, match="XLMWithLMHeadModel generates by other logits than those of its forward"):
        LAWS["generation"][1]("XLMWithLMHeadModel")


def test_checkpointing_of_a_language_model_that_scales_its_embeddings_in_place() -> None:
    LAWS["checkpointing"][1]("CTRLLMHeadModel")


def test_what_is_not_causal_is_refused() -> None:
    assert "lets a token see later ones" in check("XLNetLMHeadModel")["refused"]


def _check(name: str) -> dict[str, Any]:
    if name == "broken":
        raise ValueError("it is broken")
    return {"length": len(name)}


@pytest.mark.slow
def test_a_sweep_gives_results_in_order_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "STORE", tmp_path)
    source = tmp_path / "source.py"
    source.write_text("first")
    results = sweep(_check, ["bb", "broken", "a"], store="test", sources=[source])
    assert list(results) == ["bb", "broken", "a"]
    assert results["a"] == {"length": 1}
    assert results["broken"]["error"] == "ValueError: it is broken"
    store = tmp_path / "test.jsonl"
    lines = store.read_text().splitlines()
    assert len(lines) == 3
    store.write_text("\n".join(lines[:2]) + '\n{"key": "stop')  # stopped while it wrote
    again = sweep(_check, ["bb", "broken", "a"], store="test", sources=[source])
    assert {name: result.get("length") for name, result in again.items()} == {"bb": 2, "broken": None, "a": 1}
    assert len(store.read_text().splitlines()) == 4
    source.write_text("second")
    before = len(store.read_text().splitlines())
    sweep(_check, ["a"], store="test", sources=[source])
    assert len(store.read_text().splitlines()) == before + 1, "results of other sources are not used again"


def test_a_table_keeps_its_cells() -> None:
    assert table(("a", "b"), [("x|y", 1)]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |"

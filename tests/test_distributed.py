"""FlamingoTrainer on two processes, with DDP and with FSDP2, against one process; and runs that are killed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed_training import SAVES_LORA_OF_FSDP, check_parts, make, make_quantised, make_with_lora
from tests.tiny_stream import make_trainer

ROOT = Path(__file__).parents[1]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCH = ["accelerate.commands.launch", "--num_processes", "2", "--mixed_precision", "no"]
# Sums over processes are in another order, in float32.
CLOSE = 1e-5

pytestmark = pytest.mark.slow


def run(launcher: list[str], folder: Path, *checks: str) -> Any:
    folder.mkdir(exist_ok=True)
    arguments = ["-m", "tests.distributed_training", str(folder), *checks]
    command = [sys.executable, "-m", *launcher, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if result.returncode:
        return result.stderr
    return json.loads((folder / "found.json").read_text())


def one_process(folder: Path) -> Any:
    trainer = make_trainer(folder, model=make())
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    found = run(TORCHRUN, tmp_path_factory.mktemp("two"), "ddp", "fsdp")
    assert isinstance(found, dict), found
    return found


EXACT = ["ddp", "ddp checkpointing", "ddp without media", "fsdp", "fsdp checkpointing", "fsdp without media"]
ROUNDED = {"fsdp frozen bf16": 1e-3, "fsdp bf16": 2e-2}


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_losses_are_those_of_one_process(name: str, found: dict[str, list[Any]], tmp_path: Path) -> None:
    alone = one_process(tmp_path)
    expected = [entry for entry in alone.state.log_history if "loss" in entry]
    close = ROUNDED.get(name, CLOSE)
    for process in found[name]:
        assert process["losses"] == pytest.approx([entry["loss"] for entry in expected], rel=close)
        assert process["logs"] == pytest.approx(expected[0], rel=max(close, 1e-4), abs=close)
        assert process["is_sharded"] == name.startswith("fsdp")
        assert process["frozen_are_untouched"]
        assert process["tables_are_tied"]
        if name in EXACT:
            norms = {key: tensor.double().norm().item() for key, tensor in alone.model.state_dict().items()}
            assert process["weights"] == pytest.approx(norms, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["ddp lora", "fsdp lora", "ddp quantised"])
def test_lora_and_a_quantised_language_model_train_as_in_one_process(
    name: str, found: dict[str, list[Any]], tmp_path: Path
) -> None:
    if name == "fsdp lora" and not SAVES_LORA_OF_FSDP:
        pytest.skip("older transformers cannot save it")
    alone = check_parts(tmp_path, make_quantised(tmp_path) if name == "ddp quantised" else make_with_lora())
    for process in found[name]:
        assert process["losses"] == pytest.approx(alone["losses"], rel=CLOSE)
        assert process["saved"] == pytest.approx(alone["saved"], rel=1e-3, abs=1e-4)
    assert bool(alone["saved"]) == ("lora" in name)


def test_an_encoder_with_scalars_is_left_out_of_fsdp(found: dict[str, list[Any]], tmp_path: Path) -> None:
    alone = one_process(tmp_path)
    losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    assert [process["losses"] for process in found["fsdp scalars"]] == [pytest.approx(losses, rel=CLOSE)] * 2


@pytest.mark.parametrize("name", ["ddp resume", "fsdp resume", "fsdp resume sharded"])
def test_resumption_is_exact(name: str, found: dict[str, list[Any]]) -> None:
    assert found[name] == [{"same_end": True, "same_losses": True, "given": 12}] * 2


@pytest.mark.parametrize("name", ["fsdp saving", "fsdp saving sharded"])
def test_what_is_saved_at_the_end_loads_as_a_whole_model(name: str, found: dict[str, list[Any]]) -> None:
    trained = sorted(name for name, parameter in make().named_parameters() if parameter.requires_grad)
    expected = {"same": True, "class": ["FlamingoForConditionalGeneration"], "trained": trained}
    assert found[name] == [expected] * 2


def test_a_sharded_model_evaluates_and_generates(found: dict[str, list[Any]]) -> None:
    for process in found["fsdp use"]:
        assert process["evaluated"] == pytest.approx(process["expected"], rel=CLOSE)
        assert process["generated"]
        assert process["encoded"]
        assert process["losses"] == found["fsdp"][0]["losses"], "training goes on as if nothing had been generated"


def test_accelerate_launches_ddp_with_its_file(tmp_path: Path) -> None:
    found = run([*LAUNCH, "--config_file", "examples/launch/ddp.yaml"], tmp_path / "two", "ddp")
    assert isinstance(found, dict), found
    alone = [entry["loss"] for entry in one_process(tmp_path).state.log_history if "loss" in entry]
    assert [process["losses"] for process in found["ddp"]] == [pytest.approx(alone, rel=CLOSE)] * 2


def test_fsdp_that_would_not_shard_is_an_error(tmp_path: Path) -> None:
    error = run([*LAUNCH, "--config_file", "examples/launch/fsdp2.yaml"], tmp_path, "as launched")
    assert isinstance(error, str)
    assert "FSDP was asked for, but accelerate would run MULTI_CPU on cpu" in error


def test_a_run_killed_again_and_again_ends_as_one_that_was_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.killed_training", str(tmp_path / "runs"), "20"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["kills"] == 20
    assert found["in_the_middle"] > 0, "some died while they wrote a checkpoint"
    assert found["not_whole"] == []
    assert found["steps"] == sorted(found["steps"])
    assert found["same_end"]

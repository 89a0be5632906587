"""FlamingoTrainer on one process: several datasets at once, exact resumption, checkpoints that are whole."""

import copy
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from flamingo_blocks import parameter_groups
from flamingo_blocks.training import UNFINISHED, FlamingoTrainer, gates
from tests.tiny_flamingo import make_flamingo
from tests.tiny_stream import WEIGHTS, TinyLoader, collate, make_rows, make_trainer

DATASETS = tuple(WEIGHTS)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def history(trainer: Any) -> list[dict[str, float]]:
    """What was logged, without what tells the time."""
    return [entry for entry in trainer.state.log_history if "train_runtime" not in entry]


def mean_loss(model: Any, rows: list[dict[str, Tensor]]) -> Tensor:
    """The mean negative log-likelihood of all tokens of some rows, written out."""
    batch = collate(rows)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1]
    return F.cross_entropy(logits[labels != -100], labels[labels != -100])


def checkpoints(path: Path) -> list[str]:
    return sorted(found.name for found in path.iterdir())


class KeepGradients(TrainerCallback):
    def __init__(self, model: Any) -> None:
        self.model = model
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


class StopAt(TrainerCallback):
    """Fail at the begin of a step, as a process does that is killed there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step == self.step:
            raise InterruptedError


# ------------------------------------------------------------ the loss


@pytest.mark.parametrize("in_turn, rounds", [(False, 1), (False, 2), (True, 2)])
def test_accumulated_gradients_are_those_of_the_joint_loss(in_turn: bool, rounds: int, tmp_path: Path) -> None:
    model, _ = make_flamingo("llama", dtype=torch.float64)
    model.double()
    expected = copy.deepcopy(model)
    loader = TinyLoader(in_turn=in_turn)
    keep = KeepGradients(model)
    trainer = make_trainer(
        tmp_path,
        model=model,
        loader=loader,
        max_steps=1,
        gradient_accumulation_steps=rounds * loader.batches_per_step,
        max_grad_norm=0.0,
        keywords={"callbacks": [keep]},
    )
    trainer.train()
    if in_turn:
        seen = [(DATASETS[number], 0) for number in range(rounds)]
    else:
        seen = [(name, number) for number in range(rounds) for name in DATASETS]
    loss = sum((WEIGHTS[name] * mean_loss(expected, make_rows(name, number)) for name, number in seen), torch.zeros(()))
    (loss / rounds).backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item() / rounds, rel=1e-6)
    for name, parameter in expected.named_parameters():
        assert (parameter.grad is None) == (name not in keep.gradients)
        if parameter.grad is not None:
            error = (keep.gradients[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-12)
            assert error < 1e-6, name


class WithoutLabels(TinyLoader):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in super().__iter__():
            yield batch | {"labels": torch.full_like(batch["labels"], -100)} if batch["dataset"] == "text" else batch


def test_a_batch_without_any_label_counts_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "with", loader=WithoutLabels(), model=make_flamingo("llama")[0], max_steps=1)
    without = make_trainer(
        tmp_path / "without",
        loader=TinyLoader(datasets=("pages", "captions")),
        model=make_flamingo("llama")[0],
        max_steps=1,
    )
    trainer.train()
    without.train()
    assert trainer.state.log_history[0]["loss/text"] == 0.0
    assert same(weights(trainer.model), weights(without.model))


def test_text_alone_reaches_every_trained_weight_of_processes_that_keep_in_step() -> None:
    model, _ = make_flamingo("llama")
    batch = {name: value for name, value in collate(make_rows("text", 0)).items() if name in ("input_ids", "labels")}
    expected = model(**batch)
    model.always_encodes = True
    output = model(**batch)
    assert torch.equal(output.logits, expected.logits)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert not any(parameter.grad.any() for parameter in model.resampler.parameters())


@pytest.mark.slow
def test_evaluation_is_the_trainers(tmp_path: Path) -> None:
    rows = make_rows("pages", 7)
    keywords = {"eval_dataset": rows, "data_collator": collate}
    trainer = make_trainer(tmp_path, keywords=keywords, per_device_eval_batch_size=4, max_steps=1)
    trainer.train()
    with torch.no_grad():
        expected = mean_loss(trainer.model.eval(), rows).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------ what is logged, what decays


def test_each_datasets_loss_and_each_gate_are_logged(tmp_path: Path) -> None:
    model, _ = make_flamingo("llama")
    before = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, model=model, max_steps=2, logging_steps=2, learning_rate=0.0)
    trainer.train()
    logs = trainer.state.log_history[0]
    for name in DATASETS:
        expected = sum(mean_loss(before, make_rows(name, number)).item() for number in range(2)) / 2
        assert logs[f"loss/{name}"] == pytest.approx(expected, rel=1e-5)
    block: Any
    for layer, block in before.injector.blocks.items():
        assert logs[f"gate/{layer}_attention"] == pytest.approx(block.gate.alpha.tanh().abs().item())
        assert logs[f"gate/{layer}_feed_forward"] == pytest.approx(block.gate_feed_forward.alpha.tanh().abs().item())
    tokens = sum((collate(make_rows(n, i))["labels"][:, 1:] != -100).sum().item() for n in DATASETS for i in range(2))
    assert logs["tokens_per_step"] == tokens / 2


def test_a_second_run_logs_its_own_losses_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, model=make_flamingo("llama")[0], max_steps=3, logging_steps=2)
    trainer.train()  # its third step is not logged
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(sum(WEIGHTS[name] * logs[f"loss/{name}"] for name in DATASETS), rel=1e-6)


def test_gates_are_those_that_peft_trains() -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = make_flamingo("llama")
    lora = LoraConfig(target_modules=r"language_model\..*\.q_proj", modules_to_save=model.trained_module_names())
    wrapped = get_peft_model(model, lora)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and name.endswith("alpha"):
            parameter.data.fill_(0.5)
    values = gates(wrapped)
    assert len(values) == 2 * len(model.injector.layer_indices)
    assert all(value == pytest.approx(torch.tensor(0.5).tanh().item()) for value in values.values())


def test_weight_decay_is_that_of_parameter_groups(tmp_path: Path) -> None:
    model, _ = make_flamingo("llama")
    trainer = make_trainer(tmp_path, model=model, weight_decay=0.1)
    trainer.create_optimizer()
    for found, expected in zip(trainer.optimizer.param_groups, parameter_groups(model), strict=True):
        assert list(map(id, found["params"])) == list(map(id, expected["params"]))
        assert found["weight_decay"] == expected["weight_decay"]


# ------------------------------------------------------------ resumption


def saving(path: Path, *callbacks: TrainerCallback, **options: Any) -> Any:
    defaults: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    return make_trainer(path, keywords={"callbacks": list(callbacks)}, **defaults | options)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    uninterrupted = make_trainer(tmp_path / "uninterrupted", max_steps=3)  # its model has dropout
    uninterrupted.train()
    with pytest.raises(InterruptedError):
        saving(tmp_path / "resumed", StopAt(2), max_steps=3).train()
    resumed = saving(tmp_path / "resumed", max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.model), weights(uninterrupted.model))
    logged = [{k: v for k, v in entry.items() if k != "total_flos"} for entry in history(resumed)]
    assert logged == history(uninterrupted)
    assert resumed.loader.given == uninterrupted.loader.given


def test_a_run_that_is_resumed_at_its_end_does_nothing(tmp_path: Path) -> None:
    trainer = saving(tmp_path, max_steps=1)
    trainer.train()
    before = weights(trainer.model)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1
    assert same(weights(trainer.model), before)


def test_the_stream_is_resumed_by_as_many_processes_or_not_at_all(tmp_path: Path) -> None:
    trainer = saving(tmp_path, max_steps=1)
    trainer.train()
    stream = tmp_path / "checkpoint-1" / "stream_0.json"
    saved = json.loads(stream.read_text())
    stream.write_text(json.dumps(saved | {"num_processes": 8}))
    with pytest.raises(ValueError, match=r"written by 8 processes .* there are 1"):
        trainer.train(resume_from_checkpoint=True)
    stream.unlink()
    with pytest.raises(ValueError, match="written by no processes with a stream"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"there is no .*checkpoint-9"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


# ------------------------------------------------------------ checkpoints


def fail_to_write(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


PLACES: dict[str, tuple[Any, str]] = {
    "model": (Trainer, "save_model"),
    "optimizer": (Trainer, "_save_optimizer_and_scheduler"),
    "random numbers": (Trainer, "_save_rng_state"),
    "stream": (Path, "write_text"),
    "flush": (os, "fsync"),
}


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = saving(tmp_path, max_steps=2)
    trainer.train()
    expected = weights(trainer.model)
    shutil.rmtree(tmp_path / "checkpoint-2")
    for owner, writes in PLACES.values():
        message = r"checkpoint-2 could not be written .*No space left.*checkpoint-1, is whole"
        with monkeypatch.context() as full:
            full.setattr(owner, writes, fail_to_write)
            with pytest.raises(OSError, match=message):
                trainer.train(resume_from_checkpoint=True)
        assert checkpoints(tmp_path) == ["checkpoint-1"]
    trainer.train(resume_from_checkpoint=True)
    assert same(weights(trainer.model), expected)


def test_a_disk_that_is_full_in_the_middle_of_a_file_is_an_error(tmp_path: Path) -> None:
    trainer = saving(tmp_path, max_steps=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint-1 could not be written .* There is no earlier one"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints(tmp_path) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / UNFINISHED / "checkpoint-9").mkdir(parents=True)
    trainer = saving(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="No valid checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-1"]


def test_no_more_checkpoints_are_kept_than_asked_for(tmp_path: Path) -> None:
    saving(tmp_path, save_total_limit=1, max_steps=2).train()
    assert checkpoints(tmp_path) == ["checkpoint-2"]


def test_all_checkpoints_are_kept_without_a_limit(tmp_path: Path) -> None:
    saving(tmp_path, save_total_limit=-1, max_steps=2).train()
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_a_checkpoint_is_written_again_in_place_of_an_older_one(tmp_path: Path) -> None:
    trainer = saving(tmp_path, max_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-1" / "mark").touch()
    trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-1"]
    assert not (tmp_path / "checkpoint-1" / "mark").exists()


def test_the_best_checkpoint_is_known_by_its_name_and_kept(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    def compute_metrics(_: Any) -> dict[str, float]:
        seen.append(weights(trainer.model))
        return {"goodness": [1.0, 3.0, 2.0][len(seen) - 1]}

    best = {"load_best_model_at_end": True, "metric_for_best_model": "goodness", "greater_is_better": True}
    keywords = {"compute_metrics": compute_metrics, "eval_dataset": make_rows("pages", 9), "data_collator": collate}
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, keywords=keywords, save_total_limit=2, max_steps=3, **options | best)
    trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    for name in ("checkpoint-2", "checkpoint-3"):
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    assert same(weights(trainer.model), seen[1])


# ------------------------------------------------------------ what is refused


def refuse(match: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_what_would_not_do_what_it_says_is_refused(tmp_path: Path) -> None:
    model, _ = make_flamingo("llama")
    refuse("max_steps must be given", lambda: make_trainer(tmp_path, model=model, max_steps=-1))
    refuse("must be a multiple of 3", lambda: make_trainer(tmp_path, model=model, gradient_accumulation_steps=4))
    refuse("label_smoothing_factor", lambda: make_trainer(tmp_path, model=model, label_smoothing_factor=0.1))
    rows = make_rows("pages", 0)
    refuse("pass loader=", lambda: make_trainer(tmp_path, model=model, keywords={"train_dataset": rows}))
    alone = FlamingoTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    refuse("training needs a loader", alone.train)
    refuse("must be a Flamingo", lambda: gates(torch.nn.Linear(2, 2)))


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[])
    monkeypatch.setenv("WORLD_SIZE", "2")  # so torchrun says, but without use_cpu nobody listens on CPUs
    refuse(r"2 processes were started.*--use_cpu", lambda: FlamingoTrainer(make_flamingo("llama")[0], alone))


class WithoutNames(TinyLoader):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in super().__iter__():
            yield {name: value for name, value in batch.items() if name != "dataset"}


def test_a_batch_without_its_datasets_name_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, model=make_flamingo("llama")[0], loader=WithoutNames())
    refuse("a batch must have 'dataset'", trainer.train)

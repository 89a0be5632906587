"""transformers' Trainer, with accelerate, trains a Flamingo as it trains any other model."""

import copy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from transformers import Trainer, TrainerCallback

from flamingo_blocks import FlamingoForConditionalGeneration, build_flamingo, parameter_groups
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig
from tests.tiny_flamingo import SIZES, VISION, make_flamingo, make_tokenizer
from tests.tiny_language_models import CONFIGS, VOCAB
from tests.tiny_training import collate, make_examples, make_resumable_trainer, make_trainer

TRAINED = ("resampler.", "injector.", "new_tokens.")


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_checkpointing": True}, {"dtype": torch.bfloat16}],
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")
def test_a_run_moves_what_is_trained_and_nothing_else(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, _ = make_flamingo(name, dtype=options.get("dtype", torch.float32))
    before = weights(model)
    trainer = make_trainer(tmp_path, model=model, **{k: v for k, v in options.items() if k != "dtype"})
    trainer.train()
    moved = differing(before, weights(model))
    assert moved == trained(model)
    assert moved == {key for key in before if key.startswith(TRAINED)}
    assert {parameter.dtype for name, parameter in model.named_parameters() if name in moved} == {torch.float32}
    assert all(torch.isfinite(torch.tensor(losses(trainer))))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")
def test_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    plain, checkpointed = make_trainer(tmp_path), make_trainer(tmp_path, gradient_checkpointing=True)
    plain.train()
    checkpointed.train()
    assert checkpointed.model.injector.gradient_checkpointing
    assert losses(plain) == losses(checkpointed)


def test_accumulated_gradients_are_those_of_the_one_big_batch(tmp_path: Path) -> None:
    # The texts differ in length: a mean of the batches' means would be another loss.
    whole = make_trainer(tmp_path, per_device_train_batch_size=12, max_steps=2, max_grad_norm=0.0)
    parts = make_trainer(tmp_path, gradient_accumulation_steps=6, max_steps=2, max_grad_norm=0.0)
    expected = whole.model(**collate(make_examples(12))).loss.item()
    whole.train()
    parts.train()
    assert losses(whole)[0] == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-5, atol=0.0)
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(parts.model.get_parameter(name), parameter, rtol=1e-3, atol=1e-4, msg=name)


def test_bf16_losses_are_close_to_those_of_float32(tmp_path: Path) -> None:
    full, half = make_trainer(tmp_path), make_trainer(tmp_path, bf16=True)
    full.train()
    half.train()
    assert losses(half) != losses(full)
    torch.testing.assert_close(losses(half), losses(full), rtol=2e-2, atol=0.0)


class NoteGradients(TrainerCallback):
    def __init__(self, gradients: dict[str, torch.dtype]) -> None:
        self.gradients = gradients

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.grad is not None:
                self.gradients[name] = parameter.grad.dtype


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")
def test_precision_is_the_papers(name: str, tmp_path: Path) -> None:
    vision = FlamingoVisionConfig(**VISION["vit"])
    options: dict[str, Any] = {"dtype": torch.bfloat16, "gate_init": 0.5, **SIZES}
    model: Any = build_flamingo(CONFIGS[name](), vision, tokenizer=make_tokenizer(), **options)[0]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # it would draw anew for the model that this one is compared with
    exact = copy.deepcopy(model).float()
    computed: dict[str, set[torch.dtype]] = {}
    gradients: dict[str, torch.dtype] = {}

    def note_dtypes(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:  # noqa: ARG001
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    computed.setdefault(name, set()).add(tensor.dtype)
                    if tensor.requires_grad:
                        tensor.register_hook(lambda gradient: computed[name].add(gradient.dtype))

        return hook

    is_frozen = {"vision_encoder": True, "language_model": True, "resampler": False, "injector": False}
    for part, frozen in is_frozen.items():
        for key, module in model.get_submodule(part).named_modules(prefix=part):
            # Of what is frozen all, of what is trained the matrix products; autocast leaves norms in float32.
            if frozen or isinstance(module, torch.nn.Linear):
                module.register_forward_hook(note_dtypes(key))
    keywords: dict[str, Any] = {"callbacks": [NoteGradients(gradients)]}
    trainer = make_trainer(tmp_path, model=model, keywords=keywords, bf16=True, gradient_checkpointing=True)
    trainer.train()
    assert {key.split(".")[0] for key in computed} == set(is_frozen)
    assert {key for key, dtypes in computed.items() if dtypes != {torch.bfloat16}} == set()
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in model.parameters())
    assert gradients == dict.fromkeys(trained(model), torch.float32)
    states = trainer.optimizer.state_dict()["state"]
    assert len(states) == len(gradients)
    assert {value.dtype for state in states.values() for value in state.values()} == {torch.float32}

    full = make_trainer(tmp_path, model=exact)
    full.train()
    torch.testing.assert_close(losses(trainer), losses(full), rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("use_cache", [False, True])
def test_evaluation_gathers_the_logits_and_no_caches(use_cache: bool, tmp_path: Path) -> None:
    found: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        found.append(prediction)
        return {"rows": len(prediction.label_ids)}

    trainer = make_trainer(tmp_path, keywords={"compute_metrics": compute_metrics}, use_cache=use_cache)
    metrics = trainer.evaluate()
    assert trainer.label_names == ["labels"]
    batch = collate(make_examples(5, seed=1))
    with torch.no_grad():
        output = trainer.model(**batch)
    assert metrics["eval_rows"] == 5
    logits, labels = torch.tensor(found[0].predictions), torch.tensor(found[0].label_ids)
    assert torch.equal(labels, batch["labels"])
    is_real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[is_real], output.logits[is_real], rtol=1e-4, atol=1e-5)
    assert logits.shape == (5, 8, VOCAB + 2)
    # The Trainer averages over batches; over these tokens the loss would be:
    mean = F.cross_entropy(logits[:, :-1][labels[:, 1:] != -100], labels[:, 1:][labels[:, 1:] != -100])
    assert metrics["eval_loss"] == pytest.approx(mean.item(), rel=2e-2)
    predictions = trainer.predict(make_examples(5, seed=1)).predictions
    assert torch.equal(torch.tensor(predictions), logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_checkpoint_is_a_whole_model_that_can_be_loaded(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, model=make_flamingo(name)[0], save_strategy="steps", save_steps=6)
    trainer.train()
    path = tmp_path / "checkpoint-6"
    with safe_open(path / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    expected = set(weights(trainer.model))
    # A head that is tied to the embedding is saved once.
    assert expected - saved == ({"language_model.lm_head.weight"} if name == "gpt2" else set())
    loaded = FlamingoForConditionalGeneration.from_pretrained(path)
    assert not differing(weights(loaded), weights(trainer.model))
    assert trained(loaded) == trained(trainer.model)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    def compute_metrics(_: Any) -> dict[str, float]:
        seen.append(weights(trainer.model))
        return {"goodness": [1.0, 3.0, 2.0][len(seen) - 1]}

    options: dict[str, Any] = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    best: dict[str, Any] = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "goodness",
        "greater_is_better": True,
    }
    keywords = {"compute_metrics": compute_metrics}
    trainer = make_trainer(tmp_path, model=make_flamingo("gpt2")[0], keywords=keywords, **options, **best)
    before = trained(trainer.model)
    trainer.train()
    assert not differing(weights(trainer.model), seen[1])
    assert differing(seen[1], seen[2])
    assert trained(trainer.model) == before


class NoteSteps(TrainerCallback):
    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.steps.append(state.global_step)


@pytest.mark.slow
def test_a_run_resumed_after_a_kill_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.tiny_training", str(tmp_path / "killed"), "5"]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["checkpoint-2", "checkpoint-4"]

    uninterrupted = make_resumable_trainer(tmp_path / "uninterrupted")
    before = copy.deepcopy(weights(uninterrupted.model))
    uninterrupted.train()
    steps: list[int] = []
    resumed = make_resumable_trainer(tmp_path / "killed", NoteSteps(steps))
    frozen = {name for name, p in resumed.model.named_parameters() if not p.requires_grad}
    resumed.train(resume_from_checkpoint=True)
    assert steps == [4, 5], "it went on, and did not begin anew"
    assert losses(resumed) == losses(uninterrupted)
    assert not differing(weights(resumed.model), weights(uninterrupted.model))
    assert frozen == {name for name, p in resumed.model.named_parameters() if not p.requires_grad}
    assert all(torch.equal(resumed.model.state_dict()[name], before[name]) for name in frozen)


class PapersTrainer(Trainer):
    def get_decay_parameter_names(self, model: Any) -> list[str]:
        decayed = {id(parameter) for parameter in parameter_groups(model)[0]["params"]}
        return [name for name, parameter in model.named_parameters() if id(parameter) in decayed]


@pytest.mark.parametrize("way", ["optimizers", "subclass"])
def test_the_trainer_takes_the_papers_weight_decay(way: str, tmp_path: Path) -> None:
    model, _ = make_flamingo()
    if way == "optimizers":
        optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-2)
        trainer = make_trainer(tmp_path, model=model, keywords={"optimizers": (optimizer, None)})
    else:
        trainer = make_trainer(tmp_path, model=model, kind=PapersTrainer, weight_decay=0.1)
    trainer.train()
    for found, expected in zip(trainer.optimizer.param_groups, parameter_groups(model), strict=True):
        assert list(map(id, found["params"])) == list(map(id, expected["params"]))
        assert found["weight_decay"] == expected["weight_decay"]
        assert found["initial_lr"] == 1e-2

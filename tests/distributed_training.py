"""What is checked on two processes, with DDP and with FSDP2; run by torchrun, or by accelerate's launcher.

    torchrun --standalone --nproc_per_node 2 -m tests.distributed_training FOLDER ddp fsdp

The first process writes what it found to FOLDER/found.json. Both begin from the same tiny models, without dropout where
losses are compared, on CPUs.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import safetensors.torch
import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType, gather_object
from packaging.version import Version
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from flamingo_blocks import FlamingoForConditionalGeneration
from tests import tiny_stream
from tests.test_quantization import build, make_lm
from tests.tiny_flamingo import Prompt, make_flamingo
from tests.tiny_stream import TinyLoader, collate, make_rows, make_trainer

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}}
SHARDED: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}


class Arguments(TrainingArguments):
    """Arguments with which accelerate does on CPUs what it does on GPUs, FSDP2 too."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # of an earlier trainer
        if self.device.type == "cpu" and self.fsdp:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def make(*, dropout: bool = False, **options: Any) -> Any:
    """A Flamingo whose language model has tied tables."""
    model, _ = make_flamingo("gpt2", **options)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0
    return model


def make_with_lora() -> Any:
    """The same with LoRA in its language model."""
    model = make()
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules=r"language_model\..*\.c_attn", fan_in_fan_out=True, modules_to_save=model.trained_module_names()
    )
    return peft.get_peft_model(model, config)


def make_quantised(folder: Path) -> Any:
    """A Flamingo whose language model bitsandbytes has quantised."""
    with PartialState().main_process_first():  # transformers saves in one process
        return build(make_lm("bitsandbytes", folder / "lm"))


def loader(kind: type[TinyLoader] = TinyLoader) -> TinyLoader:
    return kind(rank=RANK, ranks=RANKS)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def whole(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Any] = model.state_dict()
    return {name: getattr(tensor, "full_tensor", tensor.clone)().detach() for name, tensor in state.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def check_losses(
    folder: Path, *, dtype: torch.dtype = torch.float32, kind: type[TinyLoader] = TinyLoader, **options: Any
) -> dict[str, Any]:
    """Losses and logs to be compared with those of one process; frozen weights, tied tables."""
    model = make(dtype=dtype)
    before = whole(model)
    trainer = make_trainer(folder, model=model, loader=loader(kind), **options)
    trainer.train()
    after, frozen = whole(trainer.model), {name for name, p in trainer.model.named_parameters() if not p.requires_grad}
    lm = trainer.model.language_model
    return {
        "losses": losses(trainer),
        "logs": trainer.state.log_history[0],
        "is_sharded": type(trainer.model).__name__.startswith("FSDP"),
        "frozen_are_untouched": all(torch.equal(before[name], after[name]) for name in frozen),
        "tables_are_tied": lm.get_input_embeddings().weight is lm.get_output_embeddings().weight,
        "weights": {name: tensor.double().norm().item() for name, tensor in after.items()},
    }


def check_resume(folder: Path, **options: Any) -> dict[str, Any]:
    """A run with dropout, and one that goes on from its checkpoint in the middle."""
    trainer = make_trainer(folder, model=make(dropout=True), loader=loader(), **SAVING | options)
    trainer.train()
    again = make_trainer(folder, model=make(dropout=True), loader=loader(), **SAVING | options)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return {
        "same_end": same(whole(trainer.model), whole(again.model)),
        "same_losses": losses(trainer) == losses(again),
        "given": again.loader.given,
    }


def check_saving(folder: Path, **options: Any) -> dict[str, Any]:
    """What save_model writes at the end, as one process loads it."""
    trainer = make_trainer(folder, model=make(), loader=loader(), max_steps=1, **options)
    trainer.train()
    trainer.save_model(str(folder / "end"))
    trainer.accelerator.wait_for_everyone()
    loaded = FlamingoForConditionalGeneration.from_pretrained(folder / "end")
    return {
        "same": same(whole(loaded), whole(trainer.model)),
        "class": loaded.config.architectures,
        "trained": sorted(name for name, p in loaded.named_parameters() if p.requires_grad),
    }


def check_parts(folder: Path, model: Any, **options: Any) -> dict[str, Any]:
    """Losses, and for LoRA what is saved at the end."""
    trainer = make_trainer(folder, model=model, loader=loader(), **options)
    trainer.train()
    if hasattr(model, "peft_config"):
        trainer.save_model(str(folder / "end"))
    trainer.accelerator.wait_for_everyone()
    return {"losses": losses(trainer), "saved": saved_norms(folder / "end")}


def check_scalars(folder: Path, **options: Any) -> dict[str, Any]:
    """An encoder that has single numbers for parameters is left out, in the way of the page on scaling."""
    model = make()
    model.vision_encoder.gain = nn.Parameter(torch.ones(()), requires_grad=False)
    with mock.patch.dict(os.environ, {"FSDP_IGNORED_MODULES": "vision_encoder"}):
        return check_parts(folder, model, **options)


def saved_norms(folder: Path) -> dict[str, float]:
    """What PEFT has saved, by name."""
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path) if path.exists() else {}
    return {name: tensor.double().norm().item() for name, tensor in tensors.items()}


class GenerateInBetween(TrainerCallback):
    """The processes end their texts at different times."""

    def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        model.generate(**Prompt.make(model, seed=RANK).inputs, max_new_tokens=2 + 2 * RANK)


def check_use(folder: Path, **options: Any) -> dict[str, Any]:
    """Evaluation and generation, in the middle of training and after it, against one process with the same weights."""
    rows = make_rows("pages", 9)
    keywords = {"eval_dataset": rows, "data_collator": collate, "callbacks": [GenerateInBetween()]}
    options |= {"per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(folder, model=make(), loader=loader(), keywords=keywords, **options)
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    alone = make()
    alone.load_state_dict(whole(trainer.model))
    with torch.no_grad():
        expected = torch.stack([alone.eval()(**collate([row])).loss for row in rows]).mean().item()
    tokens = {"max_new_tokens": 3 + 4 * RANK, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    prompt = Prompt.make(alone, seed=RANK)
    trainer.model.eval()
    generated = [trainer.model.generate(**prompt.inputs, **tokens, **beams) for beams in ({}, {"num_beams": 2})]
    wanted = [alone.generate(**prompt.inputs, **tokens, **beams) for beams in ({}, {"num_beams": 2})]
    with torch.no_grad():
        media = trainer.model.encode_media(prompt.pixel_values, prompt.num_frames)
    return {
        "evaluated": evaluated,
        "expected": expected,
        "generated": all(torch.equal(*pair) for pair in zip(generated, wanted, strict=True)),
        "encoded": torch.allclose(media[0], alone.encode_media(prompt.pixel_values, prompt.num_frames)[0], atol=1e-5),
        "losses": losses(trainer),
    }


class WithoutMedia(TinyLoader):
    """On the first process, text comes without any media, not even padding."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if RANK == 0 and not batch["num_frames"].any():
                del batch["pixel_values"], batch["num_frames"]
            yield batch


DDP: dict[str, Any] = {"ddp_find_unused_parameters": False}
CHECKPOINTING: dict[str, Any] = {"gradient_checkpointing": True}
CHECKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "ddp": lambda folder: check_losses(folder, **DDP),
    "ddp checkpointing": lambda folder: check_losses(folder, **DDP, **CHECKPOINTING),
    "ddp resume": lambda folder: check_resume(folder, **DDP),
    "ddp without media": lambda folder: check_losses(folder, kind=WithoutMedia, **DDP),
    "ddp lora": lambda folder: check_parts(folder, make_with_lora(), **DDP),
    "ddp quantised": lambda folder: check_parts(folder, make_quantised(folder), **DDP),
    "fsdp": lambda folder: check_losses(folder, **FSDP),
    "fsdp checkpointing": lambda folder: check_losses(folder, **FSDP, **CHECKPOINTING),
    "fsdp frozen bf16": lambda folder: check_losses(folder, dtype=torch.bfloat16, **FSDP),
    "fsdp bf16": lambda folder: check_losses(folder, dtype=torch.bfloat16, bf16=True, **FSDP),
    "fsdp without media": lambda folder: check_losses(folder, kind=WithoutMedia, **FSDP),
    "fsdp resume": lambda folder: check_resume(folder, **FSDP),
    "fsdp resume sharded": lambda folder: check_resume(folder, **SHARDED),
    "fsdp scalars": lambda folder: check_scalars(folder, **FSDP),
    "fsdp saving": lambda folder: check_saving(folder, **FSDP),
    "fsdp saving sharded": lambda folder: check_saving(folder, **SHARDED),
    "fsdp use": lambda folder: check_use(folder, **FSDP),
}
# Before, processes that have no weights to save tried to, and PEFT failed.
SAVES_LORA_OF_FSDP = Version(transformers.__version__) >= Version("5.23")
if SAVES_LORA_OF_FSDP:
    CHECKS["fsdp lora"] = lambda folder: check_parts(folder, make_with_lora(), **FSDP)


def main(folder: Path, kinds: list[str]) -> None:
    found: dict[str, list[Any]] = {}
    if kinds == ["as launched"]:
        make_trainer(folder, model=make(), loader=loader())
    tiny_stream.TrainingArguments = Arguments  # type: ignore[attr-defined]
    for name, check in CHECKS.items():
        if name.split()[0] in kinds or name in kinds:
            found[name] = gather_object([check(folder / name)])
    if RANK == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])

"""A tiny Flamingo in transformers' Trainer: examples, a collator, a trainer, and a run that is killed on its way.

Run as a script, it trains into a directory and kills itself at the begin of a step: see `test_trainer.py`.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.tiny_flamingo import make_flamingo
from tests.tiny_language_models import VOCAB

IMAGE = VOCAB


def make_examples(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of six to eight tokens, each with one image."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(count):
        input_ids = torch.randint(10, VOCAB - 5, (8 - i % 3,), generator=generator)
        input_ids[i % 2] = IMAGE
        pixel_values = torch.randn(1, 1, 3, 32, 32, generator=generator)
        examples.append({"input_ids": input_ids, "pixel_values": pixel_values, "source": f"page {i}"})
    return examples


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad to the right, and ask for no loss on padding and on `<image>`."""
    input_ids = torch.nn.utils.rnn.pad_sequence([e["input_ids"] for e in examples], batch_first=True, padding_value=2)
    attention_mask = (input_ids != 2).long()
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.stack([e["pixel_values"] for e in examples]),
        "labels": input_ids.masked_fill((attention_mask == 0) | (input_ids == IMAGE), -100),
    }


def make_trainer(
    output_dir: Path,
    *,
    model: Any = None,
    kind: type[Trainer] = Trainer,
    keywords: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Train on 12 examples, two at a time, for six steps."""
    defaults: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "logging_steps": 1,
    }
    defaults |= {"learning_rate": 1e-2, "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True}
    return kind(
        model=make_flamingo()[0] if model is None else model,
        args=TrainingArguments(output_dir=str(output_dir), **defaults | options),
        data_collator=collate,
        train_dataset=make_examples(12),
        eval_dataset=make_examples(5, seed=1),
        **keywords or {},
    )


def make_resumable_trainer(output_dir: Path, *callbacks: TrainerCallback) -> Any:
    """Train a model with dropout, so that the state of the random numbers counts, and save every second step."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    return make_trainer(output_dir, model=make_flamingo("gpt2")[0], keywords={"callbacks": list(callbacks)}, **options)


class KillAt(TrainerCallback):
    """End the process at the begin of a step, as if the power had failed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_resumable_trainer(Path(sys.argv[1]), KillAt(int(sys.argv[2]))).train()

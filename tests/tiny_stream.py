"""A small stream of two datasets, and trainers that read it: pages with pictures, and text that has none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from flamingo_blocks.training import FlamingoTrainer
from tests.tiny_flamingo import make_flamingo
from tests.tiny_language_models import VOCAB

WEIGHTS = {"pages": 1.0, "captions": 0.2, "text": 0.03}
IMAGE = VOCAB


def make_rows(dataset: str, number: int, *, rows: int = 4) -> list[dict[str, Tensor]]:
    """The rows of a dataset's batch of that number: texts of six to nine tokens.

    Pages have up to two images, the first one none: the process that gets it has nothing but text, the other one media.
    """
    generator = torch.Generator().manual_seed(100 * number + list(WEIGHTS).index(dataset))
    made = []
    for row in range(rows):
        input_ids = torch.randint(10, VOCAB - 5, (6 + (row + number) % 4,), generator=generator)
        media = {"pages": row % 3, "captions": 1, "text": 0}[dataset]
        input_ids[[1, 4][:media]] = IMAGE
        made.append({"input_ids": input_ids, "pixel_values": torch.randn(media, 1, 3, 32, 32, generator=generator)})
    return made


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad to the right. Where there is no image at all, there is one of no frames."""
    input_ids = torch.nn.utils.rnn.pad_sequence([r["input_ids"] for r in rows], batch_first=True, padding_value=2)
    attention_mask = (input_ids != 2).long()
    counts = [len(row["pixel_values"]) for row in rows]
    pixel_values = torch.zeros(len(rows), max(1, *counts), 1, 3, 32, 32)
    for row, images in zip(pixel_values, [row["pixel_values"] for row in rows], strict=True):
        row[: len(images)] = images
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": pixel_values,
        "num_frames": (torch.arange(pixel_values.shape[1]) < torch.tensor(counts)[:, None]).long(),
        "labels": input_ids.masked_fill((attention_mask == 0) | (input_ids == IMAGE), -100),
    }


class TinyLoader:
    """One batch of each dataset in turn. Of four rows, the first of two processes has one, the second three."""

    def __init__(
        self, *, datasets: tuple[str, ...] = tuple(WEIGHTS), rank: int = 0, ranks: int = 1, in_turn: bool = False
    ) -> None:
        self.datasets = datasets
        self.batches_per_step = 1 if in_turn else len(datasets)
        self.rows = [slice(None)] if ranks == 1 else [slice(0, 1), slice(1, None)]
        self.rank = rank
        self.given = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            number, index = divmod(self.given, len(self.datasets))
            self.given += 1
            dataset = self.datasets[index]
            batch: dict[str, Any] = dict(collate(make_rows(dataset, number)[self.rows[self.rank]]))
            yield batch | {"dataset": dataset, "loss_weight": WEIGHTS[dataset]}

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.given = state["given"]


def make_trainer(
    output_dir: Path,
    *,
    model: Any = None,
    loader: TinyLoader | None = None,
    kind: type[FlamingoTrainer] = FlamingoTrainer,
    keywords: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Train four steps, each on one batch of each dataset. gpt2 has dropout, so that random numbers count."""
    loader = TinyLoader() if loader is None else loader
    defaults: dict[str, Any] = {
        "max_steps": 4,
        "gradient_accumulation_steps": loader.batches_per_step,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return kind(
        make_flamingo("gpt2")[0] if model is None else model,
        TrainingArguments(output_dir=str(output_dir), **defaults | options),
        loader=loader,
        **keywords or {},
    )

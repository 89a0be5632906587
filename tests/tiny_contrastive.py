"""Two towers and their loss, in processes that are compared with a single one: see `blocks/test_contrastive.py`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from flamingo_blocks.blocks import ContrastiveLoss

PROCESSES = 2


@dataclass(frozen=True)
class Case:
    """What each process has: its numbers of images and texts, or their ids."""

    images: Sequence[Any]
    texts: Sequence[Any]
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    compiled: bool = False
    log_scale: float = 1.5


CASES = {
    "pairs": Case((3, 3), (3, 3)),
    "many pairs": Case((20, 20), (20, 20)),
    "more pairs in one process": Case((2, 5), (2, 5)),
    "no pairs in one process": Case((4, 0), (4, 0)),
    "several positives, also between processes": Case(([7, 2, 2], [5, 7, 9, 2]), ([2, 7, 9, 9, 5], [7, 2])),
    "positives in the other process alone": Case(([1, 2], [3, 4, 4]), ([4, 3, 3], [2, 1])),
    "a temperature beyond its bound": Case((3, 2), (3, 2), log_scale=5.0),
    "embeddings of 16 bits": Case((3, 2), (3, 2), dtype=torch.bfloat16),
    "autocast": Case((3, 2), (3, 2), dtype=torch.float32, autocast=True),
    "compiled": Case((3, 3), (3, 3), compiled=True),
}
REFUSED = {
    "positives": "positives cannot tell what matches in other processes; give image_ids and text_ids instead",
    "ids in one process": "processes must agree on dim, got [4, 4], and on whether they give ids, got [1, 0]",
    "another dim in one process": "processes must agree on dim, got [4, 5], and on whether they give ids, got [0, 0]",
    "no pairs at all": "image_embeddings and text_embeddings must not be empty",
    "more images in one process": "without positives or ids there must be as many texts as images, got [2, 2], [3, 2]",
    "an image without a text": "every image and every text must have a positive; drop those that have none",
}


class Towers(nn.Module):
    """Two linear towers and the loss over them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.images, self.texts = nn.Linear(3, 4), nn.Linear(3, 4)
        self.loss = ContrastiveLoss(label_smoothing=0.1, gather=True)
        nn.init.constant_(self.loss.log_scale, case.log_scale)
        self.case = case
        self.to(torch.float32 if case.autocast else torch.float64)

    def forward(self, images: Tensor, texts: Tensor, **ids: Tensor) -> Tensor:
        dtype = self.case.dtype
        with torch.autocast("cpu", enabled=self.case.autocast):
            loss: Tensor = self.loss(self.images(images).to(dtype), self.texts(texts).to(dtype), **ids)
        return loss


def inputs(case: Case, ranks: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What some of the processes have, together."""
    generator = torch.Generator().manual_seed(1)
    kinds = []
    for parts in (case.images, case.texts):
        rows = [torch.randn(part if isinstance(part, int) else len(part), 3, generator=generator) for part in parts]
        kinds.append(torch.cat([rows[rank] for rank in ranks]).to(torch.float32 if case.autocast else torch.float64))
    if isinstance(case.images[0], int):
        return kinds[0], kinds[1], {}
    ids = [torch.tensor([i for rank in ranks for i in parts[rank]]) for parts in (case.images, case.texts)]
    return kinds[0], kinds[1], {"image_ids": ids[0], "text_ids": ids[1]}


def run(case: Case, model: nn.Module, ranks: Sequence[int]) -> dict[str, Any]:
    """The loss, the gradients, and the size of the largest tensor that is kept for them."""
    images, texts, ids = inputs(case, ranks)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(images, texts, **ids)
    loss.backward()
    gradients = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), "gradients": gradients, "kept": max(kept)}


def refuse(name: str, rank: int) -> str:
    """What a process says to a batch that cannot be."""
    rows = torch.randn(2, 4)
    ids, others = torch.tensor([1, 2]), torch.tensor([1, 3])
    arguments: dict[str, tuple[Tensor, Tensor, dict[str, Tensor]]] = {
        "positives": (rows, rows, {} if rank else {"positives": torch.eye(2, dtype=torch.bool)}),
        "ids in one process": (rows, rows, {} if rank else {"image_ids": ids, "text_ids": ids}),
        "another dim in one process": (torch.randn(2, 4 + rank), torch.randn(2, 4 + rank), {}),
        "no pairs at all": (rows[:0], rows[:0], {}),
        "more images in one process": (torch.randn(3 - rank, 4), rows, {}),
        "an image without a text": (rows, rows, {"image_ids": ids if rank else others, "text_ids": ids}),
    }
    images, texts, options = arguments[name]
    try:
        ContrastiveLoss(gather=True)(images, texts, **options)
    except ValueError as error:
        return str(error)
    return ""


@contextmanager
def group_of_one() -> Iterator[None]:
    """This process alone, as a group that gathers."""
    with TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            yield
        finally:
            distributed.destroy_process_group()


def main(rank: int, folder: str) -> None:
    """One of the processes; it writes what it finds."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        model = Towers(case)
        if case.compiled:
            model.loss.compile(backend="eager")
        found[name] = run(case, DistributedDataParallel(model), [rank])
    for name in REFUSED:
        found[name] = refuse(name, rank)
    torch.save(found, Path(folder, f"{rank}.pt"))
    distributed.destroy_process_group()

"""The plan is what is allocated: on one process, and on each of two and three that share a model."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from flamingo_blocks import FlamingoForConditionalGeneration
from flamingo_blocks.memory_plan import MemoryPlan, Optimizer, memory_plan
from tests.tiny_flamingo import Prompt, make_flamingo

OPTIMIZERS: dict[Optimizer, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
}


class Layers(nn.Module):
    """A table for both ends, buffers, something frozen, odd sizes, a number without an axis, several dtypes."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.frozen = nn.Linear(6, 5, dtype=torch.bfloat16).requires_grad_(False)
        self.norm = nn.BatchNorm1d(5)
        self.linear = nn.Linear(5, 6, dtype=dtype)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.gate = nn.Parameter(torch.ones(1))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(self.frozen(self.embedding(ids).bfloat16()).float())
        logits: Tensor = self.head(self.linear(hidden.to(self.linear.weight.dtype)).float() * self.gate * self.scale)
        return logits.sum()


def loss_of(model: Any) -> Tensor:
    if isinstance(model, Layers):
        return model(torch.arange(4))
    prompt = Prompt.make(getattr(model, "module", model))
    return model(**prompt.inputs, labels=prompt.input_ids).loss


MODELS: dict[str, Callable[[], Any]] = {
    "layers": Layers,
    "layers, trained in one dtype": lambda: Layers(torch.float32),  # as FSDP2 wants it
    "tied": lambda: make_flamingo("gpt2")[0],
    "frozen in bfloat16": lambda: make_flamingo("llama", dtype=torch.bfloat16)[0],
    "no new tokens": lambda: make_flamingo("llama", image_token_is_new=False, end_of_chunk_token="<eos>")[0],
    "all trained": lambda: make_flamingo("gpt2", "resnet", freeze=())[0],
}


def storages(tensors: Iterable[Any]) -> int:
    """Sum the storages of tensors, shared ones once; of those that are spread over processes, what is here."""
    found = {}
    for tensor in tensors:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def by_dtype(parameters: Iterable[Any], *, trained: bool) -> dict[torch.dtype, int]:
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.requires_grad == trained:
            kinds.setdefault(parameter.dtype, []).append(parameter)
    return {dtype: storages(tensors) for dtype, tensors in kinds.items()}


def allocated(model: Any, optimizer: Optimizer = "adamw", *, buckets: int = 0) -> MemoryPlan:
    """Train by a step, and find what is there."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    loss_of(model).backward()
    made = OPTIMIZERS[optimizer](trained)
    made.step()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in parameters)
    return MemoryPlan(
        trained=by_dtype(parameters, trained=True),
        frozen=by_dtype(parameters, trained=False),
        buffers=storages(model.buffers()),
        gradients=storages(parameter.grad for parameter in trained),
        buckets=buckets,
        optimizer_state=storages(
            value for state in made.state.values() for value in state.values() if value is not None
        ),
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_plan_is_what_is_allocated(name: str, optimizer: Optimizer) -> None:
    model = MODELS[name]().train()
    plan = memory_plan(model, optimizer=optimizer)
    found = allocated(model, optimizer)
    assert plan == found
    assert plan.total == storages(model.parameters()) + found.buffers + found.gradients + found.optimizer_state


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_plan_of_a_model_without_data_is_that_of_the_real_one(name: str) -> None:
    model, _ = make_flamingo(name, dtype=torch.bfloat16)
    with torch.device("meta"):
        without_data = FlamingoForConditionalGeneration(copy.deepcopy(model.config))
    assert memory_plan(without_data) == memory_plan(model)


@given(rows=st.integers(1, 12), columns=st.integers(1, 3), world_size=st.integers(1, 9))
def test_processes_hold_the_chunks_of_each_parameter_and_room_for_the_first(
    rows: int, columns: int, world_size: int
) -> None:
    model = nn.Linear(columns, rows, bias=False)
    # What fully_shard takes; where there are too few rows, the last processes have none.
    chunks = [chunk.numel() * 4 for chunk in model.weight.chunk(world_size)]
    chunks += [0] * (world_size - len(chunks))
    for rank, chunk in enumerate(chunks):
        plan = memory_plan(model, world_size=world_size, sharding="fsdp", rank=rank)
        assert plan.trained == {torch.float32: chunks[0]}
        assert plan.gradients == chunks[0]
        assert plan.optimizer_state == 2 * chunk + 4


def test_only_copies_of_a_model_send_gradients_in_buckets() -> None:
    model = MODELS["tied"]()
    alone, copies = memory_plan(model), memory_plan(model, world_size=2, rank=1)
    assert alone.buckets == memory_plan(model, sharding="fsdp").buckets == 0
    assert memory_plan(model, sharding="fsdp", world_size=2).buckets == 0
    assert copies.buckets == alone.gradients > 0
    assert copies.total == alone.total + alone.gradients


def test_buffers_and_single_numbers_are_whole_everywhere() -> None:
    plan = memory_plan(Layers(), world_size=1000, sharding="fsdp", rank=999)
    assert plan.buffers == memory_plan(Layers()).buffers > 0
    # Of all that is trained, the scale alone is here, with its moments; and each has counted its steps.
    assert plan.optimizer_state == 2 * 4 + 4 * 7


def test_people_can_read_it() -> None:
    plan = MemoryPlan(
        trained={torch.float32: 2**30}, frozen={torch.bfloat16: 2**29}, buffers=0, gradients=2**30, buckets=0,
        optimizer_state=2**31,
    )  # fmt: skip
    lines = [line.split() for line in str(plan).splitlines()]
    assert lines[0] == ["trained,", "float32", "1.00", "GiB"]
    assert lines[1] == ["frozen,", "bfloat16", "0.50", "GiB"]
    assert lines[-1] == ["total", "4.50", "GiB"]
    assert str(memory_plan(Layers())).endswith("MiB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 0}, "world_size must be at least 1, got 0"),
        ({"world_size": 2, "rank": 2}, "rank must be from 0 to 1, world_size - 1, got 2"),
        ({"rank": -1}, "rank must be from 0 to 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory_plan(nn.Linear(2, 2), **options)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharding": "zero1"}, "sharding must be one of ddp, fsdp, got 'zero1'"),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, momentum, sgd, got 'lion'"),
    ],
)
def test_unknown_names_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory_plan(nn.Linear(2, 2), **options)


def test_parameters_whose_bytes_are_elsewhere_are_refused() -> None:
    class Packed(nn.Parameter):
        """Stands for what quantisation makes of a parameter."""

    model = nn.Linear(2, 2)
    model.weight = Packed(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="parameters must be plain ones, but weight is a Packed; plan for the model"):
        memory_plan(model)


# ---------------------------------------------------------------- several processes


def shard(model: Any) -> Any:
    """Shard a model as it is trained: each layer and block by itself, the rest together."""
    if isinstance(model, FlamingoForConditionalGeneration):
        lm: Any = model.language_model
        for layer in [*lm.transformer.h, *model.injector.blocks.values(), *model.resampler.layers]:
            fully_shard(layer)
    numbers = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    return fully_shard(model, ignored_params=numbers)


def compare_on_this_process(rank: int, world_size: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    for name in ("layers, trained in one dtype", "tied"):
        model = MODELS[name]().train()
        plan = memory_plan(model, world_size=world_size, sharding="fsdp", rank=rank)
        assert plan == allocated(shard(model)), f"{name} on rank {rank} of {world_size}"
        totals = [torch.tensor(0) for _ in range(world_size)]
        dist.all_gather(totals, torch.tensor(plan.total))
        assert rank > 0 or plan.total == max(map(int, totals)), "the first holds most"
    model = MODELS["tied"]().train()
    plan = memory_plan(model, world_size=world_size, rank=rank)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        copies = DistributedDataParallel(model)
    events: Any = profiler.profiler
    changes = [event.nbytes() for event in events.kineto_results.events() if event.name() == "[memory]"]
    # So little is one bucket. What else is made here, to bring the copies in step, goes again.
    assert changes.count(plan.buckets) == 1
    assert -plan.buckets not in changes
    assert plan.gradients == allocated(copies).gradients, "beside the buckets"
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_each_process_holds_what_is_planned_for_it(world_size: int, tmp_path: Path) -> None:
    spawn(compare_on_this_process, (world_size, str(tmp_path / "store")), nprocs=world_size)

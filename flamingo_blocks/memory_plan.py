"""memory_plan: what training holds on each GPU from step to step, by exact arithmetic.

Activations are not in it. They depend on the text and on what is recomputed, and are measured: `benchmarks/memory.py`.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

Sharding = Literal["ddp", "fsdp"]
Optimizer = Literal["adamw", "momentum", "sgd"]
# How many tensors of its size an optimizer keeps for a parameter, and the bytes of its count of steps.
_STATE: Mapping[Optimizer, tuple[int, int]] = {"adamw": (2, 4), "momentum": (1, 0), "sgd": (0, 0)}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU. `print` it for a table.

    Attributes:
        trained: Parameters that are trained, by dtype.
        frozen: The other parameters, by dtype.
        buffers: Such as tables of positions. They are on each GPU.
        gradients: Of what is trained, in its dtype; also under autocast, which computes them in another one.
        buckets: In which DistributedDataParallel sends gradients: a copy of them. With `gradient_as_bucket_view=True`
            there is none.
        optimizer_state: In the dtype of what is trained.
    """

    trained: Mapping[torch.dtype, int]
    frozen: Mapping[torch.dtype, int]
    buffers: int
    gradients: int
    buckets: int
    optimizer_state: int

    @property
    def total(self) -> int:
        """All of it."""
        parameters = sum(self.trained.values()) + sum(self.frozen.values())
        return parameters + self.buffers + self.gradients + self.buckets + self.optimizer_state

    def __str__(self) -> str:
        rows = [
            *((f"trained, {str(dtype).removeprefix('torch.')}", size) for dtype, size in self.trained.items()),
            *((f"frozen, {str(dtype).removeprefix('torch.')}", size) for dtype, size in self.frozen.items()),
            ("buffers", self.buffers),
            ("gradients", self.gradients),
            ("buckets", self.buckets),
            ("optimizer state", self.optimizer_state),
            ("total", self.total),
        ]
        unit, scale = ("GiB", 2**30) if self.total >= 2**30 else ("MiB", 2**20)
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {size / scale:10,.2f} {unit}" for name, size in rows)


def memory_plan(
    model: nn.Module,
    *,
    world_size: int = 1,
    sharding: Sharding = "ddp",
    optimizer: Optimizer = "adamw",
    rank: int = 0,
) -> MemoryPlan:
    """Add up what training a model holds on one GPU when a backward has ended, before gradients are dropped.

    That is what is allocated, byte for byte; what CUDA's allocator adds by rounding is not counted. Beside it there
    must be room for activations, and with `"fsdp"` for the layers that are gathered whole while they run: their
    parameters, and those trained once more for gradients.

    Args:
        model: Any module, before it is wrapped or sharded. On the meta device it costs no memory. Parameters that are
            tied count once.
        world_size: Number of GPUs.
        sharding: `"ddp"`: each GPU holds everything. `"fsdp"`: FSDP2's `fully_shard` divides parameters, gradients and
            optimizer state by their first axis, as ZeRO-3 does; each GPU has room for as many rows of a parameter as
            the first GPU. A parameter that is a single number without an axis, such as NFNet's gains, is whole on each;
            `fully_shard` takes a model with such ones only if they are among its `ignored_params`.
        optimizer: `"adamw"`, also for Adam; `"momentum"`: SGD with it; `"sgd"`: without.
        rank: Of the GPU. The first one, 0, holds most.

    Raises:
        ValueError: If a number or a name is none of these, or a parameter is sharded already or quantised.

    Example:
        ```python
        import torch
        from flamingo_blocks import GatedCrossAttentionBlock
        from flamingo_blocks.memory_plan import memory_plan

        with torch.device("meta"):  # shapes only; so can be made a whole `flamingo_80b()`
            block = GatedCrossAttentionBlock(dim=8192, media_dim=1536, heads=64)
        print(memory_plan(block, world_size=8, sharding="fsdp"))
        ```

    Source: Rajbhandari et al. 2020 (ZeRO). Alayrac et al. 2022, appendix B.1.2, divide the optimizer state (stage 1)
    and split layers; neither is here.
    """
    _check(world_size, sharding, optimizer, rank)
    tensors, step_bytes = _STATE[optimizer]
    trained, frozen, optimizer_state = Counter[torch.dtype](), Counter[torch.dtype](), 0
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise ValueError(
                f"parameters must be plain ones, but {name} is a {type(parameter).__name__}; plan for the model before "
                "it is sharded or quantised"
            )
        room = real = rows = parameter.shape[0] if parameter.ndim else 1
        row_bytes = parameter.shape[1:].numel() * parameter.element_size()
        if sharding == "fsdp" and parameter.ndim:
            # Each GPU has room for as many rows as the first, so that all send alike, but its own may be fewer.
            room = math.ceil(rows / world_size)
            real = min(room, max(0, rows - rank * room))
        (trained if parameter.requires_grad else frozen)[parameter.dtype] += room * row_bytes
        if parameter.requires_grad:
            optimizer_state += tensors * real * row_bytes + step_bytes
    gradients = trained.total()
    return MemoryPlan(
        trained=dict(trained),
        frozen=dict(frozen),
        buffers=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        gradients=gradients,
        buckets=gradients if sharding == "ddp" and world_size > 1 else 0,
        optimizer_state=optimizer_state,
    )


def _check(world_size: int, sharding: str, optimizer: str, rank: int) -> None:
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to {world_size - 1}, world_size - 1, got {rank}")
    for name, value, choices in (("sharding", sharding, Sharding), ("optimizer", optimizer, Optimizer)):
        if value not in get_args(choices):
            raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")

"""Write docs/assets/memory_plan.md: what training the paper's three sizes takes, planned on the meta device.

python docs/figures/memory_plan.py
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from flamingo_blocks import FlamingoConfig, FlamingoForConditionalGeneration, flamingo_3b, flamingo_9b, flamingo_80b
from flamingo_blocks.memory_plan import MemoryPlan, Sharding, memory_plan

OUT = Path(__file__).parents[1] / "assets" / "memory_plan.md"
PRESETS = {"Flamingo-3B": flamingo_3b, "Flamingo-9B": flamingo_9b, "Flamingo-80B": flamingo_80b}
WAYS: tuple[tuple[int, Sharding], ...] = ((1, "ddp"), (8, "ddp"), (8, "fsdp"), (64, "ddp"), (64, "fsdp"))


def build(preset: Callable[[], FlamingoConfig]) -> FlamingoForConditionalGeneration:
    """Build a preset on the meta device."""
    with torch.device("meta"):
        return FlamingoForConditionalGeneration(preset())


def row(name: str, world_size: int, sharding: Sharding, plan: MemoryPlan) -> str:
    """Write a plan as a row of the table."""
    sizes = (
        plan.trained[torch.float32],
        plan.frozen[torch.bfloat16] + plan.buffers,
        plan.gradients,
        plan.buckets,
        plan.optimizer_state,
        plan.total,
    )
    way = "" if world_size == 1 else {"ddp": "DDP", "fsdp": "FSDP2"}[sharding]
    *parts, total = (f"{size / 2**30:,.1f}" for size in sizes)
    return f"| {' | '.join((name, str(world_size), way, *parts, f'**{total}**'))} |"


def table(build: Callable[[Callable[[], FlamingoConfig]], Any] = build) -> str:
    """Build the presets and tabulate their plans, in GiB."""
    lines = [
        "| | GPUs | | trained, float32 | frozen, bfloat16 | gradients | buckets | AdamW | GiB on each GPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, preset in PRESETS.items():
        model = build(preset)
        for world_size, sharding in WAYS:
            plan = memory_plan(model, world_size=world_size, sharding=sharding)
            lines.append(row(name, world_size, sharding, plan))
    return "\n".join(lines) + "\n"


def versions() -> str:
    """Say that nothing of it was measured, and with which versions the shapes were made."""
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "timm"))
    return f"\nComputed from shapes, not measured; {packages}.\n"


if __name__ == "__main__":
    OUT.write_text(table() + versions())

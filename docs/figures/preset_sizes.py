"""Write docs/assets/preset_sizes.md: what the presets' shapes amount to, beside what the paper says.

python docs/figures/preset_sizes.py
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flamingo_blocks import FlamingoConfig, FlamingoForConditionalGeneration, flamingo_3b, flamingo_9b, flamingo_80b

OUT = Path(__file__).parents[1] / "assets" / "preset_sizes.md"
# Alayrac et al. 2022, table 5 and appendix B.1: vision encoder, resampler, gated blocks, language model, all.
PAPER = {
    "Flamingo-3B": (flamingo_3b, "435M", "194M", "1.2B", "1.4B", "3.2B"),
    "Flamingo-9B": (flamingo_9b, "435M", "194M", "1.6B", "7.1B", "9.3B"),
    "Flamingo-80B": (flamingo_80b, "435M", "194M", "10B", "70B", "80B"),
}


def count(modules: Iterable[nn.Module]) -> int:
    """Count the parameters of modules, shared ones once."""
    return sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values())


def show(number: int) -> str:
    """Round to three digits."""
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.0f}M"


def build(preset: Callable[[], FlamingoConfig]) -> FlamingoForConditionalGeneration:
    """Build a preset on the meta device."""
    with torch.device("meta"):
        return FlamingoForConditionalGeneration(preset())


def table(build: Callable[[Callable[[], FlamingoConfig]], Any] = build) -> str:
    """Build the presets and tabulate them."""
    parts = ("vision encoder", "resampler", "gated blocks", "language model", "all")
    lines = [f"| | {' | '.join(parts)} |", "|---" * (len(parts) + 1) + "|"]
    for name, (preset, *papers) in PAPER.items():
        model = build(preset)
        ours = [model.vision_encoder, model.resampler, model.injector, model.language_model, model]
        cells = (f"{show(count([part]))} ({paper})" for part, paper in zip(ours, papers, strict=True))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    OUT.write_text(table())

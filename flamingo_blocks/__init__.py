"""The building blocks of Flamingo, for any Hugging Face decoder and any timm backbone.

Names are imported when they are first used (PEP 562), so that users of a single block pay for torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flamingo_blocks.blocks import (
        GatedCrossAttentionBlock,
        MediaRuns,
        PerceiverResampler,
        media_index,
        media_ranges,
    )
    from flamingo_blocks.injection import LMLayerInjector
    from flamingo_blocks.vision import VisionEncoder

_MODULES = {
    "GatedCrossAttentionBlock": "flamingo_blocks.blocks",
    "LMLayerInjector": "flamingo_blocks.injection",
    "MediaRuns": "flamingo_blocks.blocks",
    "PerceiverResampler": "flamingo_blocks.blocks",
    "VisionEncoder": "flamingo_blocks.vision",
    "media_index": "flamingo_blocks.blocks",
    "media_ranges": "flamingo_blocks.blocks",
}

__all__ = [
    "GatedCrossAttentionBlock",
    "LMLayerInjector",
    "MediaRuns",
    "PerceiverResampler",
    "VisionEncoder",
    "media_index",
    "media_ranges",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

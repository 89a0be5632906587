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
    from flamingo_blocks.builder import build_flamingo
    from flamingo_blocks.configuration_flamingo import FlamingoConfig
    from flamingo_blocks.injection import LMLayerInjector
    from flamingo_blocks.media_cache import MediaCache
    from flamingo_blocks.modeling_flamingo import FlamingoForConditionalGeneration
    from flamingo_blocks.optimization import parameter_groups
    from flamingo_blocks.presets import flamingo_3b, flamingo_9b, flamingo_80b
    from flamingo_blocks.processing_flamingo import FlamingoProcessor
    from flamingo_blocks.vision import VisionEncoder

_MODULES = {
    "FlamingoConfig": "flamingo_blocks.configuration_flamingo",
    "FlamingoForConditionalGeneration": "flamingo_blocks.modeling_flamingo",
    "FlamingoProcessor": "flamingo_blocks.processing_flamingo",
    "GatedCrossAttentionBlock": "flamingo_blocks.blocks",
    "LMLayerInjector": "flamingo_blocks.injection",
    "MediaCache": "flamingo_blocks.media_cache",
    "MediaRuns": "flamingo_blocks.blocks",
    "PerceiverResampler": "flamingo_blocks.blocks",
    "VisionEncoder": "flamingo_blocks.vision",
    "build_flamingo": "flamingo_blocks.builder",
    "flamingo_3b": "flamingo_blocks.presets",
    "flamingo_80b": "flamingo_blocks.presets",
    "flamingo_9b": "flamingo_blocks.presets",
    "media_index": "flamingo_blocks.blocks",
    "media_ranges": "flamingo_blocks.blocks",
    "parameter_groups": "flamingo_blocks.optimization",
}

__all__ = [
    "FlamingoConfig",
    "FlamingoForConditionalGeneration",
    "FlamingoProcessor",
    "GatedCrossAttentionBlock",
    "LMLayerInjector",
    "MediaCache",
    "MediaRuns",
    "PerceiverResampler",
    "VisionEncoder",
    "build_flamingo",
    "flamingo_3b",
    "flamingo_9b",
    "flamingo_80b",
    "media_index",
    "media_ranges",
    "parameter_groups",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

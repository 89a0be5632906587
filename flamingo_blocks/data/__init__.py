"""Data the paper's way: documents of text and media from many sources, packed, mixed and weighted.

Source: Alayrac et al. 2022 (Flamingo), section 2.4 and appendix A.3.
"""

from flamingo_blocks.data.document import CorruptSample, Document, Medium
from flamingo_blocks.data.feature_cache import CacheReport, FeatureCache, write_feature_cache
from flamingo_blocks.data.source import IndexedSource, Source

__all__ = [
    "CacheReport",
    "CorruptSample",
    "Document",
    "FeatureCache",
    "IndexedSource",
    "Medium",
    "Source",
    "write_feature_cache",
]

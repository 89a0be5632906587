"""Data the paper's way: documents of text and media from many sources, packed, mixed and weighted.

Source: Alayrac et al. 2022 (Flamingo), section 2.4 and appendix A.3.
"""

from flamingo_blocks.data.collate import collate, separates_documents
from flamingo_blocks.data.document import CorruptSample, Document, Medium
from flamingo_blocks.data.examples import Example, ExampleMaker
from flamingo_blocks.data.feature_cache import CacheReport, FeatureCache, write_feature_cache
from flamingo_blocks.data.html import FolderResolver, document_from_html
from flamingo_blocks.data.interleaved import document_from_mmc4, document_from_obelics
from flamingo_blocks.data.mixture import Mixture, MixtureDataset
from flamingo_blocks.data.packing import Packer
from flamingo_blocks.data.pairs import PairFolder, document_from_pair, pair_from_sample
from flamingo_blocks.data.records import JsonLinesSource, ParquetSource
from flamingo_blocks.data.shards import TarSource, write_shards
from flamingo_blocks.data.source import IndexedSource, Source
from flamingo_blocks.data.stream import Position, Stream

__all__ = [
    "CacheReport",
    "CorruptSample",
    "Document",
    "Example",
    "ExampleMaker",
    "FeatureCache",
    "FolderResolver",
    "IndexedSource",
    "JsonLinesSource",
    "Medium",
    "Mixture",
    "MixtureDataset",
    "Packer",
    "PairFolder",
    "ParquetSource",
    "Position",
    "Source",
    "Stream",
    "TarSource",
    "collate",
    "document_from_html",
    "document_from_mmc4",
    "document_from_obelics",
    "document_from_pair",
    "pair_from_sample",
    "separates_documents",
    "write_feature_cache",
    "write_shards",
]

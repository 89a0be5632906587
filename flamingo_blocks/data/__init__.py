"""Data the paper's way: documents of text and media from many sources, packed, mixed and weighted.

Source: Alayrac et al. 2022 (Flamingo), section 2.4 and appendix A.3.
"""

from flamingo_blocks.data.collate import collate, separates_documents
from flamingo_blocks.data.document import CorruptSample, Document, Medium
from flamingo_blocks.data.examples import Example, ExampleMaker
from flamingo_blocks.data.html import FolderResolver, document_from_html
from flamingo_blocks.data.mixture import Mixture, MixtureDataset
from flamingo_blocks.data.packing import Packer
from flamingo_blocks.data.source import IndexedSource, Source
from flamingo_blocks.data.stream import Position, Stream

__all__ = [
    "CorruptSample",
    "Document",
    "Example",
    "ExampleMaker",
    "FolderResolver",
    "IndexedSource",
    "Medium",
    "Mixture",
    "MixtureDataset",
    "Packer",
    "Position",
    "Source",
    "Stream",
    "collate",
    "document_from_html",
    "separates_documents",
]

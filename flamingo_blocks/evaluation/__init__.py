"""Few-shot evaluation as in the paper: prompts, support, ranking and generation, and the metrics.

Source: Alayrac et al. 2022 (Flamingo), section 2.5 and appendix A.2.
"""

from flamingo_blocks.evaluation.generation import generate_answers
from flamingo_blocks.evaluation.prompts import (
    CAPTIONING,
    CLASSIFICATION,
    HATEFUL_MEMES,
    VQA,
    Example,
    Prompt,
    Template,
    write_prompt,
)
from flamingo_blocks.evaluation.rices import RicesSupport, media_vectors
from flamingo_blocks.evaluation.support import FixedSupport, RandomSupport, SupportSelector, permutations

__all__ = [
    "CAPTIONING",
    "CLASSIFICATION",
    "HATEFUL_MEMES",
    "VQA",
    "Example",
    "FixedSupport",
    "Prompt",
    "RandomSupport",
    "RicesSupport",
    "SupportSelector",
    "Template",
    "generate_answers",
    "media_vectors",
    "permutations",
    "write_prompt",
]

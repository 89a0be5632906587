"""Few-shot evaluation as in the paper: prompts, support, ranking and generation, and the metrics.

Source: Alayrac et al. 2022 (Flamingo), section 2.5 and appendix A.2.
"""

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
from flamingo_blocks.evaluation.ranking import LengthNormalization, score_candidates

__all__ = [
    "CAPTIONING",
    "CLASSIFICATION",
    "HATEFUL_MEMES",
    "VQA",
    "Example",
    "LengthNormalization",
    "Prompt",
    "Template",
    "score_candidates",
    "write_prompt",
]

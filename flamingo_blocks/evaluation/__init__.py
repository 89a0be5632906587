"""Few-shot evaluation as in the paper: prompts, support, ranking and generation, and the metrics.

Source: Alayrac et al. 2022 (Flamingo), section 2.5 and appendix A.2.
"""

from flamingo_blocks.evaluation.annotations import (
    read_coco_captions,
    read_examples,
    read_hateful_memes,
    read_image_folder,
    read_karpathy,
    read_text_vqa,
    read_vizwiz,
    read_vqa,
    write_examples,
)
from flamingo_blocks.evaluation.answers import Answer, AnswerLog
from flamingo_blocks.evaluation.benchmarks import BENCHMARKS, Benchmark, read_benchmark, read_own_benchmark
from flamingo_blocks.evaluation.cider import cider
from flamingo_blocks.evaluation.classification import roc_auc, top_1
from flamingo_blocks.evaluation.few_shot import Options, Scores, evaluate, read_scores, score_answers
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
from flamingo_blocks.evaluation.ptb_tokenizer import tokenize_caption
from flamingo_blocks.evaluation.ranking import LengthNormalization, score_candidates
from flamingo_blocks.evaluation.rices import RicesSupport, media_vectors
from flamingo_blocks.evaluation.support import FixedSupport, RandomSupport, SupportSelector, permutations
from flamingo_blocks.evaluation.vqa import normalize_answer, vqa_accuracy

__all__ = [
    "BENCHMARKS",
    "CAPTIONING",
    "CLASSIFICATION",
    "HATEFUL_MEMES",
    "VQA",
    "Answer",
    "AnswerLog",
    "Benchmark",
    "Example",
    "FixedSupport",
    "LengthNormalization",
    "Options",
    "Prompt",
    "RandomSupport",
    "RicesSupport",
    "Scores",
    "SupportSelector",
    "Template",
    "cider",
    "evaluate",
    "generate_answers",
    "media_vectors",
    "normalize_answer",
    "permutations",
    "read_benchmark",
    "read_coco_captions",
    "read_examples",
    "read_hateful_memes",
    "read_image_folder",
    "read_karpathy",
    "read_own_benchmark",
    "read_scores",
    "read_text_vqa",
    "read_vizwiz",
    "read_vqa",
    "roc_auc",
    "score_answers",
    "score_candidates",
    "tokenize_caption",
    "top_1",
    "vqa_accuracy",
    "write_examples",
    "write_prompt",
]

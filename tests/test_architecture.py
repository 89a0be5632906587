"""What keeps the package small: who may import whom, what is public, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flamingo_blocks
from flamingo_blocks import blocks

PACKAGE = Path(flamingo_blocks.__file__).parent
TORCH_ALONE = {"torch", "einops", "jaxtyping"}
# Lowest layer first: a module imports only from layers before its own.
LAYERS = [
    "blocks.media_mask",
    "blocks.feed_forward",
    "blocks.attention",
    "blocks.media_features",
    "blocks.perceiver_resampler",
    "blocks.resampler_baselines",
    "blocks.gated_cross_attention",
    "blocks.contrastive",
    "blocks",
    "scopes",
    "residual_stream",
    "injection",
    "language",
    "vision",
    "new_tokens",
    "optimization",
    "memory_plan",
    "media_cache",
    "media_encoding",
    "parts",
    "configuration_flamingo",
    "backbones",
    "adapter",
    "generation_flamingo",
    "modeling_flamingo",
    "video",
    "chat",
    "processing_flamingo",
    "builder",
    "presets",
    "training",
    "convert",
    "convert.renaming",
    "convert.checkpoint",
    "convert.clip_vision",
    "convert.assembly",
    "convert.token_tables",
    "convert.flamingo_pytorch",
    "convert.open_flamingo",
    "convert.idefics",
    "convert.flamingo_mini",
    "convert.mllama",
    "convert.__main__",
    "data.document",
    "data.html",
    "data.source",
    "data.writing",
    "data.reading",
    "data.examples",
    "data.packing",
    "data.collate",
    "data.stream",
    "data.mixture",
    "data.shards",
    "data.records",
    "data.pairs",
    "data.interleaved",
    "data.feature_cache",
    "data",
    "evaluation.prompts",
    "evaluation.annotations",
    "evaluation.support",
    "evaluation.benchmarks",
    "evaluation.rices",
    "evaluation.generation",
    "evaluation.ranking",
    "evaluation.vqa",
    "evaluation.ptb_tokenizer",
    "evaluation.cider",
    "evaluation.classification",
    "evaluation.answers",
    "evaluation.few_shot",
    "evaluation",
    "evaluation.__main__",
    "",
]
MAY_ALSO_IMPORT = {
    "data.html": {"selectolax"},
    "language": {"transformers"},
    "vision": {"timm"},
    "configuration_flamingo": {"huggingface_hub", "transformers"},
    "backbones": {"huggingface_hub", "timm", "transformers"},
    "adapter": {"huggingface_hub", "safetensors", "timm", "transformers"},
    "generation_flamingo": {"transformers"},
    "modeling_flamingo": {"transformers", "timm"},
    "video": {"PIL", "av", "numpy"},
    "chat": {"huggingface_hub"},
    "processing_flamingo": {"numpy", "PIL", "timm", "transformers"},
    "builder": {"timm", "transformers"},
    "presets": {"transformers"},
    "training": {"accelerate", "transformers"},
    "convert.checkpoint": {"safetensors", "tqdm", "transformers"},
    "convert.assembly": {"transformers"},
    "convert.open_flamingo": {"transformers"},
    "convert.idefics": {"transformers"},
    "convert.flamingo_mini": {"transformers"},
    "convert.mllama": {"transformers"},
    "data.records": {"pyarrow"},
    "data.feature_cache": {"safetensors", "tqdm"},
    "evaluation.few_shot": {"matplotlib"},
    "evaluation.__main__": {"tqdm", "transformers"},
    "evaluation.rices": {"safetensors", "tqdm"},
}


def modules() -> dict[str, Path]:
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): path for name, path in paths.items()}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
    return names


def test_every_module_has_its_place() -> None:
    assert sorted(modules()) == sorted(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_imports_point_only_to_lower_layers(module: str) -> None:
    lower = LAYERS[: LAYERS.index(module)]
    allowed = TORCH_ALONE | set(sys.stdlib_module_names) | MAY_ALSO_IMPORT.get(module, set())
    for name in imports(modules()[module]):
        if name.split(".")[0] == "flamingo_blocks":
            assert name.removeprefix("flamingo_blocks.") in lower, f"{module} imports {name}"
        else:
            assert name.split(".")[0] in allowed, f"{module} imports {name}"


def test_checked_modules_keep_their_annotations_at_run_time() -> None:
    for name, path in modules().items():
        assert "__future__" not in imports(path), f"{name}: jaxtyping would silently check nothing"


def test_the_public_names_are_these() -> None:
    assert sorted(flamingo_blocks.__all__) == [
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
        "flamingo_80b",
        "flamingo_9b",
        "media_index",
        "media_ranges",
        "parameter_groups",
    ]
    assert sorted(blocks.__all__) == [
        "Algorithm",
        "Attend",
        "ContrastiveLoss",
        "FeedForward",
        "GatedCrossAttentionBlock",
        "KeyValues",
        "LinearResampler",
        "MLPResampler",
        "MeanPoolResampler",
        "MediaFeatures",
        "MediaRun",
        "MediaRuns",
        "PerceiverLayer",
        "PerceiverResampler",
        "SquaredReLU",
        "SwiGLU",
        "TanhGate",
        "TransformerResampler",
        "attend_to_media",
        "choose_algorithm",
        "dense_media_mask",
        "media_index",
        "media_ranges",
        "ranges_of_mask",
    ]


def test_every_public_name_can_be_had_and_no_other() -> None:
    assert sorted(flamingo_blocks._MODULES) == sorted(flamingo_blocks.__all__)
    for name in flamingo_blocks.__all__:
        assert getattr(flamingo_blocks, name).__name__ == name
        assert name in dir(flamingo_blocks)
    with pytest.raises(AttributeError, match="has no attribute 'Flamingo'"):
        flamingo_blocks.Flamingo  # noqa: B018


def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize(
    "statement", ["import flamingo_blocks", "import flamingo_blocks.blocks, flamingo_blocks.injection"]
)
def test_blocks_need_torch_alone(statement: str) -> None:
    code = f"import torch, sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in result.stdout.split()} - set(sys.stdlib_module_names)
    assert loaded <= {"flamingo_blocks", *TORCH_ALONE, "numpy", "typing_extensions", "wadler_lindig"}, "beyond torch"

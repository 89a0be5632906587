"""What keeps the package small: who may import whom, what is public, and what an import costs."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import flamingo_blocks
from flamingo_blocks import blocks

PACKAGE = Path(flamingo_blocks.__file__).parent
TORCH_ALONE = {"torch", "einops", "jaxtyping"}
# Lowest layer first, and in each layer the lowest module first: a module imports only from modules before its own.
# docs/architecture.md says what each layer is for, and python -m docs.figures.import_layers draws them.
LAYERS = {
    "blocks": [
        "blocks.media_mask",
        "blocks.feed_forward",
        "blocks.attention",
        "blocks.media_features",
        "blocks.perceiver_resampler",
        "blocks.resampler_baselines",
        "blocks.gated_cross_attention",
        "blocks.contrastive",
        "blocks",
    ],
    "injection": [
        "scopes",
        "residual_stream",
        "injection",
        "language",
        "vision",
    ],
    "components": [
        "new_tokens",
        "optimization",
        "memory_plan",
        "media_cache",
        "media_encoding",
        "parts",
        "configuration_flamingo",
        "backbones",
        "adapter",
    ],
    "model": [
        "generation_flamingo",
        "modeling_flamingo",
    ],
    "processing": [
        "video",
        "chat",
        "processing_flamingo",
    ],
    "building": [
        "builder",
        "presets",
    ],
    "training": [
        "training",
    ],
    "convert": [
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
    ],
    "data": [
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
    ],
    "evaluation": [
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
    ],
    "package": [
        "",
    ],
}
MODULES = [module for layer in LAYERS.values() for module in layer]
LIBRARIES = {
    "data.html": {"selectolax"},
    "language": {"transformers"},
    "vision": {"timm"},
    "configuration_flamingo": {"huggingface_hub", "transformers"},
    "backbones": {"huggingface_hub", "timm", "transformers"},
    "adapter": {"safetensors", "transformers"},
    "generation_flamingo": {"transformers"},
    "modeling_flamingo": {"transformers"},
    "video": {"PIL", "av", "numpy"},
    "chat": {"huggingface_hub"},
    "processing_flamingo": {"numpy", "PIL", "timm", "transformers"},
    "builder": {"transformers"},
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


def libraries(path: Path) -> set[str]:
    names = {name.split(".")[0] for name in imports(path)}
    return names - set(sys.stdlib_module_names) - {"flamingo_blocks"}


def test_every_module_has_its_place() -> None:
    assert sorted(modules()) == sorted(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_only_to_lower_layers(module: str) -> None:
    lower = MODULES[: MODULES.index(module)]
    for name in imports(modules()[module]):
        if name.split(".")[0] == "flamingo_blocks":
            assert name.removeprefix("flamingo_blocks.") in lower, f"{module} imports {name}"
    assert libraries(modules()[module]) - TORCH_ALONE == LIBRARIES.get(module, set())


def test_every_library_is_a_dependency_or_its_extra_is_named() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    needed = {requirement_name(text) for text in project["dependencies"]}
    extras = {
        extra: {requirement_name(text) for text in texts} for extra, texts in project["optional-dependencies"].items()
    }
    for module, path in modules().items():
        for name in {"pillow" if name == "PIL" else name for name in libraries(path)} - needed:
            named = re.findall(r"pip install flamingo-blocks\[(\w+)\]", path.read_text())
            assert any(name in extras[extra] for extra in named), f"{module} imports {name}"


def requirement_name(text: str) -> str:
    return re.split(r"[^\w-]", text)[0]


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

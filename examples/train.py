"""Train a Flamingo on your own data: on one process, or on many.

    python examples/train.py --language_model HuggingFaceTB/SmolLM2-135M --vision_encoder vit_base_patch16_siglip_224 \
        --data pairs=photos/pairs.jsonl,weight=0.2 documents=pages/ --warmup_steps 100 --output_dir runs/mine

Options are those below and all of transformers' TrainingArguments; the defaults of the optimizer are the paper's
(Alayrac et al. 2022, section 2.4 and appendix B.1.2). Without models and data it trains a tiny Flamingo on handwritten
digits, to show that everything runs:

    python examples/train.py
    torchrun --nproc_per_node 2 examples/train.py  # without GPUs: --use_cpu

A run that was interrupted goes on, bit for bit, with --resume (or --resume_from_checkpoint PATH) and the same options.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, LlamaConfig, TrainingArguments, set_seed

from flamingo_blocks import FlamingoForConditionalGeneration, build_flamingo
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig
from flamingo_blocks.data import (
    Document,
    ExampleMaker,
    FeatureCache,
    IndexedSource,
    JsonLinesSource,
    Medium,
    Mixture,
    MixtureDataset,
    PairFolder,
    Source,
    TarSource,
    collate,
    document_from_pair,
    pair_from_sample,
    separates_documents,
    write_feature_cache,
)
from flamingo_blocks.training import FlamingoTrainer
from tiny_world import DIGITS, IMAGE_SIZE, VOCABULARY, load_splits, make_tokenizer


@dataclass
class Options:
    """What is trained, and on what."""

    language_model: str | None = field(default=None, metadata={"help": "id or path of a causal language model"})
    vision_encoder: str | None = field(default=None, metadata={"help": "name or path of a timm model"})
    data: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": "datasets: NAME=PATH, and after commas kind=pairs, documents, videos or text (else the name is "
            "the kind), weight=1.0, batch_size=8 (rows of a process), row_length=... (tokens, to pack documents)",
        },
    )
    image_size: int | None = field(default=None, metadata={"help": "of the images; by default the backbone's own"})
    cross_attention_every: int = field(default=1, metadata={"help": "a block before every n-th decoder layer"})
    frozen_dtype: str | None = field(default=None, metadata={"help": "of what is frozen; the paper: bfloat16"})
    max_tokens: int = field(default=256, metadata={"help": "of a document: a longer one is cut at random"})
    max_media: int = field(default=5, metadata={"help": "of a document"})
    p_next: float = field(default=0.5, metadata={"help": "how often text sees the next image, not the last one"})
    separate_attention: bool = field(default=False, metadata={"help": "no self-attention between packed documents"})
    round_robin: bool = field(default=False, metadata={"help": "a step after each dataset (the paper's ablation)"})
    data_workers: int = field(default=0, metadata={"help": "processes that read data, for each one that trains"})
    feature_cache: str | None = field(
        default=None, metadata={"help": "folder for features of the frozen encoder: filled first, then trained from"}
    )
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint"})


# Defaults of TrainingArguments. A step takes gradient_accumulation_steps rounds, each of a batch of each dataset.
DEFAULTS = {
    "output_dir": "runs/train",
    "max_steps": 1000,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5000,
    "weight_decay": 0.1,
    "logging_steps": 10,
    "save_total_limit": 2,
    "ddp_find_unused_parameters": False,  # each batch uses them all
}
# Those of the demonstration, which is to learn something in 100 steps.
TINY_DEFAULTS = DEFAULTS | {"max_steps": 100, "learning_rate": 3e-3, "warmup_steps": 10}

# Options of TrainingArguments that a loader without an end makes useless.
INSTEAD = {
    "per_device_train_batch_size": "batch_size in --data",
    "num_train_epochs": "--max_steps",
    "dataloader_num_workers": "--data_workers",
}

NUMBERS = {"weight": float, "batch_size": int, "row_length": int}
Sources = dict[str, tuple[Source, dict[str, Any]]]  # by their names, with some of these numbers


# ---------------------------------------------------------------- your data


def document_from_text(record: dict[str, str]) -> Document:
    """Make a document of a record {"text": ...}."""
    return Document((record["text"],))


# What the path is, if it is no folder of pairs, by the suffixes that the sources know.
SUFFIXES = {"tar": (".tar", ".tar.gz", ".tgz"), "jsonl": (".jsonl", ".jsonl.gz")}
# By the kind of data, and what the path is.
SOURCES: dict[tuple[str, str], Callable[[Path], Source]] = {
    ("documents", "tar"): TarSource,
    ("documents", "jsonl"): JsonLinesSource,
    ("pairs", "tar"): partial(TarSource, to_document=pair_from_sample),
    ("pairs", "jsonl"): partial(JsonLinesSource, to_document=document_from_pair),
    ("pairs", "folder"): PairFolder,
    ("videos", "tar"): partial(TarSource, to_document=pair_from_sample),
    ("videos", "jsonl"): partial(
        JsonLinesSource, to_document=partial(document_from_pair, medium="video", kind="video")
    ),
    ("videos", "folder"): PairFolder,
    ("text", "jsonl"): partial(JsonLinesSource, to_document=document_from_text),
}


def open_data(words: Sequence[str]) -> Sources:
    """Open what --data names.

    Raises:
        ValueError: If it cannot be understood, or there are no such files.
    """
    sources: Sources = {}
    for word in words:
        name, _, rest = word.partition("=")
        path, *pairs = rest.split(",")
        settings = dict(pair.partition("=")[::2] for pair in pairs)
        kind = settings.pop("kind", name)
        form = next((form for form, suffixes in SUFFIXES.items() if _is_of(Path(path), suffixes)), "folder")
        if (kind, form) not in SOURCES:
            known = ", ".join(f"{kind} in {form}" for kind, form in SOURCES)
            raise ValueError(f"--data {word}: cannot read {kind} in {form}; known are {known}")
        try:
            numbers = {key: number(settings.pop(key)) for key, number in NUMBERS.items() if key in settings}
        except ValueError as error:
            raise ValueError(f"--data {word}: {error}") from error
        if settings or not path:
            raise ValueError(f"--data must be NAME=PATH,kind=...,weight=...,batch_size=...,row_length=..., got {word}")
        if name in sources:
            raise ValueError(f"--data {word}: there is a dataset {name} already; give this one another name and kind=")
        sources[name] = (SOURCES[kind, form](Path(path)), numbers)
    return sources


def _is_of(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file, or one of those in a folder, ends in one of the suffixes."""
    names = [file.name for file in path.iterdir()] if path.is_dir() else [path.name]
    return any(name.endswith(suffixes) for name in names)


def cache_features(
    path: str, model: FlamingoForConditionalGeneration, processor: Any, sources: Sources, arguments: TrainingArguments
) -> FeatureCache:
    """Encode the media that are not in the cache yet, each process a part, and open it."""
    encoder = {
        "vision_encoder": model.vision_encoder.to(arguments.device),
        "image_processor": processor.image_processor,
    }
    rank, processes = arguments.process_index, arguments.world_size
    shards = [(source, shard) for source, _ in sources.values() for shard in range(len(source))]
    documents = (document for source, shard in shards[rank::processes] for document in source.read(shard))
    write_feature_cache(path, documents, rank=rank, **encoder)
    arguments.distributed_state.wait_for_everyone()
    return FeatureCache(path, **encoder)


# ---------------------------------------------------------------- the demonstration


def tiny_models() -> dict[str, Any]:
    """Configure a language model and a vision encoder with random weights."""
    language_model = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    return {
        "language_model": language_model,
        "vision_encoder": FlamingoVisionConfig(architecture="test_vit", image_size=IMAGE_SIZE),
        "tokenizer": make_tokenizer(),
        "num_latents": 8,
    }


def tiny_pair(images: list[Medium], names: list[str], i: int) -> Document:
    """Describe an image."""
    return Document((images[i], f"a handwritten {names[i]} ."), key=f"pair {i}")


def tiny_page(images: list[Medium], names: list[str], i: int) -> Document:
    """Name up to four images in a row."""
    shown = range(i, min(i + 4, len(images)))
    return Document(tuple(part for j in shown for part in (images[j], names[j])), key=f"page {i}")


def tiny_text(names: list[str], i: int) -> Document:
    """Tell of images without showing them."""
    return Document((" ".join(f"a handwritten {name} ." for name in names[i : i + 5]),), key=f"text {i}")


def tiny_data() -> Sources:
    """Make pages, pairs and text of scikit-learn's digits."""
    train = load_splits()["train"]
    names = [DIGITS[digit] for digit in train.digits.tolist()]
    images = [Medium.from_pil(picture) for picture in train.pictures]

    everything = range(len(images))  # each is made when it is asked for
    return {
        "pages": (IndexedSource(everything, partial(tiny_page, images, names)), {"batch_size": 4}),
        "pairs": (
            IndexedSource(everything, partial(tiny_pair, images, names)),
            {"batch_size": 2, "row_length": 32, "weight": 0.2},
        ),
        "text": (IndexedSource(everything, partial(tiny_text, names)), {"batch_size": 2, "weight": 0.1}),
    }


# ---------------------------------------------------------------- all together


def main(words: Sequence[str] | None = None) -> FlamingoForConditionalGeneration:
    """Train, and save the model."""
    parser: Any = HfArgumentParser([Options, TrainingArguments], description="Train a Flamingo.")  # type: ignore[list-item]
    given, _ = parser.parse_known_args(words)
    is_tiny = not given.data
    if len({is_tiny, given.language_model is None, given.vision_encoder is None}) > 1:
        parser.error("give --language_model, --vision_encoder and --data, or none of them for the demonstration")
    parser.set_defaults(**TINY_DEFAULTS if is_tiny else DEFAULTS)
    options, arguments = parser.parse_args_into_dataclasses(words)

    for name, instead in INSTEAD.items():
        if getattr(arguments, name) != parser.get_default(name):
            parser.error(f"--{name} has no effect here; give {instead}")
    sources = tiny_data() if is_tiny else open_data(options.data)
    set_seed(arguments.seed)  # new weights must be the same in all processes
    models = {"language_model": options.language_model, "vision_encoder": options.vision_encoder}
    model, processor = build_flamingo(
        **tiny_models() if is_tiny else models,
        image_size=options.image_size,
        cross_attention_every=options.cross_attention_every,
        dtype=options.frozen_dtype,
    )
    if options.separate_attention and not separates_documents(model):
        parser.error("--separate_attention: this language model does not keep packed documents apart; leave it out")
    load, media_shape = None, processor.image_processor.image_shape
    if options.feature_cache is not None:
        load = cache_features(options.feature_cache, model, processor, sources, arguments)
        media_shape = (model.vision_encoder.layout.patches, model.vision_encoder.vision_dim)
    maker = ExampleMaker(
        processor, max_tokens=options.max_tokens, max_media=options.max_media, p_next=options.p_next, load=load
    )
    mixture = Mixture(
        [
            MixtureDataset(
                name=name,
                source=source,
                make_example=maker,
                batch_size=numbers.get("batch_size", 8),
                weight=numbers.get("weight", 1.0),
                row_length=numbers.get("row_length"),
            )
            for name, (source, numbers) in sources.items()
        ],
        collate=partial(
            collate,
            pad_token_id=processor.tokenizer.pad_token_id,
            media_shape=media_shape,
            separate_attention=options.separate_attention,
        ),
        seed=arguments.seed,
        workers=options.data_workers,
        round_robin=options.round_robin,
    )
    arguments.gradient_accumulation_steps *= mixture.batches_per_step
    trainer = FlamingoTrainer(model, arguments, loader=mixture, processing_class=processor)
    trainer.train(resume_from_checkpoint=options.resume or arguments.resume_from_checkpoint)
    trainer.save_model(str(Path(arguments.output_dir) / "model"))
    return model


if __name__ == "__main__":
    main()

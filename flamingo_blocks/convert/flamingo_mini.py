"""flamingo-mini: small Flamingos around GPT-2 or OPT, and CLIP.

Covered are dhansmair/flamingo-mini (OPT-350m) and dhansmair/flamingo-tiny (OPT-125m), both beside CLIP ViT-L/14, the
earlier dhansmair/flamingo-mini-test, and whatever the repository's code has saved: whole models, of which older
versions lack the vision encoder, and what its `state_dict_trainable()` gives.

What is special:

- A medium's place in the text is the token `<` of `<image>`, which is a word like any other to the language model. So
  *every* `<` of a text is a medium, there and here; the tokenizer's `skip_special_tokens` leaves it out here, and a `<`
  that is generated is a word.
- Here a `<` is always a token of its own. There the tokenizer may join it with signs beside it, as in `><` of
  `<image><image>`, `.<` or `</`, and then there is no medium; after a space it is a medium, but the token ` <`. So the
  tokens of `<image>` are the same where it begins a text or follows a letter, a digit, a special token or a single line
  break, and others after spaces and empty lines.
- The language model has a row for `<EOC>` in its tables. The head was a copy of the table of embeddings at first, and
  later the table itself: here it is what the checkpoint says, a tensor of its own or none.
- As there, the table of embeddings and the head are trained, while the rest of the language model is frozen.

Not copied: a clip of more frames than there are embeddings is an error there; here these are interpolated. A `<`
without a medium attends to all media alike there; here it is an error. In a batch that is padded on the left, padding
counts as positions there while GPT-2 generates. Generating goes on behind `<EOC>` there.

Source: github.com/dhansmair/flamingo-mini, commit 8a8feae and before.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoConfig,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flamingo_blocks.backbones import load_language_model, load_tokenizer, load_vision_encoder, loading
from flamingo_blocks.blocks import GatedCrossAttentionBlock, PerceiverResampler
from flamingo_blocks.builder import as_dtype
from flamingo_blocks.chat import default_chat_template
from flamingo_blocks.configuration_flamingo import FlamingoConfig, FlamingoVisionConfig
from flamingo_blocks.convert.assembly import assemble, disassemble, make_processor
from flamingo_blocks.convert.checkpoint import Checkpoint, Config, directory_of, read_config, read_tensors
from flamingo_blocks.convert.clip_vision import clip_vision_config, transformers_clip
from flamingo_blocks.convert.flamingo_pytorch import ATTENTION, FEED_FORWARD
from flamingo_blocks.convert.renaming import Rename, load_module, shape_of, to_theirs, under, under_each
from flamingo_blocks.modeling_flamingo import FlamingoForConditionalGeneration
from flamingo_blocks.parts import as_configured, make_block, make_resampler
from flamingo_blocks.processing_flamingo import FlamingoProcessor, special_token_id
from flamingo_blocks.vision import VisionEncoder

IMAGE_TOKEN, END_OF_CHUNK_TOKEN = "<", "<EOC>"
# Causal masks and numbers from 0 on, which older versions of transformers saved: they follow from the configuration.
DERIVED = re.compile(
    r"lm\.h\.\d+\.(lm_block\.)?attn\.(bias|masked_bias)|vision_encoder\.vision_model\.embeddings\.position_ids"
)

_PREFIX = "flamingo."
_VISION = "vision_encoder.vision_model."
_BLOCK_NAME = re.compile(r"lm\.(.+?)\.(\d+)\.xattn_block\.")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "sqrelu": "squared_relu"}
# Of its configuration, as far as it says something about the model here.
_DEFAULTS: dict[str, Any] = {
    "lm": "gpt2",
    "clip_model_type": "openai/clip-vit-base-patch32",
    "dim_visual": 768,
    "xattn_every": 1,
    "xattn_dim_head": 64,
    "xattn_heads": 8,
    "xattn_ff_mult": 4,
    "xattn_act": "gelu",
    "resampler_depth": 6,
    "resampler_dim_head": 64,
    "resampler_heads": 8,
    "resampler_num_latents": 64,
    "resampler_num_time_embeds": 4,
    "resampler_ff_mult": 4,
    "resampler_act": "gelu",
    "freeze_language_model": True,
    "freeze_vision_model": True,
}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
# OpenAI's: the same weights in timm, and what differs from the defaults of CLIPVisionConfig.
CLIP: dict[str, tuple[str, dict[str, Any]]] = {
    "openai/clip-vit-base-patch32": ("vit_base_patch32_clip_quickgelu_224.openai", {}),
    "openai/clip-vit-base-patch16": ("vit_base_patch16_clip_quickgelu_224.openai", {"patch_size": 16}),
    "openai/clip-vit-large-patch14": ("vit_large_patch14_clip_quickgelu_224.openai", {**_LARGE, "patch_size": 14}),
    "openai/clip-vit-large-patch14-336": (
        "vit_large_patch14_clip_quickgelu_336.openai",
        {**_LARGE, "patch_size": 14, "image_size": 336},
    ),
}

_BLOCK = [
    *under([Rename("norm", "norm"), *ATTENTION], theirs="attn.", ours=""),
    Rename("alpha_attn", "gate.alpha"),
    *under(FEED_FORWARD, theirs="ffw.", ours=""),
    Rename("alpha_ffw", "gate_feed_forward.alpha"),
]
_RESAMPLER_LAYER = [
    Rename("0.norm_media", "norm_features"),
    Rename("0.norm_latents", "norm_latents"),
    Rename("0.to_q", "to_q"),
    Rename(("0.to_k", "0.to_v"), "to_kv"),
    Rename("0.to_out", "to_out"),
    *under(FEED_FORWARD, theirs="1.", ours=""),
]


@dataclass(frozen=True)
class _LanguageModel:
    """Names of a language model's parts in transformers.

    Attributes:
        base: The model without its head. There it is `lm`.
        layers: Its decoder layers.
        table: Its table of embeddings.
    """

    base: str
    layers: str
    table: str


_LANGUAGE_MODELS = {
    "gpt2": _LanguageModel("transformer", "h", "wte"),
    "opt": _LanguageModel("model", "decoder.layers", "decoder.embed_tokens"),
}


def load_resampler(state_dict: Mapping[str, Tensor], config: Config | None = None) -> PerceiverResampler:
    """Load the resampler of a model.

    Args:
        state_dict: Of the whole model there, or of what was trained.
        config: Its configuration there, or the path of its JSON. Required.

    Returns:
        The resampler, in eval mode.

    Raises:
        ValueError: If a tensor is left over, is missing or has the wrong shape.
        OSError: If there is no such file.
    """
    numbers = _read_config(config, state_dict)
    tensors = {name: t for name, t in _without_prefix(state_dict).items() if name.startswith("resampler.")}
    dim = numbers["dim_visual"]
    resampler: PerceiverResampler = make_resampler(dim=dim, vision_dim=dim, **_resampler_sizes(numbers))
    return load_module(resampler, _resampler_table(numbers["resampler_depth"], ours=""), tensors)


def load_blocks(state_dict: Mapping[str, Tensor], config: Config | None = None) -> dict[int, GatedCrossAttentionBlock]:
    """Load the gated cross-attention blocks of a model.

    Args:
        state_dict: Of the whole model there, or of what was trained.
        config: Its configuration there, or the path of its JSON. Required.

    Returns:
        For the index of each decoder layer before which one stands, the block, in eval mode.

    Raises:
        ValueError: If a tensor is left over, is missing or has the wrong shape, or the blocks stand elsewhere than the
            configuration says.
        OSError: If there is no such file.

    Example:
        ```python
        import torch

        from flamingo_blocks.convert import flamingo_mini

        config = {"dim_visual": 8, "xattn_heads": 2, "xattn_dim_head": 4, "xattn_act": "sqrelu"}
        shapes = {"attn.norm.weight": (16,), "attn.norm.bias": (16,), "attn.to_q.weight": (8, 16)}
        shapes |= {"attn.to_kv.weight": (16, 8), "attn.to_out.weight": (16, 8), "alpha_attn": (1,), "alpha_ffw": (1,)}
        shapes |= {"ffw.0.weight": (16,), "ffw.0.bias": (16,), "ffw.1.weight": (64, 16), "ffw.3.weight": (16, 64)}
        state_dict = {f"flamingo.lm.h.0.xattn_block.{name}": torch.randn(shape) for name, shape in shapes.items()}
        block = flamingo_mini.load_blocks(state_dict, config)[0]
        assert torch.equal(block.gate.alpha, state_dict["flamingo.lm.h.0.xattn_block.alpha_attn"])
        ```
    """
    numbers = _read_config(config, state_dict)
    tensors = _without_prefix(state_dict)
    found = {name: match for name in tensors if (match := _BLOCK_NAME.match(name))}
    if not found:
        raise ValueError("the checkpoint has no gated cross-attention blocks (lm.*.xattn_block.*)")
    layers = next(iter(found.values()))[1]
    indices = range(0, max(int(match[2]) for match in found.values()) + 1, numbers["xattn_every"])
    dim = shape_of(tensors, f"lm.{layers}.0.xattn_block.attn.to_q.weight")[1]
    sizes: dict[str, Any] = {"dim": dim, "media_dim": numbers["dim_visual"], **_block_sizes(numbers, dim)}
    blocks = {index: make_block(**sizes) for index in indices}
    load_module(
        nn.ModuleDict({str(index): block for index, block in blocks.items()}),
        _blocks_table(layers, blocks, ours=""),
        {name: tensors[name] for name in found},
    )
    return blocks


@torch.no_grad()
def load_flamingo(
    checkpoint: Checkpoint,
    config: Config | None = None,
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    language_model: str | Path | PreTrainedConfig | PreTrainedModel | None = None,
    vision_encoder: str | Path | FlamingoVisionConfig | VisionEncoder | nn.Module | None = None,
    vision_config: Config | None = None,
    dtype: torch.dtype | str | None = None,
    progress: bool = False,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Load a whole model.

    Args:
        checkpoint: A file, a directory or tensors, see `flamingo_blocks.convert.checkpoint.read_tensors`. With or
            without the prefix `flamingo.`, which `state_dict_trainable()` leaves out.
        config: Its configuration there, or the path of its JSON. None: `config.json` beside the checkpoint.
        tokenizer: The language model's tokenizer, its id or path. None: that of the checkpoint's directory if it has
            one, else the language model's. It is copied; `<` and `<EOC>` become special tokens. OPT's begins each text
            with `</s>`, which the released models need; GPT-2's adds nothing.
        language_model: The language model, its id or path. None: `config["lm"]`. Of a whole checkpoint, its
            configuration is read, or can be given, and nothing else. For one that holds what was trained alone, its
            weights are loaded, or copied.
        vision_encoder: For a checkpoint without one: a timm model, its name, path or configuration, or a
            `VisionEncoder`. None: CLIP's, as `config["clip_model_type"]` says. One that is made here keeps its class
            token and does not apply its final norm.
        vision_config: For a checkpoint with a vision encoder: CLIP's configuration in transformers, or the path of its
            JSON. None: OpenAI's, as `config["clip_model_type"]` says.
        dtype: Of what is loaded here. None: that of the checkpoint.
        progress: Show bars while files are read.

    Returns:
        The model, in eval mode, and its processor.

    Raises:
        ValueError: If a tensor is left over, is missing or has the wrong shape, or the parts do not fit together.
        OSError: If something cannot be loaded.

    Example:
        ```python
        # from huggingface_hub import snapshot_download
        # from flamingo_blocks.convert import flamingo_mini
        #
        # model, processor = flamingo_mini.load_flamingo(snapshot_download("dhansmair/flamingo-tiny"))
        # inputs = processor(text="<image>", images=["cat.jpg"])
        # caption = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        # print(processor.batch_decode(caption, skip_special_tokens=True))
        ```

    Source: flamingo-mini, `FlamingoModel` and `FlamingoProcessor`.
    """
    numbers, dtype = _read_config(config, checkpoint), as_dtype("dtype", dtype)
    tensors = _without_prefix(read_tensors(checkpoint, progress=progress))
    named = numbers["lm"] if language_model is None else language_model
    is_whole = any(".lm_block." in name for name in tensors)
    lm = None if is_whole else _load_language_model(named)
    text_config = copy.deepcopy(_language_model_config(named) if lm is None else lm.config)
    names = _names_of(text_config.model_type)
    indices = range(0, text_config.num_hidden_layers, numbers["xattn_every"])
    renames = _table(names, indices, numbers["resampler_depth"])
    table = f"lm.{names.table}.weight"
    rows, stored = shape_of(tensors, table)[0], dtype or tensors[table].dtype
    # No language model that was published has these tables.
    text_config.update({"name_or_path": "", "vocab_size": rows, "tie_word_embeddings": "lm_head.weight" not in tensors})
    if lm is not None:
        base = {f"language_model.{names.base}.{name}": t for name, t in lm.base_model.state_dict().items()}
        own = to_theirs(renames, base)
        tensors = {name: tensor.to(stored, copy=True) for name, tensor in own.items()} | tensors
    text = load_tokenizer(_find_tokenizer(checkpoint, named, numbers["lm"]) if tokenizer is None else tokenizer)
    _add_tokens(text, rows)
    encoder = None
    if any(name.startswith("vision_encoder.") for name in tensors):
        if vision_encoder is not None:
            raise ValueError("vision_encoder is for checkpoints that have none, but this one has; leave it out")
        clip = _clip_config(vision_config, numbers["clip_model_type"])
        vision, width = _describe(clip), clip.hidden_size
        renames += transformers_clip(clip.num_hidden_layers, theirs=_VISION)
    else:
        encoder, vision = load_vision_encoder(
            _timm_name(numbers["clip_model_type"]) if vision_encoder is None else vision_encoder,
            keep_prefix_tokens=True,
            final_norm=False,
            dtype=None if isinstance(vision_encoder, nn.Module) else stored,
        )
        width = encoder.vision_dim
    if width != numbers["dim_visual"]:
        raise ValueError(
            f"config says dim_visual={numbers['dim_visual']}, but the vision encoder gives {width} features"
        )
    frozen: dict[Any, bool] = {
        "language_model": numbers["freeze_language_model"],
        "vision_encoder": numbers["freeze_vision_model"],
    }
    flamingo_config = FlamingoConfig(
        text_config=text_config,
        vision_config=vision,
        cross_attention_layers=list(indices),
        **as_configured(_block_sizes(numbers, text_config.hidden_size), _resampler_sizes(numbers)),
        resampler_dim=width,
        freeze=[part for part, is_frozen in frozen.items() if is_frozen],
        freeze_exceptions=_trained(names) if frozen["language_model"] else None,
        image_token_id=special_token_id(text, IMAGE_TOKEN),
        end_of_chunk_token_id=special_token_id(text, END_OF_CHUNK_TOKEN),
        new_token_ids=[],
    )
    model = assemble(flamingo_config, renames, tensors, fixed={}, vision_encoder=encoder, dtype=dtype)
    generation_config: Any = model.generation_config
    generation_config.suppress_tokens = None  # `<` is a word, too
    return model, make_processor(model, text, image_token=IMAGE_TOKEN, end_of_chunk_token=END_OF_CHUNK_TOKEN)


def to_flamingo_mini(
    model: FlamingoForConditionalGeneration, *, trained_only: bool = False, vision_encoder: bool | None = None
) -> dict[str, Tensor]:
    """Give a model's tensors by their names there.

    What `DERIVED` names is not among them; the code there fills it in by itself.

    Args:
        model: As loaded here, or built with the same options.
        trained_only: Give what is not frozen, without the prefix `flamingo.`, as `state_dict_trainable()` there.
        vision_encoder: Whether the vision encoder is among them; older versions of the code have none. None: unless
            it is a pretrained one that came from elsewhere.

    Raises:
        ValueError: If a tensor has no place there.
    """
    config: Any = model.config
    names = _names_of(config.text_config.model_type)
    renames = _table(names, model.injector.layer_indices, len(model.resampler.layers))
    without: list[str] = []
    if not config.vision_config.name_or_path if vision_encoder is None else vision_encoder:
        renames += transformers_clip(len(model.vision_encoder.backbone.blocks), theirs=_VISION)
    else:
        without += ["vision_encoder."]
    if trained_only:
        # The final norm, which nothing passes, is trained there in name.
        in_name = () if model.vision_encoder.is_frozen else ("vision_encoder.backbone.norm.",)
        frozen = (name for name, parameter in model.named_parameters() if not parameter.requires_grad)
        without += [name for name in frozen if not name.startswith(in_name)]
    tensors = disassemble(model, renames, fixed={}, without=tuple(without))
    return tensors if trained_only else {_PREFIX + name: tensor for name, tensor in tensors.items()}


# ------------------------------------------------------------ names


def _without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the prefix off, which not all checkpoints have, and leave out what is derived."""
    names = {name.removeprefix(_PREFIX): tensor for name, tensor in state_dict.items()}
    return {name: tensor for name, tensor in names.items() if not DERIVED.fullmatch(name)}


def _names_of(model_type: str) -> _LanguageModel:
    if model_type not in _LANGUAGE_MODELS:
        raise ValueError(f"language_model must be a GPT-2 or an OPT, got a {model_type!r}")
    return _LANGUAGE_MODELS[model_type]


def _trained(names: _LanguageModel) -> list[str]:
    """Name what is trained of a language model that is frozen otherwise."""
    return [f"language_model.{names.base}.{names.table}.weight", "language_model.lm_head.weight"]


def _table(names: _LanguageModel, indices: Iterable[int], depth: int) -> list[Rename]:
    """Give the table for everything but the vision encoder."""
    indices = list(indices)
    theirs, ours = f"lm.{names.layers}", f"language_model.{names.base}.{names.layers}"
    return [
        Rename("lm", f"language_model.{names.base}"),
        Rename("lm_head", "language_model.lm_head"),
        *(Rename(f"{theirs}.{index}.lm_block", f"{ours}.{index}") for index in indices),
        *_blocks_table(names.layers, indices, ours="injector.blocks."),
        *_resampler_table(depth, ours="resampler."),
    ]


def _blocks_table(layers: str, indices: Iterable[int], *, ours: str) -> list[Rename]:
    renames = []
    for index in indices:
        renames += under(_BLOCK, theirs=f"lm.{layers}.{index}.xattn_block.", ours=f"{ours}{index}.")
    return renames


def _resampler_table(depth: int, *, ours: str) -> list[Rename]:
    renames = [
        Rename("latents", "latents"),
        Rename("time_pos_emb", "features.temporal_embeddings", "frames 1 dim -> frames dim"),
        Rename("norm", "norm"),
    ]
    renames += under_each(_RESAMPLER_LAYER, range(depth), theirs="layers.", ours="layers.")
    return under(renames, theirs="resampler.", ours=ours)


# ------------------------------------------------------------ the configuration


def _read_config(config: Config | None, checkpoint: Checkpoint) -> dict[str, Any]:
    found = read_config(config, checkpoint)
    numbers = {name: found.get(name, default) for name, default in _DEFAULTS.items()}
    if numbers["xattn_every"] < 1:
        raise ValueError(f"config['xattn_every'] must be at least 1, got {numbers['xattn_every']}")
    for name in ("xattn_act", "resampler_act"):
        if numbers[name] not in _ACTIVATIONS:
            raise ValueError(f"config[{name!r}] must be {' or '.join(_ACTIVATIONS)}, got {numbers[name]!r}")
    return numbers


def _block_sizes(numbers: Mapping[str, Any], dim: int) -> dict[str, Any]:
    return {
        "heads": numbers["xattn_heads"],
        "head_dim": numbers["xattn_dim_head"],
        "hidden": int(numbers["xattn_ff_mult"] * dim),
        "activation": _ACTIVATIONS[numbers["xattn_act"]],
    }


def _resampler_sizes(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "depth": numbers["resampler_depth"],
        "heads": numbers["resampler_heads"],
        "head_dim": numbers["resampler_dim_head"],
        "hidden": int(numbers["resampler_ff_mult"] * numbers["dim_visual"]),
        "activation": _ACTIVATIONS[numbers["resampler_act"]],
        "num_latents": numbers["resampler_num_latents"],
        "max_frames": numbers["resampler_num_time_embeds"],
    }


# ------------------------------------------------------------ backbones


def _language_model_config(language_model: Any) -> Any:
    if isinstance(language_model, PreTrainedConfig):
        return language_model
    if isinstance(language_model, nn.Module):
        return language_model.config
    with loading("language_model", language_model):
        return AutoConfig.from_pretrained(language_model)


def _load_language_model(language_model: Any) -> Any:
    if isinstance(language_model, PreTrainedConfig):
        raise ValueError(
            "the checkpoint holds what was trained alone, so language_model must be one with weights, its id or path, "
            f"got a {type(language_model).__name__}"
        )
    return load_language_model(language_model)[0]


def _find_tokenizer(checkpoint: Checkpoint, language_model: Any, name: str) -> str | Path:
    if isinstance(checkpoint, str | Path):
        directory = directory_of(checkpoint, "tokenizer")
        if any((directory / file).is_file() for file in _TOKENIZER_FILES):
            return directory
    return language_model if isinstance(language_model, str | Path) else name


def _add_tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Make special tokens of `<`, which keeps its id, and `<EOC>`."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        raise ValueError(f"the tokenizer has no token {IMAGE_TOKEN!r}; give that of GPT-2 or OPT")
    tokens = [AddedToken(token, special=True, normalized=False) for token in (IMAGE_TOKEN, END_OF_CHUNK_TOKEN)]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if (last := special_token_id(tokenizer, END_OF_CHUNK_TOKEN)) >= rows:
        raise ValueError(
            f"the tokenizer's {END_OF_CHUNK_TOKEN} would be token {last}, but the checkpoint has only {rows}; this is "
            "another model's tokenizer"
        )
    # The whole tag, not just the token that counts.
    tokenizer.chat_template = default_chat_template(tokenizer, "<image>", END_OF_CHUNK_TOKEN)


def _timm_name(clip: str) -> str:
    if clip not in CLIP:
        raise ValueError(f"give vision_encoder: there is no timm model on record for {clip!r}, only for {_known()}")
    return CLIP[clip][0]


def _clip_config(config: Config | None, clip: str) -> CLIPVisionConfig:
    if config is None and clip not in CLIP:
        raise ValueError(f"give vision_config: that of {clip!r} is not on record, only those of {_known()}")
    numbers = CLIP[clip][1] if config is None else read_config(config, {})
    return CLIPVisionConfig(**numbers.get("vision_config", numbers))


def _known() -> str:
    return ", ".join(map(repr, CLIP))


def _describe(clip: Any) -> FlamingoVisionConfig:
    return clip_vision_config(
        hidden_size=clip.hidden_size,
        num_hidden_layers=clip.num_hidden_layers,
        num_attention_heads=clip.num_attention_heads,
        intermediate_size=clip.intermediate_size,
        patch_size=clip.patch_size,
        image_size=clip.image_size,
        hidden_act=clip.hidden_act,
        layer_norm_eps=clip.layer_norm_eps,
        channels=clip.num_channels,
        keep_prefix_tokens=True,
    )

"""OpenFlamingo: its released models, their first version, and Otter's, which have the same parts.

Covered are openflamingo/OpenFlamingo-3B-vitl-mpt1b, -4B-vitl-rpj3b and -9B-vitl-mpt7b with their instruction-tuned
siblings, OpenFlamingo-9B-deprecated (version 1), and checkpoints of Otter. Released files hold what was trained, and
the table of embeddings; language model and vision encoder come from where they were published.

Not copied: with all previous media, text before the first one attends to all of them, later ones included; more
`<image>` tokens than media attend to everything alike. Here the former sees nothing, and the latter is an error.

Source: github.com/mlfoundations/open_flamingo, version 2.0.1; Awadalla et al. 2023 (OpenFlamingo).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flamingo_blocks.backbones import load_language_model, load_tokenizer, load_vision_encoder
from flamingo_blocks.blocks import Attend, GatedCrossAttentionBlock, PerceiverResampler
from flamingo_blocks.builder import as_dtype
from flamingo_blocks.configuration_flamingo import FlamingoConfig, FlamingoVisionConfig
from flamingo_blocks.convert import clip_vision
from flamingo_blocks.convert.assembly import assemble, disassemble, make_processor
from flamingo_blocks.convert.checkpoint import Checkpoint, Config, read_config, read_tensors
from flamingo_blocks.convert.flamingo_pytorch import BLOCK, block_sizes, resampler_sizes, resampler_table
from flamingo_blocks.convert.renaming import Rename, listed, load_module, shape_of, to_ours, under
from flamingo_blocks.convert.token_tables import TokenTables, head_kind, head_name, name_of, with_rows
from flamingo_blocks.injection import check_has_no_blocks, select_layers
from flamingo_blocks.language import find_decoder_layers, find_hidden_size, find_residual_stream
from flamingo_blocks.modeling_flamingo import FlamingoForConditionalGeneration
from flamingo_blocks.parts import as_configured, make_block, make_resampler
from flamingo_blocks.processing_flamingo import FlamingoProcessor, special_token_id
from flamingo_blocks.vision import VisionEncoder

IMAGE_TOKEN, END_OF_CHUNK_TOKEN, PADDING_TOKEN = "<image>", "<|endofchunk|>", "<PAD>"
# Arguments of its create_model_and_transforms, which stand for the configuration that it does not have. The first
# four can be given here as modules; the last ones say nothing about the model.
_CONFIG = {"lang_encoder_path", "tokenizer_path", "clip_vision_encoder_path", "clip_vision_encoder_pretrained"}
_CONFIG |= {"cross_attn_every_n_layers", "decoder_layers_attr_name"}
_CONFIG |= {"cache_dir", "freeze_lm_embeddings", "gradient_checkpointing", "use_local_files"}
# Of the released models, as on their pages.
RELEASED: dict[str, dict[str, Any]] = {
    name: {
        "lang_encoder_path": language_model,
        "tokenizer_path": language_model,
        "clip_vision_encoder_path": "ViT-L-14",
        "clip_vision_encoder_pretrained": "openai",
        "cross_attn_every_n_layers": every,
    }
    for name, language_model, every in (
        ("OpenFlamingo-3B-vitl-mpt1b", "anas-awadalla/mpt-1b-redpajama-200b", 1),
        ("OpenFlamingo-3B-vitl-mpt1b-langinstruct", "anas-awadalla/mpt-1b-redpajama-200b-dolly", 1),
        ("OpenFlamingo-4B-vitl-rpj3b", "togethercomputer/RedPajama-INCITE-Base-3B-v1", 2),
        ("OpenFlamingo-4B-vitl-rpj3b-langinstruct", "togethercomputer/RedPajama-INCITE-Instruct-3B-v1", 2),
        ("OpenFlamingo-9B-vitl-mpt7b", "anas-awadalla/mpt-7b", 4),
        ("OpenFlamingo-9B-deprecated", "huggyllama/llama-7b", 4),
    )
}
# By open_clip's name and weights, the same in timm.
_VISION_ENCODERS = {
    ("ViT-B-32", "openai"): "vit_base_patch32_clip_quickgelu_224.openai",
    ("ViT-B-16", "openai"): "vit_base_patch16_clip_quickgelu_224.openai",
    ("ViT-L-14", "openai"): "vit_large_patch14_clip_quickgelu_224.openai",
}
_WRAPPERS = re.compile(r"_(?:fsdp_wrapped|checkpoint_wrapped)_module\.")
# Otter's resampler has its layers' parts by name.
_OTTER_NETWORK = re.compile(r"^(layers\.\d+)\.feed_forward\.")
_OTTER_ATTENTION = re.compile(r"^(layers\.\d+)\.(norm_|to_)")
_BLOCK = re.compile(r"lang_encoder\.(?:gated_cross_attn_layers\.(\d+)|.+?\.(\d+)\.gated_cross_attn_layer)\.(.+)")
_LAYER = re.compile(r"lang_encoder\.(?:old_decoder_blocks\.(\d+)|(.+?)\.(\d+)\.decoder_layer)\.(.+)")


def load_resampler(state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> PerceiverResampler:
    """Load the resampler of a model.

    Its optional embeddings of frames and of a medium's place are loaded where they are.

    Args:
        state_dict: Of the whole model there.
        config: Arguments of its `create_model_and_transforms`; they say nothing about the resampler.

    Returns:
        The resampler, in eval mode.

    Raises:
        ValueError: If a tensor is left over, is missing or has the wrong shape.
    """
    _check_config(config)
    tensors = _Parts.of(state_dict).resampler
    resampler, table, _ = _make_resampler(tensors)
    return load_module(resampler, table, tensors)


def load_blocks(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> dict[int, GatedCrossAttentionBlock]:
    """Load the gated cross-attention blocks of a model.

    Args:
        state_dict: Of the whole model there.
        config: Arguments of its `create_model_and_transforms`; `cross_attn_every_n_layers` is checked.

    Returns:
        For the index of each decoder layer before which one stands, the block, in eval mode.

    Raises:
        ValueError: If a tensor is left over, is missing or has the wrong shape, or the blocks stand elsewhere than the
            configuration says.
    """
    blocks = _Parts.of(state_dict).blocks
    _check_places(blocks, _check_config(config))
    return {index: load_module(_make_block(tensors), BLOCK, tensors) for index, tensors in sorted(blocks.items())}


@torch.no_grad()
def load_flamingo(
    checkpoint: Checkpoint,
    config: Config | None = None,
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    language_model: str | Path | PreTrainedModel | None = None,
    vision_encoder: str | Path | FlamingoVisionConfig | nn.Module | None = None,
    attend: Attend = "last",
    final_norm: bool = False,
    dtype: torch.dtype | str | None = None,
    progress: bool = False,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Load a whole model.

    Args:
        checkpoint: A file, a directory or tensors, see `flamingo_blocks.convert.checkpoint.read_tensors`.
        config: Arguments of its `create_model_and_transforms`, as on the model's page, a JSON file of them, or the name
            of a released model. None: that of the released model whose name is in the checkpoint's path, if it is.
        tokenizer: The language model's tokenizer, its id or path. None: `config["tokenizer_path"]`. It is copied and
            gets the special tokens in the order in which they were added there.
        language_model: The language model, its id or path. None: `config["lang_encoder_path"]`. A model is not copied:
            its table of embeddings becomes the checkpoint's. Those that need code of their own, as MPT-1B does, must be
            given as models.
        vision_encoder: A timm model, its name, path or configuration, or a `VisionEncoder`. None: CLIP's, as
            `clip_vision_encoder_path` and `clip_vision_encoder_pretrained` say.
        attend: Which media a token sees. OpenFlamingo: `"last"`; its first version was also trained with `"next"`;
            Otter: `"all_previous"`.
        final_norm: Whether visual tokens pass the vision encoder's final norm. They do with open_clip 2.23 or newer,
            with which the released models were not trained. A `VisionEncoder` or configuration says so itself.
        dtype: Of what is loaded here. None: that of the checkpoint.
        progress: Show bars while files are read.

    Returns:
        The model, in eval mode, and its processor.

    Raises:
        ValueError: If a tensor is left over, is missing or has the wrong shape, or the parts do not fit together.
        OSError: If something cannot be loaded.

    Example:
        ```python
        # from huggingface_hub import hf_hub_download
        # from flamingo_blocks.convert import open_flamingo
        #
        # path = hf_hub_download("openflamingo/OpenFlamingo-4B-vitl-rpj3b", "checkpoint.pt")
        # model, processor = open_flamingo.load_flamingo(path)
        #
        # own = {"lang_encoder_path": "facebook/opt-1.3b", "cross_attn_every_n_layers": 2, ...}
        # model, processor = open_flamingo.load_flamingo("checkpoint.pt", own)
        ```

    Source: open_flamingo 2.0.1, `create_model_and_transforms`. Differs: the language model's tables are not resized
    for new tokens, which stand in tables of their own. Where the checkpoint has no row of the head for a token that is
    new to the language model, it gets the mean of all rows; there, a random one.
    """
    options, dtype = _check_config(_find_config(config, checkpoint)), as_dtype("dtype", dtype)
    parts = _Parts.of(read_tensors(checkpoint, progress=progress))
    _check_places(parts.blocks, options)
    sizes, block, widths = _check_parts(parts)
    stored = dtype or reduce(torch.promote_types, {tensor.dtype for tensor in parts.resampler.values()})
    lm, revision = load_language_model(
        _named(options, "lang_encoder_path", "language_model") if language_model is None else language_model,
        dtype=None if isinstance(language_model, nn.Module) else stored,
    )
    text = load_tokenizer(_named(options, "tokenizer_path", "tokenizer") if tokenizer is None else tokenizer)
    added = _add_tokens(text)
    encoder, vision_config = load_vision_encoder(
        _timm_name(options) if vision_encoder is None else vision_encoder,
        final_norm=final_norm,
        dtype=None if isinstance(vision_encoder, nn.Module) else stored,
    )
    if widths != (encoder.vision_dim, find_hidden_size(lm)):
        raise ValueError(
            f"the checkpoint is of a vision encoder that gives {widths[0]} features and a language model of width "
            f"{widths[1]}, got {encoder.vision_dim} and {find_hidden_size(lm)}; give the backbones of this model"
        )
    path, layers = find_decoder_layers(lm, options.get("decoder_layers_attr_name"))
    indices = sorted(parts.blocks)
    stream = find_residual_stream(lm, {i: layers[i] for i in select_layers(len(layers), layers=indices)})
    check_has_no_blocks(layers)
    last = max(special_token_id(text, token) for token in (IMAGE_TOKEN, END_OF_CHUNK_TOKEN))
    tables = TokenTables.of(lm, parts.language_model_at(path), added)
    if last >= len(tables.embeddings):
        raise ValueError(
            f"the checkpoint has {len(tables.embeddings)} tokens, but the tokenizer gives {IMAGE_TOKEN} or "
            f"{END_OF_CHUNK_TOKEN} the id {last}; this is another model's tokenizer"
        )
    # Only now, when all that is in the checkpoint is known to fit.
    _load_vision_encoder(encoder, parts.vision_encoder)
    head = tables.load(lm)
    flamingo_config = FlamingoConfig(
        text_config=lm.config,
        text_revision=revision if lm.config.name_or_path else None,
        vision_config=vision_config,
        cross_attention_layers=indices,
        decoder_layers=options.get("decoder_layers_attr_name"),
        residual_stream=stream,
        attend=attend,
        **as_configured(block, sizes),
        image_token_id=special_token_id(text, IMAGE_TOKEN),
        end_of_chunk_token_id=special_token_id(text, END_OF_CHUNK_TOKEN),
        new_token_ids=tables.ids,
        new_token_head=head,
    )
    tensors = {f"perceiver.{name}": tensor for name, tensor in parts.resampler.items()}
    for index, block_tensors in parts.blocks.items():
        tensors |= {f"{_block_prefix(path, index)}{name}": tensor for name, tensor in block_tensors.items()}
    model = assemble(
        flamingo_config,
        _table(path, indices, sizes["depth"]),
        tensors,
        fixed={name: rows.to(stored) for name, rows in tables.new_rows(lm, head).items()},
        language_model=lm,
        vision_encoder=encoder,
        dtype=dtype,
    )
    return model, make_processor(model, text, image_token=IMAGE_TOKEN, end_of_chunk_token=END_OF_CHUNK_TOKEN)


@torch.no_grad()
def to_open_flamingo(model: FlamingoForConditionalGeneration, *, language_model: bool = False) -> dict[str, Tensor]:
    """Give a model's tensors as OpenFlamingo's checkpoints have them.

    These are the resampler, the blocks, the table of embeddings with the new tokens' rows, and the head, where it is
    another table. OpenFlamingo reads them with `load_state_dict(..., strict=False)`. The head of GPT-NeoX has the name
    that it had in transformers before version 5, as in the released files: `lang_encoder.embed_out`.

    Args:
        model: As loaded here, or built with the same options.
        language_model: Give the rest of the language model, too: where it was trained, or came from the checkpoint.

    Raises:
        ValueError: If a tensor has no place there, or `new_token_head` is not what the language model has.
    """
    lm: Any = model.language_model
    path, _ = find_decoder_layers(lm, model.config.decoder_layers)
    indices = list(model.injector.layer_indices)
    tensors = disassemble(
        model,
        _table(path, indices, len(model.resampler.layers)),
        fixed={},
        without=("language_model.", "vision_encoder.", "new_tokens."),
    )
    embedding, head, new = lm.get_input_embeddings(), lm.get_output_embeddings(), model.new_tokens
    is_tied, bias = head.weight is embedding.weight, getattr(head, "bias", None)
    ids = [] if new is None else list(new.token_ids)
    if new is not None and model.config.new_token_head != head_kind(lm):
        raise ValueError(
            f"new_token_head must be {head_kind(lm)!r} for this language model, got {model.config.new_token_head!r}; "
            "OpenFlamingo has its new tokens in the language model's own tables"
        )
    if new is not None and is_tied and bias is not None and not torch.equal(new.head.weight, new.embeddings.weight):
        raise ValueError(
            "this language model reads and predicts tokens with one table, but new_tokens.embeddings and "
            "new_tokens.head were trained apart; make them equal first"
        )
    if language_model:
        of_tables = (f"{name_of(lm, embedding)}.", f"{name_of(lm, head)}.")
        for name, tensor in lm.state_dict().items():
            if not name.startswith(of_tables):
                index, _, rest = name.removeprefix(f"{path}.").partition(".")
                theirs = f"{path}.{index}.decoder_layer.{rest}" if name.startswith(f"{path}.") else name
                tensors[f"lang_encoder.{theirs}"] = tensor.clone()
    tables = {f"{name_of(lm, embedding)}.weight": (embedding.weight, "embeddings.weight")}
    if not is_tied:
        tables[f"{head_name(lm)}.weight"] = (head.weight, "head.weight")
    if bias is not None:
        tables[f"{head_name(lm)}.bias"] = (bias, "head.bias")
    rows = {} if new is None else new.state_dict()
    for name, (table, of_new) in tables.items():
        tensors[f"lang_encoder.{name}"] = with_rows(table, ids, rows.get(of_new))
    return tensors


# ------------------------------------------------------------ the checkpoint's parts


@dataclass
class _Parts:
    """A checkpoint, sorted: each part by the names that it has within itself."""

    resampler: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    vision_encoder: dict[str, Tensor] = field(default_factory=dict)
    language_model: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, state_dict: Mapping[str, Tensor]) -> "_Parts":
        """Sort tensors. The same one may be there under several names, as in version 1."""
        parts, unused = cls(), []
        for full_name, tensor in state_dict.items():
            name = _WRAPPERS.sub("", full_name)
            part, _, rest = name.partition(".")
            if match := _BLOCK.fullmatch(name):
                first, second, rest = match.groups()
                rest = rest.replace("feed_forward.", "ff.")  # as Otter calls it
                _put(parts.blocks.setdefault(int(first or second), {}), rest, tensor, full_name)
            elif match := _LAYER.fullmatch(name):
                first, _, second, rest = match.groups()
                _put(parts.layers.setdefault(int(first or second), {}), rest, tensor, full_name)
            elif part == "lang_encoder":
                _put(parts.language_model, rest, tensor, full_name)
            elif part == "perceiver":
                rest = _OTTER_NETWORK.sub(r"\1.1.", rest)
                _put(parts.resampler, _OTTER_ATTENTION.sub(r"\1.0.\2", rest), tensor, full_name)
            elif part == "vision_encoder":
                _put(parts.vision_encoder, rest, tensor, full_name)
            else:
                unused.append(full_name)
        if unused:
            raise ValueError(f"these tensors are none of OpenFlamingo's: {listed(unused)}")
        return parts

    def language_model_at(self, path: str) -> dict[str, Tensor]:
        """Give the language model's tensors by its own names.

        Args:
            path: Of its decoder layers.
        """
        tensors = dict(self.language_model)
        for index, layer in self.layers.items():
            tensors |= {f"{path}.{index}.{name}": tensor for name, tensor in layer.items()}
        return tensors


def _put(tensors: dict[str, Tensor], name: str, tensor: Tensor, full_name: str) -> None:
    if name in tensors and not torch.equal(tensors[name], tensor):
        raise ValueError(f"{full_name} is there twice, under different names and with different values")
    tensors[name] = tensor


def _check_parts(parts: _Parts) -> tuple[dict[str, Any], dict[str, Any], tuple[int, int]]:
    """See that blocks and resampler are whole, without loading them.

    Returns:
        Sizes of the resampler and of the blocks, and the widths of visual features and language model.
    """
    if "media_time_embs" in parts.resampler:
        raise ValueError(
            "the checkpoint has perceiver.media_time_embs, by which a medium's latents depend on its place; a whole "
            "model here encodes media by themselves. Take its parts with load_resampler and load_blocks"
        )
    if not parts.blocks:
        raise ValueError("the checkpoint has no gated cross-attention blocks (lang_encoder.*.gated_cross_attn_layer.*)")
    with torch.device("meta"):
        resampler, table, sizes = _make_resampler(parts.resampler)
        blocks = {index: _make_block(tensors) for index, tensors in parts.blocks.items()}
    whole: list[tuple[str, str, list[Rename], dict[str, Tensor], nn.Module]] = [
        ("perceiver.", "resampler.", table, parts.resampler, resampler)
    ]
    for index, block in blocks.items():
        prefixes = f"lang_encoder.gated_cross_attn_layers.{index}.", f"injector.blocks.{index}."
        whole.append((*prefixes, BLOCK, parts.blocks[index], block))
    for theirs, ours, renames, tensors, module in whole:
        to_ours(
            under(renames, theirs=theirs, ours=ours),
            {theirs + name: tensor for name, tensor in tensors.items()},
            {ours + name: tensor.shape for name, tensor in module.state_dict().items()},
        )
    first = parts.blocks[min(blocks)]
    return sizes, block_sizes(first), (resampler.dim, shape_of(first, "attn.to_q.weight")[1])


def _make_block(tensors: Mapping[str, Tensor]) -> GatedCrossAttentionBlock:
    dim, media_dim = shape_of(tensors, "attn.to_q.weight")[1], shape_of(tensors, "attn.to_kv.weight")[1]
    return make_block(dim=dim, media_dim=media_dim, **block_sizes(tensors))


def _make_resampler(tensors: Mapping[str, Tensor]) -> tuple[PerceiverResampler, list[Rename], dict[str, Any]]:
    """Make a resampler as a checkpoint has it; with the table of its names, and its sizes."""
    sizes, dim = resampler_sizes(tensors), shape_of(tensors, "latents")[1]
    sizes["max_frames"] = shape_of(tensors, "frame_embs")[0] if "frame_embs" in tensors else 0
    max_media = shape_of(tensors, "media_time_embs")[0] if "media_time_embs" in tensors else 0
    resampler = make_resampler(dim=dim, vision_dim=dim, max_media=max_media, **sizes)
    places = Rename("media_time_embs", "features.media_embeddings", "media 1 dim -> media dim")
    return resampler, [*_resampler_table(sizes["depth"]), places], sizes


def _block_prefix(path: str, index: int) -> str:
    return f"lang_encoder.{path}.{index}.gated_cross_attn_layer."


def _resampler_table(depth: int) -> list[Rename]:
    return [*resampler_table(depth), Rename("frame_embs", "features.temporal_embeddings")]


def _table(path: str, indices: list[int], depth: int) -> list[Rename]:
    renames = under(_resampler_table(depth), theirs="perceiver.", ours="resampler.")
    for index in indices:
        renames += under(BLOCK, theirs=_block_prefix(path, index), ours=f"injector.blocks.{index}.")
    return renames


# ------------------------------------------------------------ the configuration


def _find_config(config: Config | None, checkpoint: Checkpoint) -> dict[str, Any]:
    if isinstance(config, str) and (name := config.removeprefix("openflamingo/")) in RELEASED:
        return RELEASED[name]
    if config is None:
        # Downloaded from a hub, a file lies in a directory of the model's name. The longest name is the most specific.
        path = "" if isinstance(checkpoint, Mapping) else str(Path(checkpoint).absolute())
        found = [name for name in RELEASED if name in path]
        return RELEASED[max(found, key=len)] if found else {}
    return read_config(config, checkpoint)


def _check_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    config = dict(config or {})
    if unknown := set(config) - _CONFIG:
        raise ValueError(
            f"config must hold arguments of OpenFlamingo's create_model_and_transforms, got {listed(sorted(unknown))}; "
            f"known are {listed(sorted(_CONFIG))}"
        )
    return config


def _check_places(blocks: Mapping[int, object], config: Mapping[str, Any]) -> None:
    every = config.get("cross_attn_every_n_layers")
    if every is not None and (not isinstance(every, int) or every < 1):
        raise ValueError(f"cross_attn_every_n_layers must be a positive number, got {every!r}")
    if every is not None and (wrong := [index for index in sorted(blocks) if (index + 1) % every]):
        raise ValueError(
            f"config says cross_attn_every_n_layers={every}, but the checkpoint has blocks before layers {wrong}"
        )


def _named(config: Mapping[str, Any], name: str, argument: str) -> Any:
    if not config.get(name):
        raise ValueError(f"give {argument}, or config[{name!r}]")
    return config[name]


def _timm_name(config: Mapping[str, Any]) -> str:
    key = (config.get("clip_vision_encoder_path"), config.get("clip_vision_encoder_pretrained"))
    if key not in _VISION_ENCODERS:
        raise ValueError(
            f"give vision_encoder: there is no timm model on record for clip_vision_encoder_path={key[0]!r} and "
            f"clip_vision_encoder_pretrained={key[1]!r}, only for {', '.join(map(str, _VISION_ENCODERS))}"
        )
    return _VISION_ENCODERS[key]


# ------------------------------------------------------------ backbones


def _add_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Add special tokens in the order of create_model_and_transforms, and give the ids of those that were not there."""
    before = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [END_OF_CHUNK_TOKEN, IMAGE_TOKEN]})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PADDING_TOKEN})
    return list(range(before, len(tokenizer)))


def _load_vision_encoder(encoder: VisionEncoder, tensors: Mapping[str, Tensor]) -> None:
    """Load CLIP's weights, in the names of open_clip or, from Otter, of transformers, where the checkpoint has them."""
    tensors = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    # The projection of the pooled token, and numbers from 0 on: no tokens come from them.
    tensors = {name: t for name, t in tensors.items() if name not in ("proj", "embeddings.position_ids")}
    if not tensors:
        return
    backbone = encoder.backbone
    shapes = {clip_vision.OURS + name: tensor.shape for name, tensor in backbone.state_dict().items()}
    table = clip_vision.open_clip if "conv1.weight" in tensors else clip_vision.transformers_clip
    loaded = to_ours(table(len(backbone.blocks), theirs=""), tensors, shapes)
    backbone.load_state_dict({name.removeprefix(clip_vision.OURS): tensor for name, tensor in loaded.items()})

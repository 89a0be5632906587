"""IDEFICS, Hugging Face's open reproduction of Flamingo: whole models, to and fro.

Covered are HuggingFaceM4/idefics-9b, -9b-instruct, -80b and -80b-instruct, and what was trained from them. A checkpoint
holds the whole model: a Llama, CLIP's vision transformer, and what joins them.

What differs from the paper's model is in `FlamingoConfig`: RMSNorms and SwiGLU in the blocks, normalised queries and
keys; CLIP's class token among the features, which have not passed its last norm; no temporal embeddings. Text before
the first image, and in rows without any, takes no attention, only the feed-forward networks.

A token sees the last image before it. Behind an end of text, `</s>`, it sees nothing until the next image: where a
prompt holds several documents, number them, the `</s>` with what it ends:

```python
import torch

input_ids = torch.tensor([[1, 32001, 306, 2, 450, 32001, 306]])
is_end = input_ids == 2
document_ids = is_end.cumsum(1) - is_end.long()  # model(input_ids, ..., document_ids=document_ids)
assert document_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1]]
```

transformers' own processor pads images with zeros, which its `image_attention_mask` hides. Here padding media are those
of zero `num_frames`, as `FlamingoProcessor` gives them: of each row the first as many as it has `<image>` tokens are
real.

Not copied: the number of layers there is divided by the interval between blocks and rounded down, so that a model with
a remainder fails in its forward; here it is refused. Dropout, by default 0 there.

Source: transformers, `models/idefics`; Laurençon et al. 2023 (OBELICS).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import IdeficsConfig, LlamaConfig, PreTrainedTokenizerBase

from flamingo_blocks.backbones import load_tokenizer
from flamingo_blocks.blocks import GatedCrossAttentionBlock, PerceiverResampler
from flamingo_blocks.configuration_flamingo import FlamingoConfig
from flamingo_blocks.convert.assembly import assemble, disassemble, make_processor
from flamingo_blocks.convert.checkpoint import Checkpoint, Config, directory_of, read_config, read_tensors
from flamingo_blocks.convert.clip_vision import clip_vision_config, transformers_clip
from flamingo_blocks.convert.renaming import Rename, load_module, part_of, under, under_each
from flamingo_blocks.modeling_flamingo import FlamingoForConditionalGeneration
from flamingo_blocks.parts import Gating, as_configured, make_block, make_resampler
from flamingo_blocks.processing_flamingo import FlamingoProcessor, special_token_id

IMAGE_TOKEN = "<image>"
# It stands before and after images; between two of them there is one.
FAKE_TOKEN = "<fake_token_around_image>"
# Ends what a side of a dialogue says, in the instruct models alone.
END_OF_UTTERANCE = "<end_of_utterance>"
# Ends of the names of what older checkpoints hold besides weights: numbers that follow from the configuration.
DERIVED_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")

_BLOCKS, _RESAMPLER = "model.gated_cross_attn_layers.", "model.perceiver_resampler."
_BLOCK = [
    Rename("input_layernorm.weight", "norm.weight"),
    Rename("cross_attn.q_proj", "to_q"),
    Rename(("cross_attn.k_proj", "cross_attn.v_proj"), "to_kv"),
    Rename("cross_attn.q_layer_norm.weight", "q_norm.weight"),
    Rename("cross_attn.k_layer_norm.weight", "k_norm.weight"),
    Rename("cross_attn.o_proj", "to_out"),
    Rename("post_attention_layernorm.weight", "norm_feed_forward.weight"),
    Rename("mlp.gate_proj", "feed_forward.to_gate"),
    Rename("mlp.up_proj", "feed_forward.to_hidden"),
    Rename("mlp.down_proj", "feed_forward.to_out"),
]
_RESAMPLER_LAYER = [
    Rename("0.context_layer_norm", "norm_features"),
    Rename("0.latents_layer_norm", "norm_latents"),
    Rename("0.q_proj", "to_q"),
    Rename(("0.k_proj", "0.v_proj"), "to_kv"),
    Rename("0.q_layer_norm", "q_norm"),
    Rename("0.k_layer_norm", "k_norm"),
    Rename("0.output_proj", "to_out"),
    Rename("1.ln", "norm_feed_forward"),
    Rename("1.fc", "feed_forward.to_hidden"),
    Rename("1.c_proj", "feed_forward.to_out"),
]
_EMBEDDINGS, _NEW_EMBEDDINGS = "model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight"
_HEAD, _NEW_HEAD = "lm_head.weight", "lm_head.additional_fc.weight"
_LANGUAGE_MODEL = [
    Rename(_EMBEDDINGS, "language_model.model.embed_tokens.weight"),
    Rename("model.layers", "language_model.model.layers"),
    Rename("model.norm", "language_model.model.norm"),
    Rename(_HEAD, "language_model.lm_head.weight"),
    Rename(_NEW_EMBEDDINGS, "new_tokens.embeddings.weight"),
    Rename(_NEW_HEAD, "new_tokens.head.weight"),
]
# What all models of the family have in common, and their tensors do not tell.
_COMMON = {
    "cross_attention_activation": "swiglu",
    "cross_attention_norm": "rms_norm",
    "feed_forward_without_media": True,
    "attend": "last",
}
_COMMON_RESAMPLER = {"resampler_activation": "relu", "max_frames": 0}

# As in the dialogues that the instruct models were trained with: `User: What is this?<image><end_of_utterance>`,
# `Assistant: A cat.<end_of_utterance>`, images between two fake tokens.
_DIALOGUE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{ ' ' ~ content.strip(' ') }}{%- else -%}
{%- for part in content -%}
{%- if part['type'] in ('image', 'video') -%}
{%- if loop.first or loop.previtem['type'] == 'text' -%}FAKE{%- endif -%}IMAGE
{%- elif part['type'] == 'text' -%}{{ (' ' if loop.first else '') ~ part['text'].strip(' ') }}
{%- else -%}{{ raise_exception('the parts of a message must be text, image or video, got ' ~ part['type']) }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if not loop.first %}{{ '\\n' }}{% endif -%}
{%- if message['role'] == 'system' -%}{{ text_of(message['content']).strip(' ') }}
{%- elif message['role'] == 'user' -%}{{ 'User:' ~ text_of(message['content']) ~ 'END' }}
{%- elif message['role'] == 'assistant' -%}{{ 'Assistant:' }}
{%- generation -%}{{ text_of(message['content']) ~ 'END' }}{%- endgeneration -%}
{%- else -%}{{ raise_exception('a role must be system, user or assistant, got ' ~ message['role']) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif -%}
"""


def load_resampler(state_dict: Mapping[str, Tensor], config: Config) -> PerceiverResampler | None:
    """Load the resampler of a model.

    Args:
        state_dict: Of the whole model there.
        config: Its configuration: a mapping, an `IdeficsConfig`, or the path of its JSON.

    Returns:
        The resampler, in eval mode, in the checkpoint's dtype; None if the model has none: its blocks attend to the
        features themselves.

    Raises:
        ValueError: If a tensor of it is left over, is missing or has the wrong shape, or the configuration is not one
            of IDEFICS.
    """
    family = _read(config, state_dict)
    tensors = part_of(state_dict, _RESAMPLER)
    if not family.use_resampler:
        if tensors:
            raise ValueError("config says use_resampler=False, but the checkpoint has a resampler")
        return None
    dim = _vision_dim(family)
    with torch.device("meta"):  # without initial values
        resampler: PerceiverResampler = make_resampler(dim=dim, vision_dim=dim, **_resampler_options(family))
    return load_module(resampler, _resampler_table(len(resampler.layers)), tensors)


def load_blocks(state_dict: Mapping[str, Tensor], config: Config) -> dict[int, GatedCrossAttentionBlock]:
    """Load the gated cross-attention blocks of a model.

    Args:
        state_dict: Of the whole model there.
        config: As for `load_resampler`.

    Returns:
        For the index of each decoder layer before which one stands, the block, in eval mode, in the checkpoint's dtype.

    Raises:
        ValueError: If a tensor of a block is left over, is missing or has the wrong shape, or the configuration is not
            one of IDEFICS.
    """
    family = _read(config, state_dict)
    indices, options = _layers(family), _block_options(family)
    tensors = _without_buffers(part_of(state_dict, _BLOCKS))
    if unused := sorted(name for name in tensors if name.split(".")[0] not in map(str, range(len(indices)))):
        raise ValueError(
            f"config says there are {len(indices)} blocks, but the checkpoint also has {', '.join(unused[:20])}"
        )
    with torch.device("meta"):  # without initial values
        blocks = [make_block(dim=family.hidden_size, media_dim=_vision_dim(family), **options) for _ in indices]
    table = block_table(options["gating"])
    return {
        index: load_module(block, table, part_of(tensors, f"{n}."))
        for n, (index, block) in enumerate(zip(indices, blocks, strict=True))
    }


def load_flamingo(
    checkpoint: Checkpoint,
    config: Config | None = None,
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    end_of_chunk_token: str | None = None,
    dtype: torch.dtype | str | None = None,
    progress: bool = False,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Load a whole model.

    Generated text ends with the end of chunk or of text, and holds no `<image>` and no `<fake_token_around_image>`.

    In texts, an image is `<fake_token_around_image><image><fake_token_around_image>`; between two images there is one
    fake token. The chat template writes it so, where the tokenizer has none of its own.

    Args:
        checkpoint: A directory, file, index or tensors, see `flamingo_blocks.convert.checkpoint.read_tensors`.
        config: As for `load_resampler`. None: the checkpoint's directory has it.
        tokenizer: A tokenizer, its id or path. None: the checkpoint's directory has it.
        end_of_chunk_token: Ends what belongs to an image. None: `<end_of_utterance>` if the model has it, as the
            instruct models do, else the end of text.
        dtype: Of everything. None: as in the checkpoint.
        progress: Show bars while files are read.

    Returns:
        The model, in eval mode, and its processor. Pixels are those of `IdeficsImageProcessorPil`; of transparent
        images, which newer versions of transformers lay on white, the alpha channel is dropped.

    Raises:
        ValueError: If a tensor is left over, is missing or has the wrong shape, the configuration is not one of
            IDEFICS, or the tokenizer is another model's.
        OSError: If a file is missing or damaged.

    Example:
        ```python
        # from huggingface_hub import snapshot_download
        # from flamingo_blocks.convert import idefics
        #
        # model, processor = idefics.load_flamingo(snapshot_download("HuggingFaceM4/idefics-9b-instruct"))
        # messages = [{"role": "user", "content": [{"type": "image", "image": cat}, {"type": "text", "text": "Who?"}]}]
        # inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        # print(processor.batch_decode(model.generate(**inputs, max_new_tokens=20)))
        ```

    Source: transformers, `models/idefics`. Differs: see the module.
    """
    family = _read(config, checkpoint)
    tensors = _without_buffers(read_tensors(checkpoint, progress=progress))
    tokenizer = load_tokenizer(directory_of(checkpoint, "tokenizer") if tokenizer is None else tokenizer)
    end_of_utterance = _known(tokenizer, END_OF_UTTERANCE, family)
    if end_of_chunk_token is None:
        end_of_chunk_token = str(tokenizer.eos_token if end_of_utterance is None else END_OF_UTTERANCE)
    if family.tie_word_embeddings:
        tensors = _without_head(tensors)
    flamingo_config = FlamingoConfig(
        text_config=_language_model(family),
        vision_config=_vision_encoder(family),
        cross_attention_layers=_layers(family),
        **as_configured(_block_options(family), _resampler_options(family)),
        image_token_id=_id_of(tokenizer, IMAGE_TOKEN, family),
        end_of_chunk_token_id=_id_of(tokenizer, end_of_chunk_token, family),
        new_token_ids=[family.vocab_size + i for i in range(family.additional_vocab_size)],
        new_token_head="tied" if family.tie_word_embeddings else "linear_without_bias",
    )
    model = assemble(flamingo_config, _table(flamingo_config, _layers(family)), tensors, fixed={}, dtype=dtype)
    fake_token = _known(tokenizer, FAKE_TOKEN, family)
    if fake_token is not None:
        generation_config: Any = model.generation_config
        generation_config.suppress_tokens = [*generation_config.suppress_tokens, fake_token]
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _dialogue(has_fake_token=fake_token is not None, has_end=end_of_utterance is not None)
    processor = make_processor(
        model, tokenizer, image_token=IMAGE_TOKEN, end_of_chunk_token=end_of_chunk_token, crop_mode="squash"
    )
    return model, processor


def to_idefics(model: FlamingoForConditionalGeneration) -> dict[str, Tensor]:
    """Give a model's tensors as IDEFICS' checkpoints have them, without `DERIVED_BUFFERS`.

    As in the files that transformers writes, a head that is tied to the embeddings is left out, that of the additional
    tokens, too.

    Args:
        model: As loaded here.

    Raises:
        ValueError: If a tensor has no place there, or an option is none of IDEFICS'.

    Example:
        ```python
        # from safetensors.torch import save_file
        #
        # save_file(idefics.to_idefics(model), "model.safetensors", metadata={"format": "pt"})
        ```
    """
    config = model.config
    expected: dict[str, Any] = dict(_COMMON)
    if config.resampler == "perceiver":
        expected |= _COMMON_RESAMPLER
    text_config: Any = config.text_config
    expected["new_token_head"] = "tied" if text_config.tie_word_embeddings else "linear_without_bias"
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name} must be {value!r} for IDEFICS, got {getattr(config, name)!r}")
    depth = text_config.num_hidden_layers
    layers = list(model.injector.layer_indices)
    if depth % len(layers) or layers != list(range(0, depth, depth // len(layers))):
        raise ValueError(f"IDEFICS has blocks at equal distances, from layer 0 on, got {layers} of {depth} layers")
    return disassemble(model, _table(config, layers), fixed={})


# ------------------------------------------------------------ configurations


def _read(config: Config | None, checkpoint: Checkpoint) -> IdeficsConfig:
    """Read a configuration with transformers' own defaults, and refuse what is none of IDEFICS'."""
    options = read_config(config, checkpoint)
    if options.get("model_type", "idefics") != "idefics":
        raise ValueError(f"config must be one of IDEFICS, got model_type {options['model_type']!r}")
    family = IdeficsConfig.from_dict(options)
    if family.hidden_act != "silu":
        raise ValueError(f"hidden_act must be silu, got {family.hidden_act!r}")
    if family.alpha_type not in ("float", "vector"):
        raise ValueError(f"alpha_type must be float or vector, got {family.alpha_type!r}")
    if family.cross_layer_interval < 1 or family.num_hidden_layers % family.cross_layer_interval:
        raise ValueError(
            f"num_hidden_layers must be a multiple of cross_layer_interval={family.cross_layer_interval}, got "
            f"{family.num_hidden_layers}; the original cannot run such a model, either"
        )
    return family


def _block_options(family: IdeficsConfig) -> dict[str, Any]:
    """As `make_block` takes them."""
    return {
        "heads": family.num_attention_heads,
        "hidden": family.intermediate_size,
        "activation": "swiglu",
        "norm": "rms_norm",
        "norm_eps": family.rms_norm_eps,
        "qk_norm": family.qk_layer_norms,
        "gating": "tanh_per_channel" if family.alpha_type == "vector" else "tanh",
    }


def _resampler_options(family: IdeficsConfig) -> dict[str, Any]:
    """As `make_resampler` takes them."""
    if not family.use_resampler:
        return {"kind": "linear", "max_frames": 0}
    perceiver: Any = family.perceiver_config
    return {
        "kind": "perceiver",
        "depth": perceiver.resampler_depth,
        "heads": perceiver.resampler_n_heads,
        "head_dim": perceiver.resampler_head_dim,
        "hidden": 4 * _vision_dim(family),
        "activation": "relu",
        "qk_norm": perceiver.qk_layer_norms_perceiver,
        "num_latents": perceiver.resampler_n_latents,
        "max_frames": 0,
    }


def _vision_dim(family: IdeficsConfig) -> int:
    vision: Any = family.vision_config
    return int(vision.embed_dim)


def _layers(family: IdeficsConfig) -> list[int]:
    return list(range(0, family.num_hidden_layers, family.cross_layer_interval))


def _language_model(family: IdeficsConfig) -> LlamaConfig:
    names = [
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "hidden_act"),
        *("rms_norm_eps", "max_position_embeddings", "rope_parameters", "tie_word_embeddings", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    ]
    return LlamaConfig(**{name: getattr(family, name) for name in names})


def _vision_encoder(family: IdeficsConfig) -> Any:
    vision: Any = family.vision_config
    names = ("num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "image_size")
    return clip_vision_config(
        hidden_size=vision.embed_dim,
        hidden_act=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps,
        channels=vision.num_channels,
        keep_prefix_tokens=True,
        **{name: getattr(vision, name) for name in names},
    )


# ------------------------------------------------------------ tensors


def block_table(gating: Gating) -> list[Rename]:
    """Give the table for a block.

    Args:
        gating: `"tanh"` or `"tanh_per_channel"`.
    """
    axes = "1 1 dim -> dim" if gating == "tanh_per_channel" else ""
    gates = {"alpha_cross_attn": "gate.alpha", "alpha_dense": "gate_feed_forward.alpha"}
    return [*_BLOCK, *(Rename(theirs, ours, axes) for theirs, ours in gates.items())]


def _resampler_table(depth: int) -> list[Rename]:
    layers = under_each(_RESAMPLER_LAYER, range(depth), theirs="blocks.", ours="layers.")
    return [Rename("latents", "latents"), Rename("layer_norm", "norm"), *layers]


def _table(config: FlamingoConfig, layers: list[int]) -> list[Rename]:
    vision: Any = config.vision_config
    renames = [*_LANGUAGE_MODEL, *transformers_clip(vision.model_args["depth"], theirs="model.vision_model.")]
    if config.resampler == "perceiver":
        renames += under(_resampler_table(config.resampler_depth), theirs=_RESAMPLER, ours="resampler.")
    for n, index in enumerate(layers):
        renames += under(block_table(config.gating), theirs=f"{_BLOCKS}{n}.", ours=f"injector.blocks.{index}.")
    return renames


def _without_buffers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(DERIVED_BUFFERS)}


def _without_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop a tied head."""
    for head, embeddings in ((_HEAD, _EMBEDDINGS), (_NEW_HEAD, _NEW_EMBEDDINGS)):
        if head in tensors and embeddings in tensors and not torch.equal(tensors[head], tensors[embeddings]):
            raise ValueError(f"config says tie_word_embeddings=True, but {head} and {embeddings} differ")
    return {name: tensor for name, tensor in tensors.items() if name not in (_HEAD, _NEW_HEAD)}


# ------------------------------------------------------------ tokens


def _known(tokenizer: PreTrainedTokenizerBase, token: str, family: IdeficsConfig) -> int | None:
    """Id of a token, if the model has it, too."""
    token_id = tokenizer.get_vocab().get(token)
    return token_id if token_id is not None and token_id < family.vocab_size + family.additional_vocab_size else None


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str, family: IdeficsConfig) -> int:
    token_id, size = special_token_id(tokenizer, token), family.vocab_size + family.additional_vocab_size
    if token_id >= size:
        raise ValueError(
            f"{token} has the id {token_id} in the tokenizer, but the model has {size} tokens only; give its own "
            "tokenizer"
        )
    return token_id


def _dialogue(*, has_fake_token: bool, has_end: bool) -> str:
    fake = FAKE_TOKEN if has_fake_token else ""
    template = _DIALOGUE.replace("IMAGE", IMAGE_TOKEN + fake).replace("FAKE", fake)
    return template.replace("END", END_OF_UTTERANCE if has_end else "")

"""Llama-3.2-Vision (Mllama): a Llama with gated cross-attention layers, and an encoder of images in tiles.

Covered are meta-llama/Llama-3.2-11B-Vision, -11B-Vision-Instruct, -90B-Vision and -90B-Vision-Instruct, whose files
hold the whole model. What the family calls a layer with cross-attention is a block here, before the layer behind it.

An image is cut into up to four tiles, and each tile is a medium here: text after an image sees all of its tiles, text
after several images side by side sees those of all of them. Inside of the vision encoder the tiles of an image attend
to one another, also to the empty ones up to the fourth. No model of timm does so: the backbone is transformers' own.
What transformers' processor makes of images and text becomes the model's input by `to_inputs`:

```python
# from transformers import AutoProcessor
# from flamingo_blocks import FlamingoForConditionalGeneration
# from flamingo_blocks.convert import mllama
#
# model, processor = mllama.load_flamingo("Llama-3.2-11B-Vision")  # the directory where its files are
# hf_processor = AutoProcessor.from_pretrained("Llama-3.2-11B-Vision")
# batch = hf_processor(images=[[cat, dog]], text=["<|image|><|image|>Two pets:"], return_tensors="pt")
# model.generate(**mllama.to_inputs(model, batch))
#
# model.save_pretrained("ours")
# FlamingoForConditionalGeneration.from_pretrained("ours", vision_encoder=mllama.make_vision_encoder("ours"))
```

The processor that `load_flamingo` gives makes one tile of each image, whatever its shape, and the model then lets text
see the last image alone, also behind several side by side. It needs no `to_inputs`.

Where we differ: tokens that see no image, such as text before the first one, pass the blocks unchanged, as in Meta's
own code. In transformers they attend to all images of the batch's row, later ones and padding too, since a mask that
hides everything is turned into one that hides nothing. `load_flamingo(..., unseeing="transformers")` does the same.
Eight tokens, of which `<|image|>` is the first, have an embedding but no logit there. Here they have one, so low that
it adds nothing to the softmax; as labels they must be -100.

Source: Grattafiori et al. 2024 (The Llama 3 Herd of Models), section 7; transformers' `models/mllama`.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig, MllamaConfig, MllamaVisionModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig

from flamingo_blocks.backbones import load_tokenizer
from flamingo_blocks.blocks import GatedCrossAttentionBlock, KeyValues, MediaRuns, PerceiverResampler
from flamingo_blocks.builder import as_dtype
from flamingo_blocks.configuration_flamingo import FlamingoConfig, FlamingoVisionConfig
from flamingo_blocks.convert.assembly import assemble, disassemble, make_processor
from flamingo_blocks.convert.checkpoint import Checkpoint, Config, directory_of, read_config, read_tensors
from flamingo_blocks.convert.renaming import Rename, load_module, under
from flamingo_blocks.modeling_flamingo import FlamingoForConditionalGeneration
from flamingo_blocks.parts import as_configured, make_block
from flamingo_blocks.processing_flamingo import FlamingoProcessor
from flamingo_blocks.vision import VisionEncoder

Names = Literal["released", "transformers"]
Unseeing = Literal["zero", "transformers"]

IMAGE_TOKEN = "<|image|>"
END_OF_TURN = "<|eot_id|>"
# Rows of the embedding beyond the vocabulary.
NEW_TOKENS = 8
# The logit of those. A power of two, which all dtypes have; no softmax notices it.
NO_LOGIT = -(2.0**14)
# Of transformers' processor, and what of it is made into our names.
_OF_IMAGES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")


# ------------------------------------------------------------ images in tiles


class MllamaVision(nn.Module):
    """The vision encoder of Llama-3.2-Vision, for images of one tile as well as for tiled ones.

    Args:
        model: That of transformers.

    Source: transformers' `MllamaVisionModel`. An image of one tile stands there beside empty tiles, to which it
    attends: so it does here.
    """

    def __init__(self, model: MllamaVisionModel) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        # Ids count from 1: 0 is for padding.
        self.one_tile = config.supported_aspect_ratios.index([1, 1]) + 1

    def forward(
        self, images: Float[Tensor, "media channels height width"]
    ) -> Float[Tensor, "media patches vision_dim"]:
        """Encode images, each as the one tile of its own.

        Args:
            images: Normalised, of the size of a tile.
        """
        tiles = self.model.config.max_num_tiles
        is_tile = torch.arange(tiles, device=images.device) == 0
        features = self.encode_tiles(
            F.pad(images[:, None], (0, 0) * 3 + (0, tiles - 1)),
            torch.full(images.shape[:1], self.one_tile, device=images.device),
            is_tile.long().expand(len(images), -1),
        )
        return features[:, 0]

    def encode_tiles(
        self,
        pixel_values: Float[Tensor, "images tiles channels height width"],
        aspect_ratio_ids: Int[Tensor, " images"],
        aspect_ratio_mask: Int[Tensor, "images tiles"],
    ) -> Float[Tensor, "images tiles patches vision_dim"]:
        """Encode images that were cut into tiles.

        Args:
            pixel_values: Normalised tiles; those that an image does not have are zeros.
            aspect_ratio_ids: How its tiles lie side by side, by the model's own numbers.
            aspect_ratio_mask: 1 where an image has a tile.
        """
        output = self.model(pixel_values[:, None], aspect_ratio_ids[:, None], aspect_ratio_mask[:, None])
        return output.last_hidden_state[:, 0]


def make_vision_encoder(config: Config) -> VisionEncoder:
    """Make the vision encoder without its weights, for `from_pretrained(..., vision_encoder=...)`.

    Args:
        config: Of the converted model, or of the original one: a mapping, a configuration of transformers, the path of
            its JSON, or of the directory where it is `config.json`.

    Returns:
        The vision encoder, of the dtype in which the converted model was saved.

    Raises:
        ValueError: If it is the configuration of another model.
        OSError: If there is no such file.
    """
    content = read_config(config, {})
    vision: Any
    dtype = None
    if content.get("model_type") == FlamingoConfig.model_type:
        options = (content.get("vision_config") or {}).get("model_args") or {}
        if options.get("model_type") != MllamaVisionConfig.model_type:
            raise ValueError("config must be of a converted Llama-3.2-Vision, got that of another Flamingo")
        vision, dtype = MllamaVisionConfig(**options), content.get("vision_dtype") or content.get("dtype")
    else:
        vision = _family_config(content).vision_config
    with no_init_weights():
        backbone = MllamaVision(MllamaVisionModel(vision))
    if isinstance(dtype, str):
        backbone.to(getattr(torch, dtype))
    return VisionEncoder(backbone, image_size=vision.image_size, channels=vision.num_channels, returns="tokens")


def to_inputs(model: FlamingoForConditionalGeneration, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Turn what transformers' `MllamaProcessor` returns into what this model takes: each tile is a medium.

    Images are encoded here, padding images not. There are gradients if the vision encoder is not frozen.

    Args:
        model: A converted model.
        batch: `input_ids`, `attention_mask` and, if there are images, `pixel_values` (batch, images, tiles, channels,
            height, width), `aspect_ratio_ids` (batch, images), `aspect_ratio_mask` (batch, images, tiles) and
            `cross_attention_mask` (batch, text, images, tiles). Everything else is passed on, such as `labels`.

    Returns:
        Arguments of `forward` and `generate`: the text as it was, and `vision_features` (batch, media, 1, patches,
        vision_dim), where the tiles of a row stand side by side; `num_frames` (batch, media), 0 where a row has fewer
        tiles; and `media_mask` (batch, text, media).

    Raises:
        ValueError: If the model has another vision encoder, or the batch is not whole.
    """
    inputs = {name: value for name, value in batch.items() if name not in _OF_IMAGES}
    if batch.get("pixel_values") is None:
        return inputs
    encoder = model.vision_encoder
    backbone = encoder.backbone
    if not isinstance(backbone, MllamaVision):
        raise ValueError(f"model must be a converted Llama-3.2-Vision, got one with a {type(backbone).__name__}")
    if missing := [name for name in _OF_IMAGES if batch.get(name) is None]:
        raise ValueError(
            f"batch has pixel_values, but no {', '.join(missing)}; give all that transformers' processor returns for "
            "text with images"
        )
    pixel_values, ids, mask, seen = (torch.as_tensor(batch[name]).to(backbone.model.device) for name in _OF_IMAGES)
    is_tile, is_seen = (mask > 0) & (ids > 0)[..., None], seen > 0  # padding images have a tile in the mask
    if (is_seen & ~is_tile[:, None]).any():
        raise ValueError("cross_attention_mask lets text see tiles that aspect_ratio_mask says are padding")
    # Where unseeing tokens attend to everything, padding is something.
    is_medium = torch.ones_like(is_tile) if unseeing_of(model) == "transformers" else is_tile
    is_image = is_medium.any(-1)
    with torch.no_grad() if encoder.is_frozen else nullcontext():
        encoded = backbone.encode_tiles(pixel_values[is_image], ids[is_image], mask[is_image])
    features = encoded.new_zeros(*is_image.shape, *encoded.shape[1:])
    features[is_image] = encoded
    # Tiles first, then padding, so that tokens see neighbours.
    num_media = int(is_medium.flatten(1).sum(1).max())
    order = is_tile.flatten(1).int().argsort(dim=1, descending=True, stable=True)[:, :num_media]
    rows = torch.arange(len(order), device=order.device)[:, None]
    return inputs | {
        "vision_features": features.flatten(1, 2)[rows, order][:, :, None],
        "num_frames": is_medium.flatten(1)[rows, order].long(),
        "media_mask": is_seen.flatten(2).transpose(1, 2)[rows, order].transpose(1, 2),
    }


# ------------------------------------------------------------ tokens that see nothing


class SeesAllBlock(GatedCrossAttentionBlock):
    """A block in which tokens that see nothing attend to all media of their row, as in transformers."""

    def attend(
        self, hidden_states: Float[Tensor, "batch text {self.dim}"], media: KeyValues, runs: MediaRuns
    ) -> Float[Tensor, "batch text {self.dim}"]:
        """Give what attention adds; arguments as for `GatedCrossAttentionBlock`."""
        mask = runs.dense_mask(media.keys.shape[1])
        return super().attend(hidden_states, media, MediaRuns.from_mask(mask | ~mask.any(-1, keepdim=True)))


def set_unseeing(model: FlamingoForConditionalGeneration, unseeing: Unseeing) -> None:
    """Say what blocks do with tokens that see no medium. It is not saved with the model: say it again after loading.

    Args:
        model: A converted model.
        unseeing: `"zero"`: they leave them as they are. `"transformers"`: they let them attend to all media of their
            row, of which `to_inputs` then makes more: padding tiles and images are among them.

    Raises:
        ValueError: If it is neither.
    """
    _check_unseeing(unseeing)
    for block in model.injector.blocks.values():
        # The same parameters, under the same names.
        block.__class__ = SeesAllBlock if unseeing == "transformers" else GatedCrossAttentionBlock


def unseeing_of(model: FlamingoForConditionalGeneration) -> Unseeing:
    """Give what was set by `set_unseeing`."""
    sees_all = any(isinstance(block, SeesAllBlock) for block in model.injector.blocks.values())
    return "transformers" if sees_all else "zero"


def _check_unseeing(unseeing: Any) -> None:
    if unseeing not in get_args(Unseeing):
        raise ValueError(f"unseeing must be one of {', '.join(map(repr, get_args(Unseeing)))}, got {unseeing!r}")


# ------------------------------------------------------------ loading


def load_resampler(state_dict: Mapping[str, Tensor], config: Config) -> PerceiverResampler | None:  # noqa: ARG001
    """Give None: this family has no resampler, but a projection, which `load_flamingo` loads.

    Args:
        state_dict: As for `load_blocks`.
        config: As for `load_blocks`.
    """
    return None


def load_blocks(state_dict: Mapping[str, Tensor], config: Config) -> dict[int, GatedCrossAttentionBlock]:
    """Load the layers with cross-attention as blocks.

    Args:
        state_dict: Tensors of the whole model, or of these layers, by the names of the released files or of
            transformers' module.
        config: Of the original model: a mapping, a configuration of transformers, or the path of its JSON.

    Returns:
        Blocks, in eval mode and of the checkpoint's dtype, each by the index of the layer before which it stands in the
        language model without them.

    Raises:
        ValueError: If tensors are missing, have no place or the wrong shape, or no block can stand so.
    """
    text = _family_config(read_config(config, {})).text_config
    names = _names_of(state_dict)
    blocks = {}
    for index, theirs in _places(text).items():
        prefix = f"{names.decoder}.layers.{theirs}."
        part = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        block = make_block(dim=text.hidden_size, media_dim=text.hidden_size, **_block_sizes(text))
        blocks[index] = load_module(block, under(BLOCK, theirs=prefix, ours=""), part)
    return blocks


def load_flamingo(
    checkpoint: Checkpoint,
    config: Config | None = None,
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    unseeing: Unseeing = "zero",
    dtype: torch.dtype | str | None = None,
    progress: bool = False,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Load a whole model.

    Args:
        checkpoint: A directory with the released files, or one of them, or tensors by name. The names may also be
            those of transformers' module (`model.language_model...`).
        config: Of the original model: a mapping, a configuration of transformers, or the path of its JSON. None:
            `config.json` beside the checkpoint.
        tokenizer: The tokenizer, or its path or id. None: the checkpoint's directory.
        unseeing: What blocks do with tokens that see no image, see `set_unseeing`.
        dtype: Of the model. None: as in the checkpoint.
        progress: Show a bar while files are read.

    Returns:
        The model, in eval mode, and a processor, which squashes each image to one tile. A chunk ends with `<|eot_id|>`,
        or with the end of text if the tokenizer has no such token. For images in tiles, see `to_inputs`.

    Raises:
        ValueError: If tensors are missing, have no place or the wrong shape, or the configuration or tokenizer is of
            another model.
        OSError: If a file is missing or damaged.

    Source: transformers' `MllamaForConditionalGeneration`. Differs: see the module.
    """
    _check_unseeing(unseeing)
    dtype = as_dtype("dtype", dtype)
    family = _family_config(read_config(config, checkpoint))
    text, vision = family.text_config, family.vision_config
    words: Any = _load_tokenizer(tokenizer, checkpoint, family)
    end_of_chunk = END_OF_TURN if END_OF_TURN in words.get_vocab() else words.eos_token
    tensors = read_tensors(checkpoint, progress=progress)
    names = _names_of(tensors)
    of_vision = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{names.vision}.")}
    encoder = make_vision_encoder(family)
    load_module(encoder.backbone, [Rename(names.vision, "model")], of_vision)
    places = _places(text)
    flamingo_config = FlamingoConfig(
        text_config=_language_model_config(text),
        vision_config=FlamingoVisionConfig(
            architecture=None,
            model_args={k: v for k, v in vision.to_diff_dict().items() if k != "transformers_version"},
            image_size=vision.image_size,
            channels=vision.num_channels,
        ),
        cross_attention_layers=list(places),
        **as_configured(_block_sizes(text), {"kind": "linear", "dim": text.hidden_size, "max_frames": 0}),
        image_token_id=family.image_token_index,
        end_of_chunk_token_id=words.convert_tokens_to_ids(end_of_chunk),
        new_token_ids=list(range(text.vocab_size, text.vocab_size + NEW_TOKENS)),
        freeze_exceptions=list(_FIXED),
    )
    stored = next((tensor.dtype for name, tensor in tensors.items() if name not in of_vision), torch.float32)
    model = assemble(
        flamingo_config,
        _table(names, text.num_hidden_layers - len(places), list(places)),
        {name: tensor for name, tensor in tensors.items() if name not in of_vision},
        fixed={name: tensor.to(stored) for name, tensor in _fixed(text.hidden_size).items()},
        vision_encoder=encoder.to(dtype=dtype),
        dtype=dtype,
    )
    set_unseeing(model, unseeing)
    processor = make_processor(
        model,
        words,
        image_token=IMAGE_TOKEN,
        end_of_chunk_token=end_of_chunk,
        crop_mode="squash",
        interpolation="bilinear",
    )
    return model, processor


def to_mllama(model: FlamingoForConditionalGeneration, names: Names = "released") -> dict[str, Tensor]:
    """Give a model's tensors by the names of the family: the reverse of `load_flamingo`.

    Args:
        model: A converted model.
        names: `"released"`: those of the released files, which transformers' `save_pretrained` writes and its
            `from_pretrained` reads. `"transformers"`: those of the `state_dict` of `MllamaForConditionalGeneration`.

    Returns:
        All tensors of the original, bit for bit.

    Raises:
        ValueError: If a tensor has no place there, or one was trained that is not there, see `NO_LOGIT`.
    """
    if names not in _NAMES:
        raise ValueError(f"names must be one of {', '.join(map(repr, _NAMES))}, got {names!r}")
    lm: Any = model.language_model
    table = _table(_NAMES[names], len(lm.model.layers), list(model.injector.layer_indices))
    table.append(Rename(_NAMES[names].vision, "vision_encoder.backbone.model"))
    return disassemble(model, table, fixed=_fixed(lm.config.hidden_size))


# ------------------------------------------------------------ names


@dataclass(frozen=True)
class _Prefixes:
    decoder: str
    head: str
    vision: str
    projector: str


_NAMES: dict[Names, _Prefixes] = {
    "released": _Prefixes(
        decoder="language_model.model",
        head="language_model.lm_head",
        vision="vision_model",
        projector="multi_modal_projector",
    ),
    "transformers": _Prefixes(
        decoder="model.language_model",
        head="lm_head",
        vision="model.vision_model",
        projector="model.multi_modal_projector",
    ),
}
# A layer with cross-attention.
BLOCK = [
    Rename("input_layernorm", "norm"),
    Rename("cross_attn.q_proj", "to_q"),
    Rename(("cross_attn.k_proj", "cross_attn.v_proj"), "to_kv"),
    Rename("cross_attn.q_norm", "q_norm"),
    Rename("cross_attn.k_norm", "k_norm"),
    Rename("cross_attn.o_proj", "to_out"),
    Rename("cross_attn_attn_gate", "gate.alpha"),
    Rename("post_attention_layernorm", "norm_feed_forward"),
    Rename("mlp.gate_proj", "feed_forward.to_gate"),
    Rename("mlp.up_proj", "feed_forward.to_hidden"),
    Rename("mlp.down_proj", "feed_forward.to_out"),
    Rename("cross_attn_mlp_gate", "gate_feed_forward.alpha"),
]
# Tensors that the family does not have.
_FIXED = ("new_tokens.head.weight", "new_tokens.head.bias")


def _fixed(dim: int) -> dict[str, Tensor]:
    weight, bias = _FIXED
    return {weight: torch.zeros(NEW_TOKENS, dim), bias: torch.full((NEW_TOKENS,), NO_LOGIT)}


def _names_of(tensors: Mapping[str, Tensor]) -> _Prefixes:
    return _NAMES["transformers" if any(name.startswith("model.") for name in tensors) else "released"]


def _table(names: _Prefixes, layers: int, blocks: Sequence[int]) -> list[Rename]:
    """Everything but the vision encoder.

    Args:
        names: Of the other side.
        layers: Number of the language model's own layers.
        blocks: Before which of them there are blocks.
    """
    tables = ("language_model.model.embed_tokens.weight", "new_tokens.embeddings.weight")
    renames = [
        Rename(f"{names.decoder}.embed_tokens.weight", tables),
        Rename(f"{names.decoder}.norm", "language_model.model.norm"),
        Rename(names.head, "language_model.lm_head"),
        Rename(names.projector, "resampler.project"),
    ]
    theirs = 0
    for index in range(layers):
        if index in blocks:
            renames += under(BLOCK, theirs=f"{names.decoder}.layers.{theirs}.", ours=f"injector.blocks.{index}.")
            theirs += 1
        renames.append(Rename(f"{names.decoder}.layers.{theirs}", f"language_model.model.layers.{index}"))
        theirs += 1
    return renames


# ------------------------------------------------------------ the configuration


def _family_config(config: Mapping[str, Any]) -> Any:
    """Read a configuration of the original model, and refuse what it does not say as the released ones do."""
    found = config.get("model_type", MllamaConfig.model_type)
    if found != MllamaConfig.model_type:
        raise ValueError(f'config must be of a Llama-3.2-Vision, model_type "mllama", got {found!r}')
    family: Any = MllamaConfig(**config)
    if family.text_config.hidden_act != "silu":
        raise ValueError(f'text_config.hidden_act must be "silu", got {family.text_config.hidden_act!r}')
    return family


def _places(text: Any) -> dict[int, int]:
    """Give the index of the language model's own layer that follows each layer with cross-attention: a block's place.

    Returns:
        The other index by this one.
    """
    crossing, layers = sorted(set(text.cross_attention_layers)), text.num_hidden_layers
    places = {theirs - before: theirs for before, theirs in enumerate(crossing)}
    if not crossing or len(places) < len(crossing) or not all(0 <= c < layers - 1 for c in crossing):
        raise ValueError(
            "text_config.cross_attention_layers must name layers that each have one without cross-attention behind "
            f"them, among {layers}, got {text.cross_attention_layers}; blocks stand before such layers, one before each"
        )
    return places


def _block_sizes(text: Any) -> dict[str, Any]:
    return {
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "hidden": text.intermediate_size,
        "activation": "swiglu",
        "norm": "rms_norm",
        "norm_eps": text.rms_norm_eps,
        "qk_norm": True,
        "feed_forward_without_media": False,
    }


def _language_model_config(text: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers - len(text.cross_attention_layers),
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        hidden_act=text.hidden_act,
        max_position_embeddings=text.max_position_embeddings,
        initializer_range=text.initializer_range,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters=text.rope_parameters,
        attention_dropout=text.dropout,
        use_cache=text.use_cache,
        tie_word_embeddings=False,  # whatever it says there: embedding and head have another number of rows
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )


def _load_tokenizer(
    tokenizer: str | Path | PreTrainedTokenizerBase | None, checkpoint: Checkpoint, family: Any
) -> PreTrainedTokenizerBase:
    words = load_tokenizer(directory_of(checkpoint, "tokenizer") if tokenizer is None else tokenizer)
    found = words.convert_tokens_to_ids(IMAGE_TOKEN)
    if found != family.image_token_index:
        raise ValueError(
            f"the tokenizer must have {IMAGE_TOKEN} as token {family.image_token_index}, as config.image_token_index "
            f"says, got {found}; it is another model's"
        )
    return words

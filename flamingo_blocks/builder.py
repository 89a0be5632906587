"""build_flamingo: a Flamingo from any decoder of transformers and any backbone of timm."""

import logging
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args

import torch
from torch import Tensor, nn
from transformers import (
    AddedToken,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flamingo_blocks.backbones import (
    dtype_name,
    ensure_padding,
    load_language_model,
    load_tokenizer,
    load_vision_encoder,
)
from flamingo_blocks.blocks import Attend
from flamingo_blocks.configuration_flamingo import FlamingoConfig, FlamingoVisionConfig
from flamingo_blocks.injection import select_layers
from flamingo_blocks.language import find_decoder_layers, find_residual_stream, ordinary_token
from flamingo_blocks.modeling_flamingo import FlamingoForConditionalGeneration
from flamingo_blocks.parts import Activation, Gating, Norm, Resampler
from flamingo_blocks.processing_flamingo import FlamingoImageProcessor, FlamingoProcessor, special_token_id
from flamingo_blocks.residual_stream import LAYOUTS

_log = logging.getLogger(__name__)
Part = Literal["language_model", "vision_encoder"]


class FlamingoSizes(TypedDict, total=False):
    """Sizes and kinds of the trained parts; see `FlamingoConfig`."""

    cross_attention_heads: int
    cross_attention_head_dim: int
    cross_attention_kv_heads: int
    cross_attention_hidden: int
    cross_attention_activation: Activation
    cross_attention_norm: Norm
    cross_attention_norm_eps: float
    cross_attention_qk_norm: bool
    feed_forward_without_media: bool
    gate_init: float
    resampler_dim: int
    resampler_depth: int
    resampler_heads: int
    resampler_head_dim: int
    resampler_hidden: int
    resampler_activation: Activation
    resampler_qk_norm: bool
    num_latents: int
    max_frames: int


def build_flamingo(
    language_model: str | Path | PreTrainedConfig | PreTrainedModel,
    vision_encoder: str | Path | FlamingoVisionConfig | nn.Module,
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    cross_attention_every: int = 1,
    layers: Sequence[int] | Literal["middle"] | None = None,
    decoder_layers: str | None = None,
    resampler: Resampler = "perceiver",
    attend: Attend = "last",
    gating: Gating = "tanh",
    freeze: Collection[Part] = ("language_model", "vision_encoder"),
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    image_token: str = "<image>",
    end_of_chunk_token: str = "<EOC>",
    dtype: torch.dtype | str | None = None,
    trained_dtype: torch.dtype | str = torch.float32,
    **sizes: Unpack[FlamingoSizes],
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Join a language model and a vision encoder to a Flamingo, which starts as the language model, exactly.

    Every default is the paper's choice; the other values are its ablations (table 3), and more.

    Args:
        language_model: A causal language model: its id on the hub, the path of a local copy, a model, or a
            configuration, for one that is trained from scratch. A model is not copied; the blocks go into it, until
            `model.eject()` takes them out.
        vision_encoder: A timm model: its name, with pretrained weights; the path of a local copy (`config.json` and
            weights, as timm saves for the hub); a model, as it is; or a `FlamingoVisionConfig`, for one with random
            weights.
        tokenizer: The tokenizer, its id or path. None: the language model's own. It is copied, and gets the special
            tokens that it lacks.
        cross_attention_every: A block before decoder layers 0, n, 2n, ... 1, the default, is the paper's best (its 3B
            model); 4 costs half the training time for 1.9 points less (table 3, v) and is what its 9B model does.
        layers: Instead: the indices of the decoder layers that get a block, or `"middle"` for a single one.
        decoder_layers: Dotted name of the list of decoder layers, where it is not found by itself.
        resampler: What turns features into latents.
        attend: Which media a token sees, see `flamingo_blocks.media_ranges`.
        gating: How the blocks' output is gated. Without a gate, the model does not start as the language model.
        freeze: Parts that are not trained. `()` trains everything.
        image_size: Height and width of the images. None: what the backbone was made for. The paper: 320.
        channels: Of the images. None: 3, or those of the given encoder or configuration.
        image_token: Stands for a medium in the text. A special token of that name is used again, if there is one.
        end_of_chunk_token: Ends what belongs to a medium; generation stops there.
        dtype: Of language model and vision encoder. None: as they are, or as their checkpoints. The paper: bfloat16.
        trained_dtype: Of resampler, blocks and new tokens. The paper: float32.
        **sizes: Sizes and kinds of the trained parts, see `FlamingoConfig`, e.g. `num_latents=32`.

    Returns:
        The model, in eval mode, and its processor.

    Raises:
        ValueError: If the parts cannot be joined; the message says what to do.
        TypeError: If an option is unknown; the message names the nearest one.
        OSError: If an id or path cannot be loaded.

    Example:
        ```python
        from transformers import GPT2Config, PreTrainedTokenizerFast
        from tokenizers import Tokenizer, models, pre_tokenizers

        from flamingo_blocks import build_flamingo
        from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig

        # With network: build_flamingo("gpt2", "vit_base_patch16_clip_224.openai", cross_attention_every=4)
        words = Tokenizer(models.WordLevel({"a": 0, "cat": 1, "?": 2}, unk_token="?"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        model, processor = build_flamingo(
            GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
            FlamingoVisionConfig(architecture="test_vit", image_size=32),
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?"),
            num_latents=4,
        )
        print(model.summary())
        ```

    Source: Alayrac et al. 2022, section 2 and table 3.
    """
    _check_options(sizes, freeze)
    dtype, trained_dtype = as_dtype("dtype", dtype), as_dtype("trained_dtype", trained_dtype) or torch.float32
    lm, text_revision = load_language_model(language_model, dtype=dtype)
    encoder, vision_config = load_vision_encoder(vision_encoder, image_size=image_size, channels=channels, dtype=dtype)
    if tokenizer is None and not lm.config.name_or_path:
        raise ValueError(
            "this language model does not say where its tokenizer is; give tokenizer=, an id, a path or a tokenizer"
        )
    tokenizer = load_tokenizer(lm.config.name_or_path if tokenizer is None else tokenizer)
    ensure_padding(tokenizer)
    weight = getattr(lm.get_input_embeddings(), "weight", None)  # several tables, as of audio codebooks, have none
    vocab_size = lm.config.get_text_config(decoder=True).vocab_size if weight is None else weight.shape[0]
    new_token_ids = add_special_tokens(tokenizer, [image_token, end_of_chunk_token], vocab_size=vocab_size)
    _, all_layers = find_decoder_layers(lm, decoder_layers)
    indices = select_layers(len(all_layers), every=cross_attention_every, layers=layers)
    # On the meta device there is nothing to run, and the usual layout is assumed.
    is_meta = any(parameter.is_meta for parameter in lm.parameters())
    config = FlamingoConfig(
        text_config=lm.config,
        text_revision=text_revision,
        vision_config=vision_config,
        cross_attention_layers=list(indices),
        decoder_layers=decoder_layers,
        residual_stream=LAYOUTS[0] if is_meta else find_residual_stream(lm, {i: all_layers[i] for i in indices}),
        resampler=resampler,
        attend=attend,
        gating=gating,
        freeze=sorted(freeze),
        image_token_id=special_token_id(tokenizer, image_token),
        end_of_chunk_token_id=special_token_id(tokenizer, end_of_chunk_token),
        new_token_ids=new_token_ids,
        trained_dtype=dtype_name(trained_dtype),
        **sizes,
    )
    model: Any = FlamingoForConditionalGeneration(config, language_model=lm, vision_encoder=encoder)
    model.eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    try:
        check_injection(model)
    except ValueError:
        model.eject()
        raise
    choose_decoding(model)
    image_processor = FlamingoImageProcessor.from_timm(
        encoder.backbone, image_size=encoder.image_size, channels=encoder.channels
    )
    processor = FlamingoProcessor(
        image_processor, tokenizer, image_token=image_token, end_of_chunk_token=end_of_chunk_token
    )
    return model, processor


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], *, vocab_size: int) -> list[int]:
    """Add special tokens to a tokenizer that lacks them.

    Args:
        tokenizer: It is changed.
        tokens: E.g. `<image>` and `<EOC>`.
        vocab_size: Rows of the language model's embedding.

    Returns:
        Ids of the tokens that are new to the language model.

    Raises:
        ValueError: If a token is an ordinary word already, or the tokenizer knows more tokens than the language model.
    """
    known = tokenizer.get_vocab()
    unknown_ids = [i for token, i in known.items() if i >= vocab_size and token not in tokens]
    if unknown_ids:
        raise ValueError(
            f"the tokenizer has tokens up to {max(unknown_ids)}, but the language model only {vocab_size} of them; "
            "this is another model's tokenizer"
        )
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"image_token and end_of_chunk_token must differ, got {tokens[0]!r} for both")
    missing = [token for token in tokens if token not in known]
    # Not normalised: <EOC> must not become <eoc>, which a text might hold.
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)
    # Also those of an earlier Flamingo's tokenizer, which the language model itself has never seen.
    ids = {token: special_token_id(tokenizer, token) for token in tokens}
    return sorted(token_id for token, token_id in ids.items() if token in missing or token_id >= vocab_size)


@torch.enable_grad()
def check_injection(model: FlamingoForConditionalGeneration) -> None:
    """Run a model once on three tokens, to see that its language model is one that blocks can stand in.

    Args:
        model: A new model. On the meta device there is nothing to run, and nothing is checked.

    Raises:
        ValueError: If blocks are not run in the order of the layers, run without gradients in some passes only, or
            hidden states or logits are not what they should be.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    lm = model.language_model
    name = type(lm).__name__
    called: list[int] = []
    with_gradients: set[bool] = set()

    def record(index: int) -> Any:
        def hook(*_: object) -> None:
            called.append(index)
            with_gradients.add(torch.is_grad_enabled())

        return hook

    blocks, indices = model.injector.blocks, list(model.injector.layer_indices)
    handles = [blocks[str(i)].register_forward_pre_hook(record(i)) for i in indices]
    # Two rows of three tokens: a language model that puts time before batch cannot hide. They differ in the last token,
    # which the first two must not see.
    word = ordinary_token(lm, besides=(model.config.image_token_id, model.config.end_of_chunk_token_id))
    input_ids = torch.tensor([[word, word, model.config.end_of_chunk_token_id], [word] * 3], device=lm.device)
    try:
        logits: Tensor = model(input_ids, use_cache=False).logits.detach()
    except Exception as error:
        raise ValueError(f"{name} with blocks does not run on plain token ids: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    if not _is_in_order(called, indices):
        raise ValueError(
            f"{name} should run its decoder layers {indices} in this order, once or in loops, but ran {called}; name "
            "another list of layers with decoder_layers"
        )
    if len(with_gradients) > 1:
        raise ValueError(
            f"{name} runs decoder layers several times, but some of the times without gradients, so blocks there would "
            "learn from the others alone; name another list of layers with decoder_layers"
        )
    head_weight = getattr(lm.get_output_embeddings(), "weight", None)
    vocab_size = logits.shape[-1] if head_weight is None else head_weight.shape[0]
    beyond = [i for i in model.config.new_token_ids or () if i >= vocab_size]
    expected = (2, 3, vocab_size + len(beyond))
    if tuple(logits.shape) != expected:
        raise ValueError(
            f"{name} should give logits of shape {expected} with the new tokens, got {tuple(logits.shape)}; its "
            "head is not used in the usual way, and new tokens cannot be added to it"
        )
    if logits.isnan().any():
        raise ValueError(f"{name} gives logits that are not a number for plain token ids")
    first, second = logits[:, :2].float()
    if (first - second).abs().max() > 1e-3 * _spread(model, logits):
        raise ValueError(
            f"{name} lets a token see later ones, so it is no causal language model as it stands; for an encoder, set "
            "is_decoder=True in its configuration"
        )


def choose_decoding(model: FlamingoForConditionalGeneration) -> None:
    """Find out how a model generates by the logits of its forward, and write it into its configuration.

    Args:
        model: A new model. On the meta device there is nothing to run, and the usual way is assumed.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    reasons: list[str] = []
    for model.config.decoding in ("cached", "uncached"):
        for model.config.decoding_position_ids in (True, False):
            reason = _differs_from_forward(model)
            if not reason:
                if model.config.decoding == "uncached":
                    _log.warning(f"{type(model.language_model).__name__} generates without its cache: {reasons[0]}")
                return
            reasons.append(reason)
    model.config.decoding = "none"
    _log.warning(f"{type(model.language_model).__name__} cannot generate: {reasons[0]}")


@torch.no_grad()
def _differs_from_forward(model: FlamingoForConditionalGeneration) -> str:
    """Say why generating is not what forward says, if so."""
    lm = model.language_model
    special = (model.config.image_token_id, model.config.end_of_chunk_token_id)
    first = ordinary_token(lm, besides=special)
    second = ordinary_token(lm, besides=(*special, first))
    input_ids = torch.tensor([[first, second, second, first, second], [second, first, first, first, second]])
    input_ids = input_ids.to(lm.device)
    try:
        found: Any = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=GenerationConfig(max_new_tokens=3, output_logits=True, return_dict_in_generate=True),
            # Nothing that a language model might take for padding may be generated.
            prefix_allowed_tokens_fn=lambda *_: [first, second],
        )
        logits = torch.stack(found.logits, dim=1).float()
        expected = model(found.sequences[:, :-1], use_cache=False).logits[:, input_ids.shape[1] - 1 :].float()
    except Exception as error:  # whatever it says: this is no way to generate
        return f"{type(error).__name__}: {error}"
    tolerance = 1e-2 if lm.dtype == torch.float32 else 0.5  # half precision, and experts chosen by it
    difference = float((logits - expected).abs().max() / _spread(model, expected))
    if difference <= tolerance:
        return ""
    return f"its logits differ from those of its forward by up to {difference:.2g} of their standard deviation"


def _spread(model: FlamingoForConditionalGeneration, logits: Tensor) -> Tensor:
    """Standard deviation of the language model's own logits: those of new tokens may be out of all proportion."""
    head_weight = getattr(model.language_model.get_output_embeddings(), "weight", None)
    return logits[..., : None if head_weight is None else head_weight.shape[0]].float().std()


def _is_in_order(called: Sequence[int], indices: Sequence[int]) -> bool:
    """Whether each layer comes right after the one before it, or is the begin of another loop over earlier ones."""
    places = [indices.index(index) for index in called]
    steps = zip([-1, *places], places, strict=False)
    return set(called) == set(indices) and all(place <= before + 1 for before, place in steps)


def _check_options(sizes: Mapping[str, Any], freeze: Collection[str]) -> None:
    known = [*FlamingoSizes.__annotations__]
    named = [name for name in build_flamingo.__annotations__ if name not in ("sizes", "return")]
    for name in sizes:
        if name == "trust_remote_code":
            raise TypeError(
                "build_flamingo runs no code that comes with a model; load the model with AutoModelForCausalLM, and "
                "trust_remote_code=True there, and pass it as language_model, with its tokenizer"
            )
        if name not in known:
            nearest = get_close_matches(name, [*known, *named], n=1, cutoff=0)[0]
            raise TypeError(f"build_flamingo has no option {name!r}; did you mean {nearest!r}?")
    for part in [freeze] if isinstance(freeze, str) else freeze:
        if part not in get_args(Part) or isinstance(freeze, str):
            raise ValueError(f'freeze must be a collection of "language_model" and "vision_encoder", got {freeze!r}')


def as_dtype(name: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Read a floating-point dtype, given as such or by its name.

    Args:
        name: Of the argument.
        dtype: Its value.

    Raises:
        ValueError: If it is something else.
    """
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"{name} must be a floating-point dtype of torch, e.g. torch.bfloat16, got {dtype!r}")
    return dtype

"""FlamingoForConditionalGeneration: the whole model, as transformers knows models.

Source: Alayrac et al. 2022 (Flamingo).
"""

import copy
import inspect
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from flamingo_blocks.adapter import (
    BACKBONES,
    RECORD,
    fingerprint,
    load_language_model_of,
    load_tensors,
    load_vision_encoder_of,
    read_adapter,
    unchanged_if_it_fails,
    write_adapter,
)
from flamingo_blocks.backbones import (
    check_is_causal_lm,
    dtype_name,
    has_peft,
    is_quantized,
    make_language_model,
    make_vision_encoder,
)
from flamingo_blocks.blocks import (
    GatedCrossAttentionBlock,
    KeyValues,
    MediaFeatures,
    MediaRuns,
    PerceiverResampler,
    TanhGate,
    choose_algorithm,
    media_ranges,
)
from flamingo_blocks.blocks.media_mask import check_ranges_fit
from flamingo_blocks.configuration_flamingo import CACHE_NAMES, FlamingoConfig
from flamingo_blocks.generation_flamingo import (
    FlamingoGenerationMixin,
    cached_length,
    cached_rows,
    pop_cache,
    ranges_to_keep,
)
from flamingo_blocks.injection import LMLayerInjector
from flamingo_blocks.language import find_decoder_layers, find_hidden_size, ordinary_token
from flamingo_blocks.media_cache import MediaCache
from flamingo_blocks.media_encoding import encode_distinct
from flamingo_blocks.new_tokens import NewTokens
from flamingo_blocks.parts import make_block, make_resampler
from flamingo_blocks.vision import VisionEncoder


# What gathers and moves outputs, as accelerate does, makes them anew from a dict, which run-time checks would refuse.
@dataclass
@no_type_check
class FlamingoCausalLMOutput(CausalLMOutputWithPast):
    """What a Flamingo's forward returns.

    Attributes:
        loss: Mean negative log-likelihood of the labels, in nats; with labels only.
        logits: Before the softmax. Those of the language model's own vocabulary come first.
        cache: The language model's cache. Its name is `past_key_values` in transformers before 5.24, or `cache_params`
            for Mamba and its like.
        hidden_states: The language model's, if asked for.
        attentions: The language model's, if asked for.
        state: The language model's cache, for RWKV.
        media_cache: What is kept of the media, for the next forward.
    """

    loss: Float[Tensor, ""] | None = None
    logits: Float[Tensor, "batch text vocab"] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    state: Any = None
    if not hasattr(CausalLMOutputWithPast, "cache"):  # transformers before 5.24
        cache_params: Any = None
    media_cache: MediaCache | None = None


class FlamingoForConditionalGeneration(FlamingoGenerationMixin, PreTrainedModel):  # type: ignore[override]
    """A vision encoder and a language model, joined by a resampler and gated cross-attention blocks.

    Most users call `build_flamingo`, or `from_pretrained` on what `save_pretrained` wrote.

    Args:
        config: What to make. Backbones that are not passed are made from it, with random weights.
        language_model: A causal language model of transformers. It is not copied; blocks are injected into it, until
            `eject`.
        vision_encoder: A vision encoder. It is not copied.

    Attributes:
        language_model: The language model, with its own state_dict keys and classes.
        vision_encoder: `VisionEncoder`.
        resampler: `PerceiverResampler`, or what `config.resampler` names.
        injector: `LMLayerInjector`; its `blocks` are the gated cross-attention blocks.
        new_tokens: `NewTokens`, or None if the language model knows all tokens.
        always_encodes: Whether a batch without any media runs the vision encoder and the resampler, too, on a frame of
            zeros. Processes that share a model, or its gradients, need it to keep in step; `FlamingoTrainer` sets it.

    Raises:
        ValueError: If the parts do not fit together.

    Source: Alayrac et al. 2022, section 2.
    """

    config: FlamingoConfig
    config_class = FlamingoConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    # With device_map="auto", what adds to its own input stays in one piece, as do the language model's own layers.
    _no_split_modules = [  # noqa: RUF012
        *("VisionEncoder", "PerceiverResampler", "MLPResampler", "TransformerResampler", "MeanPoolResampler"),
        *("LinearResampler", "GatedCrossAttentionBlock", "NewTokens"),
    ]
    # What the language model supports is checked when it is made; this model adds no other attention of that kind.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: FlamingoConfig,
        *,
        language_model: PreTrainedModel | None = None,
        vision_encoder: VisionEncoder | None = None,
    ) -> None:
        if language_model is not None:
            config = copy.deepcopy(config)  # it may be used again, around another language model
            config.text_config = language_model.config
            # Some classes are not the ones that transformers makes of their configuration.
            language_model.config.architectures = [type(language_model).__name__]
        super().__init__(config)
        if vision_encoder is not None and not isinstance(vision_encoder, VisionEncoder):
            raise ValueError(
                f"vision_encoder must be a VisionEncoder, got {type(vision_encoder).__name__}; make one of it"
            )
        vision: Any = config.vision_config
        for option in ("keep_prefix_tokens", "final_norm"):
            if vision_encoder is not None and getattr(vision_encoder, option) != getattr(vision, option):
                raise ValueError(
                    f"vision_encoder has {option}={getattr(vision_encoder, option)}, but config.vision_config says "
                    f"{getattr(vision, option)}; make them agree, else what is saved would load as another model"
                )
        # Under from_pretrained, modules are made without data, and all non-persistent buffers are lost.
        is_meta = torch.get_default_device().type == "meta"
        if is_meta and language_model is not None and language_model.device.type != "meta":
            raise ValueError(
                "language_model cannot be passed to from_pretrained, which loads it with everything else; to put saved "
                "blocks into another language model, build a Flamingo around that one and load their state_dict"
            )
        self._lost_buffers = _non_persistent_buffers(vision_encoder.backbone) if is_meta and vision_encoder else {}
        lm: Any = make_language_model(config.text_config) if language_model is None else language_model
        check_is_causal_lm(lm)
        self.language_model: Any = lm
        self.vision_encoder = make_vision_encoder(config.vision_config) if vision_encoder is None else vision_encoder
        if vision_encoder is None:
            self.vision_encoder.to(_dtype(config.vision_dtype, lm))
        self.resampler = _make_resampler(config, self.vision_encoder.vision_dim)
        _, layers = find_decoder_layers(lm, config.decoder_layers)
        indices = range(len(layers)) if config.cross_attention_layers is None else config.cross_attention_layers
        dim = find_hidden_size(lm)
        blocks = {index: _make_block(config, dim, self.resampler.dim) for index in indices}
        self.injector = LMLayerInjector(blocks, stream=config.residual_stream)
        self.new_tokens: NewTokens | None = None
        if config.new_token_ids:
            embedding: Any = lm.get_input_embeddings()
            head: Any = lm.get_output_embeddings()
            if not isinstance(getattr(head, "weight", None), Tensor):
                raise ValueError(
                    f"new tokens cannot be added to {type(lm).__name__}, whose head is a {type(head).__name__}; let "
                    "image_token and end_of_chunk_token be special tokens that its tokenizer has already"
                )
            self.new_tokens = NewTokens(
                config.new_token_ids,
                vocab_size=head.weight.shape[0],
                embedding_dim=embedding.weight.shape[1],
                head_dim=head.weight.shape[1],
                old_token_id=ordinary_token(lm),
                head=config.new_token_head,
            )
            if not head.weight.is_meta:
                self.new_tokens.start_from(lm)
        for part in (self.resampler, self.injector, self.new_tokens):
            if part is not None:
                part.to(device=None if is_meta else lm.device, dtype=_dtype(config.trained_dtype, lm))
        # Only now, when nothing can fail any more: a language model is never left half changed.
        self.injector.inject(layers)
        if self.new_tokens is not None:
            self.new_tokens.inject(lm)
        self.always_encodes = False
        self._lm_arguments = _argument_names(lm.forward)
        self._cache_name = next((name for name in CACHE_NAMES if name in self._lm_arguments), CACHE_NAMES[0])
        self.generation_config = copy.deepcopy(lm.generation_config)
        self.generation_config.eos_token_id = _with_id(lm.generation_config.eos_token_id, config.end_of_chunk_token_id)
        self.generation_config.suppress_tokens = _with_id(lm.generation_config.suppress_tokens, config.image_token_id)
        self.freeze()
        if not is_meta:
            for module in self.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
        self._note_parts()
        self._remember_backbones()
        self.post_init()  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------ what is trained

    def eject(self) -> Any:
        """Take everything out of the language model again, which is as it was, though frozen.

        Returns:
            The language model.
        """
        self.injector.eject()
        if self.new_tokens is not None:
            self.new_tokens.eject()
        return self.language_model

    def freeze(self) -> None:
        """Freeze the parts that `config.freeze` names, and unfreeze the other backbones, with `freeze_exceptions`."""
        frozen = self.config.freeze or ()
        self.language_model.requires_grad_("language_model" not in frozen)
        if "vision_encoder" in frozen:
            self.vision_encoder.freeze()
        else:
            self.vision_encoder.unfreeze()
        parameters = dict(self.named_parameters())
        for name in self.config.freeze_exceptions or ():
            if name in parameters:
                parameters[name].requires_grad_(name.startswith(tuple(frozen)))

    def trained_module_names(self) -> list[str]:
        """Name the resampler, the blocks and the new tokens' tables, but none that is frozen, for `modules_to_save`.

        PEFT freezes everything but what it adds, and saves nothing else; modules of these names it trains and saves,
        too. They are the largest ones that it can put a wrapper around: whoever calls them, gets them by name.
        """
        names = ["resampler", *(f"injector.blocks.{index}" for index in self.injector.layer_indices)]
        if self.new_tokens is not None:
            names += [f"new_tokens.{name}" for name, _ in self.new_tokens.named_children()]
        return [name for name in names if any(p.requires_grad for p in self.get_submodule(name).parameters())]

    # ------------------------------------------------------------ forward

    def encode_media(
        self,
        pixel_values: Float[Tensor, "batch media frames channels height width"] | None = None,
        num_frames: Int[Tensor, "batch media"] | None = None,
        *,
        vision_features: Float[Tensor, "batch media frames patches vision_dim"] | None = None,
    ) -> Float[Tensor, "batch media latents media_dim"]:
        """Encode images and videos into latents: equal ones once, and padding not at all.

        Args:
            pixel_values: Normalised images; an image is a video of one frame.
            num_frames: How many frames of each medium are real; 0 for padding media, which come last in their row and
                whose latents mean nothing. None: all frames of all media.
            vision_features: Instead of pixels, what the vision encoder made of them earlier.

        Raises:
            ValueError: If shapes are wrong, or `num_frames` says what cannot be.
        """
        media = pixel_values if vision_features is None else vision_features
        if media is None or (pixel_values is not None and vision_features is not None):
            raise ValueError("give either pixel_values or vision_features")
        if pixel_values is not None and pixel_values.ndim != 6:
            raise ValueError(
                "pixel_values must have shape (batch, media, frames, channels, height, width), got "
                f"{tuple(pixel_values.shape)}; an image is one frame"
            )
        encode_frames: Any = nn.Identity() if pixel_values is None else self.vision_encoder
        if num_frames is not None:
            _check_num_frames(num_frames, media)
        if torch.compiler.is_compiling():  # which needs static shapes
            return self.resampler(encode_frames(media.flatten(0, 2)).unflatten(0, media.shape[:3]), num_frames)
        latents: Tensor = encode_distinct(
            media,
            torch.full(media.shape[:2], media.shape[2]) if num_frames is None else num_frames,
            encode_frames=encode_frames,
            resample=self.resampler,
            # Copies do not differ in the vision encoder while it is frozen; there is no dropout in a resampler.
            find_copies=not media.requires_grad and (pixel_values is None or self.vision_encoder.is_frozen),
        )
        return latents

    def forward(
        self,
        input_ids: Int[Tensor, "batch text"] | None = None,
        pixel_values: Float[Tensor, "batch media frames channels height width"] | None = None,
        num_frames: Int[Tensor, "batch media"] | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        media_cache: MediaCache | None = None,
        inputs_embeds: Float[Tensor, "batch text dim"] | None = None,
        labels: Int[Tensor, "batch text"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        vision_features: Float[Tensor, "batch media frames patches vision_dim"] | None = None,
        document_ids: Int[Tensor, "batch text"] | None = None,
        media_ranges: Int[Tensor, "rows text 2"] | None = None,
        media_mask: Bool[Tensor, "rows text all_media"] | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Predict the next token at each place of the text.

        Args:
            input_ids: Text, with an `<image>` token for each medium.
            pixel_values: Images and videos, in the order of their `<image>` tokens. None: text only.
            num_frames: See `encode_media`.
            attention_mask: As the language model takes it.
            position_ids: As the language model takes it.
            cache: The language model's cache.
            media_cache: The media of the text in that cache. New media may come along in `pixel_values`; without, an
                `<image>` token is a word like any other, as when it was generated.
            inputs_embeds: Instead of `input_ids`; which media are seen must then be told by `media_ranges`.
            labels: Token ids that each place of `input_ids` should have been predicted to be, -100 where there is no
                loss. They are shifted here: give `input_ids` themselves, with the prompt masked.
            use_cache: Return the caches. None: outside of training, if the language model's config says so.
            logits_to_keep: Give logits for so many last tokens only; 0 for all.
            vision_features: Instead of `pixel_values`, see `encode_media`.
            document_ids: For packed documents, see `flamingo_blocks.media_ranges`.
            media_ranges: What each token sees, if that is not what `config.attend` says, e.g. by document. Rows of
                text that share media, as beams do, may share a row here. They count all media of their row, those in
                `media_cache` too. Then nothing is made of `<image>` tokens, which may be more or fewer than the media.
                A later call without them follows `config.attend` again.
            media_mask: The same as a mask: True where the token sees the medium. It is as good as ranges where all
                tokens see neighbouring media. Else it needs a forward without caches, as in training; then
                `use_cache=None` means none, and attention is dense. So it is under `torch.compile`, which cannot look
                at the mask.
            past_key_values: The same as `cache`, whose name it is in transformers before 5.24.
            **kwargs: Passed on to the language model.

        Returns:
            A `FlamingoCausalLMOutput`, a tuple with `return_dict=False`.

        Raises:
            ValueError: If shapes are wrong, a row's `<image>` tokens and media do not agree in number, ranges or mask
                name media that are not there, the mask cannot be kept in a cache, or there is more than one cache.
        """
        return_dict = kwargs.pop("return_dict", None)
        kwargs |= {"cache": cache, "past_key_values": past_key_values}
        cache = pop_cache(kwargs)
        text = input_ids if input_ids is not None else inputs_embeds
        if text is None:
            raise ValueError("give input_ids or inputs_embeds")
        if labels is not None and labels.shape != text.shape[:2]:
            raise ValueError(f"labels must have the text's shape, {tuple(text.shape[:2])}, got {tuple(labels.shape)}")
        if document_ids is not None and (media_ranges is not None or media_mask is not None):
            raise ValueError("document_ids tell what tokens see, as media_ranges and media_mask do; give one of them")
        has_media = pixel_values is not None or vision_features is not None
        runs = None
        if media_mask is not None:
            if use_cache or cache is not None or media_cache is not None:
                media_ranges = ranges_to_keep(media_ranges, media_mask)
            elif media_ranges is not None:
                raise ValueError("give either media_ranges or media_mask")
            elif (runs := MediaRuns.from_mask(media_mask)).mask is None:
                media_ranges, runs = runs.ranges, None
            else:
                use_cache = False
        if not torch.compiler.is_compiling():
            self._check_call(kwargs, text, cache, media_cache, media_ranges)
        if self.config.decoding != "cached":
            if use_cache or cache is not None:
                raise ValueError(
                    f"{type(self.language_model).__name__} gives other logits with its cache than for the whole text; "
                    "pass use_cache=False and the whole text"
                )
            use_cache = False
        if use_cache is None:
            config: Any = self.config if hasattr(self.config, "use_cache") else self.config.text_config
            use_cache = not self.training and bool(getattr(config, "use_cache", True))
        media: Tensor | Mapping[int, KeyValues]
        num_media, is_new = None, True
        in_order = media_ranges is None and self.config.attend != "all_previous"
        # Text that the cache knows, as generate's steps are.
        if media_cache is not None and media_cache.rows and media_ranges is not None and not has_media:
            is_new = False
        else:
            is_image = self._is_image(text)
            if media_cache is not None and media_cache.rows and not has_media:
                is_image = torch.zeros_like(is_image)
            media, num_media = self._encode(text.shape[0], pixel_values, num_frames, vision_features)
            if use_cache or media_cache is not None:
                media_cache = MediaCache() if media_cache is None else media_cache
                is_empty = media.shape[1] == 0 and media_cache.rows > 0
                media_ranges = media_cache.update(
                    {} if is_empty else self.injector.project_media(media),
                    num_media,
                    is_image,
                    attend=self.config.attend,
                    document_ids=document_ids,
                    media_ranges=media_ranges,
                    start=cached_length(cache) if cache is not None else None,
                )
                num_media = None
            elif runs is not None:
                check_ranges_fit(runs.ranges, num_media)
            elif media_ranges is None:
                media_ranges = self._ranges(is_image, document_ids)
            else:
                check_ranges_fit(media_ranges, num_media)
                num_media = None
        rows_per_media = 1
        if runs is None:
            assert media_ranges is not None
            if media_cache is not None:
                media, media_ranges = media_cache.key_values, media_cache.over_held(media_ranges)
            rows, rows_of_ranges = text.shape[0], media_ranges.shape[0]
            if rows % rows_of_ranges:
                raise ValueError(f"media_ranges have {rows_of_ranges} rows, which must divide the text's, {rows}")
            rows_per_media = rows // rows_of_ranges
            runs = MediaRuns.from_ranges(
                media_ranges.repeat(1, rows_per_media, 1),
                num_media=num_media,
                in_order=in_order and rows_per_media == 1,
            )
            if media_cache is not None and not is_new:
                media_cache.check_runs(runs)
        arguments = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            self._cache_name: cache,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
        with self.injector.scope(media, runs, rows_per_media=rows_per_media):
            output = self._run_language_model(input_ids, text, arguments | kwargs)
        if media_cache is not None and is_new:
            media_cache.drop_unseen()
        logits = output.logits
        if isinstance(logits_to_keep, int) and 0 < logits_to_keep < logits.shape[1]:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss_arguments = {_NUM_ITEMS: kwargs[_NUM_ITEMS]} if _NUM_ITEMS in kwargs else {}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **loss_arguments)
        result = FlamingoCausalLMOutput(
            loss=loss,
            logits=logits,
            media_cache=media_cache,
            **{name: output.get(name) for name in _PASSED_ON},
        )
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def _check_call(
        self, others: Mapping[str, Any], text: Tensor, cache: Any, media_cache: MediaCache | None, media_ranges: Any
    ) -> None:
        """Refuse what would run, but not do what was meant."""
        if not self.injector.is_injected:
            raise RuntimeError(
                "the blocks were taken out of the language model by eject(); build a new Flamingo around it"
                + _WRAPPED_BY_PEFT.format("injector")
            )
        if self.new_tokens is not None and not self.new_tokens.is_injected:
            raise RuntimeError("the new tokens are not in the language model" + _WRAPPED_BY_PEFT.format("new_tokens"))
        for name in others:
            if name not in self._lm_arguments and (nearest := get_close_matches(name, _OWN, n=1, cutoff=0.8)):
                raise TypeError(f"forward has no argument {name!r}; did you mean {nearest[0]!r}?")
        text_length, rows = cached_length(cache), cached_rows(cache)
        if text_length and rows not in (None, len(text)):
            raise ValueError(
                f"{self._cache_name} has {rows} rows, but the text {len(text)}; where rows shall share what is in it, "
                "call its batch_repeat_interleave first; after a beam search, begin anew"
            )
        if media_cache is not None and media_cache.rows and text_length == 0 and media_ranges is None:
            raise ValueError(
                "media_cache holds the media of earlier text, but that text is in no cache; pass "
                f"{self._cache_name} as well, or a new MediaCache()"
            )
        if media_cache is None and text_length:
            raise ValueError(
                f"{self._cache_name} holds earlier text, but not its media; pass media_cache=outputs.media_cache as "
                "well, or an empty MediaCache() if that text had none"
            )

    def _run_language_model(self, input_ids: Tensor | None, text: Tensor, arguments: dict[str, Any]) -> Any:
        """Call the language model with what it knows of the arguments, in a scope of the new tokens."""
        arguments = {
            name: value
            for name, value in arguments.items()
            if value is not None and (name in self._lm_arguments or name not in _OPTIONAL) and name != _NUM_ITEMS
        }
        tokens: AbstractContextManager[None] = nullcontext()
        if self.new_tokens is not None:
            # With embeddings instead of ids there is nothing to look up, but there are logits to give.
            ids = text.new_zeros(text.shape[:2], dtype=torch.long) if input_ids is None else input_ids
            tokens = self.new_tokens.scope(ids)
            input_ids = None if input_ids is None else self.new_tokens.old_ids(input_ids)
        if input_ids is not None:
            arguments["input_ids"] = input_ids
        with tokens:
            return self.language_model(**arguments, return_dict=True)

    def _ranges(self, is_image: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """What each token sees, by the model's rule."""
        return media_ranges(is_image, document_ids=document_ids, attend=self.config.attend)

    def _is_image(self, text: Tensor) -> Tensor:
        if text.is_floating_point():  # embeddings tell no tokens
            return torch.zeros(text.shape[:2], dtype=torch.bool, device=text.device)
        is_image: Tensor = text == torch.as_tensor(self.config.image_token_id, device=text.device)
        return is_image

    def _encode(
        self, batch: int, pixel_values: Tensor | None, num_frames: Tensor | None, vision_features: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Give latents, and the number of media of each row on the host; also where there are none."""
        frames = pixel_values if vision_features is None else vision_features
        if self.always_encodes and (frames is None or frames.shape[1] == 0):
            shape = (self.vision_encoder.channels, *self.vision_encoder.image_size)
            frames = pixel_values = torch.zeros(batch, 1, 1, *shape, device=self.device)
            vision_features, num_frames = None, torch.zeros(batch, 1, dtype=torch.long)
        if frames is None or frames.shape[1] == 0:
            return self._no_media(batch), torch.zeros(batch, dtype=torch.long, device="cpu")
        if frames.shape[0] != batch:  # not len(), which export would take for a constant
            raise ValueError(
                f"the media have {frames.shape[0]} rows, but the text {batch}; give every row its own media"
            )
        if num_frames is None:
            num_media = torch.full((batch,), frames.shape[1], device="cpu")
        elif torch.compiler.is_compiling():
            num_media = (num_frames > 0).sum(1).cpu()
        else:
            num_frames = num_frames.cpu()  # read once
            num_media = (num_frames > 0).sum(1)
            if not (self.training or self.always_encodes or num_media.any()):
                return self._no_media(batch), num_media
        return self.encode_media(pixel_values, num_frames, vision_features=vision_features), num_media

    def _no_media(self, batch: int) -> Tensor:
        return next(self.injector.parameters()).new_zeros(batch, 0, 1, self.resampler.dim)

    # ------------------------------------------------------------ what transformers asks of a model

    def get_input_embeddings(self) -> nn.Module:
        """The language model's, without the new tokens."""
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head, without the new tokens."""
        head: nn.Module = self.language_model.get_output_embeddings()
        return head

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> Any:
        """Not here: new tokens have tables of their own.

        Args:
            new_num_tokens: May be the number of tokens that there are, as scripts ask for `len(tokenizer)` in any case.
            *_: Of no use.
            **__: Of no use.

        Returns:
            The language model's input embeddings, without the new tokens.

        Raises:
            ValueError: If there are fewer or more tokens.
        """
        if new_num_tokens in (None, self.config.get_text_config().vocab_size):
            return self.get_input_embeddings()
        raise ValueError(
            "the language model's tables are never resized, since that changes its own logits; new tokens have their "
            "own small tables, see FlamingoConfig.new_token_ids"
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote; arguments as in transformers.

        `dtype` is that of the language model, and of a vision encoder that was saved in the same dtype as it. The
        trained parts keep theirs; bring everything to one with `model.to(dtype)`. What was frozen is frozen again. A
        vision encoder that timm cannot make by name is passed as `vision_encoder=`; its weights are loaded into it.

        Raises:
            ValueError: If `device_map` offloads the vision encoder or the resampler; other parts may be offloaded.
        """
        try:
            result = super().from_pretrained(*args, **kwargs)
        except OSError as error:
            path = str(args[0] if args else kwargs.get("pretrained_model_name_or_path"))
            if (Path(path) / RECORD).is_file():
                raise ValueError(
                    f"{path!r} holds an adapter, without the backbones; load it with {cls.__name__}.from_adapter"
                ) from error
            raise
        model = result[0] if isinstance(result, tuple) else result
        for name in ("vision_encoder", "resampler"):
            if any(parameter.is_meta for parameter in getattr(model, name).parameters()):
                raise ValueError(
                    f"device_map offloads the {name}, whose weights would come back module by module as modules are "
                    "called; but some that are read without a call would not. Give it a device of its own in device_map"
                )
        model._restore_buffers()
        model.freeze()
        model._remember_backbones()
        return result

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the whole model, backbones included; arguments as in transformers.

        Raises:
            ValueError: If the language model is quantised, or PEFT has put LoRA or the like into the model.
        """
        self._check_no_peft()
        if is_quantized(self.language_model):
            raise ValueError(
                "the language model is quantised, and transformers could not load it as a part of something larger; "
                "save what was trained with save_adapter, and load it around the same language model with from_adapter"
            )
        self._note_parts()
        return super().save_pretrained(*args, **kwargs)

    def save_adapter(self, save_directory: str | Path) -> None:
        """Save what was trained, without the frozen backbones; `from_adapter` loads it.

        Args:
            save_directory: Made if it is not there. The processor goes there with its own `save_pretrained`.

        Raises:
            ValueError: If the trained parts are of several dtypes, a backbone was trained but is frozen now, or PEFT
                has put LoRA or the like into the model.
        """
        self._check_no_peft()
        self._note_parts()
        write_adapter(self, save_directory, before=self._backbones_before)

    def _check_no_peft(self) -> None:
        if has_peft(self):
            raise ValueError(
                "PEFT has put adapters of its own into this model; save everything that is trained with PEFT's own "
                "save_pretrained, or merge them first with merge_and_unload(), after which save_pretrained saves the "
                "whole model"
            )

    def _remember_backbones(self) -> None:
        """Note a few numbers of the backbones, by which it is noticed that they were trained and frozen again."""
        self._backbones_before = {part: fingerprint(part, getattr(self, part)) for part in BACKBONES}

    @classmethod
    def from_adapter(
        cls,
        name_or_path: str | Path,
        *,
        language_model: str | Path | PreTrainedModel | None = None,
        vision_encoder: str | Path | nn.Module | None = None,
        dtype: torch.dtype | str | None = None,
        **hub: Any,
    ) -> "FlamingoForConditionalGeneration":
        """Load what `save_adapter` wrote, and the backbones that it was trained beside.

        A backbone that was trained itself is in the adapter, and comes from nowhere else.

        Args:
            name_or_path: The adapter's directory, or its id on the hub.
            language_model: Its id or path, or the language model itself, which is not copied. None: the one that the
                adapter names, at the same revision.
            vision_encoder: The same for the vision encoder.
            dtype: Of backbones that are loaded here. None: as when the adapter was saved. Given ones and the trained
                parts keep theirs.
            **hub: Where and how to find the adapter, as transformers takes it: `revision`, `token`, `cache_dir`, ...

        Returns:
            The model, in eval mode. What was frozen is frozen again.

        Raises:
            ValueError: If a file is damaged or a backbone is not the one that the adapter was trained beside; given
                backbones are then as they were.
            OSError: If the adapter or a backbone is not found.
            TypeError: If an option is unknown.
        """
        if dtype is not None and isinstance(language_model, nn.Module) and isinstance(vision_encoder, nn.Module):
            raise ValueError("dtype is for backbones that are loaded here; bring given ones to it with .to(dtype)")
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        adapter = read_adapter(name_or_path, **hub)
        with unchanged_if_it_fails(language_model, vision_encoder):
            lm = load_language_model_of(adapter, language_model, dtype)
            encoder = load_vision_encoder_of(adapter, vision_encoder, dtype)
            model = cls(adapter.config, language_model=lm, vision_encoder=encoder)
            try:
                load_tensors(model, adapter.tensors)
            except BaseException:
                model.eject()
                raise
        model.generation_config = adapter.generation_config
        nn.Module.eval(model)
        return model

    def _note_parts(self) -> None:
        """Write down the dtypes of the parts, of which transformers knows one, and what of them is frozen."""
        parts = [part for part in (self.resampler, self.injector, self.new_tokens) if part is not None]
        trained = {parameter.dtype for part in parts for parameter in part.parameters()}
        if len(trained) != 1:
            raise ValueError(
                "resampler, blocks and new tokens must be of one dtype to be saved, got "
                f"{', '.join(sorted(map(str, trained)))}; bring them to one with .to(dtype)"
            )
        frozen = tuple(self.config.freeze or ())
        exceptions = [n for n, p in self.named_parameters() if p.requires_grad == n.startswith(frozen)]
        self.config.freeze_exceptions = exceptions or None
        self.config.trained_dtype = dtype_name(trained.pop())
        # One without parameters has none.
        vision = next((p.dtype for p in self.vision_encoder.parameters()), self.language_model.dtype)
        self.config.vision_dtype = None if vision == self.language_model.dtype else dtype_name(vision)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what a checkpoint lacks. `init` leaves alone what was loaded."""
        if isinstance(
            module, nn.Linear | nn.LayerNorm | nn.RMSNorm | MediaFeatures | PerceiverResampler | TanhGate | NewTokens
        ):
            module.reset_parameters()
        else:
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=0.02)

    def is_custom_code(self) -> bool:  # type: ignore[override]
        """Whether the language model is none of transformers' own.

        In custom code, transformers spares modules without parameters, also those that fill buffers which no file
        holds. This model's own initialisation leaves alone what was loaded.
        """
        return bool(self.language_model.is_custom_code())

    def _restore_buffers(self) -> None:
        """Give the backbone its non-persistent buffers, e.g. tables of positions, which no checkpoint holds."""
        buffers = _non_persistent_buffers(self.vision_encoder.backbone)
        if buffers and not self._lost_buffers:
            self._lost_buffers = _non_persistent_buffers(make_vision_encoder(self.config.vision_config).backbone)
        for name, buffer in buffers.items():
            buffer.copy_(self._lost_buffers[name])
        self._lost_buffers = {}

    def enable_input_require_grads(self) -> None:
        """Do nothing: checkpointing is not reentrant here and does not need it, and some models cannot run with it."""

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("checkpointing must not be reentrant here; leave use_reentrant out, or set it to False")
        # Where transformers recomputes a layer with its hooks, the blocks must find their media again.
        function = partial(gradient_checkpointing_func, context_fn=self.injector.checkpoint_context)
        super()._set_gradient_checkpointing(enable, function, **kwargs)

    # ------------------------------------------------------------ what people look at

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{name}={type(module).__name__}" for name, module in self._parts().items() if module is not None
        )
        return f"{type(self).__name__}({parts}; {_count(self.parameters()):,} parameters; see .summary())"

    def _parts(self) -> dict[str, Any]:
        return {
            "vision_encoder": self.vision_encoder.backbone,
            "resampler": self.resampler,
            "blocks": self.injector.blocks,
            "new_tokens": self.new_tokens,
            "language_model": self.language_model,
        }

    def summary(self) -> str:
        """Tabulate the parts, what of them is trained, and where the blocks stand."""
        rows = [("part", "module", "trained", "frozen", "dtype", "MiB")]
        parts = {name: module for name, module in self._parts().items() if module is not None}
        for name, module in [*parts.items(), ("total", self)]:
            trained = _count(p for p in module.parameters() if p.requires_grad)
            size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
            dtypes = sorted({dtype_name(p.dtype) for p in module.parameters()})
            class_name = "" if module is self else type(module).__name__
            if name == "blocks":
                class_name = f"{len(module)} {type(next(iter(module.values()))).__name__}"
            frozen = _count(module.parameters()) - trained
            rows.append((name, class_name, f"{trained:,}", f"{frozen:,}", ", ".join(dtypes), f"{size / 2**20:,.1f}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column in (0, 1, 4) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        name, layers = find_decoder_layers(self.language_model, self.config.decoder_layers)
        indices = ", ".join(map(str, self.injector.layer_indices))
        height, width = self.vision_encoder.image_size
        layout = self.vision_encoder.layout
        patches = "x".join(map(str, layout.grid or (layout.patches,)))
        lines += [
            "",
            f"blocks before {len(self.injector.layer_indices)} of {len(layers)} decoder layers ({name}): {indices}",
            f"a token sees: {self.config.attend}; gating: {self.config.gating}; "
            f"images: {height}x{width} to {patches} patches of {self.vision_encoder.vision_dim} features",
            f"text is generated {_DECODING[self.config.decoding]}",
            f"attention over media: {self._algorithm(text=256, media=5)} for 256 tokens and 5 images, "
            f"{self._algorithm(text=1, media=1)} for the next token (see choose_algorithm)",
        ]
        return "\n".join(lines)

    def _algorithm(self, *, text: int, media: int) -> str:
        """Name what the first block uses for one row with media at equal distances."""
        block: Any = next(iter(self.injector.blocks.values()))
        queries = block.norm.weight.new_empty(1, text, block.heads, block.head_dim)
        media_like = queries.new_empty(1, media, self.config.num_latents, block.kv_heads, block.head_dim)
        is_image = torch.zeros(1, text, dtype=torch.bool, device="cpu")
        is_image[:, torch.arange(media) * text // media] = True
        runs = MediaRuns.from_ranges(self._ranges(is_image))
        return str(block.algorithm or choose_algorithm(queries, KeyValues(media_like, media_like), runs))


# What of the language model's output is passed on. Everything else would not survive the copies that FSDP and DDP make.
_PASSED_ON = {field.name for field in fields(FlamingoCausalLMOutput)} - {"loss", "logits", "media_cache"}
# How summary() says it.
_DECODING = {
    "cached": "with the language model's cache",
    "uncached": "without a cache, since the language model's own gives other logits",
    "none": "not at all, since the language model generates by other logits than its forward's",
}
# What a language model may not know, and can do without: it has no positions, or gives all logits.
_OPTIONAL = ("position_ids", "logits_to_keep", "use_cache")
# What only this model knows: never meant for the language model.
_OWN = ("pixel_values", "num_frames", "media_cache", "media_ranges", "media_mask", "document_ids", "vision_features")
_WRAPPED_BY_PEFT = (
    '; or, if PEFT was told modules_to_save=["{}"], it runs a copy that nobody calls: pass '
    "modules_to_save=model.trained_module_names() instead"
)
# What the Trainer gives to the loss.
_NUM_ITEMS = "num_items_in_batch"


def _make_resampler(config: FlamingoConfig, vision_dim: int) -> Any:
    return make_resampler(
        config.resampler,
        dim=config.resampler_dim or vision_dim,
        vision_dim=vision_dim,
        depth=config.resampler_depth,
        heads=config.resampler_heads,
        head_dim=config.resampler_head_dim,
        hidden=config.resampler_hidden,
        activation=config.resampler_activation,
        qk_norm=config.resampler_qk_norm,
        num_latents=config.num_latents,
        max_frames=config.max_frames,
    )


def _make_block(config: FlamingoConfig, dim: int, media_dim: int) -> GatedCrossAttentionBlock:
    heads = config.cross_attention_heads
    if heads is None:
        # Some configurations refuse to name one number where layers differ.
        with suppress(Exception):
            heads = getattr(config.get_text_config(), "num_attention_heads", None)
        if not isinstance(heads, int) or heads < 1 or dim % heads:  # as in Mamba
            heads = max(1, dim // 64)
    return make_block(
        dim=dim,
        media_dim=media_dim,
        heads=heads,
        head_dim=config.cross_attention_head_dim,
        kv_heads=config.cross_attention_kv_heads,
        hidden=config.cross_attention_hidden,
        activation=config.cross_attention_activation,
        norm=config.cross_attention_norm,
        norm_eps=config.cross_attention_norm_eps,
        qk_norm=config.cross_attention_qk_norm,
        gating=config.gating,
        gate_init=float(config.gate_init),
        feed_forward_without_media=config.feed_forward_without_media,
    )


def _dtype(name: str | None, lm: PreTrainedModel) -> torch.dtype:
    return lm.dtype if name is None else getattr(torch, name)


def _non_persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    persistent = set(module.state_dict())
    return {name: buffer for name, buffer in module.named_buffers() if name not in persistent}


def _argument_names(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def _with_id(ids: int | list[int] | None, token_id: Any) -> list[int]:
    before = [ids] if isinstance(ids, int) else list(ids or ())
    return before if token_id in before else [*before, token_id]


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _check_num_frames(num_frames: Tensor, media: Tensor) -> None:
    if num_frames.is_floating_point() or num_frames.dtype == torch.bool:
        raise ValueError(f"num_frames must be integers, got {num_frames.dtype}")
    if num_frames.shape != media.shape[:2]:
        raise ValueError(f"num_frames must have shape {tuple(media.shape[:2])}, got {tuple(num_frames.shape)}")
    if torch.compiler.is_compiling():
        return
    on_host = num_frames.cpu()
    frames = media.shape[2]
    if ((on_host < 0) | (on_host > frames)).any():
        raise ValueError(f"num_frames must be in 0..{frames}, the frames there are, got {on_host.tolist()}")
    is_real = on_host > 0
    if (is_real[:, 1:] & ~is_real[:, :-1]).any():
        raise ValueError(f"padding media, of 0 frames, must come last in their row, got {on_host.tolist()}")


AutoModelForImageTextToText.register(FlamingoConfig, FlamingoForConditionalGeneration, exist_ok=True)

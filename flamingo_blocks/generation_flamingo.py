"""How a Flamingo generates: transformers' `generate`, with media that are encoded once, before the first token."""

import copy
import inspect
from collections.abc import Mapping
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from flamingo_blocks.blocks.media_mask import ranges_of_mask
from flamingo_blocks.configuration_flamingo import CACHE_NAMES, FlamingoConfig
from flamingo_blocks.injection import LMLayerInjector
from flamingo_blocks.language import ordinary_token
from flamingo_blocks.media_cache import MediaCache

# Options of transformers that cannot be right here, and why.
_REFUSED = {
    "token_healing": "it changes the prompt after its media were matched with it",
    "assistant_early_exit": "the first decoder layers are no model of their own here; pass assistant_model",
    "use_mtp": "a language model's layers for several tokens at once know no media; pass assistant_model",
}


class FlamingoGenerationMixin(GenerationMixin):
    """What `FlamingoForConditionalGeneration` can do because it generates."""

    config: FlamingoConfig
    language_model: Any
    vision_encoder: Any
    injector: LMLayerInjector
    new_tokens: Any
    _cache_name: str
    device: Any
    get_output_embeddings: Any
    _encode: Any
    _is_image: Any

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        pixel_values: Float[Tensor, "batch media frames channels height width"] | None = None,
        num_frames: Int[Tensor, "batch media"] | None = None,
        vision_features: Float[Tensor, "batch media frames patches vision_dim"] | None = None,
        media_cache: MediaCache | None = None,
        media_ranges: Int[Tensor, "batch text 2"] | None = None,
        media_mask: Bool[Tensor, "batch text all_media"] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue texts, as `generate` of any model of transformers does.

        Media are encoded once, before the first token, and their keys and values are kept. Text ends at the language
        model's own end of text or at the end of a chunk; `<image>` is not generated. `generation_config` holds both.
        Where `config.decoding` is `"uncached"`, the language model's cache is not used, whatever `use_cache` says.

        To go on with a conversation, pass `cache` and `media_cache` to the first call, and to the next ones together
        with the whole text and the new media only. To go back first, crop `cache`: media whose `<image>` is no longer
        in it are dropped. To go back to before the newest medium, begin with `MediaCache(keep_all=True)`.

        With `assistant_model`, another Flamingo or a language model drafts tokens: the former encodes the media itself,
        the latter sees the text alone. With `guidance_scale`, what is guided away from is the text without any media.

        Args:
            inputs: The prompts, `input_ids`.
            *args: As in transformers.
            pixel_values: See `forward`.
            num_frames: See `forward`.
            vision_features: See `forward`.
            media_cache: An empty cache to be filled, or that of earlier text.
            media_ranges: What each token of the prompts sees, if that is not what `config.attend` says; then nothing is
                made of `<image>` tokens, which may be more or fewer than the media. What is generated sees what the
                last token of its prompt sees. With caches of earlier text, ranges for the new text are enough; they
                count all media of their row, those of earlier text too.
            media_mask: The same as a mask: True where the token sees the medium. All tokens must see neighbouring
                media.
            **kwargs: As in transformers.

        Raises:
            ValueError: If a row's `<image>` tokens and media do not agree in number, ranges or mask do not fit text and
                media, only one of the two caches of earlier text is there, or an option cannot be right here.
        """
        if media_mask is not None:
            media_ranges = ranges_to_keep(media_ranges, media_mask)
        kwargs |= zip(list(inspect.signature(GenerationMixin.generate).parameters)[2:], args, strict=False)
        self._check_generate(kwargs)
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if input_ids is None:
            embeddings = kwargs.get("inputs_embeds")
            has_media = pixel_values is not None or vision_features is not None
            if embeddings is not None and has_media and media_ranges is None:
                raise ValueError(
                    "inputs_embeds do not tell where the <image> tokens are; pass input_ids or media_ranges as well"
                )
            # Without any prompt, transformers begins with one row of one token.
            input_ids = torch.zeros(1, 1, dtype=torch.long, device=self.device) if embeddings is None else embeddings
        if self.config.decoding == "uncached":
            kwargs["use_cache"] = False  # whatever is asked for: some tools always ask for the cache
        media_cache = MediaCache() if media_cache is None else media_cache
        if (cache := pop_cache(kwargs)) is not None:
            kwargs[self._cache_name] = cache
        earlier, text, start = _split(input_ids, cache, kwargs.get("attention_mask"))
        if (media_cache.rows and start == 0) or (not media_cache.rows and self._is_image(earlier).any()):
            raise ValueError(
                f"{self._cache_name} and media_cache must hold the same earlier text and its media, but one of them is "
                "empty; pass both to every call, or neither, as for recurrent models"
            )
        if not text.shape[1]:
            raise ValueError(
                f"there is no new text: input_ids have {input_ids.shape[1]} tokens, {self._cache_name} {start}; pass "
                "the whole text, or new text alone together with an attention_mask over all of it"
            )
        if media_ranges is not None:
            media_ranges = _of_new_text(media_ranges, input_ids, text)
        draft = kwargs.get("assistant_model")
        if start and (draft is not None or self._option(kwargs, "prompt_lookup_num_tokens")):
            raise ValueError(
                f"with drafts, transformers runs the whole text, also what is in {self._cache_name} already; pass the "
                "whole text and all its media without caches, or generate without drafts"
            )
        if draft is not None:
            if isinstance(draft, FlamingoGenerationMixin) and vision_features is not None:
                raise ValueError(
                    "a Flamingo as assistant_model must encode all media itself; pass pixel_values instead of "
                    "vision_features"
                )
            if kwargs.get("assistant_tokenizer") is None:
                kwargs["assistant_model"] = self._as_draft(draft, input_ids, pixel_values, num_frames, media_ranges)
            elif isinstance(draft, FlamingoGenerationMixin):
                raise ValueError(
                    "a Flamingo as assistant_model must have the same tokens; leave out assistant_tokenizer"
                )
        before = dict(vars(media_cache))
        transformers_generate: Any = super().generate
        try:
            self._announce(media_cache, text, pixel_values, num_frames, vision_features, media_ranges, start=start)
            output = transformers_generate(inputs, media_cache=media_cache, **kwargs)
        except BaseException:
            vars(media_cache).update(before)  # a call that failed has not happened
            raise
        media_cache.drop_unseen()
        if (self._option(kwargs, "num_beams") or 1) > 1:
            media_cache.close("a beam search")
        return output

    def _option(self, kwargs: Mapping[str, Any], name: str) -> Any:
        """Get an option as transformers would: from the call, the configuration passed, or the model's own."""
        configs = [kwargs.get("generation_config"), self.generation_config]
        values = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), None)

    def _check_generate(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse what would not do what was meant."""
        name = type(self.language_model).__name__
        if type(self.language_model).generate is not GenerationMixin.generate:
            raise ValueError(
                f"{name} has a generate() of its own, which knows no media; only its forward can be used here"
            )
        if self.config.decoding == "none":
            raise ValueError(
                f"{name} generates by other logits than those of its forward; only its forward can be used here"
            )
        if kwargs.get("document_ids") is not None:
            raise ValueError(
                "generate takes no document_ids: a prompt is one document; what else it is to see, say with "
                "media_ranges=flamingo_blocks.media_ranges(is_image, document_ids=...)"
            )
        for option, reason in _REFUSED.items():
            if self._option(kwargs, option):
                raise ValueError(f"{option} cannot be used here: {reason}")
        if self._option(kwargs, "guidance_scale") not in (None, 1) and (self._option(kwargs, "num_beams") or 1) > 1:
            raise ValueError("guidance_scale cannot be used with beams: transformers does not reorder its second cache")
        if self._option(kwargs, "cache_implementation") == "paged":
            raise ValueError('cache_implementation="paged" batches text alone; choose another one, or none')

    def _announce(
        self,
        media_cache: MediaCache,
        text: Tensor,
        pixel_values: Tensor | None,
        num_frames: Tensor | None,
        vision_features: Tensor | None = None,
        media_ranges: Tensor | None = None,
        *,
        start: int = 0,
    ) -> None:
        """Tell a media cache of text that will be run: encode its media, project them, and find out who sees what."""
        media, num_media = self._encode(len(text), pixel_values, num_frames, vision_features)
        key_values = self.injector.project_media(media)
        media_cache.update(
            key_values,
            num_media,
            self._is_image(text),
            attend=self.config.attend,
            media_ranges=media_ranges,
            start=start,
        )

    # ------------------------------------------------------------ steps

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        media_cache: MediaCache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare a step: the language model's own way, and what the step's tokens see."""
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        inputs: dict[str, Any] = self.language_model.prepare_inputs_for_generation(input_ids, **kwargs)
        if not self.config.decoding_position_ids:
            inputs.pop("position_ids", None)
        if media_cache is not None:
            text = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            length = text.shape[1]
            start = input_ids.shape[1] - length
            # The ids may lack what is in the cache: in a chunk of the prompt, or where new text alone was given.
            start = max(start, cached_length(kwargs.get(self._cache_name)) or 0)
            inputs |= {"media_cache": media_cache, "media_ranges": media_cache.ranges_at(start, length)}
        return inputs

    # Caches differ between architectures; the language model knows its own.

    @property
    def _is_stateful(self) -> bool:
        return bool(self.language_model._is_stateful)

    def _supports_default_dynamic_cache(self) -> bool:  # type: ignore[override]
        return bool(self.language_model._supports_default_dynamic_cache())

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.language_model._prepare_cache_for_generation(*args, **kwargs)

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.language_model._prepare_position_ids_for_generation(*args, **kwargs)

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.language_model._update_model_kwargs_for_generation(*args, **kwargs)

    # ------------------------------------------------------------ guidance

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        processors = parent._get_logits_processor(*args, **kwargs)
        for processor in processors:
            # It calls the model by itself, with a cache of its own.
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                nothing = MediaCache()
                self._announce(nothing, torch.zeros(1, 1, device=self.device), None, None)
                processor.model = partial(self._without_media, nothing)
        return processors

    def _without_media(self, nothing: MediaCache, input_ids: Tensor, **kwargs: Any) -> Any:
        """Run text that sees no media: an `<image>` is a word."""
        model: Any = self
        return model(input_ids, media_cache=nothing, media_ranges=nothing.ranges_at(0, input_ids.shape[1]), **kwargs)

    # ------------------------------------------------------------ drafts

    def _as_draft(
        self,
        model: Any,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        num_frames: Tensor | None,
        media_ranges: Tensor | None,
    ) -> Any:
        """Let a model draft for this one: give it media, and let it bear the ids and give the logits of all tokens.

        Returns:
            A view of the model, which shares everything with it. The model itself stays as it was.
        """
        if model._is_stateful:
            raise ValueError(
                f"assistant_model must have a cache that can be cropped, but {type(model).__name__} has states; "
                "choose a model with attention"
            )
        view, forward, vocab_size = copy.copy(model), model.forward, _vocab_size(self.config)
        known = _vocab_size(model.config)
        if isinstance(model, FlamingoGenerationMixin):
            if model.config.image_token_id != self.config.image_token_id:
                raise ValueError(
                    f"assistant_model must have the same <image> token, {self.config.image_token_id}, got "
                    f"{model.config.image_token_id}"
                )
            media_cache = MediaCache()
            pixel_values = None if pixel_values is None else pixel_values.to(model.device)
            media_ranges = None if media_ranges is None else media_ranges.to(model.device)
            text = input_ids.to(model.device)
            model._announce(media_cache, text, pixel_values, num_frames, media_ranges=media_ranges)
            # Not the generate of a Flamingo, which would encode the media anew for each draft.
            view.generate = partial(GenerationMixin.generate, view, media_cache=media_cache)
        elif known == _vocab_size(self.language_model.config):
            # transformers compares the sizes to see whether the tokens are the same.
            view.config = copy.deepcopy(model.config)
            view.config.get_text_config(decoder=True).vocab_size = vocab_size
        unknown = ordinary_token(model.language_model if isinstance(model, FlamingoGenerationMixin) else model)

        @wraps(forward)
        def forward_with_all_tokens(input_ids: Tensor, **kwargs: Any) -> Any:
            output = forward(input_ids=input_ids.where(input_ids < known, unknown), **kwargs)
            output.logits = F.pad(output.logits, (0, vocab_size - output.logits.shape[-1]), value=-torch.inf)
            return output

        view.forward = forward_with_all_tokens
        return view

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        # The media are not the draft's: it has a cache of its own, or none.
        kwargs["model_kwargs"] = {k: v for k, v in kwargs["model_kwargs"].items() if k != "media_cache"}
        parent: Any = super()
        return parent._get_candidate_generator(*args, **kwargs)


def _vocab_size(config: Any) -> int:
    return int(config.get_text_config(decoder=True).vocab_size)


def pop_cache(arguments: dict[str, Any]) -> Any:
    """Take the language model's cache out of arguments, by whichever name it is there."""
    named = {name: arguments.pop(name, None) for name in CACHE_NAMES}
    caches = {name: cache for name, cache in named.items() if cache is not None}
    if len(caches) > 1:
        raise ValueError(f"{' and '.join(caches)} are names of the same cache, the language model's; pass one of them")
    return next(iter(caches.values()), None)


def cached_length(cache: Any) -> int | None:
    """Count the tokens in a cache. None: it does not tell, as those of recurrent models."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return None


def cached_rows(cache: Any) -> int | None:
    """Count the rows in a cache of attention layers. None: it is empty, or does not tell."""
    keys = getattr(next(iter(getattr(cache, "layers", None) or ()), None), "keys", None)
    return keys.shape[0] if isinstance(keys, Tensor) and keys.ndim == 4 else None


def ranges_to_keep(
    media_ranges: Int[Tensor, "rows text 2"] | None, media_mask: Bool[Tensor, "rows text all_media"]
) -> Int[Tensor, "rows text 2"]:
    """Make ranges of a mask, of which a `MediaCache` knows nothing.

    Args:
        media_ranges: Must be None: it says the same.
        media_mask: What each token sees.

    Raises:
        ValueError: If there are both, or no ranges say the same as the mask.
    """
    if media_ranges is not None:
        raise ValueError("give either media_ranges or media_mask")
    try:
        return ranges_of_mask(media_mask)
    except ValueError as error:
        raise ValueError(
            "with caches, as in generate, what a token sees is kept as a range of media, so that media_mask cannot be "
            f"used as it is: {error}. A forward with use_cache=False and without caches takes any mask"
        ) from error


def _of_new_text(media_ranges: Tensor, input_ids: Tensor, text: Tensor) -> Tensor:
    """Take the ranges of the new text, be they given for it alone or for all text."""
    rows, lengths = len(input_ids), sorted({input_ids.shape[1], text.shape[1]})
    if media_ranges.shape not in [(rows, length, 2) for length in lengths]:
        raise ValueError(
            "media_ranges must have a range for each token of the text, or of the new text, (batch, text, 2) = "
            f"{' or '.join(str((rows, length, 2)) for length in lengths)}, got {tuple(media_ranges.shape)}"
        )
    return media_ranges[:, -text.shape[1] :]


def _split(input_ids: Tensor, cache: Any, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Split text into what is in the cache and what is new, and count the former.

    As in transformers, a mask that is longer than the text tells that the text is new alone.
    """
    start = cached_length(cache) or 0
    is_whole = attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
    cut = start if is_whole else 0
    return input_ids[:, :cut], input_ids[:, cut:], start

"""FlamingoConfig: what a Flamingo is made of, as JSON."""

import copy
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig

from flamingo_blocks.blocks import Attend
from flamingo_blocks.new_tokens import NewTokenHead
from flamingo_blocks.parts import Activation, Gating, Norm, Resampler
from flamingo_blocks.residual_stream import StreamLayout

# Types are checked by transformers' own strict dataclasses; jaxtyping's hook would break them.

# What language models call their cache: `cache` from transformers 5.24 on; before, `past_key_values`, or `cache_params`
# in Mamba and its like; RWKV has a `state` in any version.
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")

# Names that transformers puts into configurations without declaring them.
_OF_TRANSFORMERS = {
    *GenerationConfig().to_dict(),
    *("attn_implementation", "auto_map", "experts_implementation", "fusion_config", "gradient_checkpointing"),
    *("output_attentions", "quantization_config", "sep_token_id", "torch_dtype"),
}


def _check_names(config: PreTrainedConfig, names: Iterable[str]) -> None:
    """Refuse what looks like a misspelt option; transformers would keep it as an attribute, and it would get lost."""
    known = [field.name for field in fields(config)]
    for name in names:
        if name in _OF_TRANSFORMERS or name.startswith("_") or hasattr(type(config), name):
            continue
        nearest = [option for option in known if name in option] or get_close_matches(name, known, n=1, cutoff=0.6)
        if nearest:
            raise ValueError(f"{type(config).__name__} has no option {name!r}; did you mean {' or '.join(nearest)}?")


@strict
@no_type_check
class FlamingoVisionConfig(PreTrainedConfig):
    """Which timm model the vision encoder is, and for which images.

    Attributes:
        architecture: Name for `timm.create_model`, without weights' tag. None: a model that timm cannot make by name;
            it must be passed to the model as an instance, also in `from_pretrained`.
        model_args: Further arguments of `timm.create_model`, e.g. `{"output_stride": 8}`. Of a model that timm cannot
            make, what else may make it, as `flamingo_blocks.convert.mllama.make_vision_encoder` does.
        image_size: Height and width of the images. None: what the model was made for.
        channels: Of the images.
        keep_prefix_tokens: Whether class and register tokens are kept, in front of the patches (IDEFICS).
        final_norm: Whether tokens have passed the final norm. Not in OpenFlamingo.
        output_dtype: Of the tokens that the encoder gives. None: the backbone's.
        revision: Of its pretrained weights, whose name or path is `name_or_path`. None: they have none.
    """

    model_type = "flamingo_vision"
    base_config_key = "vision_config"

    architecture: str | None = "dm_nfnet_f6"
    model_args: dict[str, Any] | None = None
    image_size: int | list[int] | tuple[int, ...] | None = None
    channels: int = 3
    keep_prefix_tokens: bool = False
    final_norm: bool = True
    output_dtype: str | None = None
    revision: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _check_names(self, kwargs)
        if isinstance(self.image_size, int):
            self.image_size = [self.image_size, self.image_size]
        if self.image_size is not None:
            self.image_size = list(self.image_size)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


@strict
@no_type_check
class FlamingoConfig(PreTrainedConfig):
    """Configuration of a `FlamingoForConditionalGeneration`.

    Sizes that are None follow from the backbones. `build_flamingo` fills in the rest; write one by hand, or take one
    from `flamingo_blocks.presets`, for a model without pretrained backbones.

    Attributes:
        text_config: The language model's own configuration. Its `name_or_path` is where the language model came from.
        text_revision: Commit of that. None: it has none.
        vision_config: The vision encoder's.
        cross_attention_layers: Decoder layers that get a block before them. None: all (the paper's 3B model); see
            `flamingo_blocks.injection.select_layers`.
        decoder_layers: Dotted name of the language model's list of decoder layers, where it is not found by itself.
        residual_stream: How hidden states are laid out between its decoder layers, see
            `flamingo_blocks.residual_stream`.
        decoding: How text is generated so that its logits are those of the forward; `build_flamingo` tries it out.
            `"cached"`: with the language model's cache. `"uncached"`: its cache gives other logits, so without.
            `"none"`: not at all, since its way of generating is another one than its forward.
        decoding_position_ids: Whether generating tells the language model the positions. Some count them otherwise in
            their forward (RoBERTa).
        cross_attention_heads: Heads of a block. None: the language model's, else one for each 64 channels.
        cross_attention_head_dim: Width of a head. None: the language model's width / heads.
        cross_attention_kv_heads: Heads of keys and values. None: as many as heads.
        cross_attention_hidden: Width of a block's feed-forward network. None: 4 times the language model's width.
        cross_attention_activation: Of that network: `"squared_relu"` (the paper), `"gelu"` (OpenFlamingo), `"relu"`, or
            `"swiglu"` (IDEFICS, Llama-3.2-Vision), which has a third matrix.
        cross_attention_norm: Kind of a block's norms: `"layer_norm"` or `"rms_norm"` (IDEFICS, Llama-3.2-Vision).
        cross_attention_norm_eps: Added to the variance in them.
        cross_attention_qk_norm: Whether a block normalises queries and keys, head by head.
        feed_forward_without_media: Whether tokens that see no medium go through the blocks' feed-forward networks.
            Not in Llama-3.2-Vision.
        gating: `"tanh"`: one tanh gate a sub-layer (the paper); `"tanh_per_channel"`: one a channel (IDEFICS);
            `"none"`: no gate (the paper's ablation, table 3, iii).
        gate_init: Alpha of the gates at the start. Only 0 starts as the language model.
        attend: Which media a token sees, see `flamingo_blocks.media_ranges`.
        resampler: `"perceiver"` (the paper), or what the paper compares it with: `"mlp"`, `"transformer"`; or
            `"mean_pool"`; or `"linear"`, a projection where widths differ (Llama-3.2-Vision).
        resampler_dim: Width of the latents. None: the vision encoder's.
        resampler_depth: Layers of a perceiver or transformer.
        resampler_heads: Their heads.
        resampler_head_dim: Width of a head of the perceiver. None: dim / heads, rounded down.
        resampler_hidden: Width of their feed-forward networks. None: 4 times their width.
        resampler_activation: Of a perceiver's or MLP's feed-forward networks, as for the blocks.
        resampler_qk_norm: Whether a perceiver normalises queries and keys, head by head.
        num_latents: Latents of a medium, for the perceiver.
        max_frames: Number of learned temporal embeddings. 0: frames are not told apart.
        freeze: Parts that are not trained: `"language_model"`, `"vision_encoder"`, both (the paper) or none.
        freeze_exceptions: Parameters that were frozen though in no such part, or trained though in one, when it was
            saved.
        image_token_id: Id of `<image>`. None: the first id behind the language model's vocabulary.
        end_of_chunk_token_id: Id of `<EOC>`. None: the id after `image_token_id`.
        new_token_ids: Those ids that the language model has no embedding for and that get a trained one. None:
            `<image>` and `<EOC>`.
        new_token_head: What gives their logits, see `NewTokens`.
        trained_dtype: Of resampler, blocks and new tokens, whatever the language model is loaded in. None: as the
            language model.
        vision_dtype: Of the vision encoder. None: as the language model.

    Source: Alayrac et al. 2022; table 3 for the alternatives.
    """

    model_type = "flamingo"
    sub_configs: ClassVar = {"text_config": AutoConfig, "vision_config": FlamingoVisionConfig}
    # Older versions of transformers would make one without a language model to find the defaults.
    has_no_defaults_at_init: ClassVar = True
    keys_to_ignore_at_inference: ClassVar = [*CACHE_NAMES, "media_cache"]

    text_config: PreTrainedConfig | dict[str, Any] | None = None
    text_revision: str | None = None
    vision_config: PreTrainedConfig | dict[str, Any] | None = None
    cross_attention_layers: list[int] | None = None
    decoder_layers: str | None = None
    residual_stream: StreamLayout = "batch text dim"
    decoding: Literal["cached", "uncached", "none"] = "cached"
    decoding_position_ids: bool = True
    cross_attention_heads: int | None = None
    cross_attention_head_dim: int | None = None
    cross_attention_kv_heads: int | None = None
    cross_attention_hidden: int | None = None
    cross_attention_activation: Activation = "squared_relu"
    cross_attention_norm: Norm = "layer_norm"
    cross_attention_norm_eps: float = 1e-5
    cross_attention_qk_norm: bool = False
    feed_forward_without_media: bool = True
    gating: Gating = "tanh"
    gate_init: float | int = 0.0
    attend: Attend = "last"
    resampler: Resampler = "perceiver"
    resampler_dim: int | None = None
    resampler_depth: int = 6
    resampler_heads: int = 16
    resampler_head_dim: int | None = None
    resampler_hidden: int | None = None
    resampler_activation: Activation = "squared_relu"
    resampler_qk_norm: bool = False
    num_latents: int = 64
    max_frames: int = 8
    freeze: list[Literal["language_model", "vision_encoder"]] | None = None
    freeze_exceptions: list[str] | None = None
    image_token_id: int | None = None
    end_of_chunk_token_id: int | None = None
    new_token_ids: list[int] | None = None
    new_token_head: NewTokenHead = "linear"
    trained_dtype: str | None = None
    vision_dtype: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _check_names(self, kwargs)
        if self.text_config is None:
            raise ValueError("text_config must be the configuration of a language model, e.g. LlamaConfig(), got None")
        if isinstance(self.text_config, dict):
            _check_model_type(self.text_config)
            self.text_config = AutoConfig.for_model(**self.text_config)
        # A copy: transformers is about to reset the attention implementation, also of a model that is in use.
        self.text_config = copy.deepcopy(self.text_config)
        if self.vision_config is None:
            self.vision_config = {}
        if isinstance(self.vision_config, dict):
            self.vision_config = FlamingoVisionConfig(**self.vision_config)
        if self.freeze is None:
            self.freeze = ["vision_encoder", "language_model"]
        vocab_size = self.text_config.get_text_config(decoder=True).vocab_size
        if self.image_token_id is None:
            self.image_token_id = vocab_size
        if self.end_of_chunk_token_id is None:
            self.end_of_chunk_token_id = self.image_token_id + 1
        if self.new_token_ids is None:
            self.new_token_ids = [self.image_token_id, self.end_of_chunk_token_id]
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """Give the language model's configuration, with a vocabulary that counts the new tokens.

        It is what transformers asks while generating. `text_config` itself stays that of the language model.
        """
        text_config = super().get_text_config(*args, **kwargs)
        if text_config is self:
            return text_config
        text_config = text_config.get_text_config(decoder=True)  # that of a vision-language model has one itself
        if not self.new_token_ids:
            return text_config
        text_config = copy.copy(text_config)
        text_config.vocab_size = max(text_config.vocab_size, *(i + 1 for i in self.new_token_ids))
        return text_config


def _check_model_type(text_config: dict[str, Any]) -> None:
    """Say what to do where transformers does not know the language model, as one whose code came with it."""
    model_type = text_config.get("model_type")
    if model_type is not None and model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"the language model is of the type {model_type!r}, which this version of transformers does not know. If "
            "its code came with it, load it first, lm = AutoModelForCausalLM.from_pretrained(..., "
            f"trust_remote_code=True), and register it: AutoConfig.register({model_type!r}, type(lm.config)) and "
            "AutoModelForCausalLM.register(type(lm.config), type(lm))"
        )


AutoConfig.register(FlamingoConfig.model_type, FlamingoConfig, exist_ok=True)

"""A tiny configuration of any causal language model of transformers, by a recipe: sizes follow from fields' names.

What no name tells, e.g. which layers of a hybrid are which, stands in `EXCEPTIONS`. An architecture that came out after
this was written most often needs no line here.
"""

import dataclasses
import inspect
import re
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, WIDTH, DEPTH, HEADS, KV_HEADS, HEAD_DIM, EXPERTS = 160, 64, 4, 4, 2, 16, 4
PAD, BOS, EOS = 0, 1, 2

# Fields that set a size, and to what; the first match counts.
_SIZES = [
    (r"(unpadded_)?vocab_size|n_vocab|vocab_size_per_layer_input|text_vocab_size|n_words", VOCAB),
    (r"hidden_size|n_embd|d_model|dim_model|emb_dim|embed_dim|embedding_size|word_embed_proj_dim|model_dim", WIDTH),
    (r"attention_hidden_size|input_embedding_size|lru_width|embedding_dim|hidden_size_global", WIDTH),
    (r"num_hidden_layers|n_layers?|num_layers|num_blocks|(num_)?(de|en)code(r)?_layers|num_(de|en)coder_layers", DEPTH),
    (r"num_attention_heads|n_heads?|num_heads|(num_)?(de|en)coder_attention_heads|mamba_(num|n)_heads", HEADS),
    (r"swa_num_attention_heads|cca_num_q_heads|num_query_heads", HEADS),
    (r"num_key_value_heads(_.*)?|num_kv_heads|kv_n_heads|num_global_key_value_heads|swa_num_key_value_heads", KV_HEADS),
    (r"linear_num_(key_|value_)?heads|index_n_heads", KV_HEADS),
    (r"((attention|global|swa|mamba|index)_)?head_dim|d_kv|dim_head|mamba_d_head|kv_channels", HEAD_DIM),
    (r"linear_(key|value)_head_dim|(swa_)?v_head_dim|qk_(nope|rope)_head_dim", HEAD_DIM),
    (r"[qko]v?_lora_rank|router_hidden_size|hidden_size_per_layer_input|mamba_d_ssm|laurel_rank|altup_.*rank", 32),
    (r".*intermediate_size(_mlp)?|ffn_dim|d_ff|n_inner|(expert_)?ffn_hidden_size|ff_dim|dim_ff|ffn_config.*", WIDTH),
    (r"(de|en)coder_ffn_dim|d_inner|block_ff_dim|mlp_hidden_size|expert_ffn_size|num_expert_ffn", WIDTH),
    (r"feed_forward_size", WIDTH),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_k|moe_top_?k|top_k_experts|num_selected_experts", 2),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|first_k_dense_replace|num_dense_layers", 1),
    (r"state_size|mamba_d_state|ssm_state_size|d_state", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(target|source)_positions|context_length", 256),
    (r"max_sequence_length", 256),
]
_TOKEN = re.compile(r"_token_(id|index)$|^(image|video|audio|boi|eoi|eoa|boa)_token")
_SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
# Whatever is random in training must not be, where gradients are compared.
_RANDOM = re.compile(r"(dropout|_pdrop|layerdrop|drop_rate|dropout_rate|jitter_noise)(_prob|_rate|_p)?$|^dropout")
# Sizes that follow from others where they are None.
_FOLLOWS = {
    "lru_width", "ffn_dim", "n_inner", "head_dim", "d_kv", "mamba_d_ssm", "kv_lora_rank", "word_embed_proj_dim",
    "d_inner", "embedding_size", "linear_num_heads", "hidden_size_per_layer_input",
}  # fmt: skip

_HALF_LINEAR = ["linear_attention", "full_attention"] * 2
_HALF_SLIDING = ["sliding_attention", "full_attention"] * 2
_ROPE = {"rope_type": "default", "rope_theta": 1e4}

# By model_type: what no name tells.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _HALF_LINEAR},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 4, "mamba_d_head": 32},
    "blt": {"encoder_hash_byte_group_vocab": 64, "num_hidden_layers": 4, "vocab_size": VOCAB},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": _HALF_SLIDING,
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "cpmant": {"prompt_length": 4},
    "dbrx": {
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": WIDTH, "moe_num_experts": EXPERTS, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8, "rope_theta": 1e4},
    },
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": EXPERTS},
    "dots3_note": {"per_layer_config": {}},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "activation_sparsity_pattern": [0.0] * 6,
        "intermediate_size": [WIDTH] * 6,
        "vocab_size_per_layer_input": VOCAB,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": _HALF_LINEAR, "mamba_d_head": 32},
    "hunyuan_v1_dense": {"rope_parameters": _ROPE, "head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"rope_parameters": _ROPE, "head_dim": HEAD_DIM, "num_experts": EXPERTS, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _HALF_LINEAR, "linear_head_dim": HEAD_DIM, "v_head_dim": HEAD_DIM},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": HEAD_DIM, "num_heads": 8},
    "ministral": {"head_dim": HEAD_DIM},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "qwen4_exp_text": {
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "axial_pos_embds": False,
        "attention_head_size": HEAD_DIM,
        "attn_layers": ("local", "lsh", "local", "lsh"),
        "local_attn_chunk_length": 64,
        "lsh_attn_chunk_length": 64,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 50,
        "shape_vocab_size": 50,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "xlm": {"causal": True},
    "xlstm": {
        "hidden_size": 128,
        "num_heads": 2,
        "embedding_dim": 128,
        "mode": "inference",
        "qk_dim_factor": 0.5,
        "v_dim_factor": 1.0,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 6,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}
# The same for a part of one, by model_type and the part's name.
PARTS: dict[tuple[str, str], dict[str, Any]] = {
    ("gemma4_assistant", "text_config"): {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "num_kv_shared_layers": DEPTH,
        "layer_types": _HALF_SLIDING,
    },
}


def architectures() -> list[str]:
    """Name every distinct class of transformers' causal language models."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


def make_lm(architecture: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Make a tiny model of a class with random weights, in eval mode."""
    cls: Any = getattr(transformers, architecture)
    config = _shrink(cls.config_class)
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    torch.manual_seed(seed)
    lm = cls._from_config(config, dtype=dtype).eval()
    lm.generation_config.eos_token_id = None  # all generate equally long
    return lm


def _shrink(cls: Any, further: dict[str, Any] | None = None) -> Any:
    fields = _fields(cls)
    parts = getattr(cls, "sub_configs_defaults", None) or {}
    chosen = {name: _choose(name, default) for name, default in fields.items() if name not in parts}
    arguments = {name: value for name, value in chosen.items() if value is not None}
    for name, part in parts.items():
        if not getattr(part, "optional", False) or name.startswith(("text", "decoder", "llm")):
            arguments[name] = _shrink(_part_class(part), PARTS.get((cls.model_type, name)))
    if "kv_lora_rank" in fields and "num_key_value_heads" in arguments:  # latent attention has as many as heads
        arguments["num_key_value_heads"] = HEADS
    return cls(**arguments | EXCEPTIONS.get(cls.model_type, {}) | (further or {}))


def _choose(name: str, default: Any) -> Any:
    """Choose the value of a field; None leaves the default."""
    if _TOKEN.search(name):
        if name in _SPECIAL:
            return _SPECIAL[name]
        is_outside = type(default) is int and default >= VOCAB
        return 10 + sum(map(ord, name)) % 90 if is_outside else None
    if _RANDOM.search(name) and isinstance(default, float):
        return 0.0
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            is_size = type(default) is int or (default is None and name not in _FOLLOWS)
            return min(default, 1) if is_size and size == 1 and default is not None else size if is_size else None
    return None


def _part_class(part: Any) -> Any:
    cls = part.config_class if inspect.isclass(getattr(part, "config_class", None)) else None
    if cls is None or cls is PreTrainedConfig or not issubclass(cls, PreTrainedConfig) or cls.__name__ == "AutoConfig":
        return CONFIG_MAPPING[part.model_type]
    return cls


def _fields(cls: Any) -> dict[str, Any]:
    """Name the fields of a configuration class with their defaults."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        fields[field.name] = None if field.default is dataclasses.MISSING else field.default
    if "__init__" in cls.__dict__:
        for parameter in inspect.signature(cls.__init__).parameters.values():
            if parameter.default is not inspect.Parameter.empty:
                fields.setdefault(parameter.name, parameter.default)
    return fields

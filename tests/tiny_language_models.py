"""Tiny language models with random weights, one of each kind that this library must know its way around in."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3Config,
)

VOCAB, WIDTH, DEPTH = 99, 32, 3

_shape: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
_tokens: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_tokens, **_shape, intermediate_size=48),
    "gpt2": lambda: GPT2Config(**_tokens, n_embd=WIDTH, n_layer=DEPTH, n_head=4),
    # The embedding is narrower than the decoder.
    "opt": lambda: OPTConfig(**_tokens, **_shape, ffn_dim=48, word_embed_proj_dim=16),
    "gpt_neox": lambda: GPTNeoXConfig(**_tokens, **_shape, intermediate_size=48),
    "qwen3": lambda: Qwen3Config(**_tokens, **_shape, intermediate_size=48, num_key_value_heads=2, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**_tokens, **_shape, intermediate_size=48, num_key_value_heads=2, head_dim=8),
    "mamba": lambda: MambaConfig(**_tokens, hidden_size=WIDTH, num_hidden_layers=DEPTH, state_size=4),
}
PATHS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
    "qwen3": "model.layers",
    "gemma3": "model.layers",
    "mamba": "backbone.layers",
}


def make_lm(name: str, *, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    auto_model: Any = AutoModelForCausalLM
    return auto_model.from_config(CONFIGS[name](), dtype=dtype).eval()

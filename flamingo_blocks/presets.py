"""The paper's three sizes, as configurations.

They give the shapes of the paper, not its weights, which were never released. Its language models, Chinchilla, were not
either: GPT-NeoX in Chinchilla's shapes stands for them, with rotary instead of relative positions. Precision is the
paper's: what is frozen bfloat16, what is trained float32.

Source: Alayrac et al. 2022 (Flamingo), appendix B.1, table 5 (shapes) and B.1.2 (precision); Hoffmann et al. 2022
(Chinchilla).
"""

from transformers import GPTNeoXConfig

from flamingo_blocks.configuration_flamingo import FlamingoConfig, FlamingoVisionConfig
from flamingo_blocks.injection import select_layers


def flamingo_3b() -> FlamingoConfig:
    """Configure Flamingo-3B: a block before each of 24 layers, 2048 wide.

    Example:
        ```python
        import torch
        from flamingo_blocks import FlamingoForConditionalGeneration, flamingo_3b

        with torch.device("meta"):  # shapes only
            model = FlamingoForConditionalGeneration(flamingo_3b())
        print(model.summary())
        ```
    """
    return _flamingo(layers=24, width=2048, heads=16, every=1)


def flamingo_9b() -> FlamingoConfig:
    """Configure Flamingo-9B: a block before every 4th of 40 layers, 4096 wide."""
    return _flamingo(layers=40, width=4096, heads=32, every=4)


def flamingo_80b() -> FlamingoConfig:
    """Configure Flamingo-80B: a block before every 7th of 80 layers, 8192 wide."""
    return _flamingo(layers=80, width=8192, heads=64, every=7)


def _flamingo(*, layers: int, width: int, heads: int, every: int) -> FlamingoConfig:
    return FlamingoConfig(
        text_config=GPTNeoXConfig(
            vocab_size=32_000,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=2048,
            use_parallel_residual=False,
            attention_bias=False,
            tie_word_embeddings=True,
            dtype="bfloat16",
        ),
        vision_config=FlamingoVisionConfig(architecture="dm_nfnet_f6", image_size=320),
        cross_attention_layers=list(select_layers(layers, every=every)),
        cross_attention_heads=heads,
        cross_attention_head_dim=128,
        resampler_dim=1536,
        resampler_depth=6,
        resampler_heads=16,
        resampler_head_dim=96,
        num_latents=64,
        max_frames=8,
        trained_dtype="float32",
    )

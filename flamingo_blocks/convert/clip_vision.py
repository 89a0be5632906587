"""The vision encoders of the family: CLIP's vision transformers, whose weights timm's can hold.

Source: Radford et al. 2021 (CLIP). The norm after the embeddings comes before the first block, and the last norm is for
the pooled class token alone: the tokens that a resampler gets have not passed it.
"""

from typing import Any

from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig
from flamingo_blocks.convert.renaming import Rename, under, under_each

# Where a FlamingoForConditionalGeneration has it.
OURS = "vision_encoder.backbone."
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu"}


def clip_vision_config(
    *,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    intermediate_size: int,
    patch_size: int,
    image_size: int,
    hidden_act: str,
    layer_norm_eps: float = 1e-5,
    channels: int = 3,
    keep_prefix_tokens: bool,
) -> FlamingoVisionConfig:
    """Describe a CLIP vision transformer as a model of timm, without its final norm.

    Args:
        hidden_size: Width.
        num_hidden_layers: Number of layers.
        num_attention_heads: Heads.
        intermediate_size: Width of the feed-forward networks.
        patch_size: Height and width of a patch.
        image_size: Height and width of an image.
        hidden_act: `"gelu"` or `"quick_gelu"`.
        layer_norm_eps: 1e-5, the only one that timm's model has.
        channels: Of the images.
        keep_prefix_tokens: Whether the class token is kept, in front of the patches.

    Raises:
        ValueError: If timm's model has no such activation or norm.
    """
    if hidden_act not in _ACTIVATIONS or layer_norm_eps != 1e-5:
        raise ValueError(
            "a CLIP vision encoder must have hidden_act gelu or quick_gelu and layer_norm_eps 1e-5, got "
            f"{hidden_act!r} and {layer_norm_eps}"
        )
    model_args: dict[str, Any] = {
        "patch_size": patch_size,
        "embed_dim": hidden_size,
        "depth": num_hidden_layers,
        "num_heads": num_attention_heads,
        "mlp_ratio": intermediate_size / hidden_size,
        "act_layer": _ACTIVATIONS[hidden_act],
    }
    return FlamingoVisionConfig(
        architecture="vit_base_patch16_clip_224",  # the arguments make it another size
        model_args=model_args,
        image_size=image_size,
        channels=channels,
        keep_prefix_tokens=keep_prefix_tokens,
        final_norm=False,
    )


def transformers_clip(layers: int, *, theirs: str) -> list[Rename]:
    """Give the table for CLIP's vision transformer in transformers.

    Args:
        layers: Number of layers.
        theirs: Prefix of the module there, with its dot.
    """
    renames = [
        Rename("embeddings.class_embedding", "cls_token", "dim -> 1 1 dim"),
        Rename("embeddings.patch_embedding", "patch_embed.proj"),
        Rename("embeddings.position_embedding.weight", "pos_embed", "tokens dim -> 1 tokens dim"),
        Rename("pre_layrnorm", "norm_pre"),
        Rename("post_layernorm", "norm"),
    ]
    layer = [
        Rename("layer_norm1", "norm1"),
        Rename(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn.qkv"),
        Rename("self_attn.out_proj", "attn.proj"),
        Rename("layer_norm2", "norm2"),
        Rename("mlp.fc1", "mlp.fc1"),
        Rename("mlp.fc2", "mlp.fc2"),
    ]
    renames += under_each(layer, range(layers), theirs="encoder.layers.", ours="blocks.")
    return under(renames, theirs=theirs, ours=OURS)


def open_clip(layers: int, *, theirs: str) -> list[Rename]:
    """Give the table for open_clip's vision transformer, without the projection of its pooled token.

    Args:
        layers: Number of layers.
        theirs: Prefix of the module there, with its dot.
    """
    renames = [
        Rename("class_embedding", "cls_token", "dim -> 1 1 dim"),
        Rename("conv1", "patch_embed.proj"),
        Rename("positional_embedding", "pos_embed", "tokens dim -> 1 tokens dim"),
        Rename("ln_pre", "norm_pre"),
        Rename("ln_post", "norm"),
    ]
    layer = [
        Rename("ln_1", "norm1"),
        Rename("attn.in_proj_weight", "attn.qkv.weight"),
        Rename("attn.in_proj_bias", "attn.qkv.bias"),
        Rename("attn.out_proj", "attn.proj"),
        Rename("ln_2", "norm2"),
        Rename("mlp.c_fc", "mlp.fc1"),
        Rename("mlp.c_proj", "mlp.fc2"),
    ]
    renames += under_each(layer, range(layers), theirs="transformer.resblocks.", ours="blocks.")
    return under(renames, theirs=theirs, ours=OURS)

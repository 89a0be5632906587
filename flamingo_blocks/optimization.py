"""parameter_groups: what an optimizer trains, with weight decay where the paper has it.

Source: Alayrac et al. 2022 (Flamingo), appendix B.1.2.
"""

from typing import Any

from torch import nn

from flamingo_blocks.blocks import (
    LinearResampler,
    MeanPoolResampler,
    MediaFeatures,
    MLPResampler,
    PerceiverResampler,
    TransformerResampler,
)
from flamingo_blocks.new_tokens import NewTokens

# Modules none of whose parameters decays, submodules' included.
_EXEMPT = (
    *(PerceiverResampler, MLPResampler, TransformerResampler, MeanPoolResampler, LinearResampler),
    *(MediaFeatures, NewTokens),
    *(nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)


def parameter_groups(model: nn.Module, *, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Sort what is trained into a group with weight decay and one without.

    Matrices decay: the weights of linear layers and convolutions, those of LoRA included. Vectors and numbers do not
    (gates, norms, biases), nor do embeddings, new tokens, and the resampler with its latents; nor what timm's models
    name in `no_weight_decay()`. A module's kind decides, not its name, so that the model may be whole, a part, or
    wrapped, by PEFT, DistributedDataParallel or torch.compile.

    Args:
        model: Any module. What is frozen is left out.
        weight_decay: Of the first group. The paper: 0.1.

    Returns:
        Two groups for an optimizer of torch, with weight decay and without; one of them may be empty. Each trained
        parameter is in one of them, in the model's order.

    Raises:
        ValueError: If nothing is trained.

    Example:
        ```python
        import torch
        from flamingo_blocks import GatedCrossAttentionBlock, parameter_groups

        block = GatedCrossAttentionBlock(dim=64, media_dim=32, heads=4)
        optimizer = torch.optim.AdamW(parameter_groups(block), lr=1e-4)
        ```

    Source: Alayrac et al. 2022, appendix B.1.2 (AdamW, weight decay 0.1, none for the resampler). Differs from the
    paper: it speaks of the resampler alone; gates, norms and embeddings are left out as is usual.
    """
    exempt: set[int] = set()
    module: Any
    for module in model.modules():
        if isinstance(module, _EXEMPT):
            exempt |= {id(parameter) for parameter in module.parameters()}
        elif hasattr(module, "no_weight_decay"):
            names = module.no_weight_decay()
            exempt |= {id(parameter) for name, parameter in module.named_parameters() if name in names}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("model has no parameter that is trained; unfreeze something with requires_grad_(True)")
    decayed = [p for p in trained if id(p) not in exempt and sum(size > 1 for size in p.shape) > 1]
    kept = {id(parameter) for parameter in decayed}
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if id(parameter) not in kept], "weight_decay": 0.0},
    ]

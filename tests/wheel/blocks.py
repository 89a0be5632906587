"""Run in an environment that has torch, einops and jaxtyping alone: a resampler and blocks in a model of one's own."""

from importlib.util import find_spec

import torch
from torch import nn

from flamingo_blocks import GatedCrossAttentionBlock, LMLayerInjector, MediaRuns, PerceiverResampler, media_ranges

for name in ("transformers", "timm", "PIL"):
    if find_spec(name):
        raise SystemExit(f"the environment is not empty: it has {name}")

resampler = PerceiverResampler(dim=32, vision_dim=24, depth=1, heads=2, latents=4)
decoder = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
injector = LMLayerInjector({1: GatedCrossAttentionBlock(dim=16, media_dim=32, heads=2)}).inject(list(decoder))

is_image = torch.tensor([[True, False, False, True, False, False]])
runs = MediaRuns.from_ranges(media_ranges(is_image))
media = resampler(torch.randn(1, 2, 1, 9, 24))
hidden_states = torch.randn(1, 6, 16)

before = decoder(hidden_states)
with injector.scope(media, runs):
    output = decoder(hidden_states)
    if not torch.equal(output, before):
        raise SystemExit("blocks whose gates are zero change the model")
    output.sum().backward()
if not any(parameter.grad is not None and parameter.grad.any() for parameter in injector.parameters()):
    raise SystemExit("the blocks do not learn")

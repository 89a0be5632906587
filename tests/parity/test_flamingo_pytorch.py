"""flamingo-pytorch itself, beside what is loaded from its modules. `make parity` installs it."""

from typing import Any

import pytest
import torch
from flamingo_pytorch.flamingo_pytorch import GatedCrossAttentionBlock, PerceiverResampler
from torch import Tensor, nn

from flamingo_blocks import GatedCrossAttentionBlock as OurBlock
from flamingo_blocks import MediaRuns, media_ranges
from flamingo_blocks import PerceiverResampler as OurResampler
from flamingo_blocks.blocks import Attend, FeedForward
from flamingo_blocks.convert import flamingo_pytorch
from tests.strategies import randomize

DIM = 32


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dim_head", [64, 16])
@pytest.mark.parametrize("attend", ["last", "all_previous"])
def test_block(attend: Attend, dim_head: int) -> None:
    theirs = GatedCrossAttentionBlock(
        dim=DIM, dim_head=dim_head, heads=2, only_attend_immediate_media=attend == "last"
    ).double()
    randomize(theirs, 0)
    block = flamingo_pytorch.load_block(theirs.state_dict(), {"dim_head": dim_head})
    is_image = torch.tensor([[False, True, False, True, False, False], [True, False, False, False, True, False]])
    hidden, media = torch.randn(2, 6, DIM, dtype=torch.float64), torch.randn(2, 2, 5, DIM, dtype=torch.float64)
    ranges = media_ranges(is_image, attend=attend)
    found = block(hidden, media, MediaRuns.from_ranges(ranges))
    expected = theirs(hidden, media, media_locations=is_image)
    # Before the first medium, it lets tokens see all media under this rule.
    compared = ranges[..., 0] < ranges[..., 1] if attend == "all_previous" else torch.ones_like(is_image)
    torch.testing.assert_close(found[compared], expected[compared], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("media", [1, 3])
def test_resampler(media: int) -> None:
    theirs = PerceiverResampler(dim=DIM, depth=2, dim_head=16, heads=2, num_latents=3).double()
    randomize(theirs, 0)
    resampler = flamingo_pytorch.load_resampler(theirs.state_dict(), {"dim_head": 16})
    features = torch.randn(2, media, 5, DIM, dtype=torch.float64)
    torch.testing.assert_close(resampler(features[:, :, None]), theirs(features), rtol=1e-12, atol=1e-12)


def test_what_is_written_is_read_there() -> None:
    block, resampler = GatedCrossAttentionBlock(dim=DIM), PerceiverResampler(dim=DIM, depth=1)
    for theirs in (block, resampler):
        randomize(theirs, 0)
    written = flamingo_pytorch.to_flamingo_pytorch(flamingo_pytorch.load_block(block.state_dict()))
    check_equal(written, block.state_dict())
    written = flamingo_pytorch.to_flamingo_pytorch(flamingo_pytorch.load_resampler(resampler.state_dict()))
    check_equal(written, resampler.state_dict())


def test_arguments_correspond_as_the_page_on_migrating_says() -> None:
    block = GatedCrossAttentionBlock(dim=DIM, dim_head=16, heads=4, ff_mult=2)
    ours: Any = OurBlock(
        dim=DIM,
        media_dim=DIM,
        heads=4,
        head_dim=16,
        feed_forward=lambda dim: FeedForward(dim, hidden=2 * dim, activation=nn.GELU),
    )
    loaded = flamingo_pytorch.load_block(block.state_dict(), {"dim_head": 16})
    assert str(ours) == str(loaded)
    assert ours.heads == loaded.heads
    ours.load_state_dict(loaded.state_dict())
    resampler = PerceiverResampler(dim=DIM, depth=2, dim_head=16, heads=4, num_latents=3, num_media_embeds=5, ff_mult=2)
    ours = OurResampler(
        dim=DIM,
        depth=2,
        heads=4,
        head_dim=16,
        latents=3,
        max_media=5,
        max_frames=0,
        feed_forward=lambda dim: FeedForward(dim, hidden=2 * dim, activation=nn.GELU),
    )
    read: Any = flamingo_pytorch.load_resampler(resampler.state_dict(), {"dim_head": 16})
    assert str(ours) == str(read)
    assert ours.layers[0].heads == read.layers[0].heads
    ours.load_state_dict(read.state_dict())

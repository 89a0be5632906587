"""What hypothesis draws: shapes, layouts and seeds; the numbers in tensors follow from the seed."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from flamingo_blocks.blocks import Attend, MediaRuns, media_ranges

seeds = st.integers(0, 2**31 - 1)
attends: st.SearchStrategy[Attend] = st.sampled_from(("last", "all_previous", "next"))


@dataclass(frozen=True)
class Layout:
    """Where the media of a batch stand in its text, how documents are packed, and what tokens may see."""

    media_locations: Tensor
    document_ids: Tensor
    attend: Attend

    @property
    def batch(self) -> int:
        return self.media_locations.shape[0]

    @property
    def text(self) -> int:
        return self.media_locations.shape[1]

    @property
    def num_media(self) -> Tensor:
        return self.media_locations.sum(1)

    @property
    def media(self) -> int:
        """Length of the media axis: that of the fullest row, and one more, which is padding."""
        return int(self.num_media.max()) + 1

    @property
    def ranges(self) -> Tensor:
        return media_ranges(self.media_locations, document_ids=self.document_ids, attend=self.attend)

    @property
    def runs(self) -> MediaRuns:
        return MediaRuns.from_ranges(self.ranges, num_media=self.num_media)


@st.composite
def layouts(draw: st.DrawFn, *, max_batch: int = 3, max_text: int = 12, packed: bool = True) -> Layout:
    batch, text = draw(st.integers(1, max_batch)), draw(st.integers(1, max_text))
    rows = st.lists(st.lists(st.booleans(), min_size=text, max_size=text), min_size=batch, max_size=batch)
    cuts = torch.tensor(draw(rows)) if packed else torch.zeros(batch, text, dtype=torch.bool)
    return Layout(torch.tensor(draw(rows)), cuts.cumsum(1), draw(attends))


@st.composite
def long_layouts(draw: st.DrawFn) -> Layout:
    """What small layouts have not: many media, runs of one token beside very long ones, more tokens than a tile."""
    batch = draw(st.integers(1, 2))
    lengths = st.sampled_from([1, 1, 2, 31, 32, 33, 70])
    rows = [draw(st.lists(lengths, min_size=1, max_size=64)) for _ in range(batch)]
    text = max(map(sum, rows))
    media_locations = torch.zeros(batch, text, dtype=torch.bool)
    for row, run_lengths in enumerate(rows):  # the first run is text before any image
        media_locations[row, torch.tensor(run_lengths).cumsum(0)[:-1]] = True
    document_ids = torch.arange(text).expand(batch, -1) // draw(st.sampled_from([40, 10_000]))
    return Layout(media_locations, document_ids, draw(attends))


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Which media each token sees: any, all or none; some tokens see neighbouring media, others do not."""
    batch, text, media = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 5))
    tokens = st.lists(st.booleans(), min_size=media, max_size=media)
    rows = st.lists(st.lists(tokens, min_size=text, max_size=text), min_size=batch, max_size=batch)
    return torch.tensor(draw(rows))


def random_tensor(seed: int, *shape: int, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Give every parameter a random value, so that nothing is hidden behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)

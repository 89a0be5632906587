import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flamingo_blocks.residual_stream import LAYOUTS, StreamLayout, find_stream_layout, update_stream
from tests.strategies import seeds

STREAMS = [layout for layout in LAYOUTS if "streams" in layout]
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def lay_out(streams: Tensor, layout: StreamLayout) -> Tensor:
    """Lay (streams, batch, text, dim) out; of several streams, a layout that has one takes the first."""
    if "streams" in layout:
        return rearrange(streams, f"streams batch text dim -> {layout}")
    return rearrange(streams[0], f"batch text dim -> {layout}")


@every_layout
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_each_stream_gets_what_the_update_adds_to_their_mean(
    layout: StreamLayout, seed: int, batch: int, text: int, number: int
) -> None:
    streams = torch.randn(number, batch, text, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean = streams.mean(0) if "streams" in layout else streams[0]
    added = mean.cumsum(1).flip(-1)  # depends on the order of text and of channels
    result = update_stream(
        lambda x: x + x.cumsum(1).flip(-1), lay_out(streams, layout), layout, batch=batch, text=text, dim=6
    )
    torch.testing.assert_close(result, lay_out(streams + added, layout))


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_identity_changes_no_bit(layout: StreamLayout, dtype: torch.dtype) -> None:
    hidden_states = lay_out(torch.randn(4, 2, 5, 6).to(dtype), layout)
    result = update_stream(lambda x: x.clone(), hidden_states, layout, batch=2, text=5, dim=6)
    assert torch.equal(result, hidden_states)
    assert result.dtype == dtype


@every_layout
@given(st.integers(2, 8), st.sampled_from([16, 64]))
def test_a_layout_is_told_by_its_shapes(layout: StreamLayout, number: int, dim: int) -> None:
    shapes = {size: tuple(lay_out(torch.empty(number, *size, dim), layout).shape) for size in ((3, 5), (2, 7))}
    assert find_stream_layout(shapes, dim) == layout


@pytest.mark.parametrize("shape", [(3, 5, 16, 2), (5, 16), (3, 6, 16), (15, 16), (3, 5, 24)])
def test_what_is_none_of_them_is_not_guessed(shape: tuple[int, ...]) -> None:
    assert find_stream_layout({(3, 5): shape, (2, 7): shape}, 16) is None


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "batch text dim"])
def test_hidden_states_of_another_layout_are_refused(layout: StreamLayout) -> None:
    with pytest.raises(ValueError, match=r"hidden_states must be laid out as \(.*\) with batch=2, text=3, dim=4"):
        update_stream(lambda x: x, torch.zeros(2, 3, 5, 7, 11), layout, batch=2, text=3, dim=4)


def test_a_layout_that_fits_one_text_alone_is_not_guessed() -> None:
    assert find_stream_layout({(3, 5): (3, 5, 16), (2, 7): (2, 9, 16)}, 16) is None
    assert find_stream_layout({(3, 5): (3, 10, 16), (2, 7): (2, 21, 16)}, 16) is None

"""How hidden states are laid out between the decoder layers of a language model, where it is not (batch, text, dim).

Some put time before batch, or carry several streams at once. A block knows one stream: it reads the mean of them, and
what it adds is added to each.
"""

from collections.abc import Callable
from typing import Literal, get_args

from einops import rearrange
from torch import Tensor

# In einops' notation.
StreamLayout = Literal[
    "batch text dim",
    "text batch dim",
    "batch text streams dim",
    "streams batch text dim",
    "batch text (streams dim)",
    "batch (streams text) dim",
]
LAYOUTS: tuple[StreamLayout, ...] = get_args(StreamLayout)


def update_stream(
    update: Callable[[Tensor], Tensor], hidden_states: Tensor, layout: StreamLayout, *, batch: int, text: int, dim: int
) -> Tensor:
    """Apply an update of (batch, text, dim) to hidden states of any layout.

    Where the update is the identity, so is this, bit for bit.

    Args:
        update: Gives the new residual stream.
        hidden_states: What enters a decoder layer.
        layout: Their layout.
        batch: Rows of text.
        text: Tokens of a row.
        dim: Width of a stream.

    Raises:
        ValueError: If the hidden states do not have this layout.
    """
    if layout == "batch text dim":
        return update(hidden_states)
    inner = "streams batch text dim" if "streams" in layout else "batch text dim"
    try:
        streams = rearrange(hidden_states, f"{layout} -> {inner}", batch=batch, text=text, dim=dim)
    except Exception as error:
        raise ValueError(
            f"hidden_states must be laid out as ({layout}) with batch={batch}, text={text}, dim={dim}, got "
            f"{tuple(hidden_states.shape)}"
        ) from error
    if streams.ndim == 3:
        return rearrange(update(streams), f"{inner} -> {layout}")
    mean = streams.mean(0)
    return rearrange(streams + (update(mean) - mean), f"{inner} -> {layout}")


def find_stream_layout(shapes: dict[tuple[int, int], tuple[int, ...]], dim: int) -> StreamLayout | None:
    """Tell the layout from the shapes that hidden states had for texts of several sizes.

    Args:
        shapes: By (batch, text), for at least two different sizes, the shape of the hidden states.
        dim: Width of a stream.

    Returns:
        The layout; None if it is none of those known.
    """
    for layout in LAYOUTS:
        numbers = {_number_of_streams(layout, shape, *size, dim) for size, shape in shapes.items()}
        if len(numbers) == 1 and None not in numbers:
            return layout
    return None


def _number_of_streams(layout: StreamLayout, shape: tuple[int, ...], batch: int, text: int, dim: int) -> int | None:
    match layout, shape:
        case "batch text dim", (b, t, d) if (b, t, d) == (batch, text, dim):
            return 1
        case "text batch dim", (t, b, d) if (b, t, d) == (batch, text, dim):
            return 1
        case "batch text streams dim", (b, t, streams, d) if (b, t, d) == (batch, text, dim):
            return streams
        case "streams batch text dim", (streams, b, t, d) if (b, t, d) == (batch, text, dim):
            return streams
        case "batch text (streams dim)", (b, t, width) if (b, t, width % dim) == (batch, text, 0):
            return width // dim
        case "batch (streams text) dim", (b, positions, d) if (b, positions % text, d) == (batch, 0, dim):
            return positions // text
    return None

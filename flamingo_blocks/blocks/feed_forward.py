"""Feed-forward networks of the Flamingo family.

Source: Alayrac et al. 2022 (Flamingo), appendix A.1 (squared ReLU, So et al. 2021, "Primer"); Shazeer 2020, "GLU
Variants Improve Transformer" (SwiGLU).
"""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class SquaredReLU(nn.Module):
    """The square of the rectified input, the paper's activation."""

    def forward(self, x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Apply the activation elementwise."""
        return F.relu(x).square()


class FeedForward(nn.Module):
    """Two linear layers without bias around an activation.

    Args:
        dim: Width of input and output.
        hidden: Width between; the paper's choice, 4 * `dim`, by default.
        activation: Makes the activation, e.g. `nn.GELU` or `nn.ReLU`.

    Source: Alayrac et al. 2022, appendix A.1. Differs from the paper: no. It holds no norm: who calls it normalises.
    """

    def __init__(
        self, dim: int, *, hidden: int | None = None, activation: Callable[[], nn.Module] = SquaredReLU
    ) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        self.to_hidden = nn.Linear(dim, hidden, bias=False)
        self.activation = activation()
        self.to_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Apply the network to each vector of the last axis."""
        return self.to_out(self.activation(self.to_hidden(x)))


class SwiGLU(nn.Module):
    """The gated feed-forward of Llama, which IDEFICS and Llama-3.2-Vision use in their cross-attention layers.

    Args:
        dim: Width of input and output.
        hidden: Width between, 4 * `dim` by default.
    """

    def __init__(self, dim: int, *, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        self.to_gate = nn.Linear(dim, hidden, bias=False)
        self.to_hidden = nn.Linear(dim, hidden, bias=False)
        self.to_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Apply the network to each vector of the last axis."""
        return self.to_out(F.silu(self.to_gate(x)) * self.to_hidden(x))

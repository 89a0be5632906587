import torch
from torch import nn

from flamingo_blocks.blocks import FeedForward, SquaredReLU, SwiGLU


def test_squared_relu_by_hand() -> None:
    assert SquaredReLU()(torch.tensor([-2.0, 0.0, 3.0])).tolist() == [0.0, 0.0, 9.0]


def test_the_default_is_the_papers() -> None:
    network = FeedForward(6)
    x = torch.randn(2, 6)
    assert network.to_hidden.weight.shape == (24, 6)
    expected = (x @ network.to_hidden.weight.T).clamp(min=0).pow(2) @ network.to_out.weight.T
    torch.testing.assert_close(network(x), expected)


def test_the_activation_is_the_one_passed() -> None:
    network = FeedForward(6, hidden=5, activation=nn.GELU)
    x = torch.randn(2, 6)
    assert network.to_hidden.weight.shape == (5, 6)
    torch.testing.assert_close(network(x), network.to_out(nn.functional.gelu(network.to_hidden(x))))


def test_a_gated_network_is_4_times_as_wide_too_by_default() -> None:
    network = SwiGLU(6)
    assert [layer.weight.shape for layer in (network.to_gate, network.to_hidden)] == [(24, 6)] * 2
    assert not [name for name, _ in network.named_parameters() if name.endswith("bias")]


def test_swiglu_gates_the_hidden_values() -> None:
    network = SwiGLU(6, hidden=5)
    x = torch.randn(2, 6)
    assert network.to_gate.weight.shape == (5, 6)
    gate = x @ network.to_gate.weight.T
    expected = (gate * gate.sigmoid() * (x @ network.to_hidden.weight.T)) @ network.to_out.weight.T
    torch.testing.assert_close(network(x), expected)

"""NewTokens: tokens that a language model does not have, in small trained tables beside its own frozen ones.

The language model's tables are never resized: a wider head changes the old logits in their last bits for some sizes,
and a table that is frozen in part is still moved by weight decay.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flamingo_blocks.scopes import Opened, Scopes

NewTokenHead = Literal["linear", "linear_without_bias", "tied"]


class NewTokens(nn.Module):
    """Embed tokens that are new to a language model, and give their logits.

    Inside a scope, the language model's input embedding returns the new tokens' own rows where the text has them, and
    its head gives their logits: appended to the old ones, or, where an id lies within a padded vocabulary, in place of
    logits that belonged to no token. Old tokens keep the language model's embeddings and logits, bit for bit.

    Args:
        token_ids: Ids of the new tokens. Those beyond the head's vocabulary continue it without a gap.
        vocab_size: Number of logits of the language model's head.
        embedding_dim: Width of the input embedding.
        head_dim: Width of what enters the head.
        old_token_id: What a language model is given in place of an id that it does not know: a token that means nothing
            special to it, such as padding.
        head: What gives the logits: a `"linear"` layer of their own, one `"linear_without_bias"`, or the embeddings,
            `"tied"`, for language models that have one table for both.

    Attributes:
        embeddings: One row a token, as the input embedding returns it.
        head: One row a token, as the head holds it, and a bias; None if tied.

    Raises:
        ValueError: If ids are given twice, or leave a gap behind the vocabulary, or tied tables would differ in width.

    Source: Alayrac et al. 2022, appendix A.1 (`<image>` and `<EOC>` are added to the vocabulary; their embeddings are
    trained).
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        *,
        vocab_size: int,
        embedding_dim: int,
        head_dim: int,
        old_token_id: int = 0,
        head: NewTokenHead = "linear",
    ) -> None:
        super().__init__()
        token_ids = sorted(token_ids)
        beyond = [i for i in token_ids if i >= vocab_size]
        if len(set(token_ids)) != len(token_ids) or beyond != list(range(vocab_size, vocab_size + len(beyond))):
            raise ValueError(
                f"new token ids must differ and continue a vocabulary of {vocab_size} without a gap, got {token_ids}"
            )
        if head == "tied" and head_dim != embedding_dim:
            raise ValueError(f"tied tables must be of one width, got {embedding_dim} and {head_dim}")
        self.token_ids = tuple(token_ids)
        self.vocab_size = vocab_size
        self.old_token_id = old_token_id
        # Modules, not bare parameters: what trains modules by their names, as PEFT does, can have them one by one.
        self.embeddings = nn.Embedding(len(token_ids), embedding_dim)
        # Typed as those that have one need it.
        self.head: Any = None if head == "tied" else nn.Linear(head_dim, len(token_ids), bias=head == "linear")
        self.reset_parameters()
        self._scopes = Scopes()
        self._handles: list[RemovableHandle] = []

    def reset_parameters(self) -> None:
        """Draw small random rows. `start_from` gives better ones."""
        nn.init.normal_(self.embeddings.weight, std=0.02)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)
            if self.head.bias is not None:
                nn.init.zeros_(self.head.bias)

    @torch.no_grad()
    def start_from(self, lm: nn.Module) -> None:
        """Start from the mean of the language model's tokens.

        A mean row is nothing that the language model has not seen, and its logit, the mean of all logits, is never the
        largest: an untrained token is not generated greedily.

        Args:
            lm: The language model, with its own weights.
        """
        model: Any = lm
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        total = torch.zeros_like(self.embeddings.weight[0])
        for ids in torch.arange(embedding.weight.shape[0], device=embedding.weight.device).split(8192):
            total += embedding(ids).to(total).sum(0)  # through the module: some scale what they look up
        self.embeddings.weight.copy_(total / embedding.weight.shape[0])
        if self.head is None:
            return
        # torchao's quantised tensors know no mean.
        weight = head.weight if type(head.weight) is nn.Parameter else head.weight.dequantize()
        self.head.weight.copy_(weight.mean(0, dtype=torch.float32))
        if getattr(head, "bias", None) is not None and self.head.bias is not None:
            self.head.bias.fill_(head.bias.mean(dtype=torch.float32))

    def inject(self, lm: nn.Module) -> None:
        """Put the tables in place. Outside of a scope the language model stays what it was.

        Args:
            lm: A causal language model of transformers.
        """
        model: Any = lm
        self._handles = [
            model.get_input_embeddings().register_forward_hook(_EmbeddingHook(self)),
            model.get_output_embeddings().register_forward_hook(_HeadHook(self)),
        ]

    @property
    def is_injected(self) -> bool:
        """Whether the tables are in place. A copy of them without its language model is in place nowhere."""
        return any(handle.id in (handle.hooks_dict_ref() or ()) for handle in self._handles)

    def eject(self) -> None:
        """Take the tables out: the language model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def old_ids(self, input_ids: Int[Tensor, "batch text"]) -> Int[Tensor, "batch text"]:
        """Replace new tokens by an old one, for a language model that must not see an id it does not know."""
        index = self._index(input_ids)
        return input_ids.where(index < 0, self.old_token_id)

    def scope(self, input_ids: Int[Tensor, "batch text"]) -> AbstractContextManager[None]:
        """Let the language model's calls with `old_ids(input_ids)` see the new tokens, in this thread.

        Args:
            input_ids: The text, new tokens included.
        """
        return Opened(self._scopes, self._index(input_ids))

    def _index(self, input_ids: Int[Tensor, "batch text"]) -> Int[Tensor, "batch text"]:
        """Give each token its row in the tables, -1 where it is not new."""
        index = torch.full_like(input_ids, -1)
        for row, token_id in enumerate(self.token_ids):
            index = index.masked_fill(input_ids == token_id, row)
        return index

    def _embed(self, embeddings: Tensor) -> Tensor:
        index = self._scopes.current.value
        if index is None:
            return embeddings
        if embeddings.shape[:-1] != index.shape:
            raise ValueError(
                f"the input embedding must return (batch, text, dim) for ids of {tuple(index.shape)}, got "
                f"{tuple(embeddings.shape)}; new tokens cannot be added to such a language model"
            )
        rows = self.embeddings(index.clamp(min=0)).to(embeddings.dtype)
        return torch.where((index >= 0)[..., None], rows, embeddings)

    def _add_logits(self, hidden_states: Tensor, logits: Tensor) -> Tensor:
        if self._scopes.current.value is None:
            return logits
        weight = self.embeddings.weight
        if self.head is None:
            new = F.linear(hidden_states.to(weight.dtype), weight).to(logits.dtype)
        else:
            new = self.head(hidden_states.to(weight.dtype)).to(logits.dtype)
        inside = [i for i in self.token_ids if i < self.vocab_size]
        if inside:
            logits = logits.index_copy(-1, torch.tensor(inside, device=logits.device), new[..., : len(inside)])
        return torch.cat([logits, new[..., len(inside) :]], dim=-1)


class _EmbeddingHook:
    """Forward hook of the input embedding: an object, so that deepcopy and pickle can follow it."""

    def __init__(self, new_tokens: NewTokens) -> None:
        self.new_tokens = new_tokens

    def __call__(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.new_tokens._embed(output)


class _HeadHook:
    """Forward hook of the head."""

    def __init__(self, new_tokens: NewTokens) -> None:
        self.new_tokens = new_tokens

    def __call__(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.new_tokens._add_logits(args[0], output)

"""Tables in which new tokens have their rows beside a language model's own, as where it was resized for them.

Here the new tokens have tables of their own, `NewTokens`, and the language model keeps its size. Where its vocabulary
is padded, that is, larger than its tokenizer's, resizing cuts it: so it is cut here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flamingo_blocks.convert.renaming import Rename, listed, to_ours
from flamingo_blocks.new_tokens import NewTokenHead

# GPT-NeoX's head had this name when the models were released, and has another one in transformers today.
_GPT_NEOX_HEAD = "embed_out"
# Numbers that follow from a configuration. Older versions of transformers saved them.
_DERIVED = re.compile(r"\.(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias)|position_ids)$")


@dataclass
class TokenTables:
    """What a checkpoint has of a language model: its tables, new tokens' rows included, and the rest of it.

    Attributes:
        embeddings: One row a token.
        head: The same for the head; None: as the language model has it.
        bias: Of the head; None: as the language model has it.
        rest: By the language model's own names.
        ids: Tokens that are new to it.
    """

    embeddings: Tensor
    head: Tensor | None
    bias: Tensor | None
    rest: dict[str, Tensor]
    ids: list[int]

    @classmethod
    def of(cls, lm: Any, tensors: Mapping[str, Tensor], added: Sequence[int]) -> "TokenTables":
        """Take the tables out of a checkpoint, and see that all of it fits, before anything is changed.

        Args:
            lm: The language model.
            tensors: What the checkpoint has of it, by its own names.
            added: Tokens that were added to the tokenizer.

        Raises:
            ValueError: If the embeddings are missing, or a tensor does not fit.
        """
        tensors = dict(tensors)
        embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
        name, of_head, is_tied = name_of(lm, embedding), head_name(lm), head.weight is embedding.weight
        if lm.config.model_type == "gpt_neox":
            today = name_of(lm, head)
            tensors = {f"{of_head}.weight" if key == f"{today}.weight" else key: t for key, t in tensors.items()}
        if f"{name}.weight" not in tensors:
            raise ValueError(
                f"the checkpoint has no lang_encoder.{name}.weight, which holds the embeddings of the new tokens; it "
                f"has {listed(sorted(tensors)) or 'nothing'} of the language model"
            )
        table = tensors.pop(f"{name}.weight")
        rows, known = len(table), len(embedding.weight)
        whole, bias = tensors.pop(f"{of_head}.weight", None), tensors.pop(f"{of_head}.bias", None)
        if is_tied:
            if whole is not None and not torch.equal(whole, table):
                raise ValueError(
                    f"lang_encoder.{of_head}.weight must be the table of embeddings in this language model"
                )
            whole = table
        for key, found, like in (
            (f"{name}.weight", table, embedding.weight),
            (f"{of_head}.weight", whole, head.weight),
            (f"{of_head}.bias", bias, getattr(head, "bias", None)),
        ):
            expected = None if like is None else (rows, *like.shape[1:])
            if found is not None and tuple(found.shape) != expected:
                raise ValueError(
                    f"lang_encoder.{key} must have shape {expected} beside this language model, got "
                    f"{tuple(found.shape)}; give the one that the checkpoint is of"
                )
        ids = torch.arange(2, device=embedding.weight.device)
        if not embedding(ids).equal(embedding.weight[:2]):
            raise ValueError(f"{type(lm).__name__} scales its embeddings, which OpenFlamingo has no way for")
        own = lm.state_dict()
        tensors = {key: tensor for key, tensor in tensors.items() if key in own or not _DERIVED.search(key)}
        shapes = {key: own[key].shape for key in tensors if key in own}
        rest = to_ours([Rename(key, key) for key in shapes], tensors, shapes)
        new = sorted({i for i in added if i < rows} | set(range(min(rows, known), rows)))
        return cls(table, whole, bias, rest, new)

    def load(self, lm: Any) -> NewTokenHead:
        """Load the rows that a language model has, and the rest; a table that was cut there is cut here.

        Args:
            lm: The language model. It is changed.

        Returns:
            What its new tokens need for a head.
        """
        embedding = lm.get_input_embeddings()
        rows, known = len(self.embeddings), len(embedding.weight)
        is_own = (
            rows >= known
            and not self.rest
            and torch.equal(embedding.weight.to(self.embeddings), self.embeddings[:known])
        )
        if rows < known:
            lm.resize_token_embeddings(rows, mean_resizing=False)
            embedding, known = lm.get_input_embeddings(), rows
        head: Any = lm.get_output_embeddings()
        embedding.weight.copy_(self.embeddings[:known])
        if self.head is not None:
            head.weight.copy_(self.head[:known])
        if self.bias is not None:
            head.bias.copy_(self.bias[:known])
        lm.load_state_dict(self.rest, strict=False)
        if not is_own:
            lm.config.name_or_path = ""  # an adapter would not find it there
        return head_kind(lm)

    def new_rows(self, lm: Any, head: NewTokenHead) -> dict[str, Tensor]:
        """Give the new tokens' tensors by our names; rows of the head that there are none of are the mean of all.

        Args:
            lm: The language model, as `load` has left it.
            head: What `load` returned.
        """
        if not self.ids:
            return {}
        found = {"embeddings.weight": self.embeddings}
        module = lm.get_output_embeddings()
        if head != "tied":
            found["head.weight"] = _with_means(module.weight, len(self.embeddings)) if self.head is None else self.head
        if head == "linear":
            found["head.bias"] = _with_means(module.bias, len(self.embeddings)) if self.bias is None else self.bias
        return {f"new_tokens.{name}": whole[self.ids].clone() for name, whole in found.items()}


def with_rows(table: Tensor, ids: list[int], rows: Tensor | None) -> Tensor:
    """Put the new tokens' rows into a copy of a table, which grows as far as they are beyond it.

    Args:
        table: Of the language model.
        ids: The new tokens.
        rows: Theirs; None: there are none.
    """
    if rows is None:
        return table.clone()
    beyond = sum(i >= len(table) for i in ids)
    whole = torch.cat([table, table.new_zeros(beyond, *table.shape[1:])])
    whole[ids] = rows.to(whole)
    return whole


def head_kind(lm: Any) -> NewTokenHead:
    """Say what a language model has for a head, as its new tokens are to have it.

    Args:
        lm: The language model.
    """
    head = lm.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        return "linear"
    return "tied" if head.weight is lm.get_input_embeddings().weight else "linear_without_bias"


def name_of(lm: nn.Module, module: nn.Module) -> str:
    """Give the name of a module within a language model.

    Args:
        lm: The language model.
        module: The module.
    """
    return next(name for name, found in lm.named_modules() if found is module)


def head_name(lm: Any) -> str:
    """Give the name of a language model's head, as released checkpoints have it.

    Args:
        lm: The language model.
    """
    return _GPT_NEOX_HEAD if lm.config.model_type == "gpt_neox" else name_of(lm, lm.get_output_embeddings())


def _with_means(table: Tensor, rows: int) -> Tensor:
    return torch.cat([table, *[table.mean(0, keepdim=True)] * (rows - len(table))])

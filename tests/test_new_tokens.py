import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_blocks.language import ordinary_token
from flamingo_blocks.new_tokens import NewTokenHead, NewTokens
from tests.tiny_flamingo import make_flamingo
from tests.tiny_language_models import CONFIGS, VOCAB, make_lm

every_lm = pytest.mark.parametrize("name", CONFIGS)
# Two ids beyond the vocabulary, and one of a row that no token of the tokenizer uses.
IDS = (50, VOCAB, VOCAB + 1)


def inject(lm: Any, token_ids: tuple[int, ...] = IDS, *, head: NewTokenHead = "linear") -> NewTokens:
    embedding_dim = lm.get_input_embeddings().weight.shape[1]
    head_dim = lm.get_output_embeddings().weight.shape[1]
    new_tokens = NewTokens(token_ids, vocab_size=VOCAB, embedding_dim=embedding_dim, head_dim=head_dim, head=head)
    new_tokens.start_from(lm)
    new_tokens.inject(lm)
    return new_tokens


def run(lm: Any, new_tokens: NewTokens, input_ids: Tensor) -> Tensor:
    with new_tokens.scope(input_ids):
        logits: Tensor = lm(new_tokens.old_ids(input_ids), use_cache=False).logits
    return logits


@every_lm
def test_old_tokens_keep_their_logits_bit_for_bit(name: str) -> None:
    lm = make_lm(name)
    input_ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    expected = lm(input_ids, use_cache=False).logits
    new_tokens = inject(lm)
    logits = run(lm, new_tokens, input_ids)
    old = [i for i in range(VOCAB) if i not in IDS]
    assert logits.shape == (2, 4, VOCAB + 2)
    assert torch.equal(logits[..., old], expected[..., old])
    assert torch.equal(lm(input_ids, use_cache=False).logits, expected), "outside of a scope nothing changed"


@every_lm
def test_new_tokens_are_what_a_resized_language_model_would_have(name: str) -> None:
    """The same rows in one wide table give the same, up to the last bits that resizing changes."""
    lm, wide = make_lm(name), make_lm(name)
    new_tokens = inject(lm)
    wide.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    embedding, head = wide.get_input_embeddings(), wide.get_output_embeddings()
    # Gemma scales what it looks up; its head does not.
    scale = embedding(torch.tensor([3])) / embedding.weight[3]
    for parameter in new_tokens.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        new_tokens.head.bias.zero_()
        if head.weight is embedding.weight:
            new_tokens.embeddings.weight.copy_(new_tokens.head.weight * scale)
        for row, token_id in enumerate(IDS):
            embedding.weight[token_id] = new_tokens.embeddings.weight[row] / scale[0]
            head.weight[token_id] = new_tokens.head.weight[row]
    input_ids = torch.tensor([[3, VOCAB, 5, 50], [VOCAB + 1, 8, VOCAB, 10]])
    torch.testing.assert_close(
        run(lm, new_tokens, input_ids), wide(input_ids, use_cache=False).logits, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_tied_tables_are_one_as_in_a_resized_language_model(name: str) -> None:
    lm, wide = make_lm(name), make_lm(name)
    for model in (lm, wide):
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    new_tokens = inject(lm, (VOCAB, VOCAB + 1), head="tied")
    nn.init.normal_(new_tokens.embeddings.weight)
    assert list(new_tokens.state_dict()) == ["embeddings.weight"]
    wide.config.tie_word_embeddings = True
    wide.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    with torch.no_grad():
        wide.get_input_embeddings().weight[VOCAB:] = new_tokens.embeddings.weight
    input_ids = torch.tensor([[3, VOCAB, 5], [VOCAB + 1, 8, VOCAB]])
    expected = wide(input_ids, use_cache=False).logits
    torch.testing.assert_close(run(lm, new_tokens, input_ids), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="tied tables must be of one width, got 4 and 8"):
        NewTokens((VOCAB,), vocab_size=VOCAB, embedding_dim=4, head_dim=8, head="tied")


def test_a_head_may_have_no_bias() -> None:
    lm = make_lm("llama")
    new_tokens = inject(lm, head="linear_without_bias")
    assert sorted(new_tokens.state_dict()) == ["embeddings.weight", "head.weight"]
    torch.testing.assert_close(new_tokens.head.weight, lm.lm_head.weight.mean(0).expand(3, -1))
    new_tokens.reset_parameters()
    assert run(lm, new_tokens, torch.tensor([[VOCAB, 4]])).isfinite().all()


@every_lm
def test_at_the_start_a_new_token_is_never_the_most_likely(name: str) -> None:
    lm = make_lm(name)
    new_tokens = inject(lm)
    logits = run(lm, new_tokens, torch.randint(3, VOCAB + 2, (4, 8)))
    assert not torch.isin(logits.argmax(-1), torch.tensor(IDS)).any()
    mean = lm.get_input_embeddings()(torch.arange(VOCAB)).mean(0)
    torch.testing.assert_close(new_tokens.embeddings.weight, mean.expand(3, -1))


def test_gradients_reach_the_new_rows_and_leave_frozen_ones_alone() -> None:
    lm = make_lm("llama").requires_grad_(False)
    new_tokens = inject(lm)
    before = copy.deepcopy(lm.state_dict())
    input_ids = torch.tensor([[VOCAB, 5, 50, 7]])
    optimizer = torch.optim.AdamW(new_tokens.parameters(), lr=0.1, weight_decay=0.5)
    logits = run(lm, new_tokens, input_ids)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).backward()
    assert new_tokens.embeddings.weight.grad is not None
    assert new_tokens.embeddings.weight.grad.abs().sum(1).gt(0).tolist() == [True, True, False], (
        "50 and VOCAB were read"
    )
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())


def test_tables_may_be_of_another_dtype_than_the_language_model() -> None:
    lm = make_lm("llama", dtype=torch.bfloat16)
    new_tokens = inject(lm)
    assert new_tokens.embeddings.weight.dtype == torch.float32
    logits = run(lm, new_tokens, torch.tensor([[VOCAB, 4]]))
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_copies_are_separate() -> None:
    lm = make_lm("llama")
    new_tokens = inject(lm)
    input_ids = torch.tensor([[VOCAB, 4]])
    expected = run(lm, new_tokens, input_ids)
    lm_copy, copied = copy.deepcopy((lm, new_tokens))
    nn.init.zeros_(new_tokens.embeddings.weight)
    nn.init.zeros_(new_tokens.head.weight)
    assert torch.equal(run(lm_copy, copied, input_ids), expected)
    assert not torch.equal(run(lm, new_tokens, input_ids), expected)


@pytest.mark.parametrize("token_ids", [(5, 5), (VOCAB + 1,), (VOCAB, VOCAB + 2)])
def test_ids_that_repeat_or_leave_a_gap_are_refused(token_ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="new token ids must differ and continue a vocabulary of 99 without a gap"):
        NewTokens(token_ids, vocab_size=VOCAB, embedding_dim=4, head_dim=4)


def test_an_embedding_that_is_asked_for_something_else_is_an_error() -> None:
    lm = make_lm("llama")
    new_tokens = inject(lm)
    with (
        new_tokens.scope(torch.tensor([[3, 4]])),
        pytest.raises(ValueError, match="new tokens cannot be added to such a language model"),
    ):
        lm(torch.tensor([[3, 4, 5]]))


def test_a_language_model_sees_an_ordinary_token_for_a_new_one() -> None:
    lm = make_lm("llama")
    model, _ = make_flamingo("llama")
    assert model.new_tokens is not None
    text = torch.tensor([[5, VOCAB, 6, VOCAB + 1]])
    assert model.new_tokens.old_ids(text).tolist() == [[5, ordinary_token(lm), 6, ordinary_token(lm)]]
    assert ordinary_token(lm) not in (lm.config.pad_token_id, lm.config.bos_token_id, lm.config.eos_token_id)

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.spawn import spawn

from flamingo_blocks.blocks import ContrastiveLoss
from tests import reference, tiny_contrastive
from tests.strategies import random_tensor, seeds


@given(st.integers(1, 6), seeds, st.sampled_from([0.0, 0.1]), st.data())
def test_loss_equals_the_pairwise_loop_with_several_positives(
    size: int, seed: int, label_smoothing: float, data: st.DataObject
) -> None:
    labels = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    others = sorted({*labels}) + data.draw(st.lists(st.sampled_from(labels), max_size=3))
    images, texts = (random_tensor(seed + i, n, 4, requires_grad=True) for i, n in enumerate((size, len(others))))
    positives = torch.tensor(labels)[:, None] == torch.tensor(others)
    loss = ContrastiveLoss(temperature=0.2, label_smoothing=label_smoothing).double()
    result = loss(images, texts, positives)
    expected = reference.contrastive_loss(images, texts, positives, 1 / 0.2, label_smoothing)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(
        torch.autograd.grad(result, (images, texts)), torch.autograd.grad(expected, (images, texts))
    )


@given(st.integers(1, 6), seeds)
def test_without_positives_the_pairs_are_the_diagonal(size: int, seed: int) -> None:
    images, texts = (random_tensor(seed + i, size, 4) for i in (0, 1))
    loss = ContrastiveLoss().double()
    assert torch.equal(loss(images, texts), loss(images, texts, torch.eye(size, dtype=torch.bool)))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), seeds)
def test_ids_say_what_positives_say(ids: list[int], seed: int) -> None:
    image_ids = torch.tensor(ids)
    text_ids = torch.cat([image_ids[:1], image_ids.unique()])
    images, texts = random_tensor(seed, len(image_ids), 4), random_tensor(seed + 1, len(text_ids), 4)
    loss = ContrastiveLoss(gather=True).double()
    expected = loss(images, texts, image_ids[:, None] == text_ids)
    assert torch.equal(loss(images, texts, image_ids=image_ids, text_ids=text_ids), expected)


def test_the_defaults_are_clips() -> None:
    loss = ContrastiveLoss()
    assert loss.log_scale.exp().item() == pytest.approx(1 / 0.07)
    assert loss.label_smoothing == 0.0
    assert loss.gather is False


def test_temperature_is_learned_and_bounded() -> None:
    loss = ContrastiveLoss(temperature=0.5)
    images, texts = torch.randn(3, 4), torch.randn(3, 4)
    loss(images, texts).backward()
    assert loss.log_scale.grad is not None
    assert loss.log_scale.grad.abs() > 0
    torch.nn.init.constant_(loss.log_scale, 50.0)
    at_bound = ContrastiveLoss(temperature=1 / 100)
    torch.testing.assert_close(loss(images, texts), at_bound(images, texts))
    (gradient,) = torch.autograd.grad(loss(images, texts), loss.log_scale)
    assert gradient.abs() > 0, "beyond the bound the temperature could not come back"


def test_half_precision_embeddings_meet_a_full_precision_temperature() -> None:
    images, texts = torch.randn(3, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    loss = ContrastiveLoss()
    torch.testing.assert_close(loss(images, texts), loss(images.float(), texts.float()))


def test_a_half_precision_temperature_gives_a_half_precision_loss() -> None:
    embeddings = torch.randn(3, 4)
    assert ContrastiveLoss().bfloat16()(embeddings, embeddings).dtype == torch.bfloat16


def test_autocast_changes_nothing() -> None:
    images, texts = torch.randn(3, 4), torch.randn(3, 4)
    loss = ContrastiveLoss(temperature=0.01)
    expected = loss(images, texts)
    torch.testing.assert_close(expected.double(), loss.double()(images, texts), rtol=1e-5, atol=0.0)
    loss.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(images, texts), expected)


def test_uninformative_embeddings_cost_the_log_of_the_batch() -> None:
    same = torch.ones(8, 4)
    assert ContrastiveLoss()(same, same).item() == pytest.approx(math.log(8))


def test_bad_input_is_refused() -> None:
    loss, embeddings = ContrastiveLoss(), torch.randn(3, 4)
    with pytest.raises(ValueError, match="every image and every text must have a positive"):
        loss(embeddings, embeddings, torch.eye(3, dtype=torch.bool).index_fill(0, torch.tensor([1]), False))
    with pytest.raises(ValueError, match="every image and every text must have a positive"):
        loss(embeddings, embeddings, image_ids=torch.tensor([1, 2, 2]), text_ids=torch.tensor([1, 2, 3]))
    for images, texts in ((3, 2), (2, 3)):
        with pytest.raises(ValueError, match="every image and every text must have a positive"):
            loss(embeddings[:images], embeddings[:texts], torch.eye(images, texts, dtype=torch.bool))
    with pytest.raises(ValueError, match="give both image_ids and text_ids, or positives"):
        loss(embeddings, embeddings, image_ids=torch.arange(3))
    with pytest.raises(ValueError, match="give both image_ids and text_ids, or positives"):
        loss(embeddings, embeddings, torch.eye(3) > 0, image_ids=torch.arange(3), text_ids=torch.arange(3))
    for images, texts in ((0, 0), (0, 3), (3, 0)):
        with pytest.raises(ValueError, match="must not be empty"):
            loss(embeddings[:images], embeddings[:texts])
    with pytest.raises(ValueError, match=r"as many texts as images, got \[2\], \[3\]"):
        loss(embeddings, embeddings[:2])
    with pytest.raises(ValueError, match=r"temperature must be at least 1 / max_scale = 0\.01, got 0\.0"):
        ContrastiveLoss(temperature=0.0)


@pytest.mark.unchecked
def test_wrong_shapes_are_refused() -> None:
    loss, embeddings = ContrastiveLoss(), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"\(images, dim\) and \(texts, dim\), got \(3, 4\) and \(3, 5\)"):
        loss(embeddings, torch.randn(3, 5))
    for images, texts in ((embeddings, embeddings[0]), (embeddings[0], embeddings)):
        with pytest.raises(ValueError, match=r"must have shapes \(images, dim\) and \(texts, dim\)"):
            loss(images, texts)
    with pytest.raises(ValueError, match=r"positives must have shape \(images, texts\) = \(3, 3\), got \(2, 3\)"):
        loss(embeddings, embeddings, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"must be one for each of \(3, 3\), got shapes \(\(3,\), \(2,\)\)"):
        loss(embeddings, embeddings, image_ids=torch.arange(3), text_ids=torch.arange(2))


@pytest.mark.unchecked
@pytest.mark.parametrize("ids", [{}, {"image_ids": torch.tensor([1, 1, 2]), "text_ids": torch.tensor([2, 1, 2])}])
def test_the_loss_compiles_to_one_graph(ids: dict[str, torch.Tensor]) -> None:
    loss, images, texts = ContrastiveLoss(gather=True), torch.randn(3, 4), torch.randn(3, 4)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, texts, **ids), loss(images, texts, **ids))


# ---------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes finds in all cases."""
    folder = tmp_path_factory.mktemp("processes")
    spawn(tiny_contrastive.main, (str(folder),), nprocs=tiny_contrastive.PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(tiny_contrastive.PROCESSES)]


@pytest.mark.parametrize("name", tiny_contrastive.CASES)
def test_a_group_of_one_process_is_no_group(name: str) -> None:
    case = tiny_contrastive.CASES[name]
    expected = tiny_contrastive.run(case, tiny_contrastive.Towers(case), range(tiny_contrastive.PROCESSES))
    with tiny_contrastive.group_of_one():
        found = tiny_contrastive.run(case, tiny_contrastive.Towers(case), range(tiny_contrastive.PROCESSES))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


def test_a_group_of_one_process_refuses_what_no_group_refuses() -> None:
    loss, embeddings = ContrastiveLoss(gather=True), torch.randn(3, 4)
    ids = torch.tensor([1, 2, 3])
    with tiny_contrastive.group_of_one():
        with pytest.raises(ValueError, match=r"as many texts as images, got \[2\], \[3\]"):
            loss(embeddings, embeddings[:2])
        with pytest.raises(ValueError, match="positives cannot tell what matches in other processes"):
            loss(embeddings, embeddings, torch.eye(3) > 0)
        for images, texts in ((3, 2), (2, 3)):
            with pytest.raises(ValueError, match="every image and every text must have a positive"):
                loss(embeddings[:images], embeddings[:texts], image_ids=ids[:images], text_ids=ids[:texts])


def test_the_default_device_does_not_matter_to_one_or_to_a_group() -> None:
    loss, embeddings = ContrastiveLoss(gather=True), torch.randn(3, 4)
    expected = loss(embeddings, embeddings)
    with torch.device("meta"):
        assert torch.equal(loss(embeddings, embeddings), expected)
    with tiny_contrastive.group_of_one(), torch.device("meta"):
        found = loss(embeddings, embeddings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", tiny_contrastive.CASES)
def test_two_processes_are_one_with_the_whole_batch(name: str, processes: list[dict[str, Any]]) -> None:
    case = tiny_contrastive.CASES[name]
    expected = tiny_contrastive.run(case, tiny_contrastive.Towers(case), range(tiny_contrastive.PROCESSES))
    # Gradients of 16 bits are rounded before or after they are summed.
    rtol, atol = (1e-12, 1e-14) if case.dtype == torch.float64 else (1e-2, 1e-2)
    for process in processes:
        found = process[name]
        assert torch.equal(found["loss"], processes[0][name]["loss"])
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=min(rtol, 1e-6), atol=0.0)
        torch.testing.assert_close(found["gradients"], expected["gradients"], rtol=rtol, atol=atol)


def test_a_process_holds_the_logits_of_its_own_rows_alone(processes: list[dict[str, Any]]) -> None:
    case = tiny_contrastive.CASES["many pairs"]
    whole = sum(case.images) ** 2
    kept = tiny_contrastive.run(case, tiny_contrastive.Towers(case), range(tiny_contrastive.PROCESSES))["kept"]
    assert kept == whole
    assert [process["many pairs"]["kept"] for process in processes] == [whole // 2] * 2


@pytest.mark.parametrize(("name", "message"), tiny_contrastive.REFUSED.items())
def test_what_processes_cannot_compare_all_of_them_refuse(
    name: str, message: str, processes: list[dict[str, Any]]
) -> None:
    assert [process[name] for process in processes] == [message] * tiny_contrastive.PROCESSES

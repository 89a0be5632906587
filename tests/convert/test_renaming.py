"""Tables of names: both directions, and what does not fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flamingo_blocks.convert.renaming import Rename, load_module, part_of, to_ours, to_theirs, under

TABLE = [
    Rename("norm", "first.norm"),
    Rename(("k", "v"), "to_kv"),
    Rename("table", ("old", "new")),
    Rename("place", "embedding", "frames 1 dim -> frames dim"),
    Rename("gate", "alpha", " -> 1"),
]
THEIRS = {
    "norm.weight": torch.randn(3),
    "norm.bias": torch.randn(3),
    "k.weight": torch.randn(2, 3),
    "v.weight": torch.randn(2, 3),
    "table.weight": torch.randn(7, 3),
    "place": torch.randn(4, 1, 3),
    "gate": torch.randn(()),
}
SHAPES = {
    "first.norm.weight": (3,),
    "first.norm.bias": (3,),
    "to_kv.weight": (4, 3),
    "old.weight": (5, 3),
    "new.weight": (2, 3),
    "embedding": (4, 3),
    "alpha": (1,),
}


@given(st.permutations(list(THEIRS)))
def test_renaming_there_and_back_gives_the_same(order: list[str]) -> None:
    ours = to_ours(TABLE, {name: THEIRS[name] for name in order}, SHAPES)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == SHAPES
    assert torch.equal(ours["to_kv.weight"], torch.cat([THEIRS["k.weight"], THEIRS["v.weight"]]))
    assert torch.equal(ours["new.weight"], THEIRS["table.weight"][5:])
    theirs = to_theirs(TABLE, dict(sorted(ours.items())))
    assert theirs.keys() == THEIRS.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in THEIRS.items())


def test_parts_of_a_tensor_do_not_share_memory() -> None:
    ours = to_ours(TABLE, THEIRS, SHAPES)
    assert len({tensor.untyped_storage().data_ptr() for tensor in ours.values()}) == len(ours)
    theirs = to_theirs(TABLE, ours)
    assert len({tensor.untyped_storage().data_ptr() for tensor in theirs.values()}) == len(theirs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"normal.weight": torch.ones(3)}, "have no place: normal.weight"),
        ({"norm.scale": torch.ones(3)}, r"have no place: norm.scale \(which would be first.norm.scale\)"),
        ({"v.weight": None}, "are missing: to_kv.weight here, v.weight"),
        ({"k.weight": None}, "are missing: k.weight, to_kv.weight here"),
        ({"norm.bias": None}, "are missing: first.norm.bias here"),
        ({"table.weight": torch.ones(6, 3)}, "table.weight must have 7 rows, got 6"),
        ({"norm.bias": torch.ones(4)}, r"first.norm.bias: \(4,\) instead of \(3,\)"),
        ({"place": torch.ones(4, 2, 3)}, r"place must have the axes 'frames 1 dim', got \(4, 2, 3\)"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, torch.Tensor | None], message: str) -> None:
    theirs = {name: tensor for name, tensor in (THEIRS | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        to_ours(TABLE, theirs, SHAPES)


def test_what_has_no_place_there_is_named() -> None:
    ours = to_ours(TABLE, THEIRS, SHAPES)
    with pytest.raises(ValueError, match=r"have no place: other.weight"):
        to_theirs(TABLE, ours | {"other.weight": torch.ones(1)})
    del ours["old.weight"]
    with pytest.raises(ValueError, match=r"are missing: old.weight"):
        to_theirs(TABLE, ours)


def test_many_names_are_cut() -> None:
    with pytest.raises(ValueError, match=r"x00, x01, .*x19, and 5 more"):
        to_ours([], {f"x{i:02}": torch.ones(1) for i in range(25)}, {})


def test_the_longest_prefix_wins() -> None:
    table = [Rename("a", "x"), Rename("a.b", "y")]
    ours = to_ours(table, {"a.c": torch.zeros(1), "a.b.c": torch.ones(1)}, {"x.c": (1,), "y.c": (1,)})
    assert ours["y.c"] == 1
    assert ours["x.c"] == 0


def test_a_table_stands_within_larger_modules() -> None:
    (rename,) = under([Rename(("k", "v"), "kv", "1 dim -> dim")], theirs="layers.0.", ours="blocks.0.")
    assert rename == Rename(("layers.0.k", "layers.0.v"), "blocks.0.kv", "1 dim -> dim")


def test_a_loaded_module_has_copies() -> None:
    tensors = {"layer.weight": torch.randn(2, 3, dtype=torch.float64), "layer.bias": torch.randn(2).double()}
    module = load_module(
        torch.nn.Linear(3, 2), [Rename("weight", "weight"), Rename("bias", "bias")], part_of(tensors, "layer.")
    )
    assert module.weight.dtype == torch.float64
    assert not module.training
    assert torch.equal(module.weight, tensors["layer.weight"])
    tensors["layer.weight"].zero_()
    assert module.weight.any()

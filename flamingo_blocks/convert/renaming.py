"""Names of tensors in another implementation and here: one table, read in both directions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from einops import EinopsError, rearrange
from torch import Tensor, nn

Shapes = Mapping[str, Sequence[int]]
AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True)
class Rename:
    """Tensors under a prefix in another implementation, and where they are here.

    A prefix is a whole name, or a name up to a dot: `"norm"` stands for `norm.weight` and `norm.bias`. On one of the
    two sides there may be several prefixes; their tensors are then parts of the one on the other side, joined along
    the first axis.

    Attributes:
        theirs: Prefix, or prefixes, in the other implementation. Several are equal parts.
        ours: Prefix, or prefixes, here.
        axes: Where axes of size one differ: the axes there and here, as einops writes them, e.g.
            `"frames 1 dim -> frames dim"`.
    """

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    axes: str = ""

    def under(self, theirs: str, ours: str) -> "Rename":
        """The same within larger modules.

        Args:
            theirs: Prefix of the module there, with its dot.
            ours: Prefix of the module here, with its dot.
        """
        return Rename(_with_prefix(self.theirs, theirs), _with_prefix(self.ours, ours), self.axes)


def under(renames: Iterable[Rename], *, theirs: str, ours: str) -> list[Rename]:
    """Put a table within larger modules.

    Args:
        renames: A table.
        theirs: Prefix of the module there, with its dot; may be empty.
        ours: Prefix of the module here, with its dot; may be empty.
    """
    return [rename.under(theirs, ours) for rename in renames]


def under_each(renames: Sequence[Rename], indices: Iterable[int], *, theirs: str, ours: str) -> list[Rename]:
    """Put a table within each module of a list.

    Args:
        renames: A table.
        indices: Of the modules, the same there and here.
        theirs: Prefix of the list there, with its dot.
        ours: Prefix of the list here, with its dot.
    """
    return [r for i in indices for r in under(renames, theirs=f"{theirs}{i}.", ours=f"{ours}{i}.")]


def to_ours(renames: Iterable[Rename], theirs: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """Rename the tensors of another implementation.

    Args:
        renames: The table.
        theirs: Their tensors by name.
        shapes: Shapes of the tensors here by name, of which there must be each.

    Returns:
        Our tensors by name.

    Raises:
        ValueError: If a tensor of theirs has no place here, one of ours is not there, or a shape is wrong. It lists
            them.
    """
    groups, unused, missing = _sort(renames, theirs, "theirs")
    result: dict[str, Tensor] = {}
    for rename, sources, targets in groups:
        if unknown := [target for target in targets if target not in shapes]:
            unused.append(f"{sources[0]} (which would be {', '.join(unknown)})")
            continue
        whole = theirs[sources[0]] if len(sources) == 1 else torch.cat([theirs[source] for source in sources])
        whole = _rearrange(sources[0], whole, rename.axes)
        if len(targets) == 1:
            result[targets[0]] = whole
            continue
        sizes = [shapes[target][0] for target in targets]
        if sum(sizes) != len(whole):
            raise ValueError(f"{sources[0]} must have {sum(sizes)} rows, got {len(whole)}")
        # Not as views: a checkpoint of ours cannot hold tensors that share memory.
        result |= {target: part.clone() for target, part in zip(targets, whole.split(sizes), strict=True)}
    missing += [f"{name} here" for name in shapes if name not in result]
    if unused or missing:
        raise ValueError(_complaint(unused, missing))
    wrong = [
        f"{name}: {tuple(tensor.shape)} instead of {tuple(shapes[name])}"
        for name, tensor in result.items()
        if tuple(tensor.shape) != tuple(shapes[name])
    ]
    if wrong:
        raise ValueError(f"tensors have other shapes than the configuration says: {listed(wrong)}")
    return result


def to_theirs(renames: Iterable[Rename], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give our tensors the names that they have in another implementation.

    Args:
        renames: The table.
        ours: Our tensors by name.

    Returns:
        Their tensors by name. None of them shares its memory with ours in parts.

    Raises:
        ValueError: If a tensor of ours has no place there. It lists them.
    """
    groups, unused, missing = _sort(renames, ours, "ours")
    if unused or missing:
        raise ValueError(_complaint(unused, missing))
    result: dict[str, Tensor] = {}
    for rename, sources, targets in groups:
        whole = ours[sources[0]] if len(sources) == 1 else torch.cat([ours[source] for source in sources])
        parts = [part.clone() for part in whole.chunk(len(targets))] if len(targets) > 1 else [whole]
        axes = " -> ".join(reversed(rename.axes.split(" -> ")))
        result |= {t: _rearrange(sources[0], part, axes) for t, part in zip(targets, parts, strict=True)}
    return result


def load_module(module: AnyModule, renames: Iterable[Rename], state_dict: Mapping[str, Tensor]) -> AnyModule:
    """Load a part of another implementation's model.

    Args:
        module: The same part here. Its tensors are replaced by copies of those that are loaded, of their dtype.
        renames: The table.
        state_dict: Of the part there.

    Returns:
        The module, in eval mode.

    Raises:
        ValueError: As `to_ours`.
    """
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    tensors = to_ours(renames, state_dict, shapes)
    module.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return module.eval()


def shape_of(state_dict: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Give the shape of a tensor from which a size is read.

    Args:
        state_dict: Tensors by name.
        name: Name of the tensor.

    Raises:
        ValueError: If it is missing.
    """
    if name not in state_dict:
        raise ValueError(f"the checkpoint has no tensor {name}; it has {listed(list(state_dict)) or 'none'}")
    return tuple(state_dict[name].shape)


def part_of(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors of a part out of a checkpoint.

    Args:
        state_dict: Tensors by name.
        prefix: Of the part's names, with its dot. It is taken off.
    """
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def _sort(
    renames: Iterable[Rename], tensors: Mapping[str, Tensor], side: Literal["theirs", "ours"]
) -> tuple[list[tuple[Rename, list[str], list[str]]], list[str], list[str]]:
    """Sort tensors of one side into what belongs together.

    Returns:
        Each entry of the table, as often as there are tensors for it, with their names there and on the other side;
        names that stand nowhere in the table; and names of parts that are missing.
    """
    other = "ours" if side == "theirs" else "theirs"
    table = {prefix: rename for rename in renames for prefix in _as_tuple(getattr(rename, side))}
    groups, unused, missing = [], [], []
    for name in tensors:
        found = _find(table, name)
        if found is None:
            unused.append(name)
            continue
        prefix, rename = found
        rest = name.removeprefix(prefix)
        sources = [part + rest for part in _as_tuple(getattr(rename, side))]
        if absent := [source for source in sources if source not in tensors]:
            missing += absent
        elif name == sources[0]:
            groups.append((rename, sources, [part + rest for part in _as_tuple(getattr(rename, other))]))
    return groups, unused, sorted(set(missing))


def _with_prefix(names: str | tuple[str, ...], prefix: str) -> str | tuple[str, ...]:
    return prefix + names if isinstance(names, str) else tuple(prefix + name for name in names)


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _find(table: Mapping[str, Rename], name: str) -> tuple[str, Rename] | None:
    """Find the longest prefix of a name that stands in a table."""
    prefix = name
    while prefix not in table:
        prefix, dot, _ = prefix.rpartition(".")
        if not dot:
            return None
    return prefix, table[prefix]


def _rearrange(name: str, tensor: Tensor, axes: str) -> Tensor:
    if not axes:
        return tensor
    try:
        return rearrange(tensor, axes)
    except EinopsError as error:
        raise ValueError(f"{name} must have the axes {axes.split(' -> ')[0]!r}, got {tuple(tensor.shape)}") from error


def _complaint(unused: Sequence[str], missing: Sequence[str]) -> str:
    parts = []
    if unused:
        parts.append(f"these tensors have no place: {listed(unused)}")
    if missing:
        parts.append(f"these tensors are missing: {listed(missing)}")
    return "the checkpoint and the configuration do not fit together: " + "; ".join(parts)


def listed(names: Sequence[str]) -> str:
    """Name things in an error, the first twenty in alphabetical order.

    Args:
        names: What to name.
    """
    shown = ", ".join(sorted(names)[:20])
    return shown if len(names) <= 20 else f"{shown}, and {len(names) - 20} more"

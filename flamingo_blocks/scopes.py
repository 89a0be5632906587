"""Scopes: what a model's hooks read during one call, for the thread that makes the call and for nobody else.

Hooks get the arguments of their own module only. What else they need is opened as a scope around the call of the whole
model, and gone afterwards: nothing is left behind on a module, an exception ends it, and threads do not mix.
"""

import threading
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch


class Entry(NamedTuple):
    """An open scope, and whether it was opened in backward, for a recomputation."""

    value: Any
    in_backward: bool


class Scopes(threading.local):
    """The open scopes of each thread. Copies and pickles start empty: a scope belongs to the call that opened it."""

    def __init__(self) -> None:  # runs once in each thread
        self.entries: list[Entry] = []

    def __reduce__(self) -> tuple[type["Scopes"], tuple[()]]:
        return Scopes, ()

    @property
    def current(self) -> Entry:
        """The innermost open scope; one of None if there is none."""
        return self.entries[-1] if self.entries else Entry(None, False)


class Opened(AbstractContextManager[None]):
    """Open a scope for a `with` block. It can be entered again, as a second backward does, and by several threads."""

    def __init__(self, scopes: Scopes, value: Any) -> None:
        self._scopes = scopes
        self._value = value

    def __enter__(self) -> None:
        self._scopes.entries.append(Entry(self._value, is_in_backward()))

    def __exit__(self, *_: object) -> None:
        if not self._scopes.entries or self._scopes.entries.pop().value is not self._value:
            self._scopes.entries.clear()
            raise RuntimeError(
                "scopes of one thread must end in the reverse order of their begin, but another one was open; "
                "a scope must not be held over an await or a yield, where other code runs inside it"
            )


def is_in_backward() -> bool:
    """Whether autograd is running backward in this thread, as when it recomputes a checkpointed layer."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

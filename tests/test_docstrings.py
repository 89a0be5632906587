"""Examples in docstrings run. pytest-markdown-docs does not see them: they are indented, as in Google's style."""

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import flamingo_blocks

PACKAGE = Path(flamingo_blocks.__file__).parent
FENCE = re.compile(r"^( *)```python\n(.*?)^\1```$", flags=re.DOTALL | re.MULTILINE)


def objects(module: ModuleType) -> Iterator[tuple[str, Any]]:
    yield module.__name__, module
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) == module.__name__ and (inspect.isclass(value) or callable(value)):
            yield f"{module.__name__}.{name}", value
            for member, function in vars(value).items() if inspect.isclass(value) else ():
                yield f"{module.__name__}.{name}.{member}", function


def examples() -> Iterator[Any]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
        for name, value in objects(module):
            docstring = vars(value).get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None)
            for _, code in FENCE.findall(docstring if isinstance(docstring, str) else ""):
                yield pytest.param(textwrap.dedent(code), id=name)


EXAMPLES = list(examples())


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_example_runs(code: str) -> None:
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_there_are_examples() -> None:
    written = sum(path.read_text().count("```python\n") for path in PACKAGE.rglob("*.py"))
    assert len(EXAMPLES) == written

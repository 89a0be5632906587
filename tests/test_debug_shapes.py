"""The page on debugging shapes shows the errors that really come."""

import re
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import TypeCheckError

PAGE = (Path(__file__).parents[1] / "docs" / "debug_shapes.md").read_text()
SETUP = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
MISTAKES = re.findall(
    r"^```\{\.python notest\}\n([^\n]*)\n```\n\n```text\n(ValueError.*?)^```", PAGE, re.DOTALL | re.MULTILINE
)


def error_of(code: str) -> str:
    names: dict[str, Any] = {}
    exec("\n".join(SETUP), names)
    with pytest.raises((ValueError, TypeCheckError)) as caught:
        exec(code, names)
    return " ".join(f"{caught.type.__name__}: {caught.value}".split())


@pytest.mark.unchecked
@pytest.mark.parametrize(("code", "error"), MISTAKES)
def test_a_mistake_gives_the_error_on_the_page(code: str, error: str) -> None:
    assert error_of(code) == " ".join(error.split())


def test_with_checks_the_first_mistake_gives_the_longer_error() -> None:
    (error,) = re.findall(r"^```text\n(TypeCheckError.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert error_of(MISTAKES[0][0]).startswith(" ".join(error.split()))


def test_all_mistakes_on_the_page_are_tried() -> None:
    assert len(MISTAKES) == PAGE.count("\nValueError: ")

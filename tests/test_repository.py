"""What a newcomer relies on: the commands of the README, the maps in the docs."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.mutants import MUTANTS

ROOT = Path(__file__).parents[1]
CONCEPTS = ("docs/masking.md", "docs/gating.md", "docs/injection.md", "docs/caching.md")
PAGES_THAT_NAME_TESTS = ("docs/paper_map.md", "tests/README.md", *CONCEPTS)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def fake_python(folder: Path, version: str, *, pip: bool = True) -> Path:
    """Stand in for an interpreter: says its version, compares it, and writes down what it is asked to do."""
    major, minor = version.split(".")
    script = folder / f"python{version}"
    script.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {folder}/calls\n'
        'case "$*" in\n'
        f'  *"version_info < (3, 11)"*) [ {int(major) * 100 + int(minor)} -ge 311 ];;\n'
        f"  *version_info*) echo {version};;\n"
        f"  *pip*--version*) {'true' if pip else 'false'};;\n"
        f"  *venv*) mkdir -p {folder}/.venv/bin; printf '#!/bin/sh\\necho ran \"$@\"\\n' > {folder}/.venv/bin/python;"
        f" chmod +x {folder}/.venv/bin/python;;\n"
        "esac\n"
    )
    script.chmod(0o755)
    return script


def make(clone: Path, target: str, **variables: object) -> subprocess.CompletedProcess[str]:
    command = ["make", "-C", str(clone), target, *(f"{name}={value}" for name, value in variables.items())]
    # Run by make, the tests would hand its variables on.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_an_old_python_is_refused_in_a_clear_sentence(clone: Path, target: str) -> None:
    result = make(clone, target, PYTHON=fake_python(clone, "3.9"))
    assert result.returncode != 0
    assert re.search(r"flamingo-blocks needs Python 3\.11 or newer; found: .*python3\.9 \(3\.9\)\.", result.stderr)
    assert not (clone / ".venv").exists()


def test_no_python_at_all_is_said_too(clone: Path) -> None:
    assert "needs Python 3.11 or newer; found: none." in make(clone, "demo", PYTHON=clone / "absent").stderr


def test_a_python_without_pip_is_refused_in_a_clear_sentence(clone: Path) -> None:
    result = make(clone, "demo", PYTHON=fake_python(clone, "3.12", pip=False))
    assert result.returncode != 0
    assert "python3.12 has no pip: install it" in result.stderr


def test_the_first_new_enough_python_sets_up_once(clone: Path) -> None:
    old, new = fake_python(clone, "3.10"), fake_python(clone, "3.13")
    first = make(clone, "demo", PYTHON=f"{old} {new}")
    assert first.returncode == 0, first.stderr
    assert "ran examples/train_tiny.py --out runs/train_tiny" in first.stdout
    calls = (clone / "calls").read_text()
    assert "-m venv --without-pip .venv" in calls
    assert "-e .[dev]" in calls
    started = time.perf_counter()
    second = make(clone, "test", PYTHON=f"{old} {new}")
    assert "ran -m pytest" in second.stdout
    assert "Setting up" not in second.stdout
    assert (clone / "calls").read_text() == calls
    assert time.perf_counter() - started < 5


def test_help_lists_the_commands_of_the_readme(clone: Path) -> None:
    printed = make(clone, "help").stdout
    for command in re.findall(r"`?make ([a-z-]+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{command} ", printed, re.MULTILINE) or command == "help", command


@pytest.mark.parametrize("page", PAGES_THAT_NAME_TESTS)
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", (ROOT / page).read_text())
    assert len(named) > 7
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_every_link_to_a_file_leads_there(page: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), target


def test_deliberate_bugs_stand_where_the_code_is_now() -> None:
    for mutant in MUTANTS:
        assert (ROOT / mutant.path).read_text().count(mutant.old) == 1, f"{mutant.bug}: {mutant.old}"


def test_fences_of_the_docs_are_such_as_the_site_understands() -> None:
    """Words behind the language end a fence for mkdocs, unless they stand in braces with it."""
    for page in (ROOT / "docs").rglob("*.md"):
        assert not re.findall(r"^\s*```\w+ .*$", page.read_text(), flags=re.MULTILINE), page

"""What a newcomer relies on: the commands of the README, the maps in the docs, and what a release is made of."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import flamingo_blocks
from tests.mutants import MUTANTS
from tests.test_architecture import LAYERS
from tests.wheel.__main__ import EXTRAS

ROOT = Path(__file__).parents[1]
COMPARISON = runpy.run_path(str(ROOT / "docs/figures/comparison_short.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = ROOT / ".github" / "workflows"
CONCEPTS = ("docs/masking.md", "docs/gating.md", "docs/injection.md", "docs/caching.md")
OTHERS = ("docs/comparison.md", "docs/migrating.md")
PAGES_THAT_NAME_TESTS = ("docs/laws.md", "docs/paper_map.md", "tests/README.md", *CONCEPTS, *OTHERS)


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


def test_help_lists_every_command_and_those_that_pages_name(clone: Path) -> None:
    listed = set(re.findall(r"^([a-z-]+) +\S", make(clone, "help").stdout, re.MULTILINE))
    [phony] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed == set(phony.split())
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / ".ci" / "run"]:
        assert set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= listed, page


@pytest.mark.parametrize("page", PAGES_THAT_NAME_TESTS)
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", (ROOT / page).read_text())
    assert len(named) > 7
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


def test_every_row_of_the_comparison_says_where_ours_is_shown() -> None:
    compared, shown = COMPARISON["read_tables"](COMPARISON["PAGE"].read_text())
    assert len(compared) > 20
    assert list(shown) == list(compared)
    for name, evidence in shown.items():
        target = COMPARISON["target_of"](evidence).partition("#")[0]
        assert (ROOT / target).exists(), f"{name}: {target}"
        for path in re.findall(r"`((?:tests|benchmarks|examples)/[^`:]*)", evidence):
            assert (ROOT / path).exists(), f"{name}: {path}"


def test_the_short_comparison_says_what_the_page_says() -> None:
    assert COMPARISON["OUT"].read_text() == COMPARISON["table"](COMPARISON["PAGE"].read_text())


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/assets/comparison_short.md"])
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


def test_tags_in_docstrings_stand_in_code_that_one_line_holds() -> None:
    """Where code goes on in the next line, the site takes `<image>` for HTML and shows nothing."""
    for module in (ROOT / "flamingo_blocks").rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for line in (ast.get_docstring(node) or "").splitlines():
                    assert not ("<" in line and line.count("`") % 2), f"{module}: {line}"


def test_every_module_has_its_page_in_the_reference() -> None:
    pages = {page: page.read_text() for page in (ROOT / "docs" / "reference").rglob("*.md")}
    described = {name for text in pages.values() for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    modules = (path for path in (ROOT / "flamingo_blocks").rglob("*.py") if not path.name.startswith("_"))
    assert described == {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules}
    for page in pages:
        assert page.relative_to(ROOT / "docs").as_posix() in (ROOT / "mkdocs.yml").read_text(), page


def test_the_readme_has_the_short_comparison() -> None:
    assert COMPARISON["OUT"].read_text() in (ROOT / "README.md").read_text()


def test_bugs_that_the_page_of_laws_names_are_those_that_are_put_in() -> None:
    rows = re.findall(r"\| `(tests/\S+)` \| (.+) \|$", (ROOT / "docs" / "laws.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    known = {(mutant.test.partition("[")[0], mutant.bug) for mutant in MUTANTS}
    assert set(rows) <= known, set(rows) - known


def test_page_and_picture_of_the_architecture_have_every_layer() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert re.findall(r"^\| ([a-z]+) \|", page, re.MULTILINE)[1:] == list(LAYERS)
    picture = re.split(r"\W+", (ROOT / "docs" / "assets" / "import_layers.svg").read_text())
    for layer, modules in LAYERS.items():
        assert {layer, *(module.split(".")[-1] or "flamingo_blocks" for module in modules)} <= set(picture), layer


def test_the_version_stands_in_the_package_and_the_citation_agrees() -> None:
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    source = (ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]).read_text()
    assert f'__version__ = "{flamingo_blocks.__version__}"\n' in source
    assert f"\nversion: {flamingo_blocks.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_changelog_begins_with_what_is_not_released_or_with_this_version() -> None:
    titles = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if titles[0] == ("Unreleased", ""):
        titles.pop(0)
    assert all(re.fullmatch(r" - \d{4}-\d\d-\d\d", date) for _, date in titles)
    assert [version for version, _ in titles[:1]] in ([], [flamingo_blocks.__version__])


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what belongs to the project, git knows")
def test_what_is_built_holds_the_package_and_what_its_tests_need() -> None:
    targets = PYPROJECT["tool"]["hatch"]["build"]["targets"]
    assert targets["wheel"] == {"packages": ["flamingo_blocks"]}
    listed = {name.removeprefix("/") for name in targets["sdist"]["include"]}
    files = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True).stdout
    always = {".gitignore", "LICENSE", "README.md", "pyproject.toml"}
    assert {file.split("/")[0] for file in files.splitlines()} - always == listed


def test_every_extra_is_for_users_or_for_those_who_work_on_the_library() -> None:
    extras = set(PYPROJECT["project"]["optional-dependencies"])
    assert extras == {*EXTRAS, "dev", "docs", "test"}
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "flamingo_blocks").rglob("*.py")]:
        for names in re.findall(r"(?:flamingo-blocks|\"\.)\[([\w,]+)\]", page.read_text()):
            assert set(names.split(",")) <= extras, page
    assert re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "quick_start.md").read_text(), re.MULTILINE) == [*EXTRAS]


def test_a_release_is_tried_with_each_python_that_it_says() -> None:
    said = re.findall(r"Programming Language :: Python :: (3\.\d+)", "\n".join(PYPROJECT["project"]["classifiers"]))
    assert PYPROJECT["project"]["requires-python"] == f">={said[0]}"
    [tried] = re.findall(r"python: (\[.*\])", (WORKFLOWS / "release.yml").read_text())
    assert re.findall(r"3\.\d+", tried) == said


def test_the_command_of_the_bug_template_prints_the_versions() -> None:
    [code] = re.findall(r'python -c "(.+)"$', (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text(), re.MULTILINE)
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert re.search(r"^flamingo-blocks \d", printed, re.MULTILINE)

"""Try a built wheel as its users do: in an empty environment, outside of the project. Needs the standard library alone.

    python -m tests.wheel dist/flamingo_blocks-0.1.0-py3-none-any.whl

It takes some minutes and about 6 GB, most of them torch's.
"""

import argparse
import email
import email.message
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent
# What a user may ask for. The other extras are for those who work on the library.
EXTRAS = ("data", "evaluation", "examples", "training", "video")
BLOCKS_NEED = ("einops", "jaxtyping", "torch")


def main() -> None:
    """Try the wheel that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.wheel", description="Try a wheel in an empty environment.")
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel.absolute()
    metadata = read_metadata(wheel)
    check_contents(wheel)
    say("the wheel holds the package, its license and nothing else")
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(Path(folder))

        needed = [text for text in metadata.get_all("Requires-Dist", []) if re.split(r"[^\w-]", text)[0] in BLOCKS_NEED]
        environment.install(*needed)
        environment.install("--no-deps", str(wheel))
        environment.run("blocks.py")
        say("blocks and injector run beside torch, einops and jaxtyping alone")

        environment.install(str(wheel))
        environment.run("model.py", metadata["Version"])
        say("a model is built, generates, and is the same when it is loaded again; missing extras are named")

        environment.install("mypy")
        environment.check_types("downstream.py")
        say("mypy --strict knows the types of the installed package, and finds each wrong use")

        for extra in EXTRAS:
            environment.install("--dry-run", f"{wheel}[{extra}]")
        environment.install(f"{wheel}[{','.join(EXTRAS)}]")
        environment.run("extras.py")
        say(f"with the extras {', '.join(EXTRAS)} every module can be imported, and the commands start")


def say(text: str) -> None:
    """Print what was found to hold."""
    print(f"ok: {text}", flush=True)


def read_metadata(wheel: Path) -> email.message.Message:
    """Read what pip would read."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def check_contents(wheel: Path) -> None:
    """Compare the files with those of the package.

    Raises:
        SystemExit: If one is missing or does not belong there.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info = next(name.split("/")[0] for name in names if name.endswith("/METADATA"))
    package = (path for path in (ROOT / "flamingo_blocks").rglob("*") if path.is_file())
    expected = {path.relative_to(ROOT).as_posix() for path in package if "__pycache__" not in path.parts}
    expected |= {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    if names != expected:
        sys.exit(f"the wheel lacks {sorted(expected - names)}, and has besides {sorted(names - expected)}")


class Environment:
    """An environment that starts empty, in a folder outside of the project."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "environment" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        venv.create(folder / "environment", with_pip=False)

    def install(self, *arguments: str) -> None:
        """Install by the pip of the interpreter that environments are made of: they have none."""
        base = getattr(sys, "_base_executable", sys.executable)
        command = [base, "-m", "pip", "--python", str(self.python), "install", "--disable-pip-version-check", "--quiet"]
        self._run(*command, *arguments)

    def run(self, script: str, *arguments: str) -> None:
        """Run a script of this folder, with the installed packages alone in its path."""
        self._run(str(self.python), "-I", "-W", "error:::flamingo_blocks", str(SCRIPTS / script), *arguments)

    def check_types(self, script: str) -> None:
        """Check the types of a copy of a script, by the environment's own mypy."""
        shutil.copy(SCRIPTS / script, self.folder)
        self._run(str(self.python), "-I", "-m", "mypy", "--strict", script)

    def _run(self, *command: str) -> None:
        if subprocess.run(command, cwd=self.folder, check=False).returncode:
            sys.exit(f"failed: {' '.join(command)}")


if __name__ == "__main__":
    main()

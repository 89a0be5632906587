"""Run one check on many things: in parallel, with a progress bar, and going on where an earlier run was stopped."""

import hashlib
import json
import multiprocessing
import os
import platform
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "coverage"
# What came out of each thing so far, one line of JSON each.
STORE = ROOT / "runs" / "coverage"

Result = dict[str, Any]


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"Python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "timm")}}


def sweep(
    check: Callable[[str], Result], names: Sequence[str], *, store: str, sources: Iterable[Path], limit_s: int = 900
) -> dict[str, Result]:
    """Check everything that is named, and give the results by name, in that order.

    Args:
        check: A function of a module, so that other processes find it. What it raises is a result too, under `"error"`.
        names: What to check. Costly things first use the processors best.
        store: Name of the file that holds the results.
        sources: Files that the results depend on. Results from before a change to them, or with other versions of the
            libraries, are not used again.
        limit_s: Seconds after which a check counts as failed.
    """
    digest = hashlib.sha256(json.dumps(versions()).encode())
    for path in sorted(sources):
        digest.update(path.read_bytes())
    key = digest.hexdigest()[:16]
    path = STORE / f"{store}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = _read(path, key)
    missing = [name for name in names if name not in found]
    if missing:
        workers = min(os.cpu_count() or 1, len(missing))
        context = multiprocessing.get_context("spawn")
        with (
            path.open("a") as file,
            ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool,
            tqdm(total=len(names), initial=len(names) - len(missing), desc=store) as progress,
        ):
            futures = {pool.submit(_run, check, name, limit_s): name for name in missing}
            if path.stat().st_size and not path.read_text().endswith("\n"):
                file.write("\n")  # after the line that a stopped run was writing
            for future in as_completed(futures):
                name = futures[future]
                found[name] = future.result()
                file.write(json.dumps({"key": key, "name": name, "result": found[name]}) + "\n")
                file.flush()
                progress.set_postfix_str(name)
                progress.update()
    return {name: found[name] for name in names}


def write_page(path: Path, text: str) -> None:
    """Write a generated page of the documentation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"wrote {path.relative_to(ROOT)}")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _read(path: Path, key: str) -> dict[str, Result]:
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the line that a stopped run was writing
            continue
        if entry["key"] == key:
            found[entry["name"]] = entry["result"]
    return found


def _start_worker() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()  # they would write over the sweep's own
    transformers.logging.set_verbosity_error()
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # nobody waits for the result


def _run(check: Callable[[str], Result], name: str, limit_s: int) -> Result:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {limit_s} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit_s)
    try:
        return check(name)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    finally:
        signal.alarm(0)

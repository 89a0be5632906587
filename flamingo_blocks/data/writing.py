"""written_whole: files that are there as a whole, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a file its name when all of it is on the disk. A process that is killed leaves a `.part` at most.

    Args:
        path: The name.

    Yields:
        Where to write.
    """
    part = path.with_suffix(path.suffix + ".part")
    try:
        yield part
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

"""The answers of an evaluation, in files of JSON lines that outlive a run that is killed.

Each process appends to a file of its own. What stands in a folder is of one evaluation: the first line of each file
says of which, and other settings are refused.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        shots: Number of examples in the prompt.
        seed: Of their choice.
        key: The query's.
        text: The answer.
        scores: The candidates' log-likelihoods, in nats, where it was chosen among candidates.
        support: Keys of the examples in the prompt, in order.
    """

    shots: int
    seed: int
    key: str
    text: str
    scores: tuple[float, ...] | None = None
    support: tuple[str, ...] = ()


class AnswerLog:
    """The answers in a folder.

    Args:
        folder: It is made, if need be.
        settings: All that answers depend on, as JSON has it. None: only read what is there.
        process: Number of this process, which has a file of its own.

    Raises:
        ValueError: If the folder holds answers of other settings, or of several, or a file is damaged.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any] | None = None, *, process: int = 0) -> None:
        self.folder = Path(folder)
        self._settings = None if settings is None else json.loads(json.dumps(settings))
        self._path = self.folder / f"answers-{process}.jsonl"
        self._wanted = self._settings
        self._has_written = False
        self.answers: dict[tuple[int, int, str], Answer] = {}
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            for answer in self._read(path):
                self.answers[answer.shots, answer.seed, answer.key] = answer

    def append(self, answers: Sequence[Answer]) -> None:
        """Write answers down, and remember them.

        Raises:
            ValueError: If the log was opened without settings, or another run with other settings has begun to write.
        """
        if self._settings is None:
            raise ValueError("this log was opened without settings, to be read alone; pass settings to write")
        lines = [json.dumps(asdict(answer)) for answer in answers]
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._path.exists() or not self._path.stat().st_size:
            lines.insert(0, json.dumps({"settings": self._settings}))
        elif not self._has_written:
            with self._path.open("rb") as file:
                self._check_settings(self._path, json.loads(file.readline())["settings"])
        self._has_written = True
        with self._path.open("a", encoding="utf-8") as log:
            log.write("".join(f"{line}\n" for line in lines))
        for answer in answers:
            self.answers[answer.shots, answer.seed, answer.key] = answer

    def _read(self, path: Path) -> Iterator[Answer]:
        """Read whole lines. What a killed run left half written is dropped, from this process's own file for good."""
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if path == self._path and self._settings is not None and whole != content:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1]):
            try:
                fields = json.loads(line)
                if number == 0:
                    found = fields["settings"]
                else:
                    fields["support"] = tuple(fields["support"])
                    fields["scores"] = None if fields["scores"] is None else tuple(fields["scores"])
                    answer = Answer(**fields)
            except (KeyError, TypeError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"{path}, line {number + 1}: no answer ({error}); mend the file, or delete it"
                ) from error
            if number == 0:
                self._check_settings(path, found)
            else:
                yield answer

    def _check_settings(self, path: Path, found: Mapping[str, Any]) -> None:
        if self._wanted is None:
            self._wanted = found
        wanted = self._wanted
        if found == wanted:
            return
        names = [name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]
        differences = ", ".join(f"{name}={found.get(name)!r}, not {wanted.get(name)!r}" for name in sorted(names))
        raise ValueError(f"{path} holds answers with {differences}; write to another folder, or delete this one")

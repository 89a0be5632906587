import json
from pathlib import Path

import pytest

from flamingo_blocks.evaluation.answers import Answer, AnswerLog

SETTINGS = {"benchmark": "vqav2", "num_beams": 3}
FIRST = Answer(4, 0, "a", "two cats", None, ("x", "y"))
SECOND = Answer(4, 1, "b", "é\u2028\n", (-1.5, float("-inf")), ())


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    AnswerLog(tmp_path, SETTINGS).append([FIRST])
    AnswerLog(tmp_path, SETTINGS, process=1).append([SECOND])
    for log in (AnswerLog(tmp_path), AnswerLog(tmp_path, SETTINGS), AnswerLog(tmp_path, SETTINGS, process=7)):
        assert log.answers == {(4, 0, "a"): FIRST, (4, 1, "b"): SECOND}


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_line_that_was_cut_off_is_dropped_and_nothing_else(cut: int, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path, SETTINGS)
    log.append([FIRST])
    log.append([SECOND])
    path = tmp_path / "answers-0.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    other = AnswerLog(tmp_path, SETTINGS, process=1)
    assert other.answers == {(4, 0, "a"): FIRST}
    again = AnswerLog(tmp_path, SETTINGS)
    assert again.answers == {(4, 0, "a"): FIRST}
    again.append([SECOND])
    assert AnswerLog(tmp_path).answers == {(4, 0, "a"): FIRST, (4, 1, "b"): SECOND}


def test_a_file_that_was_cut_off_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "answers-0.jsonl").write_text('{"settings": {"bench')
    AnswerLog(tmp_path, SETTINGS).append([FIRST])
    assert AnswerLog(tmp_path, SETTINGS).answers == {(4, 0, "a"): FIRST}


def test_answers_of_other_settings_are_refused(tmp_path: Path) -> None:
    AnswerLog(tmp_path, SETTINGS).append([FIRST])
    with pytest.raises(ValueError, match=r"answers with num_beams=3, not 1; write to another folder"):
        AnswerLog(tmp_path, {**SETTINGS, "num_beams": 1}, process=1)


def test_answers_of_runs_that_began_at_once_are_not_mixed(tmp_path: Path) -> None:
    logs = [AnswerLog(tmp_path, {**SETTINGS, "num_beams": beams}) for beams in (3, 1)]
    logs[0].append([FIRST])
    with pytest.raises(ValueError, match=r"answers with num_beams=3, not 1"):
        logs[1].append([SECOND])
    other = AnswerLog(tmp_path / "apart", {**SETTINGS, "num_beams": 1}, process=1)
    other.append([SECOND])
    (tmp_path / "apart" / "answers-1.jsonl").rename(tmp_path / "answers-1.jsonl")
    with pytest.raises(ValueError, match=r"answers-1.jsonl holds answers with num_beams=1, not 3"):
        AnswerLog(tmp_path)


@pytest.mark.parametrize("line", ["{}", "no json", "[]", '{"shots": 1, "seed": 2}', "\u2028"])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "answers-0.jsonl"
    path.write_text(json.dumps({"settings": SETTINGS}) + f"\n{line}\n")
    with pytest.raises(ValueError, match=r"answers-0.jsonl, line 2: no answer"):
        AnswerLog(tmp_path)


def test_a_log_without_settings_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass settings to write"):
        AnswerLog(tmp_path / "new").append([FIRST])
    assert not (tmp_path / "new").exists()

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_blocks.evaluation import tokenize_caption
from tests.evaluation.ptb_cases import CASES, make_up

LIST = json.loads(CASES.read_text(encoding="utf-8"))


def test_captions_are_cut_as_the_original_cuts_them() -> None:
    wrong = [case for case in LIST if tokenize_caption(case["caption"]) != case["words"]]
    assert wrong == [case for case in LIST if "differs" in case]
    assert len(wrong) < len(LIST) / 100
    assert len(LIST) > 400


@pytest.mark.parametrize(
    "caption, words",
    [
        ("A man's dog isn't big.", ["a", "man", "'s", "dog", "is", "n't", "big"]),
        (
            "It cannot fly; it's gonna sit (down)",
            ["it", "can", "not", "fly", "it", "'s", "gon", "na", "sit", "-lrb-", "down", "-rrb-"],
        ),
        (
            "Mr. Smith of the U.S. at 5 p.m. , no. 5",
            ["mr.", "smith", "of", "the", "u.s.", "at", "5", "p.m.", "no.", "5"],
        ),
        ("A well-known T-shirt costs $5.00!", ["a", "well-known", "t-shirt", "costs", "$", "5.00"]),
        ("A\nB\tC", ["a", "b", "c"]),
        (" . ", []),
        ("", []),
    ],
)
def test_a_few_that_can_be_read(caption: str, words: list[str]) -> None:
    assert tokenize_caption(caption) == words


@given(st.text(max_size=60))
def test_any_text_is_cut_and_no_letter_is_lost(text: str) -> None:
    words = tokenize_caption(text)
    assert all(word and not any(letter.isspace() for letter in word) for word in words if "<" not in word)
    plain = Counter(letter for letter in text.lower() if "a" <= letter <= "z")
    assert plain <= Counter("".join(words))


@given(st.randoms())
def test_case_changes_no_word_but_by_what_is_an_abbreviation_in_capitals(draw: object) -> None:
    caption = make_up(draw)  # type: ignore[arg-type]
    assert [word.lower() for word in tokenize_caption(caption)] == tokenize_caption(caption)

import pytest

from flamingo_blocks.evaluation import normalize_answer, vqa_accuracy


@pytest.mark.parametrize(
    "text, normal",
    [
        ("Two", "2"),
        ("ten", "10"),
        ("none", "0"),
        ("The cat", "cat"),
        ("an apple and a pear", "apple and pear"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yes.", "yes"),
        ("2.5", "2.5"),
        (".5", ".5"),
        ("3 p.m.", "3 pm"),
        ("1,000", "1000"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("t-shirt", "t shirt"),
        ("t -shirt", "t shirt"),
        ("left/right", "left right"),
        ("what?!", "what"),
        ("mom's", "mom's"),
        ("10:30", "10:30"),
        ("$5", "$5"),
        ("  Black\tand\nWhite ", "black and white"),
        ("", ""),
    ],
)
def test_answers_are_brought_to_one_form(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize("agreeing, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_an_answer_is_right_if_three_others_gave_it(agreeing: int, accuracy: float) -> None:
    assert vqa_accuracy("A cat.", ["cat"] * agreeing + ["dog"] * (10 - agreeing)) == pytest.approx(accuracy)


def test_people_answer_in_words_and_so_may_a_model() -> None:
    assert vqa_accuracy("two", ["two"] * 10) == vqa_accuracy("2", ["two"] * 10) == 1


def test_few_answers_cannot_make_one_right() -> None:
    assert vqa_accuracy("cat", ["cat"]) == 0
    assert vqa_accuracy("cat", ["cat", "cat"]) == pytest.approx(1 / 3)


def test_no_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        vqa_accuracy("cat", [])

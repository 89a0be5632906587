"""VQA accuracy: how far an answer agrees with those of ten people, after the official normalisation.

Source: Antol et al. 2015 (VQA), section 3, and the evaluation code that goes with its data. OK-VQA, TextVQA and VizWiz
are scored in the same way. MSVD-QA has one answer for each question, for which there is `top_1`.
"""

import re
from collections.abc import Sequence

_WORDS = "one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS.split(), start=1)} | {"none": "0", "zero": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The official expression means to spare a period behind a digit, too, but does not.
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # and it takes a flag for a count

# A word of these that lacks one of its apostrophes gets it back.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_APOSTROPHES = {
    word[: place.start()] + word[place.end() :]: word
    for word in _CONTRACTIONS.split()
    for place in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # as the official list has it


def normalize_answer(text: str) -> str:
    """Bring an answer to the form in which answers are compared.

    Punctuation goes or becomes a space, numbers up to ten become digits, articles go, contractions get their
    apostrophes, and everything is in lower case.

    Args:
        text: The answer.

    Source: The official evaluation of VQA (visualqa.org), its quirks included: if one sign stands beside a space, or a
    comma between digits, signs are taken out, else they become spaces; no more than 32 periods are taken out.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for sign in _PUNCTUATION:
        is_beside_space = f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if is_beside_space or has_comma_in_number else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", cleaned, count=_PERIODS).lower().split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Score an answer by how many people gave it.

    It is right if three others did: each person is left out in turn, and min(1, agreeing others / 3) averaged. With ten
    answers, three that agree give 0.9.

    Args:
        prediction: The model's answer.
        answers: Those of people; ten, in the standard data sets. With fewer the formula is the same: no prediction gets
            more than 1/3 for two answers, or anything for one.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: If there are no answers.

    Source: Antol et al. 2015, section 3; visualqa.org. Differs from the code there: versions of it normalise people's
    answers only where they are not all the same, or their punctuation alone. Here they are always normalised as the
    prediction is, as in OpenFlamingo, since else "two" would not agree with ten people who wrote "two".
    """
    if not answers:
        raise ValueError("answers must be at least one, got none")
    normalized = normalize_answer(prediction)
    agrees = [normalize_answer(answer) == normalized for answer in answers]
    return sum(min(1.0, (sum(agrees) - own) / 3) for own in agrees) / len(answers)

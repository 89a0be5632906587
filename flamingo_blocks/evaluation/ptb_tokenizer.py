"""Words of a caption, as the evaluation of COCO's captions has them: those of the Stanford PTBTokenizer, in lower case.

The original is Java (CoreNLP 3.4.1, called with `-preserveLines -lowerCase`), a lexer of the conventions of the Penn
Treebank. This is a port of what captions need. `tests/evaluation/ptb_cases.py` compares the two: of 3,000 made-up
captions of difficult parts, one differs. Known to differ are words stuck together by other signs than a hyphen, slash
or period ("a,two-year-old", "stop!The", "won't_"), "US$5", and telephone numbers in brackets; and the original looks at
how the next caption begins where one ends with "A." or the like.
"""

import re
from html import unescape
from unicodedata import normalize

# What the evaluation of captions drops. Brackets it means to drop, too, but looks for them in capitals.
_DROPPED = frozenset([*"'`.?!,:-;\"\u2018", "''", "``", "--", "..."])
# How signs are written, by the kind of token, or by the sign.
_KINDS = {"ellipsis": "...", "dash": "--"}
_SIGNS = dict(zip("()[]{}", ["-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-"], strict=True))
_SIGNS |= {"\u00a3": "#", "\u20ac": "$", "\u00a2": "cents"}
_BEFOREHAND = str.maketrans(
    {"\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2026": "...", "\u00ad": None}
    | {"\u2013": "--", "\u2014": "--", "\u2015": "--", "\u00bd": " 1/2 ", "\u00bc": " 1/4 ", "\u00be": " 3/4 "}
)

# These keep their period: always, if capitalised, or in front of a number.
_ABBREVIATIONS = """
    adm al ala alex apr ariz assn assoc asst atty attys aug ave bldg blvd bros calif capt cf cmdr co col colo comdr conn
    corp cos cpl ct dak dec dept dr drs esq est etc ext feb fla fri ft ga gen gov govs hon inc ind insp intl jan jos jr
    jul jun kan kans ky lt ltd maj mar md messrs mfg mich minn mo mon mont mr mrs ms mt natl neb nev nov oct okla penn
    ph ph.d pres prof profs pvt rd rep reps rev sen sens sep sept seq sgt sq sr st ste supt sys tel tenn thu thurs tue
    tues univ va vs vt wed wis wisc wm wyo
"""
_CAPITALISED_ABBREVIATIONS = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
_ABBREVIATIONS_OF_NUMBERS = "art ca fig figs no nos op pp"

_LETTER = r"[^\W\d_]"
_WORD = rf"(?:{_LETTER}|\d)+"
_NO_PART = r"(?!\w|[-./]\w)"  # of a longer word


def _any_of(words: str) -> str:
    return "|".join(re.escape(word) for word in sorted(words.split(), key=len, reverse=True))


# Tried in this order: what the original finds as the longest match stands before what is shorter.
_TOKEN = re.compile(
    rf"""
    (?P<space>[\s\u00a0\u200b\ufeff\U00010000-\U0010ffff]+)  # emojis are space
    # addresses of pages and mail, tags, smileys, #these and @those
    | https?://[^\s"<>|()]+[^\s"<>|.!?(){{}},-]
    | (?:www\.)?(?:[\w-]+\.)+(?:com|net|org|edu)(?![\w-])(?:/[^\s"<>|()]*[^\s"<>|.!?(){{}},-])?
    | [\w.-]+@(?:[\w-]+\.)+[a-z]+
    | </?[a-z][^<>\n]*>
    | (?P<smiley>[:;=]-?[()\[\]](?!\w))
    | [@\#][a-z][a-z\d_]*
    # the first of two words that are written as one
    | can(?=not{_NO_PART}) | (?:gon|wan)(?=na{_NO_PART}) | got(?=ta{_NO_PART}) | (?:gim|lem)(?=me{_NO_PART})
    | more(?='n\b) | 't(?=(?:is|was)\b) | y'(?=all\b)
    # contractions; '90s, 'em
    | {_LETTER}+(?=n't\b) | n't\b | '(?:s|m|d|ll|re|ve)\b
    | '(?:\d\d(?=s\b|\s)s?|em|til|cause)(?!\w) | 'n'(?!\w) | (?<=\w)'n'(?=\w)
    # abbreviations and acronyms
    | (?:(?:{_any_of(_ABBREVIATIONS)})\. | (?-i:{_any_of(_CAPITALISED_ABBREVIATIONS)})\.)(?!\w)
    | (?:{_any_of(_ABBREVIATIONS_OF_NUMBERS)})\.(?=\s?\d)(?!\w)
    | (?:{_LETTER}\.)+(?!\w) | (?:{_LETTER}\.)+{_LETTER}(?!\w)
    | (?-i:[A-Z]+(?:&[A-Z]+)+)(?!\w)
    # numbers
    | [-+]?(?:\d+|(?=\.))(?:[.,:/]\d+)+(?:-{_WORD})* | [-+]?\d+(?!\w|[-_&/]\w|\.[a-z])
    # words, and several words joined
    | {_WORD}(?:[-_/.]{_WORD} | '(?!(?:s|m|d|ll|re|ve|t)\b|n'){_LETTER}+)*
    | (?P<ellipsis>\.\.\.+) | (?P<dash>--+) | [!?]+ | '' | `` | .
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokenize_caption(text: str) -> list[str]:
    """Cut a caption into words, in lower case and without most punctuation.

    Args:
        text: The caption. A line break is a space.
    """
    found = _TOKEN.finditer(normalize("NFC", unescape(text)).translate(_BEFOREHAND))
    tokens = (_write(match.lastgroup or "", match[0].lower()) for match in found if match.lastgroup != "space")
    return [token for token in tokens if token not in _DROPPED]


def _write(kind: str, token: str) -> str:
    if kind == "smiley":
        return token[:-1] + _SIGNS[token[-1]]
    return _KINDS.get(kind) or _SIGNS.get(token, token)

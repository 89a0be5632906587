# ruff: noqa: RUF001 # captions have all kinds of dashes and quotes
"""Compare `tokenize_caption` with the tokenizer that it is a port of, and write ptb_cases.json, which the tests read.

    python -m tests.evaluation.ptb_cases stanford-corenlp-3.4.1.jar

The jar is in the package pycocoevalcap; Java runs it. Captions are written ones, and made-up ones of difficult parts.
Those that differ are marked, and counted.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from flamingo_blocks.evaluation.ptb_tokenizer import tokenize_caption

CASES = Path(__file__).with_suffix(".json")
# What the evaluation of COCO's captions drops.
DROPPED = {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}

WRITTEN = r"""
A man riding a wave on top of a surfboard.
Two dogs are playing with a frisbee in the grass .
A man's dog isn't big; it's "small" (very).
A black-and-white photo of well-dressed men in t-shirts
Mr. Smith and Dr. Jones vs. the U.S. Army at 5 p.m. on Jan. 5th
A sign on St. Louis Ave. says "No Parking" from 8:00 a.m. to 5:30 p.m.
A clock that reads 10:30 on a building in Washington D.C.
The corner of 5th Ave. and 42nd St. in N.Y.
a $5.00 bill and 1,000 people, 3.5 miles, 50% off, #1 fan
1/2 of a pizza and 2 1/2 cups, 3/4 full
The dogs' bones lie near the children's toys and James' bike.
A '90s car, a 1950s diner, and a 1990's phone from the '70s
rock'n'roll and rock 'n' roll at 12 o'clock
They can't, won't, don't, isn't, aren't, couldn't, shouldn't've
I'm sure you're right, we've seen he'd say she'll go
A cat that cannot move is gonna fall; I wanna see, gotta go, gimme, lemme
'Tis the season, and 'twas the night
A man... wait, what -- yes - no
A man… wait – yes — no
it’s a “smart” café, naïve and jalapeño, don’t you think?
A teddy bear wearing a shirt that says “I ‘love’ you”
A cat/dog and/or his/her toy, w/ a hat, b/w photo, w/o shoes
[brackets] {braces} (parens) <tag> & AT&T R&B Q&A B&W M&M's
½ cup of sugar costs £5, €7 or 5¢ at 100°F
wow!! what?! no way!!! huh??
See http://www.example.com/a?b=c or www.foo.org, mail me@example.com
A 12-year-old boy in a half-eaten semi-truck of the 1800s on a two-way street
A Boeing 747-400 next to a 7-eleven and a 7-up can with an x-ray
ice-cream ice - cream well- known -known
A man sits.The dog runs.A cat sleeps.
A man sits,the dog runs , a cat sleeps ;the end
Woman_with_hat ^ caret ~ tilde *star* a+b=c |pipe| 'single' `tick`
Smile :) and wink ;) or frown :( at the end :-)
A man #dogs @home @ the park # 5
a. b. c. J. Smith and J.P. Morgan, e.g. bankers, i.e. rich men, etc.
McDonald's, Wendy's, O'Brien and D'Angelo of Coca-Cola Co. and Apple Inc.
A 2.5-story house, a 3.5-inch step, a 1/2-eaten pizza, 24/7-open
Fish &amp; chips and fish'n'chips for Dr. Lee, Ph.D.
A vitamin c.
a 6' 2" man, 5'10 woman, 12" pizza
3D 4x4 2x4 10mph 5ft 7pm 12oz 30s 1st 2nd 3rd
y'all come to the o'clock s'mores at ma'am's
A train with the no. 5 on fig. 3 is No. 1, no.
Prof. Lee Jr. and Sgt. Lt. Col. Gen. Brown of Mt. Hood, Ft. Worth, Calif.
A man with a mustache ( ? ) and a hat ( red )

.
"A" 'B' ``C''
""".strip("\n").split("\n")

PARTS = r"""
man woman dog cat frisbee skateboard t-shirt x-ray ice-cream people's dogs' man's bus stop sign Mr. Mrs. Dr. St. Mt.
U.S. N.Y. D.C. a.m. p.m. e.g. etc. vs. No. Jan. Ave. Co. Inc. Jr. I'm it's don't can't won't cannot gonna wanna
gotta gimme lemme o'clock 'tis 'twas they'd you're we've he'll isn't aren't doesn't didn't ain't y'all rock'n'roll
'n' n' 90's '90s 1990s 1990's 5th 1st 2nd 3rd 10:30 5:00 1,000 3.5 .5 1/2 3/4 2-3 747-400 #1 #5 #dog @home @ & AT&T
R&B and/or his/her black/white 50% 100% $5 $5.00 $1,000 £5 €7 3D 4x4 2x4 B&W A's M&M's coca-cola 7-up 7-eleven wi-fi
TV's DVDs i-pod half-eaten two-year-old 12-year-old well- -known semi- old-fashioned mother-in-law café naïve
jalapeño O'Brien D'Angelo McDonald's Wendy's kids' children's boys' James' 6' 12" 5ft 10mph 30s 40's 7pm 7:30pm 12oz
w/ w/o b/w c/o
"""
WORDS = "a the on in with and of is red large small young white black two three riding standing next to near water"
BETWEEN = [", ", ". ", "; ", ": ", "... ", "! ", "? ", " - ", " -- ", " & ", " / ", " . ", " , ", "  ", " … ", " – "]
ENDS = [".", ".", ".", " .", "", "", "!", "?", "...", '."', ".)"]
AROUND = [('"', '"'), ("(", ")"), ("'", "'"), ("“", "”"), ("[", "]")]


def make_up(draw: random.Random) -> str:
    """Make a caption of words and difficult parts."""
    text = ""
    for _ in range(draw.randint(2, 12)):
        word = draw.choice((PARTS if draw.random() < 0.35 else WORDS).split())
        word = draw.choice([word] * 20 + [word.capitalize(), word.upper()])
        if draw.random() < 0.05:
            word = word.join(draw.choice(AROUND))
        text += word + (draw.choice(BETWEEN) if draw.random() < 0.15 else " ")
    return text.rstrip() + draw.choice(ENDS)


def original(captions: list[str], jar: str) -> list[list[str]]:
    """Tokenize as the evaluation of COCO's captions does."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(captions))
        file.flush()
        command = ["java", "-Dfile.encoding=UTF-8", "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer"]
        done = subprocess.run([*command, "-preserveLines", "-lowerCase", file.name], capture_output=True, check=True)
    lines = done.stdout.decode().split("\n")[: len(captions)]
    # Its scorers split what is left at any space, such as the one in a fraction.
    return [" ".join(word for word in line.rstrip().split(" ") if word not in DROPPED).split() for line in lines]


def main() -> None:
    """Compare, count and write."""
    draw = random.Random(0)
    made_up = [make_up(draw) for _ in range(3000)]
    captions = WRITTEN + made_up
    differs = [
        tokenize_caption(text) != words for text, words in zip(captions, original(captions, sys.argv[1]), strict=True)
    ]
    written, rest = differs[: len(WRITTEN)], differs[len(WRITTEN) :]
    print(f"{sum(written)} of {len(written)} written captions differ, {sum(rest)} of {len(rest)} made-up ones")
    kept = WRITTEN + made_up[:400]
    cases = [
        {"caption": text, "words": words} | ({"differs": True} if tokenize_caption(text) != words else {})
        for text, words in zip(kept, original(kept, sys.argv[1]), strict=True)
    ]
    CASES.write_text(
        "[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "\n]\n", encoding="utf-8"
    )
    for case in cases:
        if "differs" in case:
            print(case, tokenize_caption(str(case["caption"])))


if __name__ == "__main__":
    main()

"""A prompt is its support with answers, one after the other, and the query without."""

import re
from typing import Any

import pytest

from flamingo_blocks.evaluation import (
    CAPTIONING,
    CLASSIFICATION,
    HATEFUL_MEMES,
    VQA,
    Example,
    Template,
    write_prompt,
)

CAT = Example("cat", ("cat.png",), ("a cat", "cat"), {"question": "What is this?"})
DOGS = Example("dogs", ("dog.png", "two dogs.mp4"), ("dogs",), {"question": "And these?"})
TEXT = Example("text", (), ("nothing",), {"question": "And here?"})
TEMPLATES = {
    "the paper's": VQA,
    "without a space before the answer": Template("{media}Question: {question}\nAnswer:{answer}{end}"),
    "with several spaces and a new line behind": Template("{media}Q: {question} A:  {answer}{end}\n"),
    "with a field twice": Template("{media}{question} Again: {question} {answer}{end}"),
    "with text before the media": Template("Look: {media} {question} {answer}{end} "),
}
every_template = pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)


def test_the_templates_write_what_the_paper_shows() -> None:
    """Figure 8 and appendix A.2."""
    assert write_prompt(CAPTIONING, [CAT], DOGS).text == "<image>Output: a cat<EOC><image><image>Output:"
    assert CLASSIFICATION == CAPTIONING
    assert (
        write_prompt(VQA, [CAT], CAT).text
        == "<image>Question: What is this? Answer: a cat<EOC><image>Question: What is this? Answer:"
    )
    meme = Example("meme", ("meme.png",), ("yes",), {"text": 'so "funny"'})
    written = '<image>is an image with: "so "funny"" written on it. Is it hateful? Answer:'
    assert write_prompt(HATEFUL_MEMES, [meme], meme).text == f"{written} yes<EOC>{written}"


@every_template
@pytest.mark.parametrize("show", [True, False], ids=["with the support's media", "without them"])
@pytest.mark.parametrize("tokens", [("<image>", "<EOC>"), ("[IMG]", "</s>")], ids=["own tokens", "other tokens"])
def test_a_prompt_and_a_right_answer_are_the_examples_written_out(
    template: Template, show: bool, tokens: tuple[str, str]
) -> None:
    """So that a model sees the query just as it saw each example before."""
    image, end = tokens
    options = {"image_token": image, "end_of_chunk_token": end}
    support = [DOGS, TEXT, CAT]

    def written(example: Example, with_media: bool) -> str:
        text = template.text.replace("{media}", image * len(example.media) if with_media else "")
        text = text.replace("{question}", example.fields["question"])
        return text.replace("{answer}", example.shown_answer).replace("{end}", end)

    for query in (CAT, DOGS, TEXT):
        prompt = write_prompt(template, support, query, show_support_media=show, **options)
        before = "".join(written(example, show) for example in support)
        whole = prompt.text + prompt.space + query.shown_answer + prompt.end
        assert (before + written(query, True)).startswith(whole)
        assert prompt.end == end
        assert prompt.text == prompt.text.rstrip()
        assert prompt.media == ("dog.png", "two dogs.mp4", "cat.png") * show + query.media
        assert prompt.text.count(image) == len(prompt.media)


def test_the_order_of_support_is_that_of_the_prompt() -> None:
    there, back = (write_prompt(VQA, support, TEXT) for support in ([CAT, DOGS], [DOGS, CAT]))
    assert there.media == ("cat.png", "dog.png", "two dogs.mp4")
    assert back.media == ("dog.png", "two dogs.mp4", "cat.png")
    assert there.text.index("a cat") < there.text.index("dogs<EOC>")
    assert back.text.index("dogs<EOC>") < back.text.index("a cat")


def test_without_support_a_prompt_is_the_query_alone() -> None:
    prompt = write_prompt(VQA, [], DOGS)
    assert prompt.text == "<image><image>Question: And these? Answer:"
    assert prompt.media == DOGS.media


def test_the_answer_to_the_query_is_not_told() -> None:
    prompts = {
        write_prompt(VQA, [CAT], Example("query", ("x.png",), answers, DOGS.fields, label)).text
        for answers, label in ((("yes",), None), (("no", "yes"), "no"), (("<EOC>",), None))
    }
    assert len(prompts) == 1


def test_an_example_shows_its_label_or_else_its_first_answer() -> None:
    labelled = Example("cat", ("cat.png",), ("a cat", "cat"), label="it is a cat")
    assert write_prompt(CAPTIONING, [labelled], DOGS).text.startswith("<image>Output: it is a cat<EOC>")
    assert write_prompt(CAPTIONING, [CAT], DOGS).text.startswith("<image>Output: a cat<EOC>")
    assert Example("cat", (), ("a cat",), label="").shown_answer == ""


def test_braces_in_what_is_filled_in_are_text() -> None:
    example = Example("set", ("set.png",), ("{end}",), {"question": r"What is {answer} \1?"})
    written = r"<image>Question: What is {answer} \1? Answer:"
    assert write_prompt(VQA, [example], example).text == f"{written} {{end}}<EOC>{written}"


@pytest.mark.parametrize(
    "text",
    [
        "{media}Answer: {answer}",
        "Answer: {answer}{end}",
        "{media}{end}",
        "{answer}{media}{end}",
        "{media}{end}{answer}",
        "{media}{media}{answer}{end}",
        "{media}{answer}{answer}{end}",
        "{media}{answer}{question}{end}",
        "{media}{answer}{end}{question}",
        "{media}{answer}{end}{end}",
    ],
)
def test_a_template_without_its_three_places_in_order_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"a template must have {media}, fields, {answer} and {end}.*got " + repr(text)
    ):
        Template(text)


def test_an_example_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="example 'cat' must have at least one answer, got none"):
        Example("cat", ("cat.png",), ())


@pytest.mark.parametrize("support", [[], [CAT]], ids=["query", "support"])
def test_a_missing_field_is_named_with_those_that_are_there(support: list[Example]) -> None:
    template = Template("{media}{ocr}{question} {hint} {answer}{end}")
    message = "example 'cat' has no 'hint' and no 'ocr', which the template asks for; it has the fields ['question']"
    with pytest.raises(ValueError, match=re.escape(message)):
        write_prompt(template, support, CAT)


@pytest.mark.parametrize("token", ["<image>", "<EOC>"])
@pytest.mark.parametrize("place", ["question", "query's question", "answer", "label"])
def test_text_that_would_be_read_as_a_token_is_refused(token: str, place: str) -> None:
    bad: dict[str, Any] = {"key": "bad", "media": (), "answers": ("yes",), "fields": {"question": "?"}}
    if "question" in place:
        bad["fields"] = {"question": f"What{token}?"}
    elif place == "answer":
        bad["answers"] = (f"yes{token}",)
    else:
        bad["label"] = f"yes{token}"
    support, query = ([CAT], Example(**bad)) if place.startswith("query") else ([CAT, Example(**bad)], CAT)
    with pytest.raises(ValueError, match="the text of example 'bad' holds <image> or <EOC>, which would be read as"):
        write_prompt(VQA, support, query)
    write_prompt(VQA, support, query, image_token="[IMG]", end_of_chunk_token="[END]")

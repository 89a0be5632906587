"""Few-shot prompts: annotated examples, the templates that write them as text, and prompts made of several.

Source: Alayrac et al. 2022 (Flamingo), section 2.5 and appendix A.2.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PLACE = re.compile(r"\{(\w*)\}")


@dataclass(frozen=True)
class Example:
    """Media, a question about them, and what is right to answer.

    Args:
        key: Names the example; no other one of its data set has the same.
        media: Images and videos, each as `FlamingoProcessor` takes it; most often paths.
        fields: What its template asks for besides, such as `{"question": "What is this?"}`.
        answers: All that count as right, or the reference captions; at least one.
        label: The answer that a prompt shows where the example is support. None: the first of `answers`.

    Raises:
        ValueError: If there is no answer.
    """

    key: str
    media: tuple[Any, ...]
    answers: tuple[str, ...]
    fields: Mapping[str, str] = field(default_factory=dict)
    label: str | None = None

    def __post_init__(self) -> None:
        if not self.answers:
            raise ValueError(f"example {self.key!r} must have at least one answer, got none")

    @property
    def shown_answer(self) -> str:
        """The answer that a prompt shows where the example is support."""
        return self.answers[0] if self.label is None else self.label


@dataclass(frozen=True)
class Template:
    """How an example is written.

    Args:
        text: `{media}` stands for an `<image>` token a medium, `{answer}` for the answer, `{end}` for the `<EOC>`
            token; any other name in braces for one of the example's `fields`.

    Raises:
        ValueError: If there is not one `{media}`, one `{answer}` and one `{end}`, in this order, or a field stands
            behind the answer.

    Example:
        ```python
        from flamingo_blocks.evaluation import Example, Template, write_prompt

        template = Template("{media}Question: {question} Answer: {answer}{end}")
        cat = Example("1", ("cat.png",), ("a cat",), {"question": "What is this?"})
        dog = Example("2", ("dog.png",), ("a dog",), {"question": "And this?"})
        prompt = write_prompt(template, support=[cat], query=dog)
        assert prompt.text == "<image>Question: What is this? Answer: a cat<EOC><image>Question: And this? Answer:"
        assert prompt.media == ("cat.png", "dog.png")
        ```
    """

    text: str

    def __post_init__(self) -> None:
        names = _PLACE.findall(self.text)
        marks = [name for name in names if name in ("media", "answer", "end")]
        if marks != ["media", "answer", "end"] or names[-2:] != ["answer", "end"]:
            raise ValueError(
                "a template must have {media}, fields, {answer} and {end}, in this order and each of the three once, "
                f"got {self.text!r}"
            )

    @property
    def space(self) -> str:
        """What stands between a prompt and an answer: it belongs to the answer's first word, as tokenizers see it."""
        before = self.text.partition("{answer}")[0]
        return before[len(before.rstrip()) :]

    def write(self, example: Example, *, media: str, answer: str, end: str) -> str:
        """Write an example with an answer.

        Args:
            example: The example.
            media: Stands for its media.
            answer: The answer.
            end: Stands for the end of a chunk.

        Raises:
            ValueError: If a field is missing.
        """
        values = {**example.fields, "media": media, "answer": answer, "end": end}
        missing = sorted(set(_PLACE.findall(self.text)) - set(values))
        if missing:
            raise ValueError(
                f"example {example.key!r} has no {' and no '.join(map(repr, missing))}, which the template asks for; "
                f"it has the fields {sorted(example.fields)}"
            )
        return _PLACE.sub(lambda place: values[place[1]], self.text)

    def write_query(self, example: Example, *, media: str) -> str:
        """Write what stands before the answer, without spaces at the end."""
        text = self.text.partition("{answer}")[0]
        return Template(text + "{answer}{end}").write(example, media=media, answer="", end="").rstrip()


CAPTIONING = Template("{media}Output: {answer}{end}")
CLASSIFICATION = CAPTIONING
VQA = Template("{media}Question: {question} Answer: {answer}{end}")
HATEFUL_MEMES = Template('{media}is an image with: "{text}" written on it. Is it hateful? Answer: {answer}{end}')


@dataclass(frozen=True)
class Prompt:
    """A text, ready for the processor, after which an answer is to come.

    Attributes:
        text: The text. It ends without a space.
        media: Those of its `<image>` tokens, in order.
        space: What an answer begins with before its first word, as the examples do; most often one space.
        end: Ends an answer.
    """

    text: str
    media: tuple[Any, ...]
    space: str
    end: str

    @property
    def images(self) -> list[Any]:
        """The media as processors take them: those of transformers know names of files as text alone."""
        return [str(medium) if isinstance(medium, Path) else medium for medium in self.media]


def write_prompt(
    template: Template,
    support: Sequence[Example],
    query: Example,
    *,
    show_support_media: bool = True,
    image_token: str = "<image>",
    end_of_chunk_token: str = "<EOC>",
) -> Prompt:
    """Write examples with their answers, then the query without.

    Args:
        template: How each is written.
        support: Examples, in order: the last one stands next to the query.
        query: What is asked.
        show_support_media: False: leave out the media of the support, and their tokens. The paper's "zero shots" are
            two such examples, which show what an answer looks like.
        image_token: Stands for a medium, as the model's processor has it.
        end_of_chunk_token: Ends an answer, as the model's processor has it.

    Raises:
        ValueError: If an example lacks a field of the template, or its text holds one of the two tokens.

    Source: Alayrac et al. 2022, section 2.5, appendix A.2 and figure 8.
    """
    for example in (*support, query):
        texts = [*example.fields.values(), *([] if example is query else [example.shown_answer])]
        if any(token in text for token in (image_token, end_of_chunk_token) for text in texts):
            raise ValueError(
                f"the text of example {example.key!r} holds {image_token} or {end_of_chunk_token}, which would be read "
                "as a token; leave the example out, or write it otherwise"
            )
    shown = [(example, image_token * len(example.media) if show_support_media else "") for example in support]
    written = [
        template.write(example, media=media, answer=example.shown_answer, end=end_of_chunk_token)
        for example, media in shown
    ]
    media = [medium for example in support for medium in example.media if show_support_media]
    return Prompt(
        text="".join(written) + template.write_query(query, media=image_token * len(query.media)),
        media=(*media, *query.media),
        space=template.space,
        end=end_of_chunk_token,
    )

"""Conversations with images and videos, as texts with `<image>` and a list of media."""

import base64
import json
from collections.abc import Mapping, Sequence
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub import get_session

from flamingo_blocks.video import VideoFile

# What both templates do with a message's content: media become <image>, the rest is text.
_CONTENT = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}{%- elif content is iterable -%}
{%- for part in content -%}
{%- if part['type'] in ('image', 'video') -%}{{ IMAGE }}
{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- else -%}{{ raise_exception('the parts of a message must be text, image or video, got ' ~ part['type']) }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
_DIALOGUE = """\
{%- for message in messages -%}
{%- if not loop.first %}{{ '\\n' }}{% endif -%}
{%- if message['role'] == 'system' -%}{{ text_of(message['content']) }}
{%- elif message['role'] == 'user' -%}{{ 'User: ' ~ text_of(message['content']) }}
{%- elif message['role'] == 'assistant' -%}{{ 'Flamingo:' }}
{%- generation -%}{{ ' ' ~ text_of(message['content']) ~ END_OF_CHUNK }}{%- endgeneration -%}
{%- else -%}{{ raise_exception('a role must be system, user or assistant, got ' ~ message['role']) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '\\nFlamingo:' }}{% endif -%}
"""
_AS_TEXT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is defined and message['content'] is iterable and message['content'] is not string -%}
{%- set flat.messages = flat.messages + [dict(message, content=text_of(message['content']))] -%}
{%- else -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages %}"""


def default_chat_template(tokenizer: Any, image_token: str, end_of_chunk_token: str) -> str | dict[str, str]:
    """Choose a chat template that writes a medium as an `<image>` token.

    Args:
        tokenizer: Its own template is kept. One that knows text only gets to see each message as text.
        image_token: Stands for a medium.
        end_of_chunk_token: Ends an answer, where the tokenizer has no template of its own.

    Returns:
        The tokenizer's template, or several by name; or one for dialogues as the paper shows them:
        `User: <image>What is this?`, `Flamingo: A cat.<EOC>`.
    """

    def with_tokens(template: str) -> str:
        return template.replace("IMAGE", json.dumps(image_token)).replace(
            "END_OF_CHUNK", json.dumps(end_of_chunk_token)
        )

    def with_media(template: str) -> str:
        return template if _writes(tokenizer, template, image_token) else with_tokens(_CONTENT + _AS_TEXT) + template

    own = getattr(tokenizer, "chat_template", None)
    if own is None:
        return with_tokens(_CONTENT + _DIALOGUE)
    return {name: with_media(one) for name, one in own.items()} if isinstance(own, dict) else with_media(own)


def _writes(tokenizer: Any, template: str, image_token: str) -> bool:
    """Try whether a template writes an image as `<image>`, as that of a saved Flamingo does."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
    try:
        return image_token in tokenizer.apply_chat_template([message], chat_template=template, tokenize=False)
    except Exception:  # templates raise errors of many kinds
        return False


def collect_media(conversations: Sequence[Any], *, load: bool) -> list[Any]:
    """Make images of all media of conversations, so that their order is kept.

    `ProcessorMixin.apply_chat_template` collects images and videos separately.

    Args:
        conversations: Lists of messages. They are copied.
        load: Whether media are wanted, or their places only.

    Returns:
        The conversations, in which each medium is `{"type": "image", "image": medium}`: an image, a path, an open file,
        a list of frames or a `VideoFile`.

    Raises:
        ValueError: If there is audio, or a medium cannot be fetched.
    """
    return [[_message(message, load) for message in getattr(one, "messages", one)] for one in conversations]


def _message(message: Any, load: bool) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if content is None or isinstance(content, str):
        return message
    return {**message, "content": [_part(part, load) for part in content]}


def _part(part: Any, load: bool) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "audio":
        raise ValueError("a Flamingo takes text, images and videos; a message has audio")
    if kind not in ("image", "image_url", "video"):
        return part
    key = next((key for key in (kind, "url", "path", "base64") if part.get(key) is not None), None)
    if key is None or not load:
        return {"type": "image"}
    medium = part[key]["url"] if isinstance(part[key], Mapping) else part[key]  # {"image_url": {"url": ...}}
    if isinstance(medium, str | Path):
        medium = _fetch(str(medium), is_base64=key == "base64")
    if kind == "video" and isinstance(medium, str | BytesIO | BufferedIOBase):
        medium = VideoFile(medium)
    return {"type": "image", "image": medium}


def _fetch(source: str, *, is_base64: bool) -> str | BytesIO:
    """Fetch what is not on this machine."""
    if source.startswith(("http://", "https://")):
        try:
            response = get_session().get(source, follow_redirects=True, timeout=30)
            response.raise_for_status()
        except Exception as error:
            raise ValueError(f"{source[:200]!r} cannot be fetched: {error}") from error
        return BytesIO(response.content)
    if is_base64 or source.startswith("data:"):
        try:
            return BytesIO(base64.b64decode(source.rpartition(",")[2]))
        except ValueError as error:
            raise ValueError(f"{source[:40]!r}... is not base64: {error}") from error
    return source

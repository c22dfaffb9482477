"""Turns conversations into text, with the tokenizer's chat template or without it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from auto_round.calibration.base import Document, Message
from auto_round.errors import ConfigError, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Text:
    """A document as text. `is_templated`: a chat template wrote it, special tokens included."""

    text: str
    is_templated: bool


def render_documents(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    apply_chat_template: bool | None,
    system_prompt: str | None,
) -> list[Text]:
    """Returns each document as text.

    Args:
        documents: texts or conversations.
        apply_chat_template: True renders all, a plain text as one user message; False renders none, a conversation
            becomes its contents, one a line; None renders conversations if the tokenizer has a template.
        system_prompt: the system message of each conversation, in place of its own; only used with a template.
    Raises:
        ConfigError: `apply_chat_template` is True and the tokenizer has no template, or the template fails.
    """
    has_template = tokenizer.chat_template is not None
    if apply_chat_template and not has_template:
        raise ConfigError(
            "apply_chat_template needs a chat template and this tokenizer has none. "
            "Leave the option (and system_prompt) out, or set tokenizer.chat_template"
        )
    texts = []
    for document in documents:
        is_templated = has_template if apply_chat_template is None else apply_chat_template
        if isinstance(document, str):
            is_templated = bool(apply_chat_template)
        text = _render(_messages(document, system_prompt), tokenizer) if is_templated else _plain_text(document)
        texts.append(Text(text, is_templated))
    return texts


def _messages(document: Document, system_prompt: str | None) -> list[Message]:
    messages = [{"role": "user", "content": document}] if isinstance(document, str) else document
    if system_prompt is None:
        return messages
    # A template takes one system message at most.
    own = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": system_prompt}, *own]


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    # transformers needs jinja2 for chat templates only, so it may be missing.
    require("jinja2", needed_for="a chat template")
    from jinja2 import TemplateError

    try:
        # tokenize=False: transformers 5 returns an encoding else.
        return tokenizer.apply_chat_template(list(messages), tokenize=False)
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise ConfigError(f"the chat template refuses a conversation with the roles {roles}: {error}") from error


def _plain_text(document: Document) -> str:
    if isinstance(document, str):
        return document
    return "\n".join(_content(message["content"]) for message in document)


def _content(content: Any) -> str:
    """Returns a message's text; contents of several parts give their text parts."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content or () if "text" in part)

"""Text in and out: the tokenizer, the chat template, and a text stream that never splits a UTF-8 character."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from cllm_export.bundle.manifest import CHAT_TEMPLATE_NAME, MORE_CHAT_TEMPLATES_NAME, TOKENIZER_NAME, Bundle
from cllm_export.errors import BundleError, PromptError
from cllm_export.prompts import Chat, Message, as_chat

if TYPE_CHECKING:
    from cllm_export.runtime.decoding.chat_template import ChatTemplate

DEFAULT, TOOL_USE = "default", "tool_use"
"""Names of chat templates. A model that has one template has the default."""

INCOMPLETE = "\ufffd"
"""Tokenizers decode a cut-off UTF-8 sequence to this character."""

Messages = Sequence[Message] | Chat
"""Chat messages, alone or with arguments of the chat template."""


class TextCodec:
    """A model's tokenizer and chat template.

    Args:
        directory: the bundle or checkpoint that holds ``tokenizer.json``.
        chat_template: text of the template, or texts by name if there are several; None if the model has none.
        special_tokens: tokens by the names that chat templates use, such as bos_token and eos_token.

    Raises:
        BundleError: there is no tokenizer, or it is damaged.
    """

    def __init__(
        self, directory: Path, *, chat_template: str | Mapping[str, str] | None, special_tokens: Mapping[str, str]
    ) -> None:
        self.directory = directory
        self._chat_templates = templates_by_name(chat_template)
        self._compiled: dict[str, ChatTemplate] = {}
        self._special_tokens = special_tokens
        try:
            self.tokenizer = Tokenizer.from_file(str(directory / TOKENIZER_NAME))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"{directory / TOKENIZER_NAME} is not a tokenizer: {error}") from None
        self.tokenizer.no_truncation()  # trainers save these settings, but a prompt must not be cut or padded silently
        self.tokenizer.no_padding()

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> TextCodec:
        """The codec of an opened bundle."""
        if not bundle.has(TOKENIZER_NAME):
            raise BundleError(f"{bundle.path} has no {TOKENIZER_NAME}; rebuild it from a checkpoint that has one")
        return cls(
            bundle.path,
            chat_template=_chat_templates_of(bundle) or None,
            special_tokens=bundle.manifest.special_tokens,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that its tokenizer adds.

        Raises:
            PromptError: the text holds half a surrogate pair, which UTF-8 cannot encode.
        """
        return self._encode(text, add_special_tokens=True)

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that follows a prompt, without special tokens.

        Raises:
            PromptError: the text holds half a surrogate pair, which UTF-8 cannot encode.
        """
        return self._encode(text, add_special_tokens=False)

    def encode_chat(self, messages: Messages) -> list[int]:
        """Token ids of chat messages rendered with the model's template, ready for the assistant's turn.

        Raises:
            PromptError: the model has no chat template, or the template refuses the messages.
        """
        return self._encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: Messages) -> str:
        """Chat messages as the text the model was trained on, as transformers renders them.

        Raises:
            PromptError: the model has no such chat template, or the template refuses the messages.
            BundleError: the template is not valid.
        """
        chat = as_chat(messages)
        return self._template_for(chat).render(chat)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids)))

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not valid Unicode at character {error.start}") from None
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def _template_for(self, chat: Chat) -> ChatTemplate:
        """The template that a chat names, else the one for tools if it has tools, else the default."""
        from cllm_export.runtime.decoding.chat_template import ChatTemplate

        templates = self._chat_templates
        name = chat.chat_template
        if name is None:
            name = TOOL_USE if chat.tools is not None and TOOL_USE in templates else DEFAULT
        if not templates:
            raise PromptError(f"{self.directory} has no chat template: give the prompt as text, not as messages")
        if name not in templates:
            raise PromptError(
                f"{self.directory} has no chat template named {name!r}: name one of {', '.join(sorted(templates))}",
                fields=("chat_template",),
            )
        if name not in self._compiled:
            try:
                self._compiled[name] = ChatTemplate(templates[name], self._special_tokens)
            except ValueError as error:
                place = f"{self.directory / CHAT_TEMPLATE_NAME}{'' if name == DEFAULT else f' ({name})'}"
                raise BundleError(f"{place} is not a valid template: {error}") from None
        return self._compiled[name]


def templates_by_name(chat_template: str | Mapping[str, str] | None) -> dict[str, str]:
    """The texts of a model's chat templates by name. A single one is the default."""
    return {DEFAULT: chat_template} if isinstance(chat_template, str) else dict(chat_template or {})


def _chat_templates_of(bundle: Bundle) -> dict[str, str]:
    """The text of each chat template of a bundle, by name."""
    templates = {}
    if bundle.has(CHAT_TEMPLATE_NAME):
        templates[DEFAULT] = _read_text(bundle, CHAT_TEMPLATE_NAME)
    if bundle.has(MORE_CHAT_TEMPLATES_NAME):
        try:
            more = json.loads(_read_text(bundle, MORE_CHAT_TEMPLATES_NAME))
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{bundle.path / MORE_CHAT_TEMPLATES_NAME} is not valid JSON: {error}") from None
        if not isinstance(more, dict) or not all(isinstance(text, str) for text in more.values()):
            raise BundleError(f"{bundle.path / MORE_CHAT_TEMPLATES_NAME} does not hold texts by name")
        templates |= more
    return templates


def _read_text(bundle: Bundle, name: str) -> str:
    try:
        return bundle.file(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{bundle.path / name} cannot be read: {error}") from None


class TextStream:
    """Turns tokens into text, one by one. The first complete stop string ends the text.

    The stream holds back bytes that are not yet a whole character, and text that may still become a stop string. How
    the tokens are split between calls of ``push`` does not change the text. All text of a request goes through here.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str] = ()) -> None:
        self._codec = codec
        self._stop = stop
        self._window: list[int] = []
        """The tokens of the last piece of text, as context for the next ones, then tokens that are not yet text."""
        self._num_context = 0
        self._text = ""
        self._emitted = 0
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens make certain. It is empty after a stop string."""
        for token in tokens:
            if not self.stopped:
                self._window.append(token)
                self._advance(at_end=False)
        return self._emit(len(self._text) if self.stopped else len(self._text) - self._held())

    def flush(self) -> str:
        """The text held back, at the end of the request: it became neither a whole character nor a stop string."""
        if not self.stopped:
            self._advance(at_end=True)
        return self._emit(len(self._text))

    @property
    def text(self) -> str:
        """The whole text so far, with text that is held back for a stop string."""
        return self._text

    def _advance(self, *, at_end: bool) -> None:
        before = self._codec.decode(self._window[: self._num_context])
        after = self._codec.decode(self._window)
        if len(after) > len(before) and (at_end or not after.endswith(INCOMPLETE)):
            self._text += after[len(before) :]
            del self._window[: self._num_context]
            self._num_context = len(self._window)
            self._cut()

    def _cut(self) -> None:
        starts = [start for text in self._stop if (start := self._text.find(text)) >= 0]
        if starts:
            self._text, self.stopped = self._text[: min(starts)], True

    def _held(self) -> int:
        lengths = (size for text in self._stop for size in range(1, len(text)) if self._text.endswith(text[:size]))
        return max(lengths, default=0)

    def _emit(self, end: int) -> str:
        delta = self._text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return delta

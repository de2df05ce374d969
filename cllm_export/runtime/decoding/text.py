"""Text in and out: the tokenizer, the chat template, and a text stream that never splits a UTF-8 character."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from cllm_export.bundle.manifest import CHAT_TEMPLATE_NAME, TOKENIZER_NAME, Bundle
from cllm_export.errors import BundleError, PromptError

if TYPE_CHECKING:
    from cllm_export.runtime.decoding.chat_template import ChatTemplate

INCOMPLETE = "\ufffd"
"""Tokenizers decode a cut-off UTF-8 sequence to this character."""

Messages = Sequence[Mapping[str, str]]


class TextCodec:
    """A model's tokenizer and chat template.

    Args:
        directory: the bundle or checkpoint that holds ``tokenizer.json``.
        chat_template: text of the template; None if the model has none.
        special_tokens: tokens by the names that chat templates use, such as bos_token and eos_token.

    Raises:
        BundleError: there is no tokenizer, or it is damaged.
    """

    def __init__(self, directory: Path, *, chat_template: str | None, special_tokens: Mapping[str, str]) -> None:
        self.directory = directory
        self._chat_template = chat_template
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
        template = None
        if bundle.has(CHAT_TEMPLATE_NAME):
            try:
                template = bundle.file(CHAT_TEMPLATE_NAME).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise BundleError(f"{bundle.path / CHAT_TEMPLATE_NAME} cannot be read: {error}") from None
        return cls(bundle.path, chat_template=template, special_tokens=bundle.manifest.special_tokens)

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
            PromptError: the model has no chat template, or the template refuses the messages.
            BundleError: the template is not valid.
        """
        return self._template.render(messages)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids)))

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not valid Unicode at character {error.start}") from None
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    @cached_property
    def _template(self) -> ChatTemplate:
        from cllm_export.runtime.decoding.chat_template import ChatTemplate

        if self._chat_template is None:
            raise PromptError(f"{self.directory} has no chat template: give the prompt as text, not as messages")
        try:
            return ChatTemplate(self._chat_template, self._special_tokens)
        except ValueError as error:
            raise BundleError(f"{self.directory / CHAT_TEMPLATE_NAME} is not a valid template: {error}") from None


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

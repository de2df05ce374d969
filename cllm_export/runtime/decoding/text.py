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
        tokenizer_json: contents of the file, if what counts is not the file itself.
        chat_template: text of the template, or texts by name if there are several; None if the model has none.
        special_tokens: tokens by the names that chat templates use, such as bos_token and eos_token.

    Raises:
        BundleError: there is no tokenizer, or it is damaged.
    """

    def __init__(
        self,
        directory: Path,
        *,
        chat_template: str | Mapping[str, str] | None,
        special_tokens: Mapping[str, str],
        tokenizer_json: bytes | None = None,
    ) -> None:
        self.directory = directory
        self._chat_templates = templates_by_name(chat_template)
        self._compiled: dict[str, ChatTemplate] = {}
        self._special_tokens = special_tokens
        try:
            self.tokenizer = Tokenizer.from_buffer(tokenizer_json or (directory / TOKENIZER_NAME).read_bytes())
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"{directory / TOKENIZER_NAME} is not a tokenizer: {error}") from None
        self.tokenizer.no_truncation()  # trainers save these settings, but a prompt must not be cut or padded silently
        self.tokenizer.no_padding()
        self.special_texts = _special_texts(self.tokenizer, special_tokens)
        """Id -> text of every special token. In decoded text they are left out."""

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
        """Text of token ids, without special tokens.

        They are left out here, by their ids. The tokenizers library knows them by a text that it may have normalized
        (``normalized: true``), and leaves none of those out.
        """
        return str(self.tokenizer.decode([token for token in token_ids if token not in self.special_texts]))

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


def _special_texts(tokenizer: Tokenizer, named: Mapping[str, str]) -> dict[int, str]:
    """Special as in transformers: what ``tokenizer.json`` marks so, and every token that has a name."""
    added = tokenizer.get_added_tokens_decoder()
    special = {index: token.content for index, token in added.items() if token.special}
    ids = {token.content: index for index, token in added.items()}
    for text in named.values():
        index = ids.get(text, tokenizer.token_to_id(text))
        if index is not None:
            special[index] = text
    return special


class TextStream:
    """Turns tokens into text, one by one. The first complete stop string ends the text.

    Special tokens give no text, but a stop string may be the text of one, or hold it. The stream holds back bytes that
    are not yet a whole character, and text that may still become a stop string. How the tokens are split between calls
    of ``push`` does not change the text. All text of a request goes through here.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str] = ()) -> None:
        self._codec = codec
        self._stop = stop
        self._window: list[int] = []
        """The tokens of the last piece of text, as context for the next ones, then tokens that are not yet text."""
        self._num_context = 0
        self._text = ""
        self._spoken = ""
        """The text with that of special tokens, in which stop strings are looked for too. Empty without them."""
        self._specials: list[tuple[int, int]] = []
        """Where the special tokens stand in it: from, to."""
        self._waiting: list[tuple[int, str]] = []
        """Special tokens behind a cut-off character: the tokens in the window before each, and its text."""
        self._emitted = 0
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens make certain. It is empty after a stop string."""
        for token in tokens:
            if self.stopped:
                break
            if self._stop and token in self._codec.special_texts:
                self._hear(self._codec.special_texts[token])
            else:
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
            self._commit(after[len(before) :])

    def _commit(self, new: str) -> None:
        """Take the text of the tokens in the window, with the special tokens among them."""
        if self._stop:
            spoken, specials = self._among_specials(new)
            self._specials += [(start + len(self._spoken), end + len(self._spoken)) for start, end in specials]
            self._spoken += spoken
            self._waiting = []
        if new:
            self._text += new
            del self._window[: self._num_context]
            self._num_context = len(self._window)
        self._cut()

    def _hear(self, special: str) -> None:
        """Take a special token. It ends a text of which it completes a stop string, with what is held back before it.

        Behind a cut-off character it waits, for the tokens after it may complete that character.
        """
        self._waiting.append((len(self._window), special))
        num_before = len(self._codec.decode(self._window[: self._num_context]))
        new = self._codec.decode(self._window)[num_before:]
        spoken = self._spoken + self._among_specials(new)[0]
        end = len(spoken) - len(special)
        if not new or any(spoken.find(text, max(0, end - len(text) + 1)) >= 0 for text in self._stop):
            self._commit(new)

    def _among_specials(self, new: str) -> tuple[str, list[tuple[int, int]]]:
        """The new text with the special tokens that wait, and where these stand in it: from, to.

        A special token inside a character stands before it, behind the half that was there: it joins no other text.
        """
        num_before = len(self._codec.decode(self._window[: self._num_context]))
        spoken, specials, done, last = "", [], 0, -1
        for count, special in self._waiting:
            shown = self._codec.decode(self._window[:count])[num_before:]
            whole = max(done, _shared(shown, new))
            spoken += new[done:whole]
            half = shown[whole:] if count != last else ""
            specials.append((len(spoken), len(spoken) + len(half) + len(special)))
            spoken += half + special
            done, last = whole, count
        return spoken + new[done:], specials

    def _cut(self) -> None:
        starts = [start for text in self._stop if (start := self._text.find(text)) >= 0]
        starts += [self._seen(start) for text in self._stop if (start := self._spoken.find(text)) >= 0]
        if starts:
            self._text, self.stopped = self._text[: min(starts)], True

    def _seen(self, position: int) -> int:
        """How much of the text lies before a position of the text with special tokens."""
        return position - sum(min(end, position) - start for start, end in self._specials if start < position)

    def _held(self) -> int:
        """Characters at the end of the text that may still become part of a stop string."""
        spoken = self._seen(len(self._spoken) - _begun(self._spoken, self._stop))
        return max(_begun(self._text, self._stop), len(self._text) - spoken) if self._stop else 0

    def _emit(self, end: int) -> str:
        delta = self._text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return delta


def _shared(first: str, second: str) -> int:
    """Length of the beginning that two texts share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def _begun(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of a text that begins a stop string."""
    lengths = (size for each in stop for size in range(1, len(each)) if text.endswith(each[:size]))
    return max(lengths, default=0)

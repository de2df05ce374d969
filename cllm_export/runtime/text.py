"""Text in and out: tokenizer, chat template, and text that grows without ever splitting a UTF-8 character."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from cllm_export.bundle import CHAT_TEMPLATE_NAME, TOKENIZER_NAME, Bundle
from cllm_export.errors import BundleError, PromptError

Messages = Sequence[Mapping[str, str]]


class TextCodec:
    """A bundle's tokenizer and chat template."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        if not bundle.has(TOKENIZER_NAME):
            raise BundleError(f"{bundle.path} has no {TOKENIZER_NAME}; rebuild it from a checkpoint that has one")
        try:
            self.tokenizer = Tokenizer.from_file(str(bundle.file(TOKENIZER_NAME)))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"{bundle.file(TOKENIZER_NAME)} is not a tokenizer: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens its tokenizer adds."""
        return list(self.tokenizer.encode(text).ids)

    def encode_chat(self, messages: Messages) -> list[int]:
        """Token ids of chat messages rendered with the bundle's template, ready for the assistant's turn.

        Raises:
            PromptError: the bundle has no chat template, or the template refuses the messages.
        """
        return list(self.tokenizer.encode(self.render_chat(messages), add_special_tokens=False).ids)

    def render_chat(self, messages: Messages) -> str:
        """Chat messages as the text the model was trained on."""
        import jinja2

        try:
            rendered: str = self._template.render(
                messages=list(messages), add_generation_prompt=True, **self._bundle.manifest.special_tokens
            )
        except jinja2.TemplateError as error:
            raise PromptError(f"the chat template refuses these messages: {error}") from None
        return rendered

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids)))

    @cached_property
    def _template(self) -> Any:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not self._bundle.has(CHAT_TEMPLATE_NAME):
            raise PromptError(f"{self._bundle.path} has no chat template: give the prompt as text, not as messages")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

        def refuse(message: str) -> NoReturn:
            raise TemplateError(message)

        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        try:
            return environment.from_string(self._bundle.file(CHAT_TEMPLATE_NAME).read_text(encoding="utf-8"))
        except TemplateError as error:
            raise BundleError(f"{self._bundle.path / CHAT_TEMPLATE_NAME} is not a valid template: {error}") from None


class TextStream:
    """Turns tokens into text as they come, cut at the first stop string.

    Text that may still turn into a stop string, and bytes that are not yet a whole character, are held back.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str] = ()) -> None:
        self._codec = codec
        self._stop = stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._seen = ""
        self._emitted = 0
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """Text that is certain after these tokens and was not before."""
        self._tokens += tokens
        for token in tokens:
            self._seen += self._stream.step(self._codec.tokenizer, token) or ""
        self._cut()
        return self._emit(len(self._seen) if self.stopped else len(self._seen) - self._held())

    def flush(self) -> str:
        """The rest, at the end of the request: what was held back turned out not to be a stop string."""
        if not self.stopped:
            whole = self._codec.decode(self._tokens)
            self._seen += whole[len(self._seen) :] if whole.startswith(self._seen) else ""
            self._cut()
        return self._emit(len(self._seen))

    @property
    def text(self) -> str:
        """Everything so far, held-back text included."""
        return self._seen

    def _cut(self) -> None:
        ends = [start for text in self._stop if (start := self._seen.find(text)) >= 0]
        if ends:
            self._seen, self.stopped = self._seen[: min(ends)], True

    def _held(self) -> int:
        lengths = (size for text in self._stop for size in range(1, len(text)) if self._seen.endswith(text[:size]))
        return max(lengths, default=0)

    def _emit(self, end: int) -> str:
        delta = self._seen[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return delta

"""`chat`: a conversation at the terminal, or of the lines of a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from cllm_export.bundle.manifest import CHAT_TEMPLATE_NAME, open_bundle
from cllm_export.cli.app import command
from cllm_export.cli.before.arguments import check_plan
from cllm_export.cli.before.commands import check_generate
from cllm_export.cli.generate import METAVARS, PARSE, EngineChoice
from cllm_export.cli.options import BundleArgument, given, require_use
from cllm_export.cli.show.console import say, streaming_text
from cllm_export.cli.show.decoding import show_statistics
from cllm_export.cli.signature import with_options
from cllm_export.errors import BundleError, PromptError
from cllm_export.prompts import Message
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import GenerateOptions

RESET, EXIT = "/reset", "/exit"
HINT = f"{RESET} forgets the conversation, {EXIT} or Ctrl-D ends it, Ctrl-C stops an answer"


@command('cllm-export chat my-bundle --system "Answer in one sentence."')
@with_options(
    GenerateOptions,
    exclude=("logprobs", "forwards_per_sync"),
    parse=PARSE,
    metavars=METAVARS,
)
@with_options(EngineChoice, exclude=("num_slots",))
def chat(
    bundle: BundleArgument,
    options: GenerateOptions,
    engine: EngineChoice,
    system: Annotated[str | None, given("--system", "The system message of the conversation.", "Input")] = None,
) -> None:
    """Talk with a model that has a chat template. In a pipe, each line of standard input is one message."""
    require_use(engine.draft_model, options.method, options.proposer)
    check_plan(bundle, engine.provider, engine.plan)
    check_generate(bundle, options, draft_model=engine.draft_model)
    _require_template(bundle)
    with engine.load(bundle, num_prompts=1) as model, streaming_text(interactive=True):
        conversation = Conversation(model, options, system)
        is_terminal = sys.stdin is not None and sys.stdin.isatty()
        if is_terminal:
            say(HINT)
        for text in _typed() if is_terminal else _piped():
            if text == EXIT:
                return
            if text == RESET:
                conversation.reset()
                continue
            try:
                conversation.answer(text)
            except PromptError as error:
                if not is_terminal:
                    raise
                say(f"error: {error}; {RESET} makes room")


class Conversation:
    """The messages so far, and the model that answers. The prefix cache keeps the KV of earlier turns.

    Raises:
        PromptError: the template refuses the system message.
    """

    def __init__(self, model: Model, options: GenerateOptions, system: str | None) -> None:
        self._model, self._options = model, options
        self._beginning: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        model.codec.render_chat([*self._beginning, _message("user", "Hello")])
        self.messages = list(self._beginning)

    def reset(self) -> None:
        """Forget all messages but the system message."""
        self.messages = list(self._beginning)

    def answer(self, text: str) -> None:
        """Print the answer to a message as it is decoded, then its statistics. Ctrl-C stops the answer here.

        Both messages become part of the conversation. Of a stopped answer it is the part that was printed.

        Raises:
            PromptError: the conversation and a new token do not fit, or the template refuses the message. The
                conversation stays as it was.
        """
        messages = [*self.messages, _message("user", text)]
        answer = ""
        with self._model.stream(messages, self._options) as stream, _interrupts() as interrupted:
            for delta in stream:
                answer += delta
                typer.echo(delta, nl=False)
                sys.stdout.flush()
                if interrupted:
                    break
            typer.echo()
            if interrupted:
                say("stopped")
            else:
                show_statistics(stream.result())
        self.messages = [*messages, _message("assistant", answer)]


def _require_template(bundle: Path) -> None:
    opened = open_bundle(bundle)
    if CHAT_TEMPLATE_NAME not in opened.manifest.files:
        raise BundleError(
            f"{opened.path} has no chat template: use cllm-export generate, which takes plain prompts, or build a "
            "checkpoint that has a template"
        )


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": text}


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C fills, instead of an exception in the middle of a forward. A second Ctrl-C raises."""
    caught: list[int] = []

    def catch(number: int, _: object) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, catch)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def _typed() -> Iterator[str]:
    """Messages typed at the terminal. Ctrl-C drops the line that is being typed."""
    with suppress(ImportError):  # Windows has its own
        import readline  # noqa: F401 - it gives `input` its editing keys
    while True:
        try:
            text = input("> ")
        except KeyboardInterrupt:
            typer.echo()
            say(HINT)
            continue
        except EOFError:
            typer.echo()
            return
        if text.strip():
            yield text


def _piped() -> Iterator[str]:
    """The lines of standard input that are not blank."""
    if sys.stdin is None:
        return
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise PromptError(f"standard input:{number}: not valid UTF-8 at byte {error.start}") from None
        if text.strip():
            yield text

"""The command line: parse, call, print. Each module has one command or a few. This package contains no other logic.

Importing this package imports no command, so that a signal is understood from the first moment. ``entry`` has them all.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cllm_export.progress import Terminated

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143
NOTHING_SAVED = "nothing was saved, and nothing is left half-written; run the same command again"


def main() -> None:
    """Entry point of ``cllm-export``: import the commands and run one. A signal gives a sentence, never a traceback."""
    try:
        with _sigterm_as_interruption():
            from cllm_export.cli.entry import main as run

            run()
    except KeyboardInterrupt as stop:  # while modules are imported; later the application takes it
        is_terminated = isinstance(stop, Terminated)
        if os.environ.get("RANK", "0") == "0" and sys.stderr is not None:
            sys.stderr.write(f"stopped by {'SIGTERM' if is_terminated else 'SIGINT'}: {NOTHING_SAVED}\n")
        sys.exit(EXIT_TERMINATED if is_terminated else EXIT_INTERRUPTED)


@contextmanager
def _sigterm_as_interruption() -> Iterator[None]:
    """Let SIGTERM end the work in order, as Ctrl-C does, so that it says what was saved and removes what was not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

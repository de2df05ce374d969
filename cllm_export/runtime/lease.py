"""Exclusive use of a model's engine: one user at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cllm_export.errors import EngineError


class Lease:
    """Lends a model's engine to one user at a time, a request or a service. A second user is refused, not queued."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self.is_closed = False
        """True once a user has closed the engine. The engine is then never lent again."""

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the engine until the ``with`` ends.

        Raises:
            EngineError: another user holds it, or it is closed.
        """
        if not self._lock.acquire(blocking=False):
            if os.getpid() != self._pid:
                raise EngineError(
                    "this model was in use when the process was forked, and its user is in the parent: load the "
                    "bundle after the fork"
                )
            raise EngineError("another request is running on this model: finish or close its stream first")
        try:
            if self.is_closed:
                raise EngineError("this model is closed; load its bundle again")
            yield
        finally:
            self._lock.release()

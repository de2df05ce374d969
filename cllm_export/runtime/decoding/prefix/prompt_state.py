"""The prefix cache of a model, with its way into a snapshot file and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cllm_export.errors import OptionError
from cllm_export.runtime.decoding.prefix.prefix_cache import PrefixCache
from cllm_export.runtime.decoding.prefix.prefix_snapshot import Expected, Snapshot, read_snapshot
from cllm_export.runtime.engines.base import Engine


class PromptState:
    """A prefix cache, and snapshots of it. Only the thread that runs the engine uses the cache; any may call ``read``.

    Args:
        engine: the engine whose rows the cache keeps.
        max_bytes: the most bytes of rows that the cache keeps.
        fingerprint: fingerprint of the bundle.
        max_length: the most tokens of a prompt and its new tokens.
    """

    def __init__(self, engine: Engine, *, max_bytes: int, fingerprint: str, max_length: int) -> None:
        self.cache = PrefixCache(max_bytes)
        self._expected = Expected(
            fingerprint=fingerprint,
            vocab_size=engine.geometry.vocab_size,
            max_tokens=max_length - 1,  # at least one token must be new
            rows=engine.read_rows(0, 0, 0),
        )

    def snapshot(self, tokens: Sequence[int]) -> Snapshot:
        """A snapshot of a text whose rows the cache holds.

        Raises:
            OptionError: the cache does not hold all rows, because they exceed its size.
        """
        match = self.cache.match(tokens)
        self._require_whole(match.length, len(tokens))
        return Snapshot(fingerprint=self._expected.fingerprint, tokens=tuple(tokens), rows=match.rows())

    def read(self, path: str | Path) -> Snapshot:
        """Read a snapshot that fits this model.

        Raises:
            SnapshotError: the file is missing, damaged, or of another bundle or version.
        """
        return read_snapshot(path, self._expected)

    def keep(self, snapshot: Snapshot) -> None:
        """Put a snapshot into the cache, as the most recently used text.

        Raises:
            OptionError: the snapshot exceeds the size of the cache.
        """
        self.cache.insert(snapshot.tokens, lambda start, stop: snapshot.rows[:, :, start:stop])
        self._require_whole(self.cache.match(snapshot.tokens).length, len(snapshot.tokens))

    def _require_whole(self, found: int, wanted: int) -> None:
        if found < wanted:
            raise OptionError(
                f"the prefix cache holds {found} of these {wanted} tokens: load the model with prefix_cache_bytes "
                f"above {self.cache.max_bytes}"
            )


def require_prompt_state(state: PromptState | None) -> PromptState:
    """The prompt state of a model that must have one.

    Raises:
        OptionError: ``state`` is None.
    """
    if state is None:
        raise OptionError(
            "this model keeps no prompts: load its bundle with prefix_cache_bytes above 0",
            fields=("prefix_cache_bytes",),
        )
    return state

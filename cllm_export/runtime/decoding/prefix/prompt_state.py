"""What a model keeps of the prompts it has read: its prefix cache, and the way from it into a file and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cllm_export.errors import OptionError
from cllm_export.runtime.decoding.prefix.prefix_cache import PrefixCache
from cllm_export.runtime.decoding.prefix.prefix_snapshot import Expected, Snapshot, read_snapshot
from cllm_export.runtime.engines.base import Engine


class PromptState:
    """A prefix cache, and snapshots of it. The cache is for whoever runs the engine, ``read`` for any thread.

    Args:
        engine: whose rows the cache keeps.
        max_bytes: of rows kept.
        fingerprint: of the bundle.
        max_length: prompt plus new tokens.
    """

    def __init__(self, engine: Engine, *, max_bytes: int, fingerprint: str, max_length: int) -> None:
        self.cache = PrefixCache(max_bytes)
        self._expected = Expected(
            fingerprint=fingerprint,
            vocab_size=engine.geometry.vocab_size,
            max_tokens=max_length - 1,  # one must be new
            rows=engine.read_rows(0, 0, 0),
        )

    def snapshot(self, tokens: Sequence[int]) -> Snapshot:
        """The rows of a text that the cache holds.

        Raises:
            OptionError: it does not hold them all: they are more than it may keep.
        """
        match = self.cache.match(tokens)
        self._require_whole(match.length, len(tokens))
        return Snapshot(fingerprint=self._expected.fingerprint, tokens=tuple(tokens), rows=match.rows())

    def read(self, path: str | Path) -> Snapshot:
        """A snapshot that this model can use.

        Raises:
            SnapshotError: missing, damaged, or of another bundle or version.
        """
        return read_snapshot(path, self._expected)

    def keep(self, snapshot: Snapshot) -> None:
        """Put a snapshot into the cache, as what was used last.

        Raises:
            OptionError: it is more than the cache may keep.
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
    """What a model keeps of prompts.

    Raises:
        OptionError: nothing.
    """
    if state is None:
        raise OptionError(
            "this model keeps no prompts: load its bundle with prefix_cache_bytes above 0",
            fields=("prefix_cache_bytes",),
        )
    return state

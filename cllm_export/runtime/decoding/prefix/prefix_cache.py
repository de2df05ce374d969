"""KV rows of texts that were read before, so that a prompt that begins like one of them is not read again.

Policy and storage alone: no engine, no threads. A trie whose nodes hold the rows of up to 16 tokens each, as
``Engine.read_rows`` gives them. Keeping whole prefixes in such a tree is known from serving engines (SGLang's
RadixAttention, arXiv 2312.07104); here rows are copied into a slot and out of it, since a slot's cache is one piece.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from cllm_export.checks import require_at_least
from cllm_export.runtime.engines.base import KvRows

CHUNK = 16
"""Tokens of a full node. Fewer make more nodes, arrays and copies; more make texts that part within a node hold more
rows twice. At 16 a node is what one forward reads, so neither is above what a forward costs."""

RowReader = Callable[[int, int], KvRows]
"""Gives the rows ``start`` to ``stop`` of the text that is inserted."""


class PrefixCacheStatistics(NamedTuple):
    """What the cache did so far, and what it holds."""

    lookups: int
    hits: int
    """Lookups that found at least one token."""
    reused_tokens: int
    evictions: int
    """Nodes that were dropped for room."""
    bytes: int
    """Of rows, now."""
    tokens: int
    """That it holds rows of, now."""


class Match(NamedTuple):
    """The longest beginning of a text that the cache holds."""

    length: int
    pieces: list[KvRows]
    """Its rows, piece after piece from position 0. Read-only by agreement, and good after an eviction."""

    def rows(self) -> KvRows:
        """All of them in one array; there must be some."""
        return np.concatenate(self.pieces, axis=2)


class PrefixCache:
    """Rows by the tokens they stand for, the least recently used dropped first. Not thread-safe.

    A text's last node may be short: a conversation's next turn then finds every token of the last one, not only the
    full chunks of it. A longer text takes its place.

    Args:
        max_bytes: of rows kept. While a text is inserted its own rows come on top.
    """

    def __init__(self, max_bytes: int) -> None:
        require_at_least("prefix_cache_bytes", max_bytes, 1)
        self.max_bytes = max_bytes
        self._root = _Node((), None, None)
        self._by_age: OrderedDict[_Node, None] = OrderedDict()
        """Least recently used first. A parent always stands after its children, so the first one is a leaf."""
        self._lookups = self._hits = self._reused = self._evictions = self._bytes = self._tokens = 0

    @property
    def statistics(self) -> PrefixCacheStatistics:
        """As of now; may be read from any thread."""
        return PrefixCacheStatistics(
            lookups=self._lookups,
            hits=self._hits,
            reused_tokens=self._reused,
            evictions=self._evictions,
            bytes=self._bytes,
            tokens=self._tokens,
        )

    def match(self, tokens: Sequence[int]) -> Match:
        """Look up the longest beginning of a text, part of a node included, and count it as used."""
        path, part, common = self._descend(tokens)
        pieces = [node.held for node in path]
        if part:
            path.append(part)
            pieces.append(part.held[:, :, :common])
        self._touch(path)
        length = sum(piece.shape[2] for piece in pieces)
        self._lookups += 1
        self._hits += length > 0
        self._reused += length
        return Match(length, pieces)

    def insert(self, tokens: Sequence[int], read_rows: RowReader) -> None:
        """Keep the rows of a text: those that are missing are read, by one call, before anything changes.

        Whatever ``read_rows`` raises is raised, and the cache is as it was.
        """
        path, part, common = self._descend(tokens)
        start = sum(len(node.tokens) for node in path)
        if start + common == len(tokens):
            self._touch([*path, part] if part else path)
            return
        read = read_rows(start + common, len(tokens))
        parent = path[-1] if path else self._root
        if part and common == len(part.tokens):
            self._drop(part)
        head = part.held[:, :, :common] if part else None
        for chunk, rows in _chunks(tokens[start:], read, head):
            parent = self._add(parent, chunk, rows)
            path.append(parent)
        self._touch(path)
        self._evict()

    def clear(self) -> None:
        """Forget everything; what was counted stays."""
        self._root = _Node((), None, None)
        self._by_age.clear()
        self._bytes = self._tokens = 0

    def _descend(self, tokens: Sequence[int]) -> tuple[list[_Node], _Node | None, int]:
        """Full nodes that the text begins with, then the node that goes on best and how many tokens of it do."""
        path: list[_Node] = []
        node, start = self._root, 0
        while child := node.children.get(tuple(tokens[start : start + CHUNK])):
            if len(child.tokens) < CHUNK:
                break
            path.append(child)
            node, start = child, start + CHUNK
        part, common = node.best_child(tuple(tokens[start : start + CHUNK]))
        return path, part, common

    def _add(self, parent: _Node, tokens: tuple[int, ...], rows: KvRows) -> _Node:
        node = _Node(tokens, rows, parent)
        parent.adopt(node)
        self._by_age[node] = None
        self._bytes += rows.nbytes
        self._tokens += len(tokens)
        return node

    def _drop(self, node: _Node) -> None:
        if node.parent:
            node.parent.disown(node)
        del self._by_age[node]
        self._bytes -= node.held.nbytes
        self._tokens -= len(node.tokens)

    def _touch(self, path: Sequence[_Node]) -> None:
        """Count a path from the root as used: its deepest node first, so that parents stay after their children."""
        for node in reversed(path):
            self._by_age.move_to_end(node)

    def _evict(self) -> None:
        while self._bytes > self.max_bytes:
            self._drop(next(iter(self._by_age)))
            self._evictions += 1


class _Node:
    """Up to a chunk of tokens after those of the nodes above, and their rows; only full ones have children."""

    __slots__ = ("_sorted", "children", "parent", "rows", "tokens")

    def __init__(self, tokens: tuple[int, ...], rows: KvRows | None, parent: _Node | None) -> None:
        self.tokens = tokens
        self.rows = rows
        self.parent = parent
        self.children: dict[tuple[int, ...], _Node] = {}
        self._sorted: list[tuple[int, ...]] = []
        """Keys of ``children``: a thousand texts may part within one node, too many to compare with each."""

    @property
    def held(self) -> KvRows:
        """Its rows; the root alone has none."""
        assert self.rows is not None
        return self.rows

    def adopt(self, child: _Node) -> None:
        self.children[child.tokens] = child
        insort(self._sorted, child.tokens)

    def disown(self, child: _Node) -> None:
        del self.children[child.tokens]
        del self._sorted[bisect_left(self._sorted, child.tokens)]

    def best_child(self, tokens: tuple[int, ...]) -> tuple[_Node | None, int]:
        """The child that begins most like ``tokens``, and how many tokens do; None where none begins so.

        In order of their tokens it is the last one before them or the first one after: whatever stands between two
        texts begins as both of them do.
        """
        place = bisect_left(self._sorted, tokens)
        near = self._sorted[max(0, place - 1) : place + 1]
        best = max(near, key=lambda other: _common(other, tokens), default=())
        common = _common(best, tokens)
        return (self.children[best], common) if common else (None, 0)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _chunks(tokens: Sequence[int], read: KvRows, head: KvRows | None) -> Iterator[tuple[tuple[int, ...], KvRows]]:
    """Tokens by chunks with their rows, ``head``'s before those that were read, each in memory of its own: a view would
    keep all of them alive after an eviction."""
    rows = read if head is None else np.concatenate((head, read), axis=2)
    for first in range(0, len(tokens), CHUNK):
        yield tuple(tokens[first : first + CHUNK]), rows[:, :, first : first + CHUNK].copy()

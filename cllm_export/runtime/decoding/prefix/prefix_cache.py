"""A prefix cache: it keeps KV rows of earlier texts, so that a prompt with the same prefix needs less prefill.

It is only policy and storage, without engine and threads. It is a trie whose nodes hold the rows of up to 16 tokens
each, as ``Engine.read_rows`` gives them. Serving engines keep whole prefixes in such a tree (SGLang's RadixAttention,
arXiv 2312.07104). Here, rows are copied into a slot and out of it, because the KV cache of a slot is one piece.
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
"""Tokens of a full node. A smaller value makes more nodes, arrays and copies. With a larger value, texts that diverge
within a node store more rows twice. At 16, a node is what one forward reads, so neither costs more than a forward."""

RowReader = Callable[[int, int], KvRows]
"""Returns the rows ``start`` to ``stop`` of the inserted text."""


class PrefixCacheStatistics(NamedTuple):
    """Counts of the cache's use so far, and its current size."""

    lookups: int
    hits: int
    """Lookups that found at least one token."""
    reused_tokens: int
    evictions: int
    """Nodes that were dropped to make room."""
    bytes: int
    """Bytes of the rows that the cache holds now."""
    tokens: int
    """Tokens whose rows the cache holds now."""


class Match(NamedTuple):
    """The longest prefix of a text that the cache holds."""

    length: int
    pieces: list[KvRows]
    """Its rows in consecutive pieces from position 0. Callers must not change them. Eviction leaves them valid."""

    def rows(self) -> KvRows:
        """All rows in one array. There must be at least one piece."""
        return np.concatenate(self.pieces, axis=2)


class PrefixCache:
    """KV rows by their tokens. The least recently used are dropped first. Not thread-safe.

    The last node of a text may be short. The next turn of a conversation then finds all tokens of the last turn, not
    only its full chunks. A longer text replaces the short node.

    Args:
        max_bytes: the most bytes of rows that the cache keeps. During ``insert``, the inserted rows come on top.
    """

    def __init__(self, max_bytes: int) -> None:
        require_at_least("prefix_cache_bytes", max_bytes, 1)
        self.max_bytes = max_bytes
        self._root = _Node((), None, None)
        self._by_age: OrderedDict[_Node, None] = OrderedDict()
        """Nodes, the least recently used first. A parent is always after its children, so the first node is a leaf."""
        self._lookups = self._hits = self._reused = self._evictions = self._bytes = self._tokens = 0

    @property
    def statistics(self) -> PrefixCacheStatistics:
        """The current statistics. Any thread may read them."""
        return PrefixCacheStatistics(
            lookups=self._lookups,
            hits=self._hits,
            reused_tokens=self._reused,
            evictions=self._evictions,
            bytes=self._bytes,
            tokens=self._tokens,
        )

    def match(self, tokens: Sequence[int]) -> Match:
        """Look up the longest prefix of a text and mark it as used. The prefix may end within a node."""
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
        """Keep the rows of a text. One call of ``read_rows`` reads the missing ones, before anything changes.

        If ``read_rows`` raises, its error is passed on, and the cache is unchanged.
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
        """Drop all rows. The counts of lookups, hits, reused tokens and evictions stay."""
        self._root = _Node((), None, None)
        self._by_age.clear()
        self._bytes = self._tokens = 0

    def _descend(self, tokens: Sequence[int]) -> tuple[list[_Node], _Node | None, int]:
        """The full nodes on the text's path, then the child that shares most tokens with the rest, and their number."""
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
        """Mark a path from the root as used, its deepest node first, so that parents stay after their children."""
        for node in reversed(path):
            self._by_age.move_to_end(node)

    def _evict(self) -> None:
        while self._bytes > self.max_bytes:
            self._drop(next(iter(self._by_age)))
            self._evictions += 1


class _Node:
    """Up to ``CHUNK`` tokens that follow the tokens of its parents, and their rows. Only full nodes have children."""

    __slots__ = ("_sorted", "children", "parent", "rows", "tokens")

    def __init__(self, tokens: tuple[int, ...], rows: KvRows | None, parent: _Node | None) -> None:
        self.tokens = tokens
        self.rows = rows
        self.parent = parent
        self.children: dict[tuple[int, ...], _Node] = {}
        self._sorted: list[tuple[int, ...]] = []
        """Sorted keys of ``children``. A thousand texts may diverge within one node, too many to compare with each."""

    @property
    def held(self) -> KvRows:
        """The rows of this node. Only the root has none."""
        assert self.rows is not None
        return self.rows

    def adopt(self, child: _Node) -> None:
        self.children[child.tokens] = child
        insort(self._sorted, child.tokens)

    def disown(self, child: _Node) -> None:
        del self.children[child.tokens]
        del self._sorted[bisect_left(self._sorted, child.tokens)]

    def best_child(self, tokens: tuple[int, ...]) -> tuple[_Node | None, int]:
        """The child with the longest common prefix with ``tokens``, and its length; None and 0 if there is none.

        Children are sorted by their tokens. The best one is the last child before ``tokens`` or the first one after:
        any text between two others shares their common prefix.
        """
        place = bisect_left(self._sorted, tokens)
        near = self._sorted[max(0, place - 1) : place + 1]
        best = max(near, key=lambda other: _common(other, tokens), default=())
        common = _common(best, tokens)
        return (self.children[best], common) if common else (None, 0)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix of two texts."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _chunks(tokens: Sequence[int], read: KvRows, head: KvRows | None) -> Iterator[tuple[tuple[int, ...], KvRows]]:
    """Chunks of tokens with their rows: the rows of ``head`` first, then those in ``read``.

    Each chunk is a copy, because a view would keep all rows in memory after an eviction.
    """
    rows = read if head is None else np.concatenate((head, read), axis=2)
    for first in range(0, len(tokens), CHUNK):
        yield tuple(tokens[first : first + CHUNK]), rows[:, :, first : first + CHUNK].copy()

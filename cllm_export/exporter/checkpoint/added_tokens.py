"""The tokens that the settings beside a ``tokenizer.json`` add to it, and the flags that they change: transformers'."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from cllm_export.errors import CheckpointError
from cllm_export.exporter.checkpoint.files import read_json

SETTINGS_NAME, MAP_NAME, LIST_NAME = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names of special tokens, in the order in which transformers adds the tokens."""


def with_added_tokens(raw: bytes, path: Path) -> bytes:
    """A ``tokenizer.json`` with the tokens that ``PreTrainedTokenizerFast`` adds to it when it loads a directory.

    First come the tokens of ``added_tokens_decoder``, else of ``added_tokens.json``; a listed token takes the flags
    listed. Then come the tokens that have a name, and the other special tokens. A new token gets the next free id.

    Args:
        raw: the contents of ``tokenizer.json``. They are returned unchanged if nothing is added.
        path: the directory of the settings.

    Raises:
        CheckpointError: the settings list what is no token.
    """
    tokenizer = Tokenizer.from_buffer(raw)
    held = tokenizer.get_added_tokens_decoder()
    tokens = _tokens_to_add(_Settings(path), held)
    special = {token.content for token in held.values() if token.special}
    for token in tokens:
        token.special = token.special or token.content in special  # the library forgets no special token
    if not tokens:
        return raw
    tokenizer.add_tokens(tokens)
    return tokenizer.to_str(pretty=True).encode()


class _Settings:
    """The settings of a directory, as transformers merges them.

    ``special_tokens_map.json`` and ``added_tokens.json`` count only without ``added_tokens_decoder``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._own = self._read(SETTINGS_NAME)
        self.listed = self._own.get("added_tokens_decoder")
        is_older = "added_tokens_decoder" not in self._own
        self._map = self._read(MAP_NAME) if is_older else {}
        self.listed_by_text = self._read(LIST_NAME) if is_older else {}

    def token(self, value: Any, *, special: bool = False) -> AddedToken:
        """A token that is given by its text, or by its text and flags. ``special`` is for a text alone."""
        flags: Any = {"content": value, "special": special} if isinstance(value, str) else value
        try:
            return AddedToken(**{key: flag for key, flag in flags.items() if key != "__type"})
        except (TypeError, AttributeError):
            raise self._refusal(value) from None

    def by_id(self, tokens: Mapping[Any, AddedToken]) -> list[AddedToken]:
        """The tokens in the order of their ids."""
        try:
            by_id = {int(index): token for index, token in tokens.items()}
            return [token for _, token in sorted(by_id.items())]
        except (ValueError, TypeError):
            raise self._refusal(dict(tokens)) from None

    def named(self) -> dict[str, AddedToken]:
        """The tokens with names: the common names first, then those of the model alone."""
        merged = self._own | self._map
        found = {name: merged.get(name) for name in NAMED}
        own = {name: value for name, value in self._own.items() if _is_own_name(name)}
        texts = {name: value for name, value in own.items() if isinstance(value, str)}
        found |= {name: value for name, value in merged.items() if _is_own_name(name) and name not in texts}
        found |= texts
        for source in (self._own, self._map):
            extra = source.get("extra_special_tokens")
            found |= extra if isinstance(extra, dict) else {}
        return {name: self.token(value, special=True) for name, value in found.items() if isinstance(value, str | dict)}

    def extra(self) -> list[AddedToken]:
        """The special tokens without a name."""
        own = self._own.get("extra_special_tokens") or self._own.get("additional_special_tokens")
        own = own if isinstance(own, list) else []
        more = self._map.get("extra_special_tokens")
        if isinstance(more, list):
            own = [*own, *(token for token in more if token not in own)]
        elif not own and isinstance(later := self._map.get("additional_special_tokens"), list):
            own = later
        return [self.token(value, special=True) for value in own]

    def _refusal(self, value: object) -> CheckpointError:
        return CheckpointError(
            f"the settings of the tokenizer in {self._path} list {reprlib.repr(value)}, which is no added token with "
            "an id: copy them again, or remove it"
        )

    def _read(self, name: str) -> dict[str, Any]:
        return read_json(self._path / name) if (self._path / name).is_file() else {}


def _is_own_name(name: str) -> bool:
    return name.endswith("_token") and name not in NAMED


def _tokens_to_add(settings: _Settings, held: Mapping[int, AddedToken]) -> list[AddedToken]:
    """The tokens to add, in order. ``held`` has those of ``tokenizer.json`` by their ids."""
    named, extra = settings.named(), settings.extra()
    known = {repr(token) for token in held.values()}
    tokens = [token for token in _listed(settings, named, extra, held) if repr(token) not in known]
    texts = {token.content for token in (*held.values(), *tokens)}
    names = {token.content for token in named.values()}
    for token in tokens:
        token.special = token.special or token.content in names
    for token in (*named.values(), *extra):
        if token.content not in texts:
            token.special = token.special or token.content in names
            tokens.append(token)
            texts.add(token.content)
    return tokens


def _listed(
    settings: _Settings, named: Mapping[str, AddedToken], extra: list[AddedToken], held: Mapping[int, AddedToken]
) -> list[AddedToken]:
    """The tokens that are listed with ids, in the order of these."""
    if isinstance(settings.listed, dict):
        return settings.by_id({index: settings.token(value) for index, value in settings.listed.items()})
    special = {token.content for name, token in named.items() if name in NAMED} | {token.content for token in extra}
    return settings.by_id(
        {
            index: AddedToken(text, normalized=text not in special, special=text in special)
            for text, index in settings.listed_by_text.items()
            if index not in held
        }
    )

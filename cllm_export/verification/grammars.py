"""Check that drafts do not change what a grammar allows: drafts that reach dead ends and ends of sequence.

Each grammar has one text, whatever the model is: a bias chooses it. The prompt repeats another beginning, so prompt
lookup drafts that one, and the grammar must reject it without a trace.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cllm_export.errors import CllmExportError, GrammarError, MissingExtraError, OptionError
from cllm_export.progress import Progress
from cllm_export.runtime.decoding.request import METHODS, SlotMethod
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.model import Model
from cllm_export.verification.report import Check

NAME = "drafts into dead ends of grammars change nothing"
PROPOSERS = ("lookup", "prompt")
BIAS = 1e4
"""Added to the logits of a text's letters. It is above the spread of any model's logits."""
MAX_NEW_TOKENS = 8
ROLES = "abcde"
"""The letters that the cases are written in."""
END = "."
"""Stands for an end-of-sequence token in a prompt."""


class Case(NamedTuple):
    """A grammar, and the text that it must give."""

    grammar: str
    prompt: str
    """A letter for each token."""
    text: str
    ends_dead: bool = False
    """Whether the text leads to a dead end, so that the request must end with GrammarError."""


CASES = (
    Case('start: "e" ("a" loop | "b" "c" "d")\nloop: "a" loop', "eaaaaeaaaaeaaaa", "ebcd"),
    Case(r'start: "e" ("a" /[^\s\S]/ | "b" "c" "d")', "eaaaaeaaaaeaaaa", "ebcd"),
    Case('start: "e" ("b" "c" "d")?', f"e{END}e{END}e{END}e{END}", "ebcd"),
    Case(r'start: "e" "b" /[^\s\S]/', "ebcebcebc", "eb", ends_dead=True),
)
"""A draft that never ends; one after which nothing can follow; one that ends the sequence; a dead end of the text."""


def check_grammars(model: Model, block_sizes: Sequence[int], progress: Progress) -> Check:
    """Decode every case with all methods, two draft sources and these block sizes. All must give the same text."""
    letters = _letters(model.codec, model.facts.eos_token_ids)
    longest = max(len(case.prompt) for case in CASES) + MAX_NEW_TOKENS
    if len(letters) < len(ROLES):
        return _not_checked("the tokenizer has too few tokens of single letters")
    if longest > model.facts.max_length:
        return _not_checked(f"it takes {longest} tokens, and the bundle holds {model.facts.max_length}")
    spelling = dict(zip(ROLES, letters, strict=False))
    letters[END] = (*model.facts.eos_token_ids, 0)[0]
    different, num_decoded, num_drafted = [], 0, 0
    for done, case in enumerate(_spelled(case, spelling) for case in CASES):
        for how in _settings(block_sizes):
            prompt = [letters[letter] for letter in case.prompt]
            bias = {letters[letter]: BIAS for letter in case.text}
            try:
                found, blocks = _outcome(model, prompt, grammar=case.grammar, logit_bias=bias, **how)
            except MissingExtraError as error:
                return _not_checked(f"needs the extra grammar ({error})")
            except OptionError as error:
                return _not_checked(str(error))
            num_decoded += 1
            num_drafted += any(letters[case.prompt[1]] in block[1:] for block in blocks)
            if found != _expected(case):
                different.append({"grammar": case.grammar, "expected": _expected(case), "found": found, **how})
        progress(NAME, done + 1, len(CASES))
    detail = f"{num_decoded - len(different)} of {num_decoded} requests equal, {num_drafted} with such drafts"
    if different:
        first = different[0]
        drafts = first["proposer"] or "no drafts"
        detail += f"; first difference: {first['method']}, {drafts}, n = {first['block_size']}"
        detail += f": {first['found']} for {first['expected']}"
    vacuous = not num_drafted
    return Check(
        name=NAME,
        passed=False if different else None if vacuous else True,
        detail=detail + ("; blocks of one token hold no draft" if vacuous else ""),
        data={"requests": num_decoded, "drafted": num_drafted, "differences": different},
    )


def _settings(block_sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    methods: Sequence[SlotMethod] = METHODS
    for size in block_sizes:
        for method in methods:
            for proposer in PROPOSERS if method != "autoregressive" else (None,):
                yield {"method": method, "proposer": proposer, "block_size": size}


def _expected(case: Case) -> str:
    return "dead end" if case.ends_dead else f"{case.text} (eos)"


def _outcome(model: Model, prompt: list[int], **options: Any) -> tuple[str, list[list[int]]]:
    """What a request came to, and its blocks.

    Raises:
        MissingExtraError: the extra ``grammar`` is not installed.
        OptionError: the model cannot take grammars.
    """
    try:
        found = model.generate(prompt, max_new_tokens=MAX_NEW_TOKENS, seed=0, **options)
    except GrammarError as error:
        return "dead end" if "dead end" in str(error) else str(error), []
    except (MissingExtraError, OptionError):
        raise
    except CllmExportError as error:
        return str(error), []
    return f"{found.text} ({found.finish_reason})", [record.block for record in found.forwards]


def _letters(codec: TextCodec, eos_token_ids: Collection[int]) -> dict[str, int]:
    """A token for each role of the cases: first the role's own letter. No token may end the sequence."""
    tokens = {letter: codec.tokenizer.token_to_id(letter) for letter in (*ROLES, *string.ascii_letters, *string.digits)}
    usable = {letter: token for letter, token in tokens.items() if token is not None and token not in eos_token_ids}
    return dict(list(usable.items())[: len(ROLES)])


def _spelled(case: Case, spelling: Mapping[str, str]) -> Case:
    """The case with other letters."""
    table = str.maketrans(dict(spelling))
    grammar = re.sub(r'"(\w)"', lambda match: f'"{spelling[match[1]]}"', case.grammar)
    return case._replace(grammar=grammar, prompt=case.prompt.translate(table), text=case.text.translate(table))


def _not_checked(reason: str) -> Check:
    return Check(name=NAME, passed=None, detail=f"not checked: {reason}")

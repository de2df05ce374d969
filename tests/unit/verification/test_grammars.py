"""The grammar check of ``verify`` finds drafts that change what a grammar allows, and says when it cannot look."""

from __future__ import annotations

import sys

import pytest
from tokenizers import Tokenizer, models

from cllm_export.runtime.decoding.constraint import Constraint
from cllm_export.runtime.decoding.request import METHODS
from cllm_export.verification.grammars import CASES, PROPOSERS, check_grammars
from tests.fakes import HashModel, byte_fallback_tokenizer, byte_level_tokenizer, make_model, write_bundle


def checked(tmp_path, *, block_sizes=(4, 8), **options):
    """The check of a bundle with these options, and what it told about its progress."""
    bundle = write_bundle(tmp_path / "bundle", **options)
    told = []
    model = make_model(bundle, HashModel(vocab_size=bundle.manifest.geometry.vocab_size, window=2))
    return check_grammars(model, block_sizes, lambda *progress: told.append(progress)), told


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer, byte_fallback_tokenizer])
def test_every_method_gives_the_text_of_every_grammar(tmp_path, tokenizer):
    pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
    check, told = checked(tmp_path, tokenizer=tokenizer())
    num = 2 * ((len(METHODS) - 1) * len(PROPOSERS) + 1) * len(CASES)  # autoregressive decoding has no proposer
    assert check.passed, check.detail
    assert check.detail.startswith(f"{num} of {num} requests equal")
    assert check.data["drafted"] >= num // 4
    assert [done for _, done, _ in told] == list(range(1, 1 + len(CASES)))


def test_a_matcher_that_reads_rejected_drafts_is_found(tmp_path, monkeypatch):
    """A constraint that asks llguidance to take back a draft, as its rollback promises."""
    pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
    follow = Constraint.state
    draft = byte_level_tokenizer().token_to_id("a")

    def with_a_guess(self, length):
        if length == len(self._text) and self._matcher.try_consume_tokens([draft]):
            self._matcher.compute_bitmask()
            self._matcher.rollback(1)
        return follow(self, length)

    monkeypatch.setattr(Constraint, "state", with_a_guess)
    check, _ = checked(tmp_path)
    assert check.passed is False
    assert "first difference: " in check.detail


def test_blocks_of_one_token_prove_nothing(tmp_path):
    pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
    check, _ = checked(tmp_path, block_sizes=(1,))
    assert check.passed is None
    assert "hold no draft" in check.detail


def test_without_the_extra_it_says_that_grammars_were_not_checked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    check, _ = checked(tmp_path)
    assert check.passed is None
    assert check.detail.startswith("not checked: needs the extra grammar")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eos_token_ids": ()}, "not checked: constrained output needs a model with an end-of-sequence token"),
        ({"max_length": 16}, "not checked: it takes 23 tokens, and the bundle holds 16"),
        (
            {"tokenizer": Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "word": 2}, unk_token="<pad>"))},
            "not checked: the tokenizer has too few tokens of single letters",
        ),
    ],
)
def test_a_bundle_that_cannot_be_checked_gives_the_reason(tmp_path, options, said):
    pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
    check, _ = checked(tmp_path, **options)
    assert check.passed is None
    assert check.detail.startswith(said)

"""Fixtures that every test may use: checkpoints and bundles, made on demand and once per session.

This module imports torch only when a test requests a checkpoint, because the unit tests run without torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cllm_export.bundle.manifest import Bundle, open_bundle
from cllm_export.runtime.decoding.block_size.latency_file import LATENCY_NAME
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from tests.checkpoints import MAX_POSITIONS, REALISTIC, SLOW_VARIANTS, VARIANTS, Variant, make_checkpoint
from tests.remembered_traces import remember_traces
from tests.required_runs import pytest_addoption, pytest_configure  # noqa: F401 - hooks that pytest calls

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cllm_export.exporter.parity.reference import Reference

PINNED: dict[str, Any] = {"fixed_shapes": True, "block_size": 8, "batch_size": 1}
"""Options of a build with fixed shapes. ``bench`` times no latencies for such a bundle, which saves seconds."""
DEMO = Path(__file__).parent.parent / "examples" / "text_to_sql"
TRAINED = {"demo": "checkpoint", "parent": "parent"}
"""Checkpoints of the repository's example: the CLLM, and the parent that it was made from."""
THREADS = 1

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its warning about forks would break tests that fork
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(item, "callspec", None)
        if (
            parameters is not None
            and parameters.params.get("name") in SLOW_VARIANTS
            and item.path.parent.name == "parity"
        ):
            item.add_marker(pytest.mark.slow)


class Workshop:
    """Makes each checkpoint, bundle, model and reference once. All of them are shared: copy one before changing it.

    Checkpoints and bundles are shared by all processes of a run, models and references by the tests of one process.
    """

    def __init__(self, root: Path, shared: Path) -> None:
        self._root, self._shared = root, shared
        self._made: dict[tuple[Any, ...], Any] = {}
        self._num_built = 0
        self._remembers_traces = False
        shared.mkdir(exist_ok=True)

    def checkpoint(self, name: str) -> Path:
        """A checkpoint by name: one of ``VARIANTS``, ``REALISTIC`` or ``TRAINED``, or ``small`` (one layer)."""
        self._remember_traces()
        if name in TRAINED:
            return DEMO / TRAINED[name]
        variant = Variant(num_layers=1) if name == "small" else (VARIANTS | REALISTIC)[name]
        directory = f"checkpoint-{name}"
        made = self._shared_once(
            ("checkpoint", name), lambda target: self._write_checkpoint(target / directory, variant)
        )
        return made / directory

    def new_checkpoint(self, name: str, variant: Variant) -> Path:
        """A checkpoint of any variant, in a directory of that name. No other process uses the directory."""
        self._remember_traces()
        return self._write_checkpoint(self._root / name, variant)

    @staticmethod
    def _write_checkpoint(target: Path, variant: Variant) -> Path:
        import torch
        from transformers.utils import logging

        torch.set_num_threads(THREADS)
        logging.disable_progress_bar()
        return make_checkpoint(target, variant)

    def bundle(self, name: str, **options: Any) -> Bundle:
        """The bundle of a checkpoint. ``options`` are those of ``BuildOptions``."""
        key = ("bundle", name, *sorted(options.items()))
        checkpoint = self.checkpoint(name)
        return self._once(
            key,
            lambda: open_bundle(
                self._shared_once(key, lambda target: self._build(checkpoint, target / f"bundle-{name}", options))
                / f"bundle-{name}"
            ),
        )

    def model(self, name: str, **options: Any) -> Model:
        """The bundle, loaded."""
        key = ("model", name, *sorted(options.items()))
        return self._once(key, lambda: load(self.bundle(name, **options).path, threads=THREADS, prefix_cache_bytes=0))

    def reference(self, name: str) -> Reference:
        """The checkpoint in PyTorch, which gives the margin of every token."""
        from cllm_export.exporter.parity.reference import Reference

        return self._once(("reference", name), lambda: Reference(self.checkpoint(name), max_length=MAX_POSITIONS))

    def stock(self, name: str) -> PreTrainedModel:
        """The checkpoint loaded in fp32 by transformers only, without code of this project."""
        import torch
        from transformers import AutoModelForCausalLM

        def load_stock() -> PreTrainedModel:
            return AutoModelForCausalLM.from_pretrained(self.checkpoint(name), dtype=torch.float32).eval()

        return self._once(("stock", name), load_stock)

    def copy(self, bundle: Bundle, target: Path) -> Bundle:
        """A copy of a bundle that a test may change, without latencies that ``bench`` measured on the shared one."""
        shutil.copytree(bundle.path, target, ignore=shutil.ignore_patterns(LATENCY_NAME))
        return open_bundle(target)

    def build(self, checkpoint: Path, **options: Any) -> Bundle:
        """Build a new bundle of any checkpoint."""
        self._num_built += 1
        return self._build(checkpoint, self._root / f"bundle-{self._num_built}-{checkpoint.name}", options)

    @staticmethod
    def _build(checkpoint: Path, target: Path, options: dict[str, Any]) -> Bundle:
        from cllm_export.exporter.options import BuildOptions
        from cllm_export.exporter.pipeline import build

        return build(checkpoint, target, BuildOptions(**options))

    def _remember_traces(self) -> None:
        """Enable the trace cache. Tests that request a checkpoint will build a bundle, so they need torch anyway."""
        if not self._remembers_traces:
            remember_traces(self._shared / "traces")
            self._remembers_traces = True

    def _once(self, key: tuple[Any, ...], make: Any) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _shared_once(self, key: tuple[Any, ...], make: Callable[[Path], object]) -> Path:
        """A directory that ``make`` fills in the first process that requests it. Other processes wait."""
        directory = self._shared / hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        ready = directory / "ready"
        with directory.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not ready.exists():
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir()
                make(directory)
                ready.touch()
        return directory


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Checkpoints and bundles, each made once per session."""
    own = tmp_path_factory.getbasetemp()
    return Workshop(
        tmp_path_factory.mktemp("workshop"), (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    )

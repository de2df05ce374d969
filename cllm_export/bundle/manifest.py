"""The bundle, a directory that the exporter writes and the runtime reads, and its manifest.

    bundle.json            the manifest: everything the runtime must know, and sha256 and size of every other file
    model.onnx             the greedy graph; further graphs are separate files (lookahead.onnx, tensorrt.onnx)
    weights.bin            the one weights file that all graphs share; linked weights stay in the checkpoint instead
    tokenizer.json         and, if the checkpoint has them, chat_template.jinja, more_chat_templates.json and
                           generation_config.json
    parity.json            written by ``verify``; not part of the bundle, but holds the bundle's fingerprint

A bundle is written beside its target and exchanged with it in one step. A kill at any moment leaves either the old
bundle or the new one. This module neither exports nor runs anything.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from cllm_export.bundle.contract import CONTRACT_VERSION, PRECISIONS, FixedShapes, Geometry, Precision
from cllm_export.bundle.linked_weights import LinkedFile, LinkedWeight, check_linked
from cllm_export.bundle.quantization import Agreement, Quantization
from cllm_export.bundle.storage import recover, sha256_of
from cllm_export.checks import from_fields, require_at_least, require_one_of, require_plain_name
from cllm_export.errors import BundleError, BundleVersionError, ChecksumError
from cllm_export.progress import Progress

SCHEMA_VERSION = 3

MANIFEST_NAME = "bundle.json"

WEIGHTS_NAME = "weights.bin"

TOKENIZER_NAME = "tokenizer.json"

CHAT_TEMPLATE_NAME = "chat_template.jinja"

MORE_CHAT_TEMPLATES_NAME = "more_chat_templates.json"
"""The chat templates other than the default, as texts by name."""

GENERATION_CONFIG_NAME = "generation_config.json"

PARITY_NAME = "parity.json"

GREEDY_GRAPH, LOOKAHEAD_GRAPH, TENSORRT_GRAPH = "greedy", "lookahead", "tensorrt"
"""The names of a bundle's graphs. TensorRT parses the graph of its name, in bundles that it may get."""

Loop = Literal["sliding", "block"]

ProposerName = Literal["pad", "repeat", "prompt", "lookup"]

LOOPS: tuple[Loop, ...] = get_args(Loop)

PROPOSERS: tuple[ProposerName, ...] = get_args(ProposerName)


@dataclass(frozen=True, kw_only=True)
class GraphEntry:
    """One graph of a bundle: its file and, if it is pinned, its shapes."""

    file: str
    fixed_shapes: FixedShapes | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedWith:
    """The decoding settings a model was consistency-tuned with. It decodes fastest with the same settings.

    At a fixed n, another proposer or loop gives the same tokens. Another n may round a near tie to another token.
    """

    block_size: int
    proposer: ProposerName
    loop: Loop

    def __post_init__(self) -> None:
        require_at_least("trained_with.block_size", self.block_size, 1)
        require_one_of("trained_with.proposer", self.proposer, PROPOSERS)
        require_one_of("trained_with.loop", self.loop, LOOPS)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Size in bytes and sha256 (hex) of one file of a bundle."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of ``bundle.json``."""

    family: str
    graphs: dict[str, GraphEntry]
    geometry: Geometry
    block_size: int
    max_length: int
    batch_size: int
    precision: Precision
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    trained_with: TrainedWith | None
    special_tokens: dict[str, str]
    """bos_token, eos_token and so on by name, as chat templates refer to them."""
    checkpoint_fingerprint: str
    """sha256 over the checkpoint's config and the headers and contents of its weight files. See the exporter."""
    tool_versions: dict[str, str]
    files: dict[str, FileEntry]
    linked_files: dict[str, LinkedFile] = field(default_factory=dict)
    """Weight files that the bundle reads from the checkpoint's directory, by the name that the graphs record."""
    linked_weights: dict[str, LinkedWeight] = field(default_factory=dict)
    """Graph initializer -> its place in a linked file."""
    quantization: Quantization | None = None
    """What was quantised. ``precision`` is the dtype of everything else."""
    schema_version: int = SCHEMA_VERSION
    contract_version: int = CONTRACT_VERSION

    def __post_init__(self) -> None:
        for name in ("block_size", "max_length", "batch_size"):
            require_at_least(name, getattr(self, name), 1)
        require_one_of("precision", self.precision, PRECISIONS)
        for name in self.files:
            require_plain_name(name)
        if WEIGHTS_NAME not in self.files or GREEDY_GRAPH not in self.graphs:
            raise ValueError(f"a bundle needs {WEIGHTS_NAME} and a {GREEDY_GRAPH} graph")
        if missing := sorted({entry.file for entry in self.graphs.values()} - set(self.files)):
            raise ValueError(f"graph file {missing[0]} is not listed")
        if self.max_length > self.geometry.cache_length or self.block_size > self.geometry.max_block_size:
            raise ValueError("max_length or block_size is beyond what the geometry holds")
        self._check_linked()
        self._check_tokens()

    def _check_linked(self) -> None:
        for name in self.linked_files:
            require_plain_name(name)
        used = {weight.file for weight in self.linked_weights.values()}
        if used != set(self.linked_files) or used & set(self.files):
            raise ValueError(f"linked weights lie in {sorted(used)}, linked files are {sorted(self.linked_files)}")

    def _check_tokens(self) -> None:
        ids = (*self.eos_token_ids, *(() if self.pad_token_id is None else (self.pad_token_id,)))
        if any(type(token) is not int or not 0 <= token < self.geometry.vocab_size for token in ids):
            raise ValueError(f"eos_token_ids and pad_token_id must be tokens of the vocabulary, got {ids}")
        texts = (*self.special_tokens.items(), *self.tool_versions.items())
        if not all(isinstance(text, str) for pair in texts for text in (*pair, self.family)):
            raise ValueError("special_tokens, tool_versions and family must be text")

    def to_json(self) -> str:
        """The manifest as stable, human-readable JSON: equal manifests give equal bytes."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: Path) -> Manifest:
        """Parse a manifest; unknown and missing keys are errors.

        Raises:
            BundleError: the text is not a manifest.
            BundleVersionError: the manifest was written by another schema or contract version.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{source} is not valid JSON ({error}); rebuild the bundle") from None
        if not isinstance(raw, dict) or "schema_version" not in raw:
            raise BundleError(f"{source} is not a bundle manifest: it has no schema_version; rebuild the bundle")
        _check_versions(raw, source)
        try:
            return _manifest_from(raw)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise BundleError(f"{source} is damaged: {error}; rebuild the bundle") from None


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle: every file is present and has the right size. ``check_files`` also compares checksums."""

    path: Path
    manifest: Manifest
    fingerprint: str
    """sha256 of the manifest. The manifest holds the sha256 of every other file."""

    def file(self, name: str) -> Path:
        """Path of one listed file."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} lists no file {name!r}; it has {', '.join(sorted(self.manifest.files))}")
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether the bundle lists the file."""
        return name in self.manifest.files

    def graph_path(self, graph: str = GREEDY_GRAPH) -> Path:
        """Path of one graph's ONNX file."""
        entry = self.manifest.graphs.get(graph)
        if entry is None:
            raise BundleError(f"{self.path} has no {graph!r} graph; it has {', '.join(sorted(self.manifest.graphs))}")
        return self.file(entry.file)

    @property
    def tensorrt_graph(self) -> str:
        """Name of the graph that TensorRT parses."""
        return tensorrt_graph_of(self.manifest.graphs)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, in the bundle or linked."""
        linked = sum(weight.length for weight in self.manifest.linked_weights.values())
        return self.manifest.files[WEIGHTS_NAME].size + linked

    def check_files(self, progress: Progress | None = None) -> None:
        """Read every file, linked ones too, and compare its sha256 with the manifest.

        Raises:
            ChecksumError: a file differs; the message names the file and both checksums.
        """
        own = {self.path / name: (entry.size, entry.sha256) for name, entry in self.manifest.files.items()}
        linked = {Path(file.path): (file.size, file.sha256) for file in self.manifest.linked_files.values()}
        total, done = sum(size for size, _ in (*own.values(), *linked.values())), 0
        for path, (size, expected) in sorted({**own, **linked}.items()):
            actual = sha256_of(path)
            if actual != expected:
                advice = "copy the bundle again" if path in own else "put the checkpoint back"
                raise ChecksumError(
                    f"{path} is corrupted: its sha256 is {actual}, the manifest says {expected}; "
                    f"{advice} or rebuild the bundle"
                )
            done += size
            if progress:
                progress("checksums", done, total)


def tensorrt_graph_of(graphs: Collection[str]) -> str:
    """Name of the graph that TensorRT parses, of a bundle with these graphs."""
    return TENSORRT_GRAPH if TENSORRT_GRAPH in graphs else GREEDY_GRAPH


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle and check that every listed file exists with its listed size. Repair an interrupted exchange first.

    Raises:
        BundleError: the path is not a bundle, or a file is missing or has another size.
        BundleVersionError: the bundle was written by another schema or contract version.
    """
    path = Path(path)
    manifest_path = path / MANIFEST_NAME
    try:
        recover(Path(os.path.abspath(path)))
        is_directory = path.is_dir()
    except OSError as error:
        raise BundleError(f"{path} cannot be opened: {error.strerror}") from None
    if not is_directory:
        raise BundleError(f"{path} is not a bundle: there is no such directory; make one with: cllm-export build")
    try:
        text = manifest_path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = " (it looks like a checkpoint: run cllm-export build on it)" if (path / "config.json").exists() else ""
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST_NAME}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{manifest_path} cannot be read: {error}") from None
    manifest = Manifest.from_json(text, source=manifest_path)
    for name, entry in manifest.files.items():
        _check_size(path, name, entry)
    check_linked(manifest.linked_files, manifest.linked_weights)
    return Bundle(path=path, manifest=manifest, fingerprint=hashlib.sha256(text.encode()).hexdigest())


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``bundle.json`` into a staged directory."""
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def describe_files(directory: Path, known: Mapping[str, str] | None = None) -> dict[str, FileEntry]:
    """Size and sha256 of every file of a staged directory. ``known`` holds checksums computed while writing."""
    paths = sorted(path for path in directory.iterdir() if path.name != MANIFEST_NAME)
    sums = {path.name: (known or {}).get(path.name) or sha256_of(path) for path in paths}
    return {path.name: FileEntry(size=path.stat().st_size, sha256=sums[path.name]) for path in paths}


def _check_versions(raw: dict[str, Any], source: Path) -> None:
    for key, own in (("schema_version", SCHEMA_VERSION), ("contract_version", CONTRACT_VERSION)):
        found = raw.get(key)
        if found == own:
            continue
        if isinstance(found, int) and found > own:
            raise BundleVersionError(f"{source} has {key} {found}, this cllm-export reads {own}: upgrade cllm-export")
        raise BundleVersionError(
            f"{source} has {key} {found!r}, this cllm-export reads {own}: "
            f"rebuild it with: cllm-export build CHECKPOINT --output {source.parent} --force"
        )


def _manifest_from(raw: dict[str, Any]) -> Manifest:
    raw = dict(raw)
    raw["graphs"] = {name: _graph_entry_from(entry) for name, entry in raw["graphs"].items()}
    raw["geometry"] = from_fields(Geometry, raw["geometry"])
    raw["trained_with"] = from_fields(TrainedWith, raw["trained_with"]) if raw["trained_with"] is not None else None
    raw["files"] = {name: from_fields(FileEntry, entry) for name, entry in raw["files"].items()}
    raw["linked_files"] = {name: from_fields(LinkedFile, entry) for name, entry in raw["linked_files"].items()}
    raw["linked_weights"] = {
        name: from_fields(LinkedWeight, {**entry, "shape": tuple(entry["shape"])})
        for name, entry in raw["linked_weights"].items()
    }
    raw["eos_token_ids"] = tuple(raw["eos_token_ids"])
    raw["quantization"] = _quantization_from(raw.get("quantization"))
    return from_fields(Manifest, raw)


def _quantization_from(raw: dict[str, Any] | None) -> Quantization | None:
    if raw is None:
        return None
    measured = raw.get("agreement")
    lists = {name: tuple(raw.get(name, ())) for name in ("engines", "weights", "rotated")}
    settled = {**lists, "agreement": from_fields(Agreement, measured) if measured is not None else None}
    return from_fields(Quantization, raw | settled)


def _graph_entry_from(raw: dict[str, Any]) -> GraphEntry:
    fixed = raw.get("fixed_shapes")
    return from_fields(
        GraphEntry, {**raw, "fixed_shapes": from_fields(FixedShapes, fixed) if fixed is not None else None}
    )


def _check_size(directory: Path, name: str, entry: FileEntry) -> None:
    path = directory / name
    if path.is_symlink() and os.path.dirname(os.path.realpath(path)) != os.path.realpath(directory):
        raise BundleError(f"{path} is a link that leaves the bundle; replace it with the file itself")
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise BundleError(f"{path} is missing; copy the bundle again or rebuild it") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    if size != entry.size:
        raise BundleError(f"{path} has {size} bytes, the manifest says {entry.size}; copy the bundle again or rebuild")

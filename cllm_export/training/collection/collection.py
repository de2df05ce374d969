"""A collection of Jacobi trajectories on disk: Parquet shards, and a manifest that pins them.

    trajectories.json      schema version, settings, every shard with its sha256, dropped prompts, the summary
    shard-00000.parquet    a row for each prompt that was kept, in the order of the prompt file

A shard holds the trajectories of a fixed range of prompts. The manifest lists it only when it is complete. An
interrupted collection therefore has a shorter list, and continues at its end. Columns of a shard, where F is the number
of forwards of a prompt:

    id, index              id in the prompt file; number of the prompt in the file, from 0
    prompt_ids, new_ids    tokens of the prompt; the fixed point, which is the decoded answer with end-of-sequence
    finish_reason          why decoding ended
    write_index [F]        position of each block's first token
    block [F][n]           the block that each forward verified: the states of the trajectory
    next_ids [F][n]        the model's prediction after each token of the block
    num_accepted [F]       rows of the block that are right, minus those past the end of the answer
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cllm_export.bundle.manifest import Loop, ProposerName
from cllm_export.bundle.storage import check_parent, sha256_of, unfinished_files, write_text
from cllm_export.checks import from_fields, require_at_least, require_plain_name
from cllm_export.errors import BundleError, OutputError, TrajectoryError

SCHEMA_VERSION = 1
MANIFEST_NAME = "trajectories.json"
EngineName = Literal["onnxruntime", "torch"]
MAX_NAMED = 5
"""Number of ids of dropped prompts kept for each reason, in a shard and in the whole collection."""
AGAIN = "remove the directory and collect again"


@dataclass(frozen=True, kw_only=True)
class CollectionSettings:
    """Everything that determines the shards of a collection."""

    model_fingerprint: str
    """Fingerprint of the checkpoint, also where a bundle built from it decodes: see ``Checkpoint.fingerprint``."""
    bundle_fingerprint: str | None
    tokenizer_sha256: str
    prompts_sha256: str
    num_prompts: int
    engine: EngineName
    device: str
    loop: Loop
    proposer: ProposerName
    block_size: int
    seed: int
    max_new_tokens: int | None
    max_length: int
    batch_size: int
    shard_size: int
    """Prompts in a shard."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "block_size", "max_length", "batch_size", "shard_size"):
            require_at_least(name, getattr(self, name), 1)

    @property
    def num_shards(self) -> int:
        return -(-self.num_prompts // self.shard_size)


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """Prompts that were dropped for one reason."""

    count: int
    ids: tuple[str, ...]
    """Ids of the first few."""
    detail: str
    """Why the first was dropped, in words."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard: its file, its number of rows, its sha256, and the dropped prompts of its range."""

    file: str
    num_rows: int
    sha256: str
    dropped: dict[str, Dropped]


@dataclass(frozen=True, kw_only=True)
class CollectionManifest:
    """The content of ``trajectories.json``."""

    settings: CollectionSettings
    shards: tuple[ShardEntry, ...] = ()
    summary: dict[str, Any] | None = None
    """None until the last shard is listed."""
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Stable JSON: equal manifests give equal bytes."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One row of a shard; see the columns above."""

    id: str
    index: int
    prompt_ids: Sequence[int]
    new_ids: Sequence[int]
    finish_reason: str
    write_index: Sequence[int] = field(repr=False)
    block: Sequence[Sequence[int]] = field(repr=False)
    next_ids: Sequence[Sequence[int]] = field(repr=False)
    num_accepted: Sequence[int] = field(repr=False)


def check_collection_output(directory: Path) -> None:
    """Refuse an output that is no collection, before any work. It may be missing or empty.

    Raises:
        OutputError: it is not a directory, or holds something else.
    """
    check_parent(directory)
    if not directory.exists() and not directory.is_symlink():
        return
    if not directory.is_dir():
        raise OutputError(f"{directory} exists and is no directory; choose another output", fields=("output",))
    strange = {path.name for path in directory.iterdir()} - {path.name for path in unfinished_files(directory)}
    if strange and MANIFEST_NAME not in strange:
        raise OutputError(
            f"{directory} exists and is not a collection of trajectories; choose another output", fields=("output",)
        )


def read_manifest(directory: Path) -> CollectionManifest | None:
    """The manifest of a collection, complete or not; None if there is none.

    Raises:
        TrajectoryError: it cannot be read, is damaged, or has another schema version.
    """
    path = directory / MANIFEST_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TrajectoryError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise TrajectoryError(f"{path} is not valid JSON ({error}); {AGAIN}") from None
    found = raw.get("schema_version") if isinstance(raw, dict) else None
    if found != SCHEMA_VERSION:
        raise TrajectoryError(f"{path} has schema version {found!r}, this cllm-export reads {SCHEMA_VERSION}; {AGAIN}")
    try:
        return _manifest_from(raw)
    except (TypeError, KeyError, ValueError, AttributeError, BundleError) as error:
        raise TrajectoryError(f"{path} is damaged: {error}; {AGAIN}") from None


def read_complete(directory: Path) -> CollectionManifest:
    """The manifest of a complete collection.

    Raises:
        TrajectoryError: there is none, it is not complete, or it is damaged.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise TrajectoryError(
            f"{directory} is not a collection of trajectories: it has no {MANIFEST_NAME}; "
            "make one with: cllm-export collect"
        )
    if manifest.summary is None:
        raise TrajectoryError(
            f"{directory} is not complete: it has {len(manifest.shards)} of {manifest.settings.num_shards} shards; "
            "run the same cllm-export collect again, which goes on where it stopped"
        )
    return manifest


def check_shards(directory: Path, manifest: CollectionManifest) -> None:
    """Compare every listed shard with its sha256.

    Raises:
        TrajectoryError: a shard is missing or differs. The message names it.
    """
    for shard in manifest.shards:
        path = directory / shard.file
        try:
            actual = sha256_of(path)
        except OSError as error:
            raise TrajectoryError(f"{path} cannot be read: {error.strerror}; {AGAIN}") from None
        if actual != shard.sha256:
            raise TrajectoryError(
                f"{path} is corrupted: its sha256 is {actual[:12]}, the manifest says {shard.sha256[:12]}; {AGAIN}"
            )


def write_manifest(directory: Path, manifest: CollectionManifest) -> None:
    """Write the manifest, or replace it, in one step.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(directory / MANIFEST_NAME, manifest.to_json())


def merge_dropped(parts: Sequence[Mapping[str, Dropped]]) -> dict[str, Dropped]:
    """Merge the dropped prompts of several parts: total counts, and the ids of the first few."""
    counts: Counter[str] = Counter()
    ids: dict[str, tuple[str, ...]] = {}
    details: dict[str, str] = {}
    for part in parts:
        for reason, entry in part.items():
            counts[reason] += entry.count
            ids[reason] = (ids.get(reason, ()) + tuple(entry.ids))[:MAX_NAMED]
            details.setdefault(reason, entry.detail)
    return {name: Dropped(count=counts[name], ids=ids[name], detail=details[name]) for name in sorted(counts)}


def _manifest_from(raw: dict[str, Any]) -> CollectionManifest:
    settings = from_fields(CollectionSettings, raw["settings"])
    shards = tuple(_shard_from(entry) for entry in raw["shards"])
    if len(shards) > settings.num_shards or (raw["summary"] is not None and len(shards) != settings.num_shards):
        raise ValueError(f"{len(shards)} shards are listed, {settings.num_shards} are expected")
    return from_fields(CollectionManifest, {**raw, "settings": settings, "shards": shards})


def _shard_from(raw: dict[str, Any]) -> ShardEntry:
    require_plain_name(raw["file"])
    dropped = {
        name: from_fields(Dropped, {**entry, "ids": tuple(entry["ids"])}) for name, entry in raw["dropped"].items()
    }
    return from_fields(ShardEntry, {**raw, "dropped": dropped})

"""Reads trajectories for training: a complete, checked collection, and its samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cllm_export.errors import TrajectoryError
from cllm_export.training.collection.collection import (
    CollectionManifest,
    Dropped,
    Trajectory,
    check_shards,
    merge_dropped,
    read_complete,
)
from cllm_export.training.collection.shards import read_shard
from cllm_export.training.data.samples import Sample


class Trajectories:
    """An open, complete collection: every shard exists and has the sha256 that the manifest lists."""

    def __init__(self, directory: Path, manifest: CollectionManifest) -> None:
        self.directory = directory
        self.manifest = manifest

    def __len__(self) -> int:
        return sum(shard.num_rows for shard in self.manifest.shards)

    @property
    def dropped(self) -> dict[str, Dropped]:
        """Reason -> prompts dropped for it, in the whole collection."""
        return merge_dropped([shard.dropped for shard in self.manifest.shards])

    def require_same_model(self, model_fingerprint: str, tokenizer_sha256: str) -> None:
        """Refuse trajectories of another model, or of another tokenizer, whose token ids differ in meaning.

        Raises:
            TrajectoryError: they are from another model or tokenizer. The message names both fingerprints.
        """
        settings = self.manifest.settings
        for what, theirs, wanted in (
            ("tokenizer", settings.tokenizer_sha256, tokenizer_sha256),
            ("model", settings.model_fingerprint, model_fingerprint),
        ):
            if theirs != wanted:
                raise TrajectoryError(
                    f"{self.directory} holds trajectories of another {what}: theirs has sha256 {theirs[:12]}, this one "
                    f"{wanted[:12]}; collect them again with: cllm-export collect CHECKPOINT"
                )

    def rows(self) -> Iterator[Trajectory]:
        """Every trajectory, in the order of the prompt file. Only one shard at a time is in memory."""
        for shard in self.manifest.shards:
            yield from (Trajectory(**row) for row in read_shard(self.directory / shard.file).to_pylist())

    def samples(self, *, with_states: bool = False) -> Iterator[Sample]:
        """Prompt and fixed point as training samples. ``with_states`` adds each forward's block and its position."""
        columns = ["id", "prompt_ids", "new_ids", *(["write_index", "block"] if with_states else [])]
        for shard in self.manifest.shards:
            for row in read_shard(self.directory / shard.file, columns).to_pylist():
                states = zip(row["write_index"], map(tuple, row["block"]), strict=True) if with_states else ()
                yield Sample(
                    id=row["id"],
                    tokens=(*row["prompt_ids"], *row["new_ids"]),
                    num_prompt=len(row["prompt_ids"]),
                    states=tuple(states),
                )


def read_trajectories(directory: str | Path) -> Trajectories:
    """Open a collection and check every shard against the manifest.

    Raises:
        TrajectoryError: the directory holds no collection, or one that is incomplete, damaged or of another schema
            version.
    """
    directory = Path(directory)
    manifest = read_complete(directory)
    check_shards(directory, manifest)
    return Trajectories(directory, manifest)

"""Shards of a collection, in Parquet. Their columns are listed in ``collection.py``."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cllm_export.bundle.storage import write_bytes
from cllm_export.errors import TrajectoryError
from cllm_export.training.collection.collection import AGAIN, Dropped, ShardEntry, Trajectory

_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "index": pa.int64(),
        "prompt_ids": _IDS,
        "new_ids": _IDS,
        "finish_reason": pa.string(),
        "write_index": _IDS,
        "block": pa.list_(_IDS),
        "next_ids": pa.list_(_IDS),
        "num_accepted": _IDS,
    }
)


def write_shard(directory: Path, number: int, rows: Sequence[Trajectory], dropped: Mapping[str, Dropped]) -> ShardEntry:
    """Write one complete shard, or nothing. Equal rows give equal bytes.

    Raises:
        OutputError: it cannot be written.
    """
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=SCHEMA), sink, compression="zstd")
    name = f"shard-{number:05}.parquet"
    write_bytes(directory / name, sink.getvalue())
    sha256 = hashlib.sha256(sink.getvalue()).hexdigest()
    return ShardEntry(file=name, num_rows=len(rows), sha256=sha256, dropped=dict(dropped))


def read_shard(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read one shard, or some of its columns.

    Raises:
        TrajectoryError: the file is not a shard of trajectories.
    """
    try:
        table = pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise TrajectoryError(f"{path} is not a shard of trajectories: {error}; {AGAIN}") from None
    expected = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
    if not table.schema.equals(expected):
        raise TrajectoryError(f"{path} has other columns than a shard of trajectories; {AGAIN}")
    return table

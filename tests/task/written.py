"""Rows of a test in each format of files that hold one row each."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from offsite.task.readers.columns import columns_of
from offsite.task.readers.tables import read

Rows = Sequence[Mapping[str, Any]]


def as_jsonl(path: Path, rows: Rows) -> Path:
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.with_suffix(".jsonl")


def as_json(path: Path, rows: Rows) -> Path:
    path.with_suffix(".json").write_text(json.dumps(rows))
    return path.with_suffix(".json")


def as_parquet(path: Path, rows: Rows) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def as_arrow(path: Path, rows: Rows) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(path.with_suffix(".arrow"), table.schema) as file:
        file.write_table(table)
    return path.with_suffix(".arrow")


def as_csv(path: Path, rows: Rows) -> Path:
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()})
    return path.with_suffix(".csv")


NESTED = [as_jsonl, as_json, as_parquet, as_arrow]
ALL = [*NESTED, as_csv]


def found(path: Path, fields: Mapping[str, type], names: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The records of a file, for its owner."""
    return [dict(record) for record in read(path, reader=None, columns=columns_of(fields, names=names or {}))]

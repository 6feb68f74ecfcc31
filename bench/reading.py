"""Time and memory of reading records: this library, pyarrow and `datasets`, on the same files in one run.

`python -m bench.reading` writes short JSON lines and shards of Parquet, reads them in fresh processes, and prints JSON.
`stream` and `read` are this library's; the others give each row's text to Python as well, since a tokenizer takes it
there. `datasets` is left out where that library is not installed.
"""

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

SHARDS = 8
CHARACTERS = 1000  # of a text in Parquet
PRINTABLE = bytes(32 + byte % 64 for byte in range(256))
PYARROW, STREAM, READ, DATASETS = "pyarrow", "stream", "read", "datasets"
WAYS = (PYARROW, STREAM, READ, DATASETS)


def write_jsonl(path: Path, rows: int) -> None:
    """Writes short rows, each with a number, a text of some words and a label."""
    dice, words = random.Random(1), [f"word{number}" for number in range(500)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = {"id": number, "text": " ".join(dice.choices(words, k=8)), "label": "spam"}
            file.write(json.dumps(row) + "\n")


def write_parquet(path: Path, megabytes: int) -> None:
    """Writes shards of texts that do not compress, so that the files have about this size together."""
    import pyarrow
    import pyarrow.parquet

    path.mkdir()
    dice, rows = random.Random(2), megabytes * 1_000_000 // CHARACTERS // SHARDS
    for shard in range(SHARDS):
        texts = [dice.randbytes(CHARACTERS).translate(PRINTABLE).decode() for _ in range(rows)]
        table = pyarrow.table({"id": list(range(rows)), "text": texts})
        pyarrow.parquet.write_table(table, path / f"part-{shard:05}-of-{SHARDS:05}.parquet", row_group_size=10_000)


def _ours(path: Path, *, whole: bool) -> Iterable[str]:
    from offsite.task.readers.columns import columns_of
    from offsite.task.readers.tables import read, stream

    columns = columns_of({"text": str}, names={})
    records = read(path, reader=None, columns=columns) if whole else stream(path, reader=None, columns=columns)
    return (record["text"] for record in records)


def _pyarrow(path: Path) -> Iterator[str]:
    import pyarrow.dataset

    kind = "parquet" if path.is_dir() else "json"
    for batch in pyarrow.dataset.dataset(path, format=kind).to_batches(columns=["text"]):
        yield from batch.column("text").to_pylist()


def _datasets(path: Path) -> Iterator[str]:
    from datasets import load_dataset

    kind, files = ("parquet", sorted(map(str, path.iterdir()))) if path.is_dir() else ("json", [str(path)])
    rows = load_dataset(kind, data_files=files, split="train", streaming=True)
    return (row["text"] for row in rows)


TEXTS: dict[str, Callable[[Path], Iterable[str]]] = {
    PYARROW: _pyarrow,
    STREAM: lambda path: _ours(path, whole=False),
    READ: lambda path: _ours(path, whole=True),
    DATASETS: _datasets,
}


def read_once(path: Path, way: str) -> dict[str, Any]:
    """Reads a file or folder, and returns the number of rows and characters, seconds, and megabytes of memory."""
    rows, characters, before = 0, 0, 0.0
    began, cpu = time.perf_counter(), time.process_time()
    for text in TEXTS[way](path):
        if not rows:
            before = _status("VmRSS")  # imports and the first rows
        rows, characters = rows + 1, characters + len(text)
    return {
        "rows": rows,
        "characters": characters,
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "mb_at_first_row": round(before),
        "peak_mb": round(_status("VmHWM")),
    }


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def fresh(path: Path, way: str) -> dict[str, Any]:
    """Runs `read_once` in a process of its own and returns its result."""
    command = [sys.executable, "-m", "bench.reading", "--path", str(path), "--way", way]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(path.parent / "hub")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(path: Path, repeats: int) -> dict[str, Any]:
    """Reads a file or folder in all ways in turn; returns medians of the CPU time, and highest peaks, by way.

    Raises:
      RuntimeError: two ways read other rows or other texts.
    """
    ways = [way for way in WAYS if way != DATASETS or importlib.util.find_spec(DATASETS)]
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            runs[way].append(fresh(path, way))
    if len({(run["rows"], run["characters"]) for of in runs.values() for run in of}) != 1:
        raise RuntimeError("the ways read different rows")
    cpu = {way: statistics.median(run["cpu_seconds"] for run in of) for way, of in runs.items()}
    return {
        "cpu_seconds": cpu,
        "to_pyarrow": {way: round(seconds / cpu[PYARROW], 2) for way, seconds in cpu.items()},
        "to_datasets": {way: round(seconds / cpu[DATASETS], 2) for way, seconds in cpu.items() if DATASETS in cpu},
        "peak_mb": {way: max(run["peak_mb"] for run in of) for way, of in runs.items()},
        "runs": runs,
    }


def main(argv: list[str] | None = None) -> int:
    """Measures and prints JSON, or reads once."""
    parser = argparse.ArgumentParser(description="time and memory of reading records")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of JSON lines")
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the shards of Parquet")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.way is not None:
        print(json.dumps(read_once(args.path, args.way)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"load_before": round(os.getloadavg()[0], 2), "cpus": os.cpu_count()}
        for name, write, size in (
            ("rows.jsonl", write_jsonl, args.rows),
            ("shards", write_parquet, args.megabytes),
        ):
            for share in (2, 1):  # memory is flat where twice the rows take as much
                path = Path(folder) / f"{share}-{name}"
                write(path, size // share)
                result[f"{name} of {size // share}"] = measure(path, args.repeats)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

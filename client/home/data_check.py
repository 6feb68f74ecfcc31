"""The check of a site's own data for its owner, at `offsite client init` and by `offsite client doctor`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from offsite.errors import DataError
from offsite.task.file_check import check_file
from offsite.task.findings import Findings
from offsite.task.readers.columns import Columns, columns_for
from offsite.task.readers.image_files import check_images
from offsite.task.readers.tables import check_readable, stream
from offsite.task.record_fields import FIELDS
from offsite.task.records import is_empty
from offsite.task.spec import Record

PROBED = 100  # rows that show which tasks' columns a file has
_PLACE = re.compile(r"\b(line|row|text|image)=(\d+)")


@dataclass(frozen=True)
class OwnData:
    """What a check of a site's data found.

    Attributes:
      records: records by each task that can read all of them.
      faults: faults of the data, for the task that reads most of them; () where a task reads all.
      unnamed: why no task finds its columns; empty where a task does.
      notes: lines about files of a folder that are no records.
    """

    records: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    unnamed: str = ""
    notes: tuple[str, ...] = ()


def check_own_data(
    path: Path, *, reader: str, column: str, names: Mapping[str, str], labels: Mapping[str, str]
) -> OwnData:
    """Reads a site's data to their end with the fields of each task that the first rows fit.

    Args:
      path: file or folder of the records.
      reader: key of `READERS`; empty to choose the reader by the suffix.
      column: column of a task's main field; empty for the field's own name.
      names: field -> name of its column.
      labels: value in the file -> name of the model's label.

    Raises:
      DataError: the data do not exist.
      ConfigError: `site.toml` names a field that no task has.
    """
    if not path.exists():
        raise DataError(f"data={str(path)!r}: no such file or folder; give the place of the site's records")
    try:
        check_readable(path, reader=reader or None)
    except DataError as error:
        return OwnData(unnamed=str(error)) if _needs_a_name(path, str(error)) else OwnData(faults=(str(error),))
    columns = {task: columns_for(task, column=column, names=names, labels=labels) for task in FIELDS}
    refusals = {task: _refusal(path, reader, own) for task, own in columns.items()}
    fitting = [task for task, line in refusals.items() if not line]
    readable = fitting or [task for task, line in refusals.items() if not _needs_a_name(path, line)]
    if not readable:
        return OwnData(unnamed=_of_the_meant_task(refusals, names, column))
    found, attempts, notes = _read_all(path, reader, {task: columns[task] for task in readable})
    return OwnData(found, notes=notes) if found else OwnData(faults=min(attempts, key=len))


def _refusal(path: Path, reader: str, columns: Columns) -> str:
    """Returns the first fault of the first rows where none of them is a record with these columns, else ""."""
    faults = list[str]()
    try:
        rows = stream(
            path,
            reader=reader or None,
            columns=columns,
            on_fault=lambda error: faults.append(str(error)),
            on_note=lambda _: None,
        )
        for record in islice(rows, PROBED):
            if not is_empty(record):
                return ""
    except DataError as error:
        faults.append(str(error))
    return faults[0] if faults else ""


def _read_all(
    path: Path, reader: str, columns: Mapping[str, Columns]
) -> tuple[dict[str, Sequence[Record]], list[tuple[str, ...]], tuple[str, ...]]:
    """Reads a file to its end, once for all tasks with a part of the same columns where no row is broken.

    Returns:
      The records by each task that can read all of them, in the order of `columns`; the faults for each other task; and
      lines about files that are no records.
    """
    found, attempts, notes = dict[str, Sequence[Record]](), list[tuple[str, ...]](), dict[str, None]()
    for task in sorted(columns, key=lambda task: -len(columns[task])):
        wider = next((other for other in found if _is_part(columns[task], columns[other])), None)
        if wider is not None:
            found[task] = found[wider]
            continue
        findings = Findings()
        rows = check_file(path, reader=reader or None, columns=columns[task], where="", findings=findings)
        notes |= dict.fromkeys(findings.warnings)
        if rows is not None and not findings.errors:
            with findings.gathering():
                check_images(path, rows)
        if rows is not None and not findings.errors:
            found[task] = rows
        else:
            attempts.append(tuple(findings.errors))
    return {task: found[task] for task in columns if task in found}, attempts, tuple(notes)


def _is_part(columns: Columns, wider: Columns) -> bool:
    """Whether all columns are among others, with the same main column, which says whether a row is blank."""
    return next(iter(columns)) == next(iter(wider)) and all(wider.get(field) == own for field, own in columns.items())


def _of_the_meant_task(refusals: Mapping[str, str], names: Mapping[str, str], column: str) -> str:
    """Returns the refusal of the task whose fields `site.toml` names, and there of a column that stands in it."""
    meant = [line for task, line in refusals.items() if set(names) <= FIELDS[task].keys()] or list(refusals.values())
    given = tuple(f"column={name!r} " for name in (*names.values(), column) if name)
    return next((line for line in meant if given and line.startswith(given)), meant[0])


def _needs_a_name(path: Path, line: str) -> bool:
    """Says whether `site.toml` may mend a refusal, by another reader or by the names of columns."""
    place = _PLACE.search(line)
    if line.startswith("column="):  # the first row stands for a file whose rows all have other columns
        return place is None or place.group(2) == "1"
    return "without a reader" in line or (path.is_dir() and place is None)

"""The check of a site's own data for its owner, at `offsite client init` and by `offsite client doctor`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offsite.errors import DataError
from offsite.task.file_check import check_file
from offsite.task.findings import Findings
from offsite.task.readers.columns import columns_for
from offsite.task.readers.image_files import check_images
from offsite.task.readers.tables import check_readable, read
from offsite.task.record_fields import FIELDS
from offsite.task.spec import Record

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
    """Reads a site's data to their end with the fields of each task.

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
    found, refusals, notes = dict[str, Sequence[Record]](), dict[str, str](), list[str]()
    for task in FIELDS:
        columns = columns_for(task, column=column, names=names, labels=labels)
        try:
            records = read(path, reader=reader or None, columns=columns, on_note=notes.append)
            check_images(path, records)
            found[task] = records
        except DataError as error:
            refusals[task] = str(error)
    if found:
        return OwnData(found, notes=tuple(dict.fromkeys(notes)))
    readable = [task for task, line in refusals.items() if not _needs_a_name(path, line)]
    if not readable:
        return OwnData(unnamed=_of_the_meant_task(refusals, names, column))
    attempts = list[list[str]]()
    for task in readable:
        findings, columns = Findings(), columns_for(task, column=column, names=names, labels=labels)
        rows = check_file(path, reader=reader or None, columns=columns, where="", findings=findings)
        if rows is not None and not findings.errors:
            with findings.gathering():
                check_images(path, rows)
        attempts.append(findings.errors)
    fewest = min(attempts, key=len)
    return OwnData(faults=tuple(fewest))


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

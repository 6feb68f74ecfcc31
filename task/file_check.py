"""Reads a data file to its end and gathers every fault, for somebody to whom the file belongs."""

import re
from collections.abc import Sequence
from pathlib import Path

from offsite.errors import DataError
from offsite.task.findings import Findings
from offsite.task.readers.columns import Columns
from offsite.task.readers.tables import read_for_job
from offsite.task.records import LenientRecords, is_empty

SHOWN = 20  # faults of one kind in one file that are shown one by one
_PLACE = re.compile(r"\b(line|row|text|image|record|article|paragraph|question)=\d+")


def check_file(
    path: Path | str, *, reader: str | None, columns: Columns, where: str, findings: Findings
) -> LenientRecords | None:
    """Reads a file to its end, and adds each fault with its place, and what was passed over, to the findings.

    Args:
      path: file or folder, as for `task.readers.tables.read`.
      reader: key of `READERS`, or None to choose the reader by the suffix.
      columns: columns that are read, the main column first.
      where: words in front of each finding, for example `site=north`.
      findings: findings so far, to which this file's are added.

    Returns:
      The records; a broken row is an empty record. None where the file as a whole cannot be read.
    """
    findings.on_step(f"read {str(path)!r}{f', {where}' if where else ''}")
    with findings.gathering(where):
        records = read_for_job(path, reader=reader, columns=columns, on_note=lambda note: findings.warn(note, where))
        add_faults(records.faults, len(records), where, findings)
        if not records.faults and all(is_empty(record) for record in records):
            main = next(iter(columns))
            raise DataError(f"data={str(path)!r} holds no {main}; give a file with at least one record")
        return records
    return None


def add_faults(faults: Sequence[str], records: int, where: str, findings: Findings) -> None:
    """Adds the faults of one file; a rule that every record breaks, or very many do, is shown once with its number.

    Args:
      faults: faults with their places, see `task.records`.
      records: number of records of the file.
      where: words in front of each finding.
      findings: findings so far.
    """
    kinds = dict[str, list[str]]()
    for fault in faults:
        kinds.setdefault(_PLACE.sub(r"\1=", fault), []).append(fault)
    for alike in kinds.values():
        every = len(alike) == records and records > 1
        for fault in alike[: 1 if every else SHOWN]:
            findings.add(fault + (f" (the same in all {records} records)" if every else ""), where)
        if not every and len(alike) > SHOWN:
            findings.add(f"{alike[0]} ({len(alike) - SHOWN} more records break this rule)", where)

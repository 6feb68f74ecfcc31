"""Whether records can be learnt from, tried on the model's own tokenizer before any work."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from offsite.task.file_check import add_faults
from offsite.task.findings import Findings
from offsite.task.nothing_to_learn import PUBLIC, Counter, Learnt, learnt
from offsite.task.records import LenientRecords
from offsite.task.selection import spread_rows
from offsite.task.tokenizer import Tokenizer

# Records that go through the tokenizer, which takes milliseconds for each: of all files, and of one file at least. The
# public file has a fewest number of usable records, and is small in more cases.
TRIED, FEWEST, OF_PUBLIC = 128, 8, 64


@dataclass(frozen=True)
class DataFile:
    """The records of one file, as `task.file_check` read them.

    Attributes:
      where: words in front of each finding, for example `site=north`.
      part: PUBLIC, TRAINING or HELD_OUT of `task.nothing_to_learn`.
      records: records; a broken row is an empty record.
      path: file or folder of the records.
    """

    where: str
    part: str
    records: LenientRecords
    path: str


@dataclass(frozen=True)
class Tried:
    """What a check knows of one file.

    Attributes:
      file: the file.
      examples: number of examples of the whole file.
      learnt: outcome of the records that were tried.
      usable: number of tried examples with a target.
      faulty: whether a record breaks a rule, so that its missing target is a finding already.
    """

    file: DataFile
    examples: int
    learnt: Learnt
    usable: int
    faulty: bool


def try_records(counter: Counter, files: Sequence[DataFile], findings: Findings) -> list[Tried]:
    """Counts the targets of each file's records; adds every fault, and every file without a target, to the findings.

    All records are held against the task's rules, for example the labels. About `TRIED`, evenly spaced over each file,
    go through the tokenizer too; where none of a file's has a target, all records of the file do. Images are all
    decoded.

    Args:
      counter: counter of the job.
      files: the files.
      findings: findings so far.

    Returns:
      What is known of each file whose records could be encoded, in order.
    """
    outcomes = list[Tried]()
    # The tokenizer starts once for all files, unless texts are cut into blocks: a block does not tell its file.
    groups = [list(files)] if counter.split == "truncate" else [[file] for file in files]
    for group in filter(None, groups):
        findings.on_step("encode some records of each file")
        with findings.gathering():
            chosen = [_chosen(counter, file, max(FEWEST, TRIED // len(group))) for file in group]
            outcomes += _tried(counter, group, chosen, findings)
    return outcomes


def _tried(
    counter: Counter, files: Sequence[DataFile], chosen: Sequence[LenientRecords], findings: Findings
) -> list[Tried]:
    together = LenientRecords([record for records in chosen for record in records])
    targets, begin, first, outcomes = counter.targets(together), 0, 0, list[Tried]()
    for file, records in zip(files, chosen, strict=True):
        size = len(records) if counter.split == "truncate" else len(targets)
        own, begin = targets[begin : begin + size], begin + size
        rows, first = range(first, first + len(records)), first + len(records)
        records.faults += _faults_of(file, together, rows)
        outcomes.append(_outcome(counter, file, records, own, findings))
    return outcomes


def _outcome(counter: Counter, file: DataFile, chosen: LenientRecords, targets: list[int], findings: Findings) -> Tried:
    records, outcome = chosen, learnt(counter, chosen, targets)
    if len(chosen) < len(file.records):
        chosen.faults = [*file.records.faults, *_check_rules(counter, file)]
        if outcome.nothing:
            records = LenientRecords(file.records, chosen.faults)
            targets = counter.targets(LenientRecords(records))
            outcome = learnt(counter, records, targets)
    _add(file, records, outcome, findings)
    count = len(file.records) if counter.split == "truncate" else len(targets)
    return Tried(file, count, outcome, sum(count > 0 for count in targets), bool(records.faults))


def _add(file: DataFile, records: LenientRecords, outcome: Learnt, findings: Findings) -> None:
    """Adds the faults of a file, and the sentence on records with nothing to learn where no fault explains them."""
    read = set(file.records.faults)
    add_faults([fault for fault in records.faults if fault not in read], len(file.records), file.where, findings)
    if records.faults or not outcome.left_out:
        return
    tried = "" if len(records) == len(file.records) else f" (of {len(file.records)} records, {len(records)} were tried)"
    (findings.add if outcome.nothing else findings.warn)(f"{file.part} data: {outcome}{tried}", file.where)


def _faults_of(file: DataFile, records: LenientRecords, rows: range) -> list[str]:
    """Returns the faults that a task found in some rows of `records`, each with the file's path."""
    faults = [fault for fault, row in zip(records.faults, records.rows, strict=True) if row in rows]
    return [fault if "data=" in fault else f"data={file.path!r} {fault}" for fault in faults]


def _chosen(counter: Counter, file: DataFile, count: int) -> LenientRecords:
    """Returns about `count` records, which go through the tokenizer, with the faults of the file."""
    records = file.records
    if counter.split != "truncate" or not isinstance(counter.processor, Tokenizer):
        return LenientRecords(records, records.faults)
    rows = spread_rows(np.arange(len(records)), max(count, OF_PUBLIC if file.part == PUBLIC else 0))
    return LenientRecords([records[int(row)] for row in rows], records.faults)


def _check_rules(counter: Counter, file: DataFile) -> list[str]:
    """Returns the faults of all records of a file under the task's rules, found without the tokenizer."""
    records = LenientRecords(file.records)
    replace(counter, processor=counter.processor.silenced()).targets(records)
    return _faults_of(file, records, range(len(records)))

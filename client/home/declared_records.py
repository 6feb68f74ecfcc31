"""The public number of a site's records: declared in `site.toml`, or counted once and kept ever after.

Noise, sample rate and delta follow from this number alone. Two data sets that the privacy promise compares have the
same number of records, since one record is replaced by an empty record, so a comparison of this number with the file
comes out the same for both and tells nothing about a record.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from offsite.client.home.data_check import OwnData, check_own_data
from offsite.client.home.installation import SiteHome
from offsite.errors import ConfigError, DataError, MalformedMessage
from offsite.task.readers.columns import Columns, columns_for
from offsite.task.readers.tables import read, read_for_job
from offsite.task.records import LenientRecords
from offsite.task.spec import Record
from offsite.trust.files import write_atomically

BLOCKS = "blocks"  # the split whose examples are cut from the texts


def read_records(home: SiteHome, task: str) -> list[Record]:
    """Returns a site's records with the fields that a task reads, for the site's owner.

    Raises:
      DataError: the records cannot be read, or a row is broken.
      ConfigError: `site.toml` names a field that no task has.
    """
    return read(home.data, reader=home.settings.reader or None, columns=_columns(home, task))


def read_records_for_job(home: SiteHome, task: str) -> LenientRecords:
    """Returns a site's records for an approved job, as many as rows, since the coordinator hears how the job went.

    Raises:
      DataError: the file as a whole cannot be read.
      ConfigError: `site.toml` names a field that no task has.
    """
    return read_for_job(home.data, reader=home.settings.reader or None, columns=_columns(home, task))


def own_data(home: SiteHome) -> OwnData:
    """Returns what a check of a site's data finds, for the site's owner.

    Raises:
      DataError: the data do not exist.
      ConfigError: `site.toml` names a field that no task has.
    """
    settings = home.settings
    return check_own_data(
        home.data, reader=settings.reader, column=settings.column, names=settings.columns, labels=settings.labels
    )


def records_by_task(home: SiteHome) -> Mapping[str, Sequence[Record]]:
    """Returns the records in the site's data for each task whose fields they have, for the site's owner.

    Raises:
      DataError: no task reads the data, or a row is broken for each task.
    """
    data = own_data(home)
    if not data.records:
        raise DataError(data.unnamed or data.faults[0])
    return data.records


def declared(home: SiteHome) -> int | None:
    """Returns the declared number of records; None where nobody has declared or counted them.

    Raises:
      MalformedMessage: the kept number is damaged.
    """
    path = _kept(home)
    if home.settings.records or not path.exists():
        return home.settings.records or None
    try:
        number = json.loads(path.read_text(encoding="ascii"))["records"]
        if type(number) is not int or number < 1:
            raise ValueError(number)
    except (ValueError, KeyError, TypeError) as error:
        raise MalformedMessage(f"state={path.name}: damaged; write records = N in site.toml") from error
    return int(number)


def declare(home: SiteHome, task: str | None = None, *, counted: int | None = None) -> int:
    """Returns the declared number of records; where there is none, counts the records and keeps their number.

    Args:
      home: folder of the site.
      task: name of the task that reads the records; None takes the largest number of any task.
      counted: number of the records, where the caller has read them just now.

    Raises:
      DataError: the records cannot be read, or the number cannot be kept.
    """
    number = declared(home)
    if number is None:
        if counted is not None:
            number = counted
        elif task is not None:  # no row's content decides the number, so a job's offer may ask for the count
            number = len(read_records_for_job(home, task))
        else:
            number = max(map(len, records_by_task(home).values()))
        write_atomically(_kept(home), json.dumps({"records": number}).encode())
    return number


def places(home: SiteHome, split: str, task: str) -> int:
    """Returns the declared number of a job's examples: of the records, or of the blocks that their texts are cut into.

    Raises:
      ConfigError: the job cuts texts into blocks, whose number the owner has not declared.
      DataError: as for `declare`.
    """
    if split != BLOCKS:
        return declare(home, task)
    number = places_of(home, split)
    if number is None:
        raise ConfigError(
            "site.toml blocks=0: this job cuts the texts into blocks, so the job's tokenizer would "
            "decide how many records there are; write blocks = N in site.toml, or permit split truncate alone"
        )
    return number


def places_of(home: SiteHome, split: str) -> int | None:
    """Returns the number of `places` where it is declared or was counted, else None; reads no record."""
    return (home.settings.blocks or None) if split == BLOCKS else declared(home)


def check_count(home: SiteHome, *counts: int) -> None:
    """Checks that the data hold as many records as are declared.

    Args:
      home: folder of the site.
      counts: numbers of records in the data, as different tasks read them; one of them must be the declared number.

    Raises:
      DataError: the data hold more or fewer.
    """
    number = declared(home)
    if number is not None and number not in counts:
        raise DataError(
            f"records={max(counts)} in the data: {number} are declared, and noise is planned for that number; bring "
            f"the data back, or declare the new number with records = {max(counts)} in site.toml"
        )


def _columns(home: SiteHome, task: str) -> Columns:
    settings = home.settings
    return columns_for(task, column=settings.column, names=settings.columns, labels=settings.labels)


def _kept(home: SiteHome) -> Path:
    return home.state / f"records-{home.settings.dataset}.json"

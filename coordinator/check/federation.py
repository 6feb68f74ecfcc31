"""The check of a job's common parts at the coordinator: names, model, public records, disk and ports."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from offsite.coordinator.check.machine import check_port, check_room
from offsite.coordinator.check.model import check_model
from offsite.coordinator.check.names import check_names
from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.home.job_settings import run_folder
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.coordinator.job.public_records import check_public
from offsite.errors import ConfigError, lookup
from offsite.task.encode import SHORTEST, SPLITS
from offsite.task.file_check import check_file
from offsite.task.findings import Findings
from offsite.task.learning_check import DataFile, Tried, try_records
from offsite.task.nothing_to_learn import PUBLIC, Encoder
from offsite.task.readers.columns import Columns, columns_of
from offsite.task.record_fields import FIELDS

OWN, COORDINATOR = 1, 2  # copies of each package: at a coordinator also the encrypted one in its depot


@dataclass(frozen=True)
class Scope:
    """What can be checked although keys of the federation file are at fault: their defaults would mislead.

    Attributes:
      left_out: paths of the keys that are at fault, with dots.
    """

    left_out: tuple[str, ...] = ()

    @property
    def files(self) -> bool:
        """Whether the files can be read."""
        return not self._any("model.", "data.column", "data.reader", "data.public", "data.sites", "data.owners")

    @property
    def examples(self) -> bool:
        """Whether records can be encoded."""
        return self.files and not self._any("data.")

    @property
    def public(self) -> bool:
        """Whether the public examples can be counted."""
        return self.examples and not self._any("evaluation.")

    @property
    def plans(self) -> bool:
        """Whether the sites' privacy plans can be made."""
        return not self._any("training.", "privacy.", "(training.")

    def _any(self, *begins: str) -> bool:
        return any(key.startswith(begins) for key in self.left_out)


EVERYTHING = Scope()


def columns_for(config: FedConfig, findings: Findings) -> Columns | None:
    """Returns the columns that a federation file names, or None where the file names wrong ones."""
    with findings.gathering():
        fields = lookup(FIELDS, config.model.task, "model.task")
        return columns_of(fields, column=config.data.column, names=config.data.columns, labels=config.data.labels)
    return None


def check_records(
    config: FedConfig, files: list[tuple[str, str, str]], findings: Findings, scope: Scope
) -> tuple[list[DataFile], Encoder | None, list[Tried]]:
    """Reads files to their end, and tries their records on the model.

    Args:
      config: the federation file.
      files: words in front of findings, part, and path of each file.
      findings: findings so far.
      scope: what can be checked.

    Returns:
      The files that could be read, the encoder of the job, and the outcome of each file that could be encoded.
    """
    length = config.data.length if scope.examples else SHORTEST  # a wrong key would mislead the check of positions
    encoder, columns = check_model(config, length, findings), columns_for(config, findings)
    if columns is None or not scope.files:
        return [], encoder, []
    read = list[DataFile]()
    for where, part, path in files:
        records = check_file(path, reader=config.data.reader or None, columns=columns, where=where, findings=findings)
        if records is not None:
            read.append(DataFile(where, part, records, path))
    if encoder is None or not scope.examples or config.data.split not in SPLITS:
        return read, encoder, []
    return read, encoder, try_records(encoder, read, findings)


def check_enough_public(config: FedConfig, tried: list[Tried], findings: Findings) -> None:
    """Checks that the public file has enough records with a target, where all its records were tried."""
    for own in tried:
        whole = own.learnt.records == len(own.file.records) and not (own.faulty or own.learnt.nothing)
        if own.file.part == PUBLIC and whole:
            with findings.gathering(own.file.where):
                check_public(config, own.usable, own.learnt)


def check_coordinator(
    config: FedConfig,
    out: Path | None,
    now: datetime,
    findings: Findings,
    *,
    running: bool = False,
    scope: Scope = EVERYTHING,
) -> None:
    """Checks a job between organisations; the sites' records are checked at the sites.

    Args:
      config: the federation file, with its table [coordinator].
      out: run folder, or None for the folder that the settings name.
      now: current time.
      findings: findings so far.
      running: whether a coordinator runs in this folder already, so that the ports are its own.
      scope: what can be checked.
    """
    if config.coordinator is None:
        raise ConfigError("config key coordinator is missing; add [coordinator] with home = the folder of init")
    with findings.gathering():
        home = CoordinatorHome.open(Path(config.coordinator.home))
        with findings.gathering():
            home.check(now)
        with findings.gathering():
            epoch = home.federation()
            sites = [member.site for member in epoch.members]
            check_names(config, sites, max(epoch.n_min, config.secagg.n_min), findings)
        check_room(config, run_folder(home, config, out), COORDINATOR * _kinds(config), findings)
        if not running:
            bind = home.settings.bind or home.settings.host
            check_port("link_port", bind, home.settings.link_port, findings)
            check_port("depot_port", bind, home.settings.depot_port, findings)
    _, _, tried = check_records(config, [("", PUBLIC, config.data.public)], findings, scope)
    if scope.public:
        check_enough_public(config, tried, findings)


def _kinds(config: FedConfig) -> int:
    return 1 + len(config.emulator.variants)

"""The check of a job's common parts at the coordinator: names, model, public records, disk and ports."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from offsite.coordinator.check.machine import check_port, check_room
from offsite.coordinator.check.model import check_memory, check_model, check_structure, counter_of, is_in_doubt
from offsite.coordinator.check.names import check_method, check_names
from offsite.coordinator.check.packages import check_packages
from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.home.job_settings import JOB, run_folder
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.coordinator.job.public_counts import check_public
from offsite.errors import ConfigError, lookup
from offsite.task.file_check import check_file
from offsite.task.findings import Findings
from offsite.task.learning_check import DataFile, Tried, try_records
from offsite.task.model_check import ModelFiles, check_files
from offsite.task.nothing_to_learn import PUBLIC, Encoder
from offsite.task.readers.columns import Columns, columns_of
from offsite.task.record_fields import FIELDS
from offsite.task.records import LenientRecords
from offsite.task.splits import SHORTEST, SPLITS
from offsite.task.target_counts import COUNTS

NOT_LOADED = (
    "the model's class was not loaded, because faults are known already; its blocks and positions, and its tokenizer "
    "as transformers has it, are checked once those faults are corrected"
)
# Copies on the disk: a package and its encrypted file in the depot, and one decrypted stream while a file is encrypted.
COORDINATOR, STREAM = 2, 1


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
    def structure(self) -> bool:
        """Whether blocks and adapter can be looked for in the model."""
        return not self._any("model.", "emulator.", "adapter.", "aggregation.")

    @property
    def packages(self) -> bool:
        """Whether packages that were built before can be compared with the file."""
        return not self._any("model.", "emulator.first", "emulator.last", "emulator.shape", "emulator.package")

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


@dataclass(frozen=True)
class Parties:
    """The sites of a job.

    Attributes:
      sites: names of the sites; None where they are not known.
      n_min: smallest number of sites whose sum may be opened.
    """

    sites: list[str] | None
    n_min: int


@dataclass(frozen=True)
class Checked:
    """What a check of files and model found.

    Attributes:
      read: files that could be read.
      tried: outcome of each file whose records could be tried.
      model_config: what is known of the model's labels; None where nothing is known.
    """

    read: list[DataFile] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)
    model_config: Any = None


def check_records(
    config: FedConfig, parties: Parties, files: Sequence[tuple[str, str, str]], findings: Findings, scope: Scope
) -> Checked:
    """Reads files to their end, tries their records, and checks names and model.

    The model's class takes seconds to load. Where a file or a name is at fault, and the model's own files leave nothing
    open, the class is not loaded, and a warning says so.

    Args:
      config: the federation file.
      parties: sites of the job.
      files: words in front of findings, part, and path of each file.
      findings: findings so far.
      scope: what can be checked.
    """
    check_names(config, parties.sites, findings)
    check_method(config, parties.sites, parties.n_min, findings)
    columns, model = columns_for(config, findings), check_files(config.model.task, Path(config.model.path), findings)
    read = [] if columns is None or not scope.files else _read(config, columns, files, findings)
    may_try = scope.examples and config.data.split in SPLITS
    counter = counter_of(config, model) if model is not None and may_try else None
    tried = try_records(counter, read, findings) if counter is not None else []
    if scope.public and counter is not None:
        check_enough_public(config, tried, findings)
    labels = None if counter is None else counter.model_config
    if findings.errors and _is_settled(config, model, tried=counter is not None or not may_try):
        findings.warn(NOT_LOADED)
        return Checked(read, tried, labels)
    length = config.data.length if scope.examples else SHORTEST  # a wrong key would mislead the check of positions
    encoder = check_model(config, length, model, findings)
    if encoder is not None and scope.structure:
        check_structure(config, encoder, findings)
        check_memory(config, encoder, findings)
    if encoder is None or not may_try:
        return Checked(read, tried, labels)
    if counter is None:
        tried = try_records(encoder, read, findings)
        if scope.public:
            check_enough_public(config, tried, findings)
    else:
        _encode_one(encoder, read, findings)
    return Checked(read, tried, encoder.model_config)


def _read(
    config: FedConfig, columns: Columns, files: Sequence[tuple[str, str, str]], findings: Findings
) -> list[DataFile]:
    """Returns the files that can be read, after all of them were read to their end."""
    read = list[DataFile]()
    for where, part, path in files:
        records = check_file(path, reader=config.data.reader or None, columns=columns, where=where, findings=findings)
        if records is not None:
            read.append(DataFile(where, part, records, path))
    return read


def _is_settled(config: FedConfig, model: ModelFiles | None, *, tried: bool) -> bool:
    """Whether the model's class would most likely find nothing, or cannot be loaded because its files are at fault."""
    if model is None:
        return config.model.task in COUNTS
    return tried and not is_in_doubt(config, model)


def _encode_one(encoder: Encoder, files: list[DataFile], findings: Findings) -> None:
    """Encodes the first record of all, since a task may refuse the model itself."""
    with findings.gathering():
        for file in files[:1]:
            encoder.encode(LenientRecords(file.records[:1]))


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
    parties, place = Parties(None, config.secagg.n_min), out
    with findings.gathering():
        home = CoordinatorHome.open(Path(config.coordinator.home))
        with findings.gathering():
            home.check(now)
        with findings.gathering():
            epoch = home.federation()
            sites = [member.site for member in epoch.members]
            parties = Parties(sites, max(epoch.n_min, config.secagg.n_min))
        place = run_folder(home, config, out)
        check_room(config, place, COORDINATOR * _kinds(config) + STREAM, findings)
        if not running:
            bind = home.settings.bind or home.settings.host
            check_port("link_port", bind, home.settings.link_port, findings)
            check_port("depot_port", bind, home.settings.depot_port, findings)
    check_records(config, parties, (("", PUBLIC, config.data.public),), findings, scope)
    if scope.packages and not (place is not None and (place / JOB).is_file()):  # a prepared job has its own copies
        check_packages(config, place, findings)


def _kinds(config: FedConfig) -> int:
    return 1 + len(config.emulator.variants)

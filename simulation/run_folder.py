"""A simulated federation's run folder: what is on disk, and the sites that are opened from it."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.client.site.release_log import CountingReleaseLog
from offsite.client.site.round_handler import Site
from offsite.client.training.emulator_session import EmulatorSession, encoded, open_session
from offsite.client.training.privacy_plan import plan_for
from offsite.coordinator.config.federation_file import FedConfig, parse_config
from offsite.coordinator.job.emulators import folders
from offsite.coordinator.job.store import Store, write_atomically
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.errors import ConfigError, DataError, lookup
from offsite.privacy.randomness import Randomness
from offsite.protos.job_manifest import JobManifest
from offsite.secagg.journal import MemoryJournal
from offsite.task.readers.columns import Columns, columns_of
from offsite.task.readers.tables import read
from offsite.task.spec import Batch, Record
from offsite.task.tasks import TASKS
from offsite.trust.identity import Identity

CONFIG, JOB = "config.json", "job.json"


@dataclass(frozen=True)
class Run:
    """One run folder with the configuration that made it."""

    config: FedConfig
    config_sha256: str
    store: Store

    @classmethod
    def create(cls, config: FedConfig, config_sha256: str, folder: Path) -> "Run":
        """Makes a run folder; an existing one with content is not overwritten.

        Raises:
          ConfigError: the folder holds something already.
        """
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"out={str(folder)!r}: the folder is not empty; choose another, or --resume it")
        if not config.sites:
            raise ConfigError("sites: a simulation needs [[sites]], or data.sites_dir with data.owners; add them")
        store = Store(folder)
        store.write_json(CONFIG, {"config": config.to_dict(), "sha256": config_sha256})
        for site in config.sites:
            _new_identity(store.site(site.name))
        return cls(config, config_sha256, store)

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Opens an existing run folder.

        Raises:
          DataError: it is not one.
        """
        if not (folder / CONFIG).is_file():
            raise DataError(f"resume={str(folder)!r}: no run folder; give the --out folder of an earlier run")
        store = Store(folder)
        content = store.read_json(CONFIG)
        return cls(parse_config(content["config"], folder), content["sha256"], store)

    def roster(self) -> tuple[tuple[str, str], ...]:
        """Returns the sites with their public signing keys, sorted by name."""
        names = sorted(site.name for site in self.config.sites)
        return tuple((name, _identity(self.store.site(name)).public.hex()) for name in names)

    def save_job(self, manifest: JobManifest, facts: dict[str, Any]) -> None:
        """Stores the job's manifest, and what the report needs of how it was prepared."""
        self.store.write_json("job_facts.json", facts)
        write_atomically(self.store.folder / JOB, manifest.to_bytes())

    def job(self) -> JobManifest | None:
        """Returns the stored manifest, or None when preparation did not finish."""
        path = self.store.folder / JOB
        return JobManifest.from_bytes(path.read_bytes()) if path.exists() else None

    def records(self, path: str) -> list[Record]:
        """Returns the records of a file or folder, read as the configuration says."""
        return read(Path(path), reader=self.config.data.reader or None, columns=columns_in(self.config))

    def examples(self, path: str, manifest: JobManifest, session: EmulatorSession) -> Batch:
        """Returns the records of a file or folder as a job's examples."""
        return encoded(session, manifest, self.records(path))

    def site(self, name: str, manifest: JobManifest, session: EmulatorSession) -> Site:
        """Opens one simulated site.

        Its noise and rounding are derived from the run's seed, so that a resumed run ends with the same adapter; this
        is what makes a simulation not private, and the report says so.
        """
        setting = next(site for site in self.config.sites if site.name == name)
        try:
            examples = self.examples(setting.train, manifest, session)
            plan = plan_for(manifest, len(examples))
        except DataError as error:
            raise DataError(f"site={name}: {error}") from error
        seed, folder = self.config.seed, self.store.site(name)
        return Site(
            name,
            manifest=manifest,
            session=session,
            examples=examples,
            plan=plan,
            identity=_identity(folder),
            journal=MemoryJournal(),
            books=CountingReleaseLog(manifest.releases),
            record=folder / "rounds.jsonl",
            noise=lambda training: Randomness.for_simulation(seed, "noise", name, training),
            rounding=lambda training: Randomness.for_simulation(seed, "rounding", name, training).uniform,
        )

    def site_lines(self, name: str) -> list[dict[str, Any]]:
        """Returns what a simulated site wrote about its rounds, one line per round.

        A round that was done again after a kill stands there twice; with the same seed it was the same computation, so
        it is one release and counts once.
        """
        path = self.store.site(name) / "rounds.jsonl"
        if not path.exists():
            return []
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
        return list({line["round"]: line for line in lines}.values())


def columns_in(config: FedConfig) -> Columns:
    """Returns the columns that a federation file names for its task.

    Raises:
      UnknownName: there is no such task.
      ConfigError: the task has no such field.
    """
    fields = lookup(TASKS, config.model.task, "model.task").columns
    return columns_of(fields, column=config.data.column, names=config.data.columns)


def simulated_sessions(run: Run, manifest: JobManifest) -> dict[str, EmulatorSession]:
    """Opens each site's emulator as a site does, for owners who permit the rank that is asked for.

    Sites of one emulator share it, since each writes its adapter before it trains.
    """
    # No owner is asked in a simulation: what the job wants is permitted, as each owner would have to.
    limits, opened = VettingThresholds.for_owner(2 * manifest.adapter.rank, share=1e6), dict[str, EmulatorSession]()
    for digest, folder in folders(run.store, manifest).items():
        session = open_session(folder, manifest, emulator=digest, limits=limits, seed=run.config.seed)
        opened |= dict.fromkeys(manifest.shipped()[digest], session)
    return opened


def with_options(config: FedConfig, *, seed: int | None, rounds: int | None, sites: int | None) -> FedConfig:
    """Returns a configuration with the command line's options put in; the ranges are checked again.

    Raises:
      ConfigError: more sites asked for than the file names, or a range is broken.
    """
    if sites is not None and sites > len(config.sites):
        raise ConfigError(f"sites={sites}: the file names {len(config.sites)}; add sites to it or ask for fewer")
    training = config.training if rounds is None else dataclasses.replace(config.training, rounds=rounds)
    kept = config.sites if sites is None else config.sites[: max(sites, 0)]
    return dataclasses.replace(
        config,
        training=training,
        seed=config.seed if seed is None else seed,
        sites=kept,
        emulator=config.emulator if sites is None else config.emulator.only([site.name for site in kept]),
        aggregation=config.aggregation if sites is None else config.aggregation.only([site.name for site in kept]),
    )


def _new_identity(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "identity.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(Identity.generate().to_bytes())


def _identity(folder: Path) -> Identity:
    path = folder / "identity.key"
    if not path.exists():
        raise DataError(f"site={folder.name}: identity.key is missing from the run folder; start a new run")
    return Identity.from_bytes(path.read_bytes())

"""A simulated federation's run folder: its files, and the sites that are opened from the folder."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from offsite.client.site.release_log import CountingReleaseLog
from offsite.client.site.round_handler import Site
from offsite.client.site.site_randomness import SiteRandomness
from offsite.client.training.emulator_session import EmulatorSession, encode_records, open_session
from offsite.client.training.local_update import SiteJob
from offsite.client.training.privacy_plan import plan_for
from offsite.coordinator.config.federation_file import FedConfig, parse_config
from offsite.coordinator.job.emulators import folders
from offsite.coordinator.job.json_form import decode, encode
from offsite.coordinator.job.lifecycle import open_or_prepare
from offsite.coordinator.job.prepare import Job, Parties
from offsite.coordinator.job.public_records import read_records
from offsite.coordinator.job.store import Store
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.errors import ConfigError, DataError
from offsite.protos.job_manifest import JobManifest
from offsite.secagg.journal import MemoryJournal
from offsite.simulation.site_log import SiteRound, read_site_log
from offsite.task.spec import Batch, Record
from offsite.trust.collusion import usual_accomplices
from offsite.trust.identity import Identity

CONFIG = "config.json"


@dataclass(frozen=True)
class _Kept:
    """Content of `config.json`: the configuration as plain values, and the SHA-256 of the federation file."""

    config: Mapping[str, object]
    sha256: str


@dataclass(frozen=True)
class Run:
    """One run folder, with the configuration of its run.

    Attributes:
      config: configuration of the run, with the command line's options.
      config_sha256: SHA-256 of the federation file, hexadecimal.
      store: files of the run.
    """

    config: FedConfig
    config_sha256: str
    store: Store

    @classmethod
    def create(cls, config: FedConfig, config_sha256: str, folder: Path) -> "Run":
        """Makes a run folder; a folder with content is not overwritten.

        Raises:
          ConfigError: the folder is not empty, or the configuration names no site.
        """
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(
                f"out={str(folder)!r}: the folder is not empty; choose another folder, or --resume this folder"
            )
        if not config.sites:
            raise ConfigError("sites: a simulation needs [[sites]], or data.sites_dir with data.owners; add them")
        store = Store(folder)
        store.write_json(CONFIG, encode(_Kept(config.to_dict(), config_sha256)))
        run = cls(config, config_sha256, store)
        for site in config.sites:
            _new_identity(run.site_folder(site.name))
        return run

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Opens an existing run folder.

        Raises:
          DataError: the folder is not a run folder.
        """
        if not (folder / CONFIG).is_file():
            raise DataError(f"resume={str(folder)!r}: no run folder; give the --out folder of an earlier run")
        store = Store(folder)
        kept = decode(_Kept, store.read_json(CONFIG), CONFIG)
        return cls(parse_config(dict(kept.config), folder), kept.sha256, store)

    def roster(self) -> tuple[tuple[str, str], ...]:
        """Returns the sites with their public signing keys, sorted by name."""
        names = sorted(site.name for site in self.config.sites)
        return tuple((name, _identity(self.site_folder(name)).public.hex()) for name in names)

    def site_folder(self, name: str) -> Path:
        """Returns the folder of one simulated site."""
        return self.store.folder / "sites" / name

    def open_job(self, on_step: Callable[[str], None] = lambda text: None) -> Job:
        """Prepares the job of this run, or opens the prepared job.

        Args:
          on_step: function that takes a text about what is being done.

        Raises:
          OffsiteError: see `open_or_prepare`.
        """
        secagg, roster = self.config.secagg, self.roster()
        parties = Parties(secagg.federation, 1, roster, secagg.fewest(len(roster)), usual_accomplices(len(roster)))
        return open_or_prepare(self.config, parties, self.store, on_step=on_step)

    def records(self, path: str) -> list[Record]:
        """Returns the records of a file or folder, read as the configuration says."""
        return read_records(self.config, path)

    def examples(self, path: str, manifest: JobManifest, session: EmulatorSession) -> Batch:
        """Returns the records of a file or folder as the examples of a job."""
        return encode_records(session, manifest, self.records(path))

    def site(self, name: str, manifest: JobManifest, session: EmulatorSession) -> Site:
        """Opens one simulated site.

        The site's noise and rounding are derived from the run's seed, so that a resumed run ends with the same adapter.
        A simulation is not private for this reason, and the report says so.
        """
        setting = next(site for site in self.config.sites if site.name == name)
        try:
            examples = self.examples(setting.train, manifest, session)
            plan = plan_for(manifest, len(examples))
        except DataError as error:
            raise DataError(f"site={name}: {error}") from error
        folder = self.site_folder(name)
        return Site(
            SiteJob(name, manifest, session, examples, plan),
            identity=_identity(folder),
            journal=MemoryJournal(),
            release_log=CountingReleaseLog(manifest.releases),
            training_log=folder / "rounds.jsonl",
            randomness=SiteRandomness(name, self.config.seed),
        )

    def site_log(self, name: str) -> tuple[SiteRound, ...]:
        """Returns the log of a simulated site about its rounds."""
        return read_site_log(self.site_folder(name) / "rounds.jsonl")


def simulated_sessions(run: Run, manifest: JobManifest) -> dict[str, EmulatorSession]:
    """Opens each site's emulator as a site does, for owners who permit the rank of the job.

    Sites with the same emulator share a session, since each site writes its adapter into the model before it trains.
    """
    # A simulation asks no owner: the limits permit the job, as each owner would have to.
    limits, opened = VettingThresholds.for_owner(2 * manifest.adapter.rank, share=1e6), dict[str, EmulatorSession]()
    for digest, folder in folders(run.store, manifest).items():
        session = open_session(folder, manifest, emulator=digest, limits=limits, seed=run.config.seed)
        opened |= dict.fromkeys(manifest.shipped()[digest], session)
    return opened


def with_options(config: FedConfig, *, seed: int | None, rounds: int | None, sites: int | None) -> FedConfig:
    """Returns a configuration with the command line's options; the ranges are checked again.

    Raises:
      ConfigError: the file names fewer than `sites` sites, or a value is out of its range.
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

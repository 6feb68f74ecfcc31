"""A simulated federation's run folder: its files, and the sites that are opened from the folder."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from offsite.errors import ConfigError, DataError, OffsiteError
from offsite.protos.job_manifest import JobManifest
from offsite.secagg.journal import MemoryJournal
from offsite.simulation.site_log import SiteRound, read_site_log
from offsite.task.device import choose_device
from offsite.task.spec import Batch, Record
from offsite.trust.collusion import usual_accomplices
from offsite.trust.files import alone
from offsite.trust.identity import Identity

CONFIG = "config.json"
# All that a run writes, but for `CONFIG`; a folder of another run is cleared of these names only.
FILES = (
    *("job.json", "job_facts.json", "rounds.jsonl", "state.safetensors", "aggregations.txt", "attempts.json"),
    *("settings.json", "model_files.json"),
    *("report.json", "report.md", "report.html", "privacy.json"),
)
FOLDERS = ("sites", "package", "packages", "adapter", "attempt")


@dataclass(frozen=True)
class Origin:
    """The command that began a run.

    Attributes:
      file: path of the federation file; empty where the run was made from a configuration alone.
      seed, rounds, sites: options of the command, None where they were not given.
      private: whether the command left privacy on.
    """

    file: str = ""
    seed: int | None = None
    rounds: int | None = None
    sites: int | None = None
    private: bool = True


@dataclass(frozen=True)
class _Kept:
    """Content of `config.json`: the configuration as plain values, the federation file's SHA-256, and the command."""

    config: Mapping[str, object]
    sha256: str
    origin: Origin = field(default_factory=Origin)


@dataclass(frozen=True)
class Run:
    """One run folder, with the configuration of its run.

    Attributes:
      config: configuration of the run, with the command line's options.
      config_sha256: SHA-256 of the federation file, hexadecimal.
      store: files of the run.
      origin: command that began the run.
    """

    config: FedConfig
    config_sha256: str
    store: Store
    origin: Origin = field(default_factory=Origin)
    _encoded: dict[str, Batch] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def create(cls, config: FedConfig, config_sha256: str, folder: Path, origin: Origin | None = None) -> "Run":
        """Makes a run folder; the folder of a run without a whole round is taken over and begun anew.

        Args:
          config: configuration of the run.
          config_sha256: SHA-256 of the federation file, hexadecimal.
          folder: run folder.
          origin: command that begins the run.

        Raises:
          ConfigError: the folder holds something else, or a whole round; a simulation runs there now; or the
            configuration names no site.
        """
        if not config.sites:
            raise ConfigError("sites: a simulation needs [[sites]], or data.sites_dir with data.owners; add them")
        check_free(folder)
        origin, store = origin or Origin(), Store(folder)
        with alone(folder, "a simulation"):
            _clear(folder)
            store.write_json(CONFIG, encode(_Kept(config.to_dict(), config_sha256, origin)))
        run = cls(config, config_sha256, store, origin)
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
        config = parse_config(dict(kept.config), folder, f"config={str(folder / CONFIG)!r}")
        return cls(config, kept.sha256, store, kept.origin)

    @property
    def whole_rounds(self) -> int:
        """Number of whole rounds in the folder.

        Raises:
          DataError: the state of the run is damaged.
        """
        return whole_rounds(self.store.folder)

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
        examples = self._encoded.get(path)
        return self.encoded(path, self.records(path), manifest, session) if examples is None else examples

    def encoded(self, path: str, records: list[Record], manifest: JobManifest, session: EmulatorSession) -> Batch:
        """Returns the records of a file as the examples of a job, and keeps these; all sites of a job encode alike."""
        self._encoded[path] = encode_records(session, manifest, records)
        return self._encoded[path]

    def site(self, name: str, manifest: JobManifest, session: EmulatorSession) -> Site:
        """Opens one simulated site.

        The site's noise and rounding are derived from the run's seed, so that a resumed run ends with the same adapter.
        A simulation is not private for this reason, and the report says so.
        """
        setting = next(site for site in self.config.sites if site.name == name)
        try:
            examples = self.examples(setting.train, manifest, session)
            plan = plan_for(manifest, len(examples))
        except OffsiteError as error:
            raise type(error)(f"site={name}: {error}") from error
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
    device, dtype = choose_device(run.config.compute.device), run.config.compute.dtype
    limits, opened = VettingThresholds.for_owner(2 * manifest.adapter.rank, share=1e6), dict[str, EmulatorSession]()
    for digest, folder in folders(run.store, manifest).items():
        session = open_session(
            folder, manifest, emulator=digest, limits=limits, seed=run.config.seed, device=device, dtype=dtype
        )
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


def whole_rounds(folder: Path) -> int:
    """Returns the number of whole rounds of the run in a folder.

    Raises:
      DataError: the state of the run is damaged.
    """
    progress = Store(folder).load_state()
    return 0 if progress is None else progress.round


def check_free(folder: Path) -> None:
    """Checks that a run may begin in a folder: the folder is missing or empty, or holds a run without a whole round.

    Raises:
      ConfigError: the folder holds something else, or a whole round.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        decode(_Kept, json.loads((folder / CONFIG).read_text(encoding="utf-8")), CONFIG)
    except (OSError, ValueError, DataError):
        raise ConfigError(
            f"out={str(folder)!r}: the folder is not empty, and holds no run; choose another folder"
        ) from None
    if rounds := whole_rounds(folder):
        raise ConfigError(
            f"out={str(folder)!r}: the folder is not empty: its run has {rounds} whole rounds; choose another folder, "
            "or --resume this folder"
        )


def _clear(folder: Path) -> None:
    """Removes what an earlier run wrote into a folder, and nothing else."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for name in FOLDERS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)


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

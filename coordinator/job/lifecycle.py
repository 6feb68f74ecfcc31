"""The life of a job in its run folder: prepared once, opened ever after, and finished when all rounds are whole."""

from collections.abc import Callable

from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.job.prepare import Job, Parties, prepare, reopen
from offsite.coordinator.job.public_records import read_records
from offsite.coordinator.job.store import Progress, Store
from offsite.errors import ConfigError, Untrusted
from offsite.protos.job_manifest import JobManifest

SETTINGS, SHA256 = "settings.json", "sha256"


def open_or_prepare(
    config: FedConfig,
    parties: Parties,
    store: Store,
    *,
    on_step: Callable[[str], None],
    settings: str | None = None,
) -> Job:
    """Opens the job that a run folder holds, or prepares the job and stores it there.

    Args:
      config: the federation file.
      parties: members of the job, for a job that is prepared now.
      store: the run folder.
      on_step: function that takes a text about what is being done.
      settings: SHA-256 of the settings that make the job, to which the run folder is tied; None where the folder
        itself holds the whole configuration, as in a simulation.

    Raises:
      ConfigError: the run began with other settings.
      Untrusted: the owners have signed another epoch since then, and the sites would refuse the rounds that are left.
      DataError: records or files of the run cannot be read.
      OffsiteError: the job cannot be prepared; see `prepare`.
    """
    if (manifest := store.job()) is None:
        records = read_records(config, config.data.public)
        job = prepare(config, records=records, federation=parties, store=store, on_step=on_step)
        if settings is not None:
            store.write_json(SETTINGS, {SHA256: settings})
        store.save_job(job.manifest, job.facts())
        return job
    if settings is not None:
        _check_settings(store, settings)
    _check_epoch(store, manifest, parties)
    on_step("open the prepared job")
    records = read_records(config, config.data.public)
    return reopen(config, manifest, store.job_facts(), records=records, store=store, on_step=on_step)


def finished(store: Store, manifest: JobManifest) -> Progress | None:
    """Returns the progress of a job if all its rounds are whole, and None for any other job."""
    progress = store.load_state()
    return progress if progress is not None and progress.round >= manifest.rounds else None


def _check_settings(store: Store, now: str) -> None:
    """Refuses to go on with a run under settings that its sites did not agree to."""
    began = store.read_json(SETTINGS).get(SHA256)
    if began != now:
        raise ConfigError(
            f"settings={now[:12]}: run {str(store.folder)!r} began with {str(began)[:12]}; restore the federation "
            "file, or give another --out"
        )


def _check_epoch(store: Store, manifest: JobManifest, parties: Parties) -> None:
    if (manifest.federation, manifest.epoch) != (parties.name, parties.epoch) and finished(store, manifest) is None:
        raise Untrusted(
            f"epoch={manifest.epoch}: this run was made under that epoch, and the owners are at epoch "
            f"{parties.epoch}; start a new run with --out FOLDER"
        )

"""A job whose report is written already: its command shows the report again, without model, packages or records."""

from importlib.metadata import version

from offsite.adapter.export import CONFIG, WEIGHTS
from offsite.coordinator.job.lifecycle import finished
from offsite.coordinator.job.store import Store
from offsite.coordinator.report.json_report import read_report
from offsite.coordinator.report.model import Report
from offsite.errors import DataError

FILES = ("report.json", "privacy.json", "report.md", "report.html")  # in the order in which they are written
CONCLUDED = "all rounds are whole and the report is written; nothing is computed again"


def concluded(store: Store, config_sha256: str) -> Report | None:
    """Returns the report of a run folder if nothing is left to do, and None where the report must be written anew.

    That is where a round, a file of the report or the adapter is missing, or where the federation file or the release
    is another than the report's: both may change what a report says.

    Args:
      store: the run folder.
      config_sha256: SHA-256 of the federation file, hexadecimal.

    Raises:
      DataError: the state of the run is damaged.
    """
    manifest = store.job()
    if manifest is None or finished(store, manifest) is None:
        return None
    paths = [store.folder / name for name in FILES] + [store.adapter / name for name in (CONFIG, WEIGHTS)]
    if not all(path.is_file() for path in paths):
        return None
    try:
        report = read_report(store.folder)
    except DataError:
        return None
    known = report.provenance
    wanted = (config_sha256, manifest.digest().hex(), version("offsite"))
    return report if (known.config_sha256, known.job_sha256, known.versions.get("offsite")) == wanted else None

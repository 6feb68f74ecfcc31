"""From an accepted offer to a site that can train, in the background: fetch, open the seal, unpack, vet, load.

No record is read for a job before its owner has approved it: what a job makes of the records is an answer about them.
"""

import logging
import math
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from offsite.client.home.policy import UNPACKING
from offsite.client.home.redact import local_message, peer_message
from offsite.client.site.round_handler import Site
from offsite.client.training.emulator_session import EmulatorSession
from offsite.emulator.package import archive
from offsite.errors import DataError, DigestMismatch, MalformedMessage, OffsiteError
from offsite.protos.codec import Offer
from offsite.protos.job_manifest import JobManifest
from offsite.protos.messages import printable
from offsite.protos.signed_job import package_context
from offsite.trust import streaming
from offsite.trust.sealing import SealingKey

log = logging.getLogger("offsite.client")
FETCHING, VETTED, OPENING, READY, REFUSED = "fetching", "vetted", "opening", "ready", "refused"
APPROVAL_SECONDS = 0.5  # between two looks at whether the owner has approved
PAUSES = (1.0, 300.0)  # seconds before what may pass is tried again, doubling
TRIES = 2  # a package that was damaged on the way or on the disk is fetched once more
Fetch = Callable[[str, int, Path, Callable[[int], None]], Path]


@dataclass(frozen=True)
class Means:
    """What a preparation works with.

    Attributes:
      site: this site's name.
      packages: folder of packages.
      sealing: this site's key.
      fetch: (SHA-256, bytes, file, told the bytes that are here) -> file; resumes.
      open_session: (manifest, package folder) -> workbench; vets and loads, and reads no record.
      open_site: (manifest, workbench) -> site; reads the records.
      max_bytes: room for all packages together.
    """

    site: str
    packages: Path
    sealing: SealingKey
    fetch: Fetch
    open_session: Callable[[JobManifest, Path], EmulatorSession]
    open_site: Callable[[JobManifest, EmulatorSession], Site]
    max_bytes: float = math.inf


class JobLoader:
    """One job on its way to being ready; run in a thread of its own and asked for its state from another.

    What may pass, as a full disk or data that are away, is tried again after a pause, from where it stood.

    Args:
      offer: what the coordinator offered.
      manifest: its manifest, permitted by the policy.
      means: what is worked with.
      is_approved: says whether the owner lets it read the records; asked right before it does.

    Attributes:
      state: FETCHING, VETTED while it waits for its approval, OPENING, READY or REFUSED.
      detail: why it is refused.
      fetched: bytes of the package that are here.
      opened: whether the records were read, so that what it says from then on may follow from them.
      site: once it is ready.
    """

    def __init__(self, offer: Offer, manifest: JobManifest, means: Means, is_approved: Callable[[], bool]) -> None:
        self.manifest, self.package = manifest, offer.package
        self.state, self.detail, self.fetched, self.opened = FETCHING, "", 0, False
        self.site: Site | None = None
        self._offer, self._means, self._is_approved = offer, means, is_approved
        self._session: EmulatorSession | None = None
        self._stopped, self._settled = threading.Event(), threading.Event()

    def stop(self) -> None:
        """Gives it up; `run` returns at the next step."""
        self._stopped.set()

    def wait(self, seconds: float) -> None:
        """Waits until it is ready, refused, or waits for its approval, at most so long."""
        self._settled.wait(seconds)

    def run(self) -> None:
        """Works until the job is ready, refused for good, or given up."""
        pause = PAUSES[0]
        try:
            while not self._advanced():
                self._stopped.wait(pause)
                pause = min(2 * pause, PAUSES[1])
        except _GivenUp:
            self._session = self.site = None
        except OffsiteError as error:
            self._refuse(error, str(error))
        except BaseException as error:  # a bug must not leave the coordinator waiting for ever
            log.error("preparation failed: %s: %s", type(error).__name__, local_message(error))
            self._refuse(error, peer_message(error))

    def _advanced(self) -> bool:
        """Goes on from where it stands, and says whether it is ready; else it may be tried again."""
        try:
            self._go_on()
            self._session = self._session or self._vetted()
            self._wait_for_approval()
            self._enter(OPENING)
            self.opened = True
            self.site = self._means.open_site(self.manifest, self._session)
        except DataError as error:
            self._refuse(error, str(error))
            return False
        self._enter(READY)
        self._settled.set()
        return True

    def _wait_for_approval(self) -> None:
        while not self._is_approved():
            self.state = VETTED
            self._settled.set()
            self._stopped.wait(APPROVAL_SECONDS)
            self._go_on()

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise _GivenUp

    def _enter(self, state: str) -> None:
        """Goes to a state; one that was refused stays so until a further try has come to its end."""
        if self.state != REFUSED or state == READY:
            self.state = state

    def _refuse(self, error: BaseException, reason: str) -> None:
        self.state, self.detail = REFUSED, f"{type(error).__name__}: {reason}"
        self._settled.set()

    def _vetted(self) -> EmulatorSession:
        """Returns the workbench of the job's package, fetched once more where what is here turns out to be damaged."""
        for left in reversed(range(TRIES)):
            folder = self._package()
            self._go_on()
            try:
                return self._means.open_session(self.manifest, folder)
            except (DigestMismatch, MalformedMessage) as error:
                _remove(folder)
                if not left:
                    raise
                log.warning("package %s is damaged and is fetched again: %s", folder.name[:12], printable(str(error)))
        raise AssertionError("the last try returns or raises")

    def _package(self) -> Path:
        """Returns the folder of the package; one that is here already is used, and checked when it is loaded."""
        offer, means = self._offer, self._means
        emulator = self.manifest.emulator_of(means.site)
        folder = means.packages / emulator
        if folder.is_dir():
            self.fetched = offer.package_bytes
            return folder
        means.packages.mkdir(parents=True, exist_ok=True)
        digest = offer.package.hex()
        _make_way(means.packages, means.max_bytes - UNPACKING * offer.package_bytes, keep=digest)
        sealed = means.fetch(digest, offer.package_bytes, means.packages / f"{digest}.sealed", self._moved)
        key = means.sealing.open(offer.sealed_key, package_context(self.manifest, offer.package))
        plain, partial = means.packages / f"{digest}.plain", means.packages / f"{emulator}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with sealed.open("rb") as source, plain.open("wb") as target:
                streaming.decrypt(source, target, key)
            with plain.open("rb") as source:
                archive.read(source, partial, expected_digest=emulator)
            partial.rename(folder)
        except OSError as error:
            raise DataError(
                f"packages={means.packages.name}: cannot be written ({error.strerror}); free disk space"
            ) from error
        finally:
            plain.unlink(missing_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
        sealed.unlink()
        return folder

    def _moved(self, fetched: int) -> None:
        self.fetched = fetched
        self._go_on()


class _GivenUp(Exception):
    """Another job came, or this one ended."""


def _make_way(packages: Path, max_bytes: float, *, keep: str) -> None:
    """Removes what earlier jobs left, the oldest first, until all that is left takes no more than so many bytes.

    Args:
      packages: the folder.
      max_bytes: that may stay.
      keep: beginning of the names of what is fetched now.
    """
    left = (path for path in packages.iterdir() if not path.name.startswith(keep))
    ages = sorted(left, key=lambda path: path.lstat().st_mtime)
    sizes = {path: sum(file.lstat().st_size for file in (path, *path.rglob("*")) if file.is_file()) for path in ages}
    for path in ages:
        if sum(sizes.values()) <= max_bytes:
            return
        del sizes[path]
        _remove(path)
        log.info("package %s made way for the next one", path.name[:12])


def _remove(path: Path) -> None:
    """Removes a file or a folder; a folder loses its name first, so that a kill leaves no half one under it."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    doomed = path.with_name(f"{path.name}.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)

"""From an accepted offer to a site that can train, in the background: fetch, open the seal, unpack, vet, load.

No record is read for a job before the owner has approved the job, because every result on the records is an answer
about them.
"""

import logging
import shutil
import threading
from pathlib import Path

from offsite.client.home.package_room import size_of
from offsite.client.home.redact import FAULT, REFUSED, local_message
from offsite.client.service.site_runtime import SiteRuntime
from offsite.client.site.round_handler import Site
from offsite.client.training.emulator_session import EmulatorSession
from offsite.emulator.package import archive
from offsite.errors import DataError, DigestMismatch, MalformedMessage, OffsiteError
from offsite.protos.codec import Offer
from offsite.protos.job_manifest import JobManifest
from offsite.protos.messages import printable
from offsite.protos.signed_job import package_context
from offsite.trust import streaming

log = logging.getLogger("offsite.client")
FETCHING, VETTED, OPENING, READY = "fetching", "vetted", "opening", "ready"
APPROVAL_SECONDS = 0.5  # between two looks for the owner's approval
PAUSES = (1.0, 300.0)  # seconds before the next try after an error that may pass; they double up to the second number
TRIES = 2  # a package that was damaged on the way or on the disk is fetched once more


class JobLoader:
    """One job on its way to being ready: a thread runs `run`, and other threads read the state.

    After an error that may pass, as a full disk, the loader pauses and goes on from where it stood.

    Args:
      offer: the coordinator's offer.
      manifest: manifest of the offer, permitted by the policy.
      runtime: open site.

    Attributes:
      state: FETCHING; VETTED while the job waits for its approval; OPENING; READY or REFUSED.
      detail: kind and reason of a refusal, for the owner alone; `client.home.redact.for_peer` leaves the kind.
      fetched: number of bytes of the package that are on the disk.
      opened: whether the records were read, so that further answers may follow from them.
      site: site that trains the job; None until the job is ready.
    """

    def __init__(self, offer: Offer, manifest: JobManifest, runtime: SiteRuntime) -> None:
        self.manifest, self.package = manifest, offer.package
        self.state, self.detail, self.fetched, self.opened = FETCHING, "", 0, False
        self.site: Site | None = None
        self._offer, self._runtime = offer, runtime
        self._session: EmulatorSession | None = None
        self._stopped, self._settled = threading.Event(), threading.Event()

    def stop(self) -> None:
        """Gives the job up; `run` returns at its next step, and the workers of a job that is ready end."""
        self._stopped.set()
        if self.site is not None:
            self._close()

    def wait(self, seconds: float) -> None:
        """Waits until the job is ready, refused or in need of an approval, at most so many seconds."""
        self._settled.wait(seconds)

    def run(self) -> None:
        """Works until the job is ready, refused for good, or given up."""
        pause = PAUSES[0]
        try:
            while not self._is_ready():
                self._stopped.wait(pause)
                pause = min(2 * pause, PAUSES[1])
        except _GivenUp:
            self.site = None
        except OffsiteError as error:
            self._refuse(type(error).__name__, str(error))
        except BaseException as error:  # a bug must not leave the coordinator waiting for ever
            log.error("job could not be loaded: %s: %s", type(error).__name__, local_message(error))
            self._refuse(FAULT, local_message(error))
        if self.site is None or self._stopped.is_set():
            self._close()

    def _close(self) -> None:
        """Ends the workers, and lets go of the emulator."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _is_ready(self) -> bool:
        """Goes on from where the job stands, and says whether the job is ready; otherwise the next try may succeed."""
        try:
            self._check_not_stopped()
            if self._runtime.is_approved(self.manifest):  # refused here, a package is not even fetched
                self._runtime.reserve(self.manifest)
            self._session = self._session or self._vetted()
            self._wait_for_approval()
            self._runtime.reserve(self.manifest)
            self._enter(OPENING)
            self.opened = True
            self.site = self._runtime.open_site(self.manifest, self._session)
        except DataError as error:
            self._refuse(type(error).__name__, str(error))
            return False
        self._enter(READY)
        self._settled.set()
        return True

    def _wait_for_approval(self) -> None:
        while not self._runtime.is_approved(self.manifest):
            self.state = VETTED
            self._settled.set()
            self._stopped.wait(APPROVAL_SECONDS)
            self._check_not_stopped()

    def _check_not_stopped(self) -> None:
        if self._stopped.is_set():
            raise _GivenUp

    def _enter(self, state: str) -> None:
        """Enters a state; a refused job stays refused until a further try has come to its end."""
        if self.state != REFUSED or state == READY:
            self.state = state

    def _refuse(self, kind: str, reason: str) -> None:
        self.state, self.detail = REFUSED, f"{kind}: {reason}"
        self._settled.set()

    def _vetted(self) -> EmulatorSession:
        """Returns the session on the job's package; a package that turns out to be damaged is fetched once more."""
        for left in reversed(range(TRIES)):
            folder = self._package()
            self._check_not_stopped()
            try:
                return self._runtime.open_session(self.manifest, folder)
            except (DigestMismatch, MalformedMessage) as error:
                _remove(folder)
                if not left:
                    raise
                log.warning("package %s is damaged and is fetched again: %s", folder.name[:12], printable(str(error)))
        raise AssertionError("the last try returns or raises")

    def _package(self) -> Path:
        """Returns the folder of the package; a package on the disk is used, and is checked when it is loaded."""
        offer, packages = self._offer, self._runtime.home.packages
        emulator = self.manifest.emulator_of(self._runtime.name)
        folder = packages / emulator
        if folder.is_dir():
            self.fetched = offer.package_bytes
            return folder
        packages.mkdir(parents=True, exist_ok=True)
        digest, room = offer.package.hex(), self._runtime.room(self.manifest, offer.package, offer.package_bytes)
        _make_way(packages, room.stays, keep=digest)
        sealed = self._runtime.fetch(digest, offer.package_bytes, packages / f"{digest}.sealed", self._on_bytes)
        key = self._runtime.home.keys.sealing.open(offer.sealed_key, package_context(self.manifest, offer.package))
        plain, partial = packages / f"{digest}.plain", packages / f"{emulator}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with sealed.open("rb") as source, plain.open("wb") as target:
                streaming.decrypt(source, target, key)
            with plain.open("rb") as source:
                archive.read(source, partial, expected_digest=emulator)
            partial.rename(folder)
        except OSError as error:
            raise DataError(
                f"packages={packages.name}: cannot be written ({error.strerror}); free disk space"
            ) from error
        finally:
            plain.unlink(missing_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
        sealed.unlink()
        return folder

    def _on_bytes(self, fetched: int) -> None:
        self.fetched = fetched
        self._check_not_stopped()


class _GivenUp(Exception):
    """Another job came, or this job ended."""


def _make_way(packages: Path, max_bytes: float, *, keep: str) -> None:
    """Removes packages of earlier jobs, the oldest first, until the rest takes at most so many bytes.

    Args:
      packages: folder of packages.
      max_bytes: number of bytes that may stay.
      keep: beginning of the names of the files that are fetched now.
    """
    earlier = (path for path in packages.iterdir() if not path.name.startswith(keep))
    oldest_first = sorted(earlier, key=lambda path: path.lstat().st_mtime)
    sizes = {path: size_of(path) for path in oldest_first}
    for path in oldest_first:
        if sum(sizes.values()) <= max_bytes:
            return
        del sizes[path]
        _remove(path)
        log.info("package %s made way for the next one", path.name[:12])


def _remove(path: Path) -> None:
    """Removes a file or a folder; a folder is renamed first, so that a kill leaves no half package under its name."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    doomed = path.with_name(f"{path.name}.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)

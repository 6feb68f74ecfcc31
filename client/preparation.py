"""From an accepted offer to a site that can train, in the background: fetch, open the seal, unpack, vet, load.

No record is read for a job before its owner has approved it: what a job makes of the records is an answer about them.
"""

import logging
import math
import shutil
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from client.policy import UNPACKING
from client.site import Site
from client.workbench import Workbench
from emulator import archive
from errors import DataError, DigestMismatch, MalformedMessage, OffsiteError
from protos.codec import Offer
from protos.manifest import JobManifest
from protos.signed_job import package_context
from trust import streaming
from trust.sealing import SealingKey

log = logging.getLogger("offsite.client")
FETCHING, VETTED, OPENING, READY, REFUSED = "fetching", "vetted", "opening", "ready", "refused"
TRIES = 2  # a package that was damaged on the way or on the disk is fetched once more
Fetch = Callable[[str, int, Path, Callable[[int], None]], Path]


@dataclass(frozen=True)
class Means:
    """What a preparation works with.

    Attributes:
      packages: folder of packages.
      sealing: this site's key.
      fetch: (SHA-256, bytes, file, told the bytes that are here) -> file; resumes.
      open_bench: (manifest, package folder) -> workbench; vets and loads, and reads no record.
      open_site: (manifest, workbench) -> site; reads the records.
      most_bytes: room for all packages together.
    """

    packages: Path
    sealing: SealingKey
    fetch: Fetch
    open_bench: Callable[[JobManifest, Path], Workbench]
    open_site: Callable[[JobManifest, Workbench], Site]
    most_bytes: float = math.inf


class Preparation:
    """One job on its way to being ready; asked for its state from another thread.

    A refusal is `final` where another try would end alike: disk and network may change, an emulator does not.

    Args:
      offer: what the coordinator offered.
      manifest: its manifest, permitted by the policy.
      means: what is worked with.
    """

    def __init__(self, offer: Offer, manifest: JobManifest, means: Means) -> None:
        self.manifest, self.package = manifest, offer.package
        self.state, self.detail, self.fetched = FETCHING, "", 0
        self.final = False
        self.site: Site | None = None
        self._offer, self._means = offer, means
        self._approved, self._settled, self._stopped = threading.Event(), threading.Event(), False
        self._after: Preparation | None = None
        self._thread = threading.Thread(target=self._run, name="preparation", daemon=True)

    def start(self, *, after: "Preparation | None" = None) -> None:
        """Begins, once an earlier one has ended: a machine has room for one model."""
        self._after = after
        if after is not None:
            after.stop()
        self._thread.start()

    def approve(self) -> None:
        """Lets it read the records, as soon as the emulator is vetted."""
        if self.state == VETTED:
            self._settled.clear()
        self._approved.set()

    def stop(self) -> None:
        """Gives it up; its thread ends by itself at the next step."""
        self._stopped = True
        self._approved.set()

    def wait(self, seconds: float) -> None:
        """Waits until it is ready, refused, or waits for its approval, at most so long."""
        self._settled.wait(seconds)

    def _run(self) -> None:
        if self._after is not None:
            self._after._thread.join()
            self._after = None
        try:
            bench = self._vetted()
            if not self._approved.is_set():
                self.state = VETTED
                self._settled.set()
            self._approved.wait()
            if self._stopped:
                return
            self.state = OPENING
            self.site = self._means.open_site(self.manifest, bench)
            self.state = READY
        except _GivenUp:
            pass
        except OffsiteError as error:
            self._refuse(error, str(error), final=not isinstance(error, DataError))
        except Exception as error:  # a bug must not leave the coordinator waiting for ever
            log.error("preparation failed: %s: %s", type(error).__name__, fault(error))
            self._refuse(error, fault(error), final=False)
        finally:
            self._settled.set()

    def _refuse(self, error: Exception, reason: str, *, final: bool) -> None:
        self.final = final
        self.state, self.detail = REFUSED, f"{type(error).__name__}: {reason}"

    def _vetted(self) -> Workbench:
        """Returns the workbench of the job's package, fetched once more where what is here turns out to be damaged."""
        for left in reversed(range(TRIES)):
            folder = self._package()
            try:
                return self._means.open_bench(self.manifest, folder)
            except (DigestMismatch, MalformedMessage) as error:
                _remove(folder)
                if not left:
                    raise
                log.warning("package %s is damaged and is fetched again: %s", folder.name[:12], error)
        raise AssertionError("the last try returns or raises")

    def _package(self) -> Path:
        """Returns the folder of the package; one that is here already is used, and checked when it is loaded."""
        offer, means = self._offer, self._means
        folder = means.packages / self.manifest.emulator
        if folder.is_dir():
            self.fetched = offer.package_bytes
            return folder
        means.packages.mkdir(parents=True, exist_ok=True)
        digest = offer.package.hex()
        _make_way(means.packages, means.most_bytes - UNPACKING * offer.package_bytes, keep=digest)
        sealed = means.fetch(digest, offer.package_bytes, means.packages / f"{digest}.sealed", self._moved)
        key = means.sealing.open(offer.sealed_key, package_context(self.manifest, offer.package))
        plain, partial = means.packages / f"{digest}.plain", means.packages / f"{self.manifest.emulator}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with sealed.open("rb") as source, plain.open("wb") as target:
                streaming.decrypt(source, target, key)
            with plain.open("rb") as source:
                archive.read(source, partial, expected_digest=self.manifest.emulator)
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
        if self._stopped:
            raise _GivenUp


class _GivenUp(Exception):
    """Another job came, or this one ended."""


def fault(error: Exception) -> str:
    """Returns what may be told of a fault that is not an `OffsiteError`: its message could quote a record."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "not enough memory for this job; raise max_memory_gb in policy.toml, or ask for a smaller physical_batch"
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"
    return f"a fault in the site's program at {place}; see its log"


def _make_way(packages: Path, most_bytes: float, *, keep: str) -> None:
    """Removes what earlier jobs left, the oldest first, until all that is left takes no more than so many bytes.

    Args:
      packages: the folder.
      most_bytes: that may stay.
      keep: beginning of the names of what is fetched now.
    """
    left = (path for path in packages.iterdir() if not path.name.startswith(keep))
    ages = sorted(left, key=lambda path: path.lstat().st_mtime)
    sizes = {path: sum(file.lstat().st_size for file in (path, *path.rglob("*")) if file.is_file()) for path in ages}
    for path in ages:
        if sum(sizes.values()) <= most_bytes:
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

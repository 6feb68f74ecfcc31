"""From an accepted offer to a site that can train: fetch, open the seal, unpack, vet, load; in the background."""

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
from emulator import archive
from errors import DataError, DigestMismatch, MalformedMessage, OffsiteError
from protos.codec import Offer
from protos.manifest import JobManifest
from protos.signed_job import package_context
from trust import streaming
from trust.sealing import SealingKey

log = logging.getLogger("offsite.client")
FETCHING, READY, REFUSED = "fetching", "ready", "refused"
Fetch = Callable[[str, int, Path, Callable[[int], None]], Path]


@dataclass(frozen=True)
class Means:
    """What a preparation works with.

    Attributes:
      packages: folder of packages.
      sealing: this site's key.
      fetch: (SHA-256, bytes, file, told the bytes that are here) -> file; resumes.
      most_bytes: room for all packages together.
      open_site: (manifest, package folder) -> site; vets and loads.
    """

    packages: Path
    sealing: SealingKey
    fetch: Fetch
    open_site: Callable[[JobManifest, Path], Site]
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
        self.manifest = manifest
        self.state, self.detail, self.fetched = FETCHING, "", 0
        self.final = False
        self.site: Site | None = None
        self._offer, self._means = offer, means
        self._thread = threading.Thread(target=self._run, name="preparation", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Waits until it is ready or refused, at most so long."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self.site = self._means.open_site(self.manifest, self._package())
        except OffsiteError as error:
            self.final = not isinstance(error, DataError)
            if isinstance(error, DigestMismatch | MalformedMessage):  # perhaps damaged here; a restart fetches it anew
                shutil.rmtree(self._means.packages / self.manifest.emulator, ignore_errors=True)
            self.state, self.detail = REFUSED, f"{type(error).__name__}: {error}"
        except Exception as error:  # a bug must not leave the coordinator waiting for ever
            log.error("preparation failed: %s: %s", type(error).__name__, fault(error))
            self.state, self.detail = REFUSED, f"{type(error).__name__}: {fault(error)}"
        else:
            self.state = READY

    def _package(self) -> Path:
        """Returns the folder of the package; one that is here already is used, and checked when it is loaded."""
        offer, means = self._offer, self._means
        folder = means.packages / self.manifest.emulator
        if folder.is_dir():
            self.fetched = offer.package_bytes
            return folder
        means.packages.mkdir(parents=True, exist_ok=True)
        _make_way(means.packages, means.most_bytes - UNPACKING * offer.package_bytes)
        digest = offer.package.hex()
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


def fault(error: Exception) -> str:
    """Returns what may be told of a fault that is not an `OffsiteError`: its message could quote a record."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "not enough memory for this job; raise max_memory_gb in policy.toml, or ask for a smaller physical_batch"
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"
    return f"a fault in the site's program at {place}; see its log"


def _make_way(packages: Path, most_bytes: float) -> None:
    """Removes packages of earlier jobs, the oldest first, until all that are left take no more than so many bytes."""
    folders = sorted((path for path in packages.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in folders}
    for path in folders:
        if sum(sizes.values()) <= most_bytes:
            return
        del sizes[path]
        shutil.rmtree(path)
        log.info("package %s made way for the next one", path.name[:12])

"""Room on the disk for a job's package: what the job takes, what the owner permits, and what is free."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from offsite.errors import PolicyRefusal
from offsite.trust.streaming import COPIES_TO_OPEN

GIGABYTE = 2**30
SHARE = 0.75  # of the disk's free room, where the owner names no number


@dataclass(frozen=True)
class PackageRoom:
    """Disk for one package; all numbers but `permitted` are bytes.

    Attributes:
      package: size of the encrypted package; the unpacked package is about as large.
      here: bytes of this package that lie on the disk already, in any of its forms.
      ready: whether the package is unpacked, so that the job takes no further room.
      older: bytes of earlier packages, which make way.
      free: free room of the disk.
      permitted: `max_disk_gb` of the policy, GiB; 0 permits three quarters of what older packages and free room give.
    """

    package: int
    here: int
    ready: bool
    older: int
    free: int
    permitted: float

    @classmethod
    def of(cls, packages: Path, emulator: str, sealed: str, package: int, permitted: float) -> "PackageRoom":
        """Looks at a site's folder of packages.

        Args:
          packages: folder of packages.
          emulator: SHA-256 of the emulator, which names the unpacked package.
          sealed: SHA-256 of the encrypted package, which names the file that is fetched.
          package: size of the encrypted package, bytes.
          permitted: `max_disk_gb` of the policy, GiB.
        """
        paths = list(packages.iterdir()) if packages.is_dir() else []
        own = [path for path in paths if path.name.startswith((emulator, sealed))]
        here, every = sum(map(size_of, own)), sum(map(size_of, paths))
        place = next(parent for parent in (packages, *packages.parents) if parent.is_dir())
        ready = (packages / emulator).is_dir()
        return cls(package, here, ready, every - here, shutil.disk_usage(place).free, permitted)

    @property
    def peak(self) -> int:
        """Bytes of this package while it is unpacked: encrypted, decrypted, and its files."""
        return COPIES_TO_OPEN * self.package

    @property
    def missing(self) -> int:
        """Bytes that the package still takes; none once it is unpacked."""
        return 0 if self.ready else max(0, self.peak - self.here)

    @property
    def limit(self) -> int:
        """Bytes that packages may take at this site."""
        return int(self.permitted * GIGABYTE) or int(SHARE * (self.free + self.older + self.here))

    @property
    def stays(self) -> int:
        """Most bytes of earlier packages beside this one."""
        return min(self.limit - self.peak, self.older + self.free - self.missing)

    def check(self) -> None:
        """Refuses a package for which there is too little room; a package that is unpacked has its room.

        Raises:
          PolicyRefusal: the policy permits less, or the disk has less; the message says how much is needed.
        """
        if not self.ready and self.peak > self.limit:
            named = f"max_disk_gb={self.permitted:g}" if self.permitted else f"max_disk_gb=0, here {_gib(self.limit)}"
            raise PolicyRefusal(
                f"disk={_gib(self.peak)}: the package takes so much while it is unpacked, and policy.toml has {named}; "
                f"set max_disk_gb = {_above(self.peak)} there, or make room"
            )
        if self.missing > self.free + self.older:
            raise PolicyRefusal(
                f"free_disk={_gib(self.free)}: the package needs {_gib(self.missing)} more while it is unpacked; make "
                "room on the disk of this site's folder"
            )

    def line(self) -> str:
        """Returns one sentence for the owner about the disk that the job takes."""
        named = "max_disk_gb" if self.permitted else "three quarters of what is free, max_disk_gb = 0"
        return (
            f"{_gib(self.peak)} while the package is unpacked, {_gib(self.package)} after; "
            f"{'unpacked already' if self.ready else f'{_gib(self.missing)} still missing'}, limit "
            f"{_gib(self.limit)} ({named}), free {_gib(self.free)}"
        )


def size_of(path: Path) -> int:
    """Returns the bytes of a file, or of all files of a folder; a file that goes meanwhile counts as none."""
    return sum(_bytes(file) for file in (path, *path.rglob("*")))


def _bytes(path: Path) -> int:
    try:
        return path.lstat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def _gib(size: int) -> str:
    return f"{size / GIGABYTE:.2f} GiB"


def _above(size: int) -> str:
    """Returns a number of GiB with one decimal that is not below a size."""
    return f"{-(-size * 10 // GIGABYTE) / 10:.1f}"

"""The emulator at the coordinator, as its sites have it: by it a tuned adapter is corrected before plug-in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapter.methods import attach
from adapter.spec import AdapterSpec
from emulator import package


@dataclass(frozen=True)
class Shipped:
    """One loaded package with the job's adapter, float32.

    Attributes:
      model: the emulator with the adapter attached.
    """

    model: Any

    @classmethod
    def open(cls, folder: Path, digest: str, spec: AdapterSpec) -> "Shipped":
        """Loads a package as a site does.

        Args:
          folder: the package.
          digest: of its manifest, hexadecimal.
          spec: of the adapter.

        Raises:
          DigestMismatch, MalformedMessage, RangeError: as for `package.load`.
        """
        plain = package.load(folder, dtype=torch.float32, expected_digest=digest)
        return cls(attach(plain, spec))

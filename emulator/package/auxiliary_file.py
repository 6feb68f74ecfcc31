"""The file of a package that holds given tensors: what an adapter needs and does not train."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from offsite.adapter.auxiliary import AuxiliaryTensors
from offsite.emulator.package.files import read_checked
from offsite.emulator.package.manifest import GIVEN, Manifest
from offsite.errors import MalformedMessage, RangeError

HEADER_ROOM = 1 << 20  # of names and shapes, beside the tensors


def write(folder: Path, given: AuxiliaryTensors) -> None:
    """Writes the file into a package's folder, the same bytes every time; none where nothing is given."""
    if given:
        plain = {name: given[name].detach().to("cpu").contiguous().clone() for name in sorted(given)}
        save_file(plain, folder / GIVEN)


def read(folder: Path, manifest: Manifest, *, most: int | None = None) -> dict[str, Tensor]:
    """Returns the given tensors of a package, checked against its manifest; none where it has no such file.

    Which tensors an adapter takes, `adapter.methods.attach` checks.

    Args:
      folder: the package.
      manifest: of the package.
      most: bytes that all tensors together may have; nothing is read of a larger file.

    Raises:
      RangeError: they have more.
      DigestMismatch: the file is not the announced one.
      MalformedMessage: it is no safetensors file.
    """
    entry = manifest.files.get(GIVEN)
    if entry is None:
        return {}
    if most is not None and entry.bytes > most + HEADER_ROOM:
        raise RangeError(
            f"{GIVEN}: bytes={entry.bytes}, at most {most} as many as the slots' blocks have are taken; do not train "
            "on this emulator, ask the coordinator for another"
        )
    content = read_checked(folder / GIVEN, entry)
    try:
        return load(content)
    except SafetensorError as error:
        raise MalformedMessage(f"{GIVEN}: not a safetensors file ({error}); fetch the package again") from error

"""The package's file of auxiliary tensors: tensors that an adapter needs and does not train."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from offsite.adapter.auxiliary import AuxiliaryTensors
from offsite.emulator.package.manifest import GIVEN, Manifest
from offsite.emulator.package.package_folder import read_checked
from offsite.errors import MalformedMessage, RangeError

HEADER_ROOM = 1 << 20  # bytes for names and shapes, beside the tensors


def write(folder: Path, auxiliary: AuxiliaryTensors) -> None:
    """Writes the file into a package's folder, the same bytes every time; without tensors there is no file."""
    if auxiliary:
        plain = {name: auxiliary[name].detach().to("cpu").contiguous().clone() for name in sorted(auxiliary)}
        save_file(plain, folder / GIVEN)


def read(folder: Path, manifest: Manifest, *, max_bytes: int | None = None) -> dict[str, Tensor]:
    """Returns the auxiliary tensors of a package, checked against its manifest; {} for a package without such a file.

    `adapter.methods.attach` checks that these are the tensors that the adapter takes.

    Args:
      folder: the package's folder.
      manifest: the package's manifest.
      max_bytes: largest size of all tensors together; a larger file is not read. None is no limit.

    Raises:
      RangeError: the file is larger than `max_bytes` allows.
      DigestMismatch: the file is not the announced one.
      MalformedMessage: the file is not in the safetensors format.
    """
    entry = manifest.files.get(GIVEN)
    if entry is None:
        return {}
    if max_bytes is not None and entry.bytes > max_bytes + HEADER_ROOM:
        raise RangeError(
            f"{GIVEN}: bytes={entry.bytes}, but at most {max_bytes} are taken, as many as the slots' blocks have; do "
            "not train on this emulator, ask the coordinator for another"
        )
    content = read_checked(folder / GIVEN, entry)
    if HEADER_ROOM < int.from_bytes(content[:8], "little") <= entry.bytes:
        raise MalformedMessage(
            f"{GIVEN}: a header of over {HEADER_ROOM} bytes; ask the coordinator for another package"
        )
    try:
        return load(content)
    except SafetensorError as error:
        raise MalformedMessage(f"{GIVEN}: not a safetensors file ({error}); fetch the package again") from error

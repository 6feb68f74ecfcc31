"""The frames of weight files: a file that was cut, or that only points to its content, is named before it is read."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from offsite.errors import DataError

POINTER = b"version https://git-lfs"


def check_files(files: Sequence[Path]) -> None:
    """Opens each file and compares its header with its size; reads no tensor.

    Raises:
      DataError: files are cut, damaged or pointers of Git LFS; the message names all of them.
    """
    if faults := [fault for fault in map(_fault, files) if fault]:
        raise DataError(
            f"model={str(files[0].parent)!r}: {len(faults)} of {len(files)} weight files cannot be read: "
            f"{'; '.join(faults)}; copy these files again"
        )


def _fault(file: Path) -> str:
    """Returns what is wrong with a file, or "" where its frame is whole."""
    try:
        with file.open("rb") as content:
            if content.read(len(POINTER)) == POINTER:
                return f"{file.name} is a pointer of Git LFS and not its content (git lfs pull fetches the content)"
        with safe_open(file, framework="numpy"):
            return ""
    except OSError as error:
        return f"{file.name} ({error.strerror or 'unreadable'})"
    except SafetensorError:
        return f"{file.name} is cut or damaged ({file.stat().st_size} bytes)"

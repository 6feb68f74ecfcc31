"""A small file that people carry between coordinator and sites: a request, or a welcome."""

from pathlib import Path

from offsite.errors import DataError


def read_carried(path: Path, *, key: str, most: int, sender: str) -> bytes:
    """Returns the content of a carried file.

    Args:
      path: place of the file.
      key: name of the kind of file, for messages.
      most: largest number of bytes of such a file.
      sender: person who makes such a file, for messages.

    Raises:
      DataError: there is no file at the place, or a larger file.
    """
    if not path.exists():
        raise DataError(f"{key}={str(path)!r}: no such file; give the path of the {key} that {sender} sent")
    if not path.is_file():
        raise DataError(f"{key}={str(path)!r}: is no file; give the path of the {key} itself")
    if (size := path.stat().st_size) > most:
        raise DataError(
            f"{key}={str(path)!r}: has {size} bytes, and a {key} has at most {most}; give the path of the {key} that "
            f"{sender} sent"
        )
    return path.read_bytes()

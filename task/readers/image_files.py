"""Reads a site's images: a folder for each class, a Parquet file of encoded images, or plain arrays in an .npz file."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from offsite.errors import DataError
from offsite.task.encoded_image import NO_IMAGE, EncodedImage
from offsite.task.readers.arrow_rows import ARROW_SUFFIXES, arrow_sources, parquet_sources
from offsite.task.readers.columns import Column, Columns, check_columns
from offsite.task.readers.data_file import DataFile
from offsite.task.readers.image_folder import class_images
from offsite.task.readers.rows import Values, rows
from offsite.task.readers.table import Source
from offsite.task.record_fields import IMAGE
from offsite.task.records import OnFault
from offsite.task.spec import Record

LENGTHS = "_length"  # suffix of the name of an array with the lengths of another array's rows without padding


def read_images(path: Path, columns: Columns, on_fault: OnFault) -> list[Record]:
    """Returns one record for each image of a folder with a folder for each class, in order of class and file name.

    The columns are "image" and "label", which is the name of the class's folder; see `class_images`. Messages number
    the images, because file names may be private.
    """
    check_columns(path, columns, ["image", "label"])
    if not path.is_dir():
        raise DataError(f"data={str(path)!r} is not a folder; give a folder with a folder of images for each class")
    sources = [
        (f"image={number}", partial(dict[str, Any], {"image": EncodedImage(image.file), "label": image.label}))
        for number, image in enumerate(class_images(path), start=1)
    ]
    return rows(path, columns, sources, on_fault)


def image_sources(file: DataFile, columns: Columns, on_fault: OnFault) -> Iterator[Source]:
    """Yields the rows of a Parquet or Arrow file with encoded images.

    An image is bytes, or {bytes, path} as many tools write it; all other columns are as in any such file.
    """
    sources = arrow_sources if file.path.suffix.lower() in ARROW_SUFFIXES else parquet_sources
    for place, fields in sources(file, columns, on_fault):
        yield place, partial(_with_images, fields)


def read_npz(path: Path, columns: Columns, on_fault: OnFault) -> list[Record]:
    """Returns one record for each row of the arrays of an .npz file; each column is an array, all with as many rows.

    An array "name" may have an array "name_length" of whole numbers; each row is then cut to its length, which removes
    padding, for example of texts. Rows of uint8 (H, W, 3) or (H, W) are images, rows of floating-point numbers are
    arrays, and single numbers and texts stay as they are.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            present = [name for name in file.files if not name.endswith(LENGTHS)]
            check_columns(path, columns, present)
            wanted = [name for column in columns.values() for name in (column.name, column.name + LENGTHS)]
            arrays = {name: file[name] for name in dict.fromkeys(wanted) if name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, BadZipFile):  # ValueError also for pickled objects
        raise DataError(f"data={str(path)!r} is not a readable .npz file of plain arrays; write it again") from None
    sizes = {name: array.shape[0] if array.ndim else -1 for name, array in arrays.items()}
    if len(set(sizes.values())) != 1 or -1 in sizes.values():
        shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise DataError(f"data={str(path)!r} rows {shown}: all columns must have as many rows; write it again")
    _check_lengths(path, arrays)
    sources = [(f"row={at + 1}", _row_of(path, columns, arrays, at)) for at in range(next(iter(sizes.values())))]
    return rows(path, columns, sources, on_fault)


def check_images(path: Path, records: Sequence[Record]) -> None:
    """Decodes every image of a file, for the file's owner; an image is else decoded when its record is encoded.

    Raises:
      DataError: an image is damaged, too large or too deep, or only a path; the message names the record's place.
    """
    for number, record in enumerate(records, start=1):
        where = getattr(record, "place", f"record={number}")
        if isinstance(record.get(IMAGE), str):
            raise DataError(f"data={str(path)!r} {where} field={IMAGE!r}: {NO_IMAGE}")
        for value in record.values():
            if isinstance(value, EncodedImage):
                try:
                    value.decoded()
                except DataError as error:
                    raise DataError(f"data={str(path)!r} {where} {error}") from None


def _check_lengths(path: Path, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        lengths = arrays.get(name + LENGTHS)
        if lengths is not None and (array.ndim < 2 or lengths.ndim != 1 or lengths.dtype.kind not in "iu"):
            raise DataError(f"data={str(path)!r} {name}{LENGTHS} must be one whole number for each row; write it again")


def _with_images(fields: Callable[[], Values | None]) -> Values | None:
    """Returns the values of a row; bytes are an encoded image."""
    values = fields()
    return None if values is None else {name: _image(value) for name, value in values.items()}


def _image(value: Any) -> Any:
    """Returns an encoded image for bytes, or for {bytes, path}; any other value, as a path without bytes, stays."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return EncodedImage(content) if isinstance(content, bytes) else value


def _row_of(path: Path, columns: Columns, arrays: dict[str, np.ndarray], at: int) -> Callable[[], Values]:
    return lambda: {column.name: _cell(path, column, arrays, at) for column in columns.values()}


def _cell(path: Path, column: Column, arrays: dict[str, np.ndarray], at: int) -> Any:
    """Returns the value of a column in a row: an array, a list, or Python's own type of number or text."""
    value = arrays[column.name][at]
    if not isinstance(value, np.ndarray):
        return value.item() if value.dtype.kind in "iubUf" else value
    if (lengths := arrays.get(column.name + LENGTHS)) is not None:
        length = int(lengths[at])
        if not 0 <= length <= len(value):
            raise DataError(
                f"data={str(path)!r} row={at + 1} {column.name}{LENGTHS} must be 0..{len(value)}, the length of a row; "
                "write it again"
            )
        value = value[:length]
    return value.tolist() if value.dtype.kind in "iU" else value

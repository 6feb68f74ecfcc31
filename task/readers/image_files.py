"""Reads a site's images: a folder for each class, a Parquet file of encoded images, or plain arrays in an .npz file."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image, UnidentifiedImageError

from offsite.errors import DataError
from offsite.task.readers.columns import Column, Columns, check_columns
from offsite.task.readers.parquet import parquet_rows
from offsite.task.records import Row
from offsite.task.spec import Record

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # of a file with several images only the first is read
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 1 << 26  # of one image; a file of few bytes can need more memory than the machine has
MAX_BYTES = 8 << 30  # of all decoded images of a file or folder
DEEP = ("I", "F")  # PIL's modes of 16 and 32 bits; a conversion would turn every value over 255 white
LENGTHS = "_length"  # suffix of the name of an array with the lengths of another array's rows without padding


def read_images(path: Path, columns: Columns) -> list[Record]:
    """Returns one record for each image of a folder with a subfolder for each class, in order of class and file name.

    The columns are "image" and "label", which is the name of the class's folder. Messages number the images, because
    file names may be private.
    """
    check_columns(path, columns, ["image", "label"])
    if not path.is_dir():
        raise DataError(f"data={str(path)!r} is not a folder; give a folder with a folder of images for each class")
    files = sorted(file for folder in path.iterdir() if folder.is_dir() for file in folder.iterdir() if _is_image(file))
    if not files:
        raise DataError(
            f"data={str(path)!r} has no images in folders ({', '.join(SUFFIXES)}); put the images of each class into a "
            "folder with the name of the class"
        )
    rows, left = [], MAX_BYTES
    for number, file in enumerate(files, start=1):
        where = f"image={number}"
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(f"data={str(path)!r} {where} cannot be read ({error.strerror})") from None
        image = _decoded(path, where, content)
        left = _less(path, left, image)
        values = {"image": image, "label": file.parent.name}
        rows.append(Row({field: values[column.name] for field, column in columns.items()}, where))
    return list(rows)


def read_image_parquet(path: Path, columns: Columns) -> list[Record]:
    """Returns one record for each row of a Parquet file with encoded images.

    An image is bytes, or {bytes, path} as many tools write it; all other columns are as in any Parquet file.
    """
    return list(_parquet_rows(path, columns, parquet_rows(path, columns)))


def read_npz(path: Path, columns: Columns) -> list[Record]:
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
    places = range(next(iter(sizes.values())))
    return [
        Row({field: _cell(path, column, arrays, at) for field, column in columns.items()}, f"row={at + 1}")
        for at in places
    ]


def _check_lengths(path: Path, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        lengths = arrays.get(name + LENGTHS)
        if lengths is None:
            continue
        if array.ndim < 2 or lengths.ndim != 1 or lengths.dtype.kind not in "iu":
            raise DataError(f"data={str(path)!r} {name}{LENGTHS} must be one whole number for each row; write it again")
        if ((lengths < 0) | (lengths > array.shape[1])).any():
            raise DataError(
                f"data={str(path)!r} {name}{LENGTHS} must be 0..{array.shape[1]}, the length of a row; write it again"
            )


def _parquet_rows(path: Path, columns: Columns, rows: Sequence[dict[str, Any]]) -> Iterator[Row]:
    left = MAX_BYTES
    for number, values in enumerate(rows, start=1):
        where = f"row={number}"
        fields: dict[str, Any] = {}
        for field, column in columns.items():
            value = values[column.name]
            if isinstance(value, dict):
                value = value.get("bytes")
            if isinstance(value, bytes):
                value = _decoded(path, where, value)
                left = _less(path, left, value)
            fields[field] = _fitting(path, where, column, value)
        yield Row(fields, where)


def _cell(path: Path, column: Column, arrays: dict[str, np.ndarray], at: int) -> Any:
    """Returns the value of a column in a row: an array, a list, or Python's own type of number or text."""
    value = arrays[column.name][at]
    if isinstance(value, np.ndarray):
        if column.name + LENGTHS in arrays:
            value = value[: int(arrays[column.name + LENGTHS][at])]
        if value.dtype.kind in "iU":
            value = value.tolist()
    elif value.dtype.kind in "iubU":
        value = value.item()
    return _fitting(path, f"row={at + 1}", column, value)


def _fitting(path: Path, where: str, column: Column, value: Any) -> Any:
    """Returns a value after a check of its column's type; `object` is a name, a whole number or an array."""
    fits = isinstance(value, str | int | np.ndarray) if column.kind is object else isinstance(value, column.kind)
    if not fits or (column.kind is int and isinstance(value, bool)):
        raise DataError(
            f"data={str(path)!r} {where} column={column.name!r} holds {type(value).__name__}; correct it, or name "
            "another column"
        )
    return value


def _decoded(path: Path, where: str, content: bytes) -> np.ndarray:
    """Returns an encoded image as uint8: (H, W) for a grey image, else (H, W, 3)."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"data={str(path)!r} {where} must have at most {MAX_PIXELS} pixels; make the image smaller"
                )
            if image.mode.startswith(DEEP):
                raise DataError(
                    f"data={str(path)!r} {where} must have at most 8 bits a channel; choose the range of values that "
                    "matters, and write the image with 8 bits"
                )
            return np.array(image if image.mode == "L" else image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        raise DataError(f"data={str(path)!r} {where} is not a readable image; remove it") from None


def _less(path: Path, left: int, image: np.ndarray) -> int:
    """Returns the number of bytes that are left for further images."""
    if image.nbytes > left:
        raise DataError(
            f"data={str(path)!r}: its images must take at most {MAX_BYTES >> 30} GiB in memory; make them smaller, "
            "since a model sees only a few hundred pixels a side"
        )
    return left - image.nbytes


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")

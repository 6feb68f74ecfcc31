"""A site's images: a folder by class, a Parquet file of encoded images, or plain arrays in an .npz file."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image, UnidentifiedImageError

from offsite.errors import DataError
from offsite.task.readers.columns import Column, Columns, check_columns, parquet_rows
from offsite.task.records import Row
from offsite.task.spec import Record

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # the first image of those that hold several
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 1 << 26  # of one image; a file of few bytes can ask for more memory than there is
MAX_BYTES = 8 << 30  # of all decoded images of a file or folder
DEEP = ("I", "F")  # PIL's modes of 16 and 32 bits, of which a conversion would make white whatever is over 255
LENGTHS = "_length"  # ending of an array that says how much of each row of another is not padding


def read_images(path: Path, columns: Columns) -> list[Record]:
    """Returns one record per image of a folder that has a folder of images for each class, by class and by name.

    Its columns are "image" and "label", the name of the class' folder. Messages count the images and do not name them.
    """
    check_columns(path, columns, ["image", "label"])
    if not path.is_dir():
        raise DataError(f"data={str(path)!r} is not a folder; give one with a folder of images for each class")
    files = sorted(file for folder in path.iterdir() if folder.is_dir() for file in folder.iterdir() if _is_image(file))
    if not files:
        raise DataError(
            f"data={str(path)!r} has no images in folders; put those of each class into a folder of its name "
            f"({', '.join(SUFFIXES)})"
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
        rows.append(Row({field: values[one.name] for field, one in columns.items()}, where))
    return list(rows)


def read_image_parquet(path: Path, columns: Columns) -> list[Record]:
    """Returns one record per row of a Parquet file whose images are encoded.

    An image is bytes, or {bytes, path} as many tools write it; all other columns are as in any Parquet file.
    """
    return list(_parquet_rows(path, columns, parquet_rows(path, columns)))


def read_npz(path: Path, columns: Columns) -> list[Record]:
    """Returns one record per row of the arrays of an .npz file, each column an array of as many rows.

    Of an array "name" beside whole numbers "name_length" each row is cut to its length: padding, as texts have it. Rows
    of uint8 (H, W, 3) or (H, W) are images, of floating numbers arrays; single numbers and texts are themselves.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            present = [name for name in file.files if not name.endswith(LENGTHS)]
            check_columns(path, columns, present)
            wanted = [name for one in columns.values() for name in (one.name, one.name + LENGTHS)]
            arrays = {name: file[name] for name in dict.fromkeys(wanted) if name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, BadZipFile):  # the second also where objects are pickled
        raise DataError(f"data={str(path)!r} is not a readable .npz file of plain arrays; write it again") from None
    sizes = {name: array.shape[0] if array.ndim else -1 for name, array in arrays.items()}
    if len(set(sizes.values())) != 1 or -1 in sizes.values():
        shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise DataError(f"data={str(path)!r} rows {shown}: all columns must have as many; write it again")
    _check_lengths(path, arrays)
    places = range(next(iter(sizes.values())))
    return [
        Row({field: _cell(path, one, arrays, at) for field, one in columns.items()}, f"row={at + 1}") for at in places
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
        for field, one in columns.items():
            value = values[one.name]
            if isinstance(value, dict):
                value = value.get("bytes")
            if isinstance(value, bytes):
                value = _decoded(path, where, value)
                left = _less(path, left, value)
            fields[field] = _fitting(path, where, one, value)
        yield Row(fields, where)


def _cell(path: Path, one: Column, arrays: dict[str, np.ndarray], at: int) -> Any:
    """Returns what a column has in a row: an array, or what Python has for a number or text."""
    value = arrays[one.name][at]
    if isinstance(value, np.ndarray):
        if one.name + LENGTHS in arrays:
            value = value[: int(arrays[one.name + LENGTHS][at])]
        if value.dtype.kind in "iU":
            value = value.tolist()
    elif value.dtype.kind in "iubU":
        value = value.item()
    return _fitting(path, f"row={at + 1}", one, value)


def _fitting(path: Path, where: str, one: Column, value: Any) -> Any:
    """Returns a value that is of its column's type; `object` is a name, a whole number or an array."""
    fits = isinstance(value, str | int | np.ndarray) if one.kind is object else isinstance(value, one.kind)
    if not fits or (one.kind is int and isinstance(value, bool)):
        raise DataError(
            f"data={str(path)!r} {where} column={one.name!r} holds {type(value).__name__}; correct it, or name another "
            "column"
        )
    return value


def _decoded(path: Path, where: str, content: bytes) -> np.ndarray:
    """Returns an encoded image as uint8, (H, W) where it is grey and (H, W, 3) otherwise."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"data={str(path)!r} {where} has over {MAX_PIXELS} pixels; make it smaller first")
            if image.mode.startswith(DEEP):
                raise DataError(
                    f"data={str(path)!r} {where} has over 8 bits a channel; choose the window that matters, and write "
                    "it with 8 bits"
                )
            return np.array(image if image.mode == "L" else image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        raise DataError(f"data={str(path)!r} {where} is no image that can be read; remove it") from None


def _less(path: Path, left: int, image: np.ndarray) -> int:
    """Returns how many bytes are left for further images."""
    if image.nbytes > left:
        raise DataError(
            f"data={str(path)!r}: its images take over {MAX_BYTES >> 30} GiB in memory; make them smaller first, a "
            "model sees a few hundred pixels a side"
        )
    return left - image.nbytes


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")

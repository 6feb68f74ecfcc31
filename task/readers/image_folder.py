"""Finds the images in a folder with a folder for each class, and counts the files that are passed over."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from offsite.errors import DataError
from offsite.task.label_names import LabelName
from offsite.task.readers.beside_data import counted, is_hidden, kind_of

# Suffixes of the formats in `task.encoded_image`; a file's content and not its suffix decides how it is read.
SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif")
NO_CLASS = "in no class's folder"


@dataclass(frozen=True)
class ClassImage:
    """One image of a class.

    Attributes:
      file: path of the image.
      label: name of the class, in Unicode's composed form.
    """

    file: Path
    label: LabelName


def class_images(root: Path) -> list[ClassImage]:
    """Returns the images below a folder's own folders, in order of their paths; the first folder names the class.

    Folders in a class's folder are read with it. Hidden folders and files are passed over; `passed_over` counts others.

    Raises:
      DataError: no folder holds an image.
    """
    files = sorted(_files(root, (root.resolve(),)))
    images = _images(root, files)
    if not images:
        raise DataError(
            f"data={str(root)!r} has no images in folders ({', '.join(SUFFIXES)}); put the images of each class into a "
            "folder with the name of the class"
        )
    return [ClassImage(file, _label(file.relative_to(root))) for file in images]


def passed_over(root: Path) -> str:
    """Returns one line about the files that are no record, by suffix, and the classes' folders in which none is.

    The line is empty where every file is a record, and does not name a file, because its name may be private.
    """
    files = sorted(_files(root, (root.resolve(),)))
    images = _images(root, files)
    read = set(images)
    full = {file.relative_to(root).parts[0] for file in images}
    empty = sorted(path.name for path, is_folder in _shown(root) if is_folder and path.name not in full)
    if len(files) == len(images) and not empty:
        return ""
    others = counted(_kind(root, file) for file in files if file not in read) or "none"
    folders = f"; folders without an image: {', '.join(map(repr, empty))}" if empty else ""
    return f"data={str(root)!r}: images={len(images)} are read, files passed over: {others}{folders}"


def holds_images(folder: Path) -> bool:
    """Says whether a folder has images in it, or in its folders."""
    return any(_is_image(file) for file in _files(folder, (folder.resolve(),)))


def _files(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Yields the files of a folder and of the folders in it; a link to a folder above is no folder in it."""
    for path, is_folder in _shown(folder):
        if not is_folder:
            yield path
        elif (real := path.resolve()) not in above:
            yield from _files(path, (*above, real))


def _shown(folder: Path) -> list[tuple[Path, bool]]:
    """Returns what a folder holds but for hidden entries, and whether each is a folder."""
    with os.scandir(folder) as entries:
        shown = (entry for entry in entries if not is_hidden(entry.name))
        return [(folder / entry.name, entry.is_dir()) for entry in shown]


def _label(path: Path) -> LabelName:
    return LabelName(path.parts[0], "folder", shown=True, inner=path.parts[1:-1])


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _images(root: Path, files: list[Path]) -> list[Path]:
    return [file for file in files if file.parent != root and _is_image(file)]


def _kind(root: Path, file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in SUFFIXES:
        return f"{suffix} {NO_CLASS}"
    Image.init()
    return kind_of(suffix, Image.registered_extensions())

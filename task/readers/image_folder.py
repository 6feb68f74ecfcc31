"""Finds the images in a folder with a folder for each class, and counts the files that are passed over."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from offsite.errors import DataError
from offsite.task.label_names import LabelName

log = logging.getLogger("offsite.task")
# Suffixes of the formats in `task.encoded_image`; a file's content and not its suffix decides how it is read.
SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif")
# Folders and files that systems and editors write, beside all names that begin with a dot.
HIDDEN: tuple[str, ...] = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information")
HIDDEN += ("lost+found", "Thumbs.db", "desktop.ini")
_NAMED = (".txt", ".json", ".csv", ".xml", ".dcm", ".heic", ".heif", ".svg", ".npy", ".nii", ".pdf", ".zip", ".avif")


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

    Folders in a class's folder are read with it. Hidden folders and files are passed over; one warning names how many
    other files are passed over, by suffix, because the names of files may be private.

    Raises:
      DataError: no folder holds an image.
    """
    files = sorted(_files(root, (root.resolve(),)))
    images = [file for file in files if file.parent != root and _is_image(file)]
    if not images:
        raise DataError(
            f"data={str(root)!r} has no images in folders ({', '.join(SUFFIXES)}); put the images of each class into a "
            "folder with the name of the class"
        )
    _tell_others(root, files, images)
    return [ClassImage(file, _label(file.relative_to(root))) for file in images]


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
        shown = (entry for entry in entries if not entry.name.startswith(".") and entry.name not in HIDDEN)
        return [(folder / entry.name, entry.is_dir()) for entry in shown]


def _label(path: Path) -> LabelName:
    return LabelName(path.parts[0], "folder", shown=True, inner=path.parts[1:-1])


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _tell_others(root: Path, files: list[Path], images: list[Path]) -> None:
    """Logs one line about the files that are no record, and about the class folders of which none is."""
    read = set(images)
    others = [file for file in files if file not in read]
    full = {file.relative_to(root).parts[0] for file in images}
    empty = sorted(path.name for path, is_folder in _shown(root) if is_folder and path.name not in full)
    if others or empty:
        counts = Counter(_kind(root, file) for file in others)
        shown = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())) or "none"
        folders = f"; folders without an image: {', '.join(map(repr, empty))}" if empty else ""
        log.warning("data=%r: images=%d are read, files passed over: %s%s", str(root), len(images), shown, folders)


def _kind(root: Path, file: Path) -> str:
    """Returns a known suffix, since an unknown one may be a part of a person's name; or the reason of another kind."""
    suffix = file.suffix.lower()
    if suffix in SUFFIXES:
        return f"{suffix} in no class's folder"
    Image.init()
    return suffix if suffix in _NAMED or suffix in Image.registered_extensions() else "with other suffixes"

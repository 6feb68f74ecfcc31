"""The files behind a path: one file, or the shards of a folder in order of their names.

A file of a folder that is neither a shard nor known to lie beside shards is refused. Passed over without a word, the
file would be missing from training and from scores.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from offsite.errors import DataError
from offsite.task.readers.beside_data import counted, is_about, is_hidden, kind_of
from offsite.task.readers.data_file import PACKED, DataFile
from offsite.task.readers.table import TableFormat

ARROW = ".arrow"  # suffix of the shards that `save_to_disk` of `datasets` writes
STATE, INFO = "state.json", "dataset_info.json"  # files that `save_to_disk` writes beside its shards
BESIDE = {STATE, INFO, "dataset_infos.json"}
CACHE = "cache-"  # first letters of the Arrow files that `datasets` keeps beside a saved data set
UNDERSCORE = "_"  # first letter of names that some tools hide, and others do not
_SET = re.compile(r"(.+)-(\d{5})-of-(\d{5})\b")  # a shard whose name says how many there are
_SPLIT = re.compile(r"(?:^|[-._ ])(train|test|valid|val|dev|eval|heldout)(?:ing|ation|idation|uation)?(?=[-._ \d]|$)")
_SAME_SPLIT = {"val": "valid", "dev": "valid"}


def suffix_of(path: Path) -> str:
    """Returns a file's suffix in small letters, for a compressed file the one before."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED else suffix


def reader_of(path: Path, suffixes: Mapping[str, str], readers: Collection[str]) -> str:
    """Returns the name of the reader for a path, by the suffix of the file or of the files in the folder.

    Args:
      path: file or folder.
      suffixes: suffix in small letters -> reader.
      readers: names of all readers, for messages.

    Raises:
      DataError: no suffix tells the reader, or the folder has files for several readers.
    """
    names = f"name a reader: {', '.join(sorted(readers))}"
    if not path.is_dir():
        if suffix_of(path) in suffixes:
            return suffixes[suffix_of(path)]
        raise DataError(f"data={str(path)!r} has a suffix without a reader; {names}")
    if _is_saved(path):
        return suffixes[ARROW]
    found = sorted({suffixes[suffix_of(file)] for file in _shown(path) if suffix_of(file) in suffixes})
    if len(found) > 1:
        raise DataError(f"data={str(path)!r} has files for the readers {', '.join(found)}; put them into folders apart")
    if not found:
        raise DataError(f"data={str(path)!r} has no file with a suffix of a reader; {names}")
    return found[0]


def files_of(path: Path, form: TableFormat) -> list[DataFile]:
    """Returns the files of a path: the file itself, or the shards of a folder in order of their names.

    Raises:
      DataError: the folder has no shard, lacks one, has one twice, or has files that are no shards.
    """
    if not path.is_dir():
        _check_packed(path, form, [path])
        return [DataFile(path, path)]
    if _is_saved(path):
        if ARROW not in form.suffixes:
            raise DataError(f"data={str(path)!r} is a folder of Arrow files, as datasets saves them; name reader arrow")
        files = _saved(path)
        _check_others(path, form, files, [file for file in _shown(path) if not file.name.startswith(CACHE)])
    else:
        shown = _shown(path)
        named = [file for file in shown if not file.name.startswith(UNDERSCORE)]
        files = [file for file in named if suffix_of(file) in form.suffixes] or [
            file for file in named if not file.suffix
        ]
        _check_others(path, form, files, shown)
        _check_sets(path, files)
        if not form.counted:
            _check_splits(path, files)
    _check_packed(path, form, files)
    return [
        DataFile(file, path, f"text={number}" if form.counted else f"file={file.name!r}")
        for number, file in enumerate(files, start=1)
    ]


def _is_saved(path: Path) -> bool:
    """Says whether `save_to_disk` wrote a folder.

    Raises:
      DataError: the folder holds several such folders, one for each split.
    """
    splits = sorted(file.parent.name for file in path.glob(f"*/{STATE}") if (file.parent / INFO).is_file())
    if splits:
        raise DataError(
            f"data={str(path)!r} holds the splits {', '.join(splits)} of a dataset; give one of them, for example "
            f"{str(path / splits[-1])!r}"
        )
    return (path / STATE).is_file() and (path / INFO).is_file()


def _saved(path: Path) -> list[Path]:
    """Returns the shards that `save_to_disk` names; other Arrow files beside them are caches of other data."""
    try:
        state = json.loads((path / STATE).read_text("utf-8"))
        names = [str(file["filename"]) for file in state["_data_files"]]
        plain = not state.get("_indices_data_files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"data={str(path)!r} file={STATE!r} is damaged; save the dataset again") from None
    if not plain or any(Path(name).name != name for name in names):
        raise DataError(f"data={str(path)!r} file={STATE!r} points to other files; save the dataset again")
    if missing := [name for name in names if not (path / name).is_file()]:
        raise DataError(f"data={str(path)!r} lacks file={missing[0]!r}, which {STATE} names; copy the folder again")
    return [path / name for name in names]


def _shown(path: Path) -> list[Path]:
    """Returns what lies in a folder in order of names, but for hidden files and files that are known to hold no record.

    Raises:
      DataError: the folder cannot be read, or has folders inside.
    """
    try:
        inside = sorted(file for file in path.iterdir() if not is_hidden(file.name))
    except OSError as error:
        raise DataError(f"data={str(path)!r} cannot be read ({error.strerror}); give a readable folder") from None
    shown = [file for file in inside if file.name.lower() not in BESIDE and not is_about(file.name)]
    if folders := [file.name for file in shown if file.is_dir()]:
        named = [name for name in folders if _SPLIT.search(name.lower()) or name == "data"]
        raise DataError(
            f"data={str(path)!r} has {len(folders)} folders inside{': ' * bool(named)}{', '.join(named)}; give the "
            "folder that holds the files. For a folder of images for each class name reader images"
        )
    return shown


def _check_packed(path: Path, form: TableFormat, files: Sequence[Path]) -> None:
    if not form.packed and any(file.suffix.lower() in PACKED for file in files):
        raise DataError(
            f"data={str(path)!r} has a {form.suffixes[0]} file that was compressed again; expand it, since such files "
            "are compressed inside"
        )


def _check_others(path: Path, form: TableFormat, files: Sequence[Path], shown: Sequence[Path]) -> None:
    """Refuses a folder without a shard, or that shows files that are none; their names may be private."""
    wanted, shards = " or ".join(form.suffixes), set(files)
    others = [file for file in shown if file not in shards]
    if not files:
        held = f" but {len(others)} others ({counted(map(_kind, others))})" if others else ""
        raise DataError(f"data={str(path)!r} has no {wanted} file{held}; write the records to such files")
    if others:
        raise DataError(
            f"data={str(path)!r} has {len(files)} {wanted} files and {len(others)} more "
            f"({counted(map(_kind, others))}); move these out of the folder"
        )


def _kind(file: Path) -> str:
    return "with _ in front" if file.name.startswith(UNDERSCORE) else kind_of(suffix_of(file))


def _check_sets(path: Path, files: Sequence[Path]) -> None:
    """Refuses sets of shards that lack one, or that have one twice."""
    plain = [file.stem if file.suffix.lower() in PACKED else file.name for file in files]
    if twice := [name for name in plain if plain.count(name) > 1]:
        raise DataError(f"data={str(path)!r} has file={twice[0]!r} plain and compressed; remove one of the two")
    sets = dict[str, dict[int, set[int]]]()
    for parts in filter(None, map(_SET.match, plain)):
        sets.setdefault(parts[1], {}).setdefault(int(parts[3]), set()).add(int(parts[2]))
    for name, by_total in sets.items():
        if len(by_total) > 1:
            totals = " and of ".join(map(str, sorted(by_total)))
            raise DataError(f"data={str(path)!r} has shards {name!r} of {totals}; remove the old ones")
        ((total, numbers),) = by_total.items()
        if missing := sorted(set(range(total)) - numbers):
            raise DataError(
                f"data={str(path)!r} lacks shard {name}-{missing[0]:05}-of-{total:05}, and {len(missing) - 1} more; "
                "copy the folder again"
            )


def _check_splits(path: Path, files: Sequence[Path]) -> None:
    """Refuses a folder with shards of several splits: a site would train on its held-out records."""
    words = [parts[1] for parts in map(_SPLIT.search, (file.name.lower() for file in files)) if parts]
    splits = sorted({_SAME_SPLIT.get(word, word) for word in words})
    if len(splits) > 1:
        raise DataError(
            f"data={str(path)!r} has shards of several splits ({', '.join(splits)}); put each split into its own folder"
        )

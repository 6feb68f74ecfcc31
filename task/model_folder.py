"""A model's folder, read before a weight is loaded: its configuration, its weights, and files beside them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open

from offsite.errors import DataError, OffsiteError, UnsupportedModel
from offsite.task.packed_format import packed_format

WIDE_BITS = 16  # of a widened weight

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
POINTER = b"version https://git-lfs"  # the first bytes of a file that Git LFS has not fetched
_SHOWN = 120  # characters of a name from a file that a message shows


def check_folder(folder: Path) -> None:
    """Checks that a model's folder is there.

    Raises:
      DataError: the path is not a folder.
    """
    if not folder.is_dir():
        raise DataError(f"model={str(folder)!r} is not a directory; give the path of a Hugging Face model directory")


def document(folder: Path) -> dict[str, Any]:
    """Returns the values that config.json of a model's folder states.

    Raises:
      DataError: the folder or config.json is missing or damaged, or the folder holds an adapter and no model.
    """
    check_folder(folder)
    if not (folder / CONFIG).is_file():
        if (folder / ADAPTER).is_file():
            raise DataError(f"model={str(folder)!r} {_only_adapter(folder)}")
        raise DataError(f"model={str(folder)!r} has no config.json; give the directory that save_pretrained wrote")
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"model={str(folder)!r} has a damaged config.json; save the model again") from error
    return values if isinstance(values, dict) else {}


def read_config(folder: Path, kind: str) -> Any:
    """Returns the configuration of a model's folder, as transformers reads it, without code from the folder.

    Args:
      folder: a Hugging Face model directory.
      kind: key of `task.kinds.KINDS`.

    Raises:
      DataError: the folder or config.json is missing or damaged, or the folder holds an adapter and no model.
      UnsupportedModel: transformers knows no such model of this kind.
    """
    from transformers import AutoConfig  # seconds; the other checks of a folder need no model library

    _check_type(folder, document(folder), kind)
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each model has its own checks, and each raises what it likes
        raise DataError(f"model={str(folder)!r} has a wrong config.json ({line(error)}); correct that value") from error


def check_weights(folder: Path) -> None:
    """Checks that a folder has weights that transformers reads, and that each file of them is whole.

    Raises:
      DataError: there are no weights, weights only under other names or as pickles, or files that are cut or missing;
        the message names all of these files.
    """
    faults = dict[str, DataError]()
    for path in sorted(set(weight_files(folder).values())):
        try:
            _names_in(path, folder)
        except DataError as error:
            faults[path.name] = error
    if faults:
        first, *others = faults
        more = f"; the same holds for {len(others)} more of these files: {', '.join(others)}" if others else ""
        raise DataError(f"{faults[first]}{more}")


def weight_files(folder: Path) -> dict[str, Path]:
    """Returns the file of each stored tensor by the tensor's name, from the files that transformers reads.

    transformers reads model.safetensors, or else the shards that the index names; no other file of weights counts.

    Raises:
      DataError: there are no such files, or the index or the one file is damaged.
    """
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_names_in(folder / SINGLE, folder), folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise DataError(f"model={str(folder)!r} {_without_weights(folder)}")
    try:
        table = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): folder / Path(str(file)).name for name, file in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"path={str(folder / INDEX)!r}: not an index of shards ({error}); fetch it again") from error


def beside(folder: Path) -> list[str]:
    """Returns a sentence about each kind of files in a model's folder that is not used, for the model's owner."""
    notes = []
    if adapter := [name for name in (ADAPTER, *ADAPTER_WEIGHTS) if (folder / name).is_file()]:
        notes.append(
            f"model={str(folder)!r} holds an adapter beside the model ({', '.join(adapter)}); the model is used "
            "without the adapter; merge the adapter into the model (merge_and_unload) if it belongs there"
        )
    code = sorted(path.name for path in folder.glob("*.py"))
    if code or "auto_map" in document(folder):
        notes.append(
            f"model={str(folder)!r} holds or names code of its own ({', '.join(code) or 'auto_map'}); the code is not "
            "run, and the class of transformers is used"
        )
    return notes


def unused(folder: Path, names: list[str], config: Any) -> str:
    """Returns a sentence about stored tensors for which a model has no place, "" where there are none.

    Args:
      folder: the model's folder.
      names: names of the tensors.
      config: configuration of the model.
    """
    if not names:
        return ""
    blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
    return (
        f"model={str(folder)!r}: {len(names)} stored tensors are not used, the first is {min(names)!r}; the model of "
        f"config.json (num_hidden_layers={blocks}) has no place for them; correct config.json if they belong to it"
    )


@contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """Yields the folder, or a folder of links to all its files but the adapter's, which transformers would attach."""
    if not (folder / ADAPTER).is_file():
        yield folder
        return
    with TemporaryDirectory() as scratch:
        for path in folder.iterdir():
            if path.name not in (ADAPTER, *ADAPTER_WEIGHTS):
                (Path(scratch) / path.name).symlink_to(path.absolute())
        yield Path(scratch)


def line(error: BaseException) -> str:
    """Returns the first line of a library's message, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _check_type(folder: Path, values: dict[str, Any], kind: str) -> None:
    from offsite.task.kinds import WORDS, class_names

    known, name = class_names(kind), values.get("model_type")
    if name not in known:
        own = values.get("auto_map")
        code = f" of its own, {str(sorted(map(str, own.values())))[:_SHOWN]}," if isinstance(own, dict) else ""
        raise UnsupportedModel(
            f"model_type={name!r} must be a {WORDS[kind]} of transformers, and code{code} in the model's directory is "
            "never run; choose another model"
        )
    packed_format(folder, values)
    names = values.get("architectures") or known[name]
    if not set(names) & {class_name for class_names_of_type in known.values() for class_name in class_names_of_type}:
        raise UnsupportedModel(f"architectures={names} must be a {WORDS[kind]}; choose another model")


def _only_adapter(folder: Path) -> str:
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return (
        f"holds an adapter ({ADAPTER}) for the model {str(base)[:_SHOWN]!r}, and no model; give the folder of that "
        "model, or merge the adapter into it (merge_and_unload) and save the result"
    )


def _without_weights(folder: Path) -> str:
    """Returns what a folder without readable weights has in their place, and the next step."""
    if (folder / ADAPTER).is_file():
        return _only_adapter(folder)
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        return (
            f"has weights as {others[0]}, must have {SINGLE}, or shards with {INDEX}; fetch the missing file, or save "
            "the model again with transformers"
        )
    if pickles := sorted(file.name for pattern in PICKLES for file in folder.glob(pattern)):
        return f"has its weights only in a pickle, {pickles[0]}; convert the weights to safetensors"
    return "has no *.safetensors; copy the model's weights into it"


def _names_in(path: Path, folder: Path) -> list[str]:
    """Returns the names of a file's tensors from its header, which also tells whether the file is whole."""
    where = f"model={str(folder)!r} file={path.name!r}"
    if not path.is_file():
        raise DataError(f"{where} is not there, and {INDEX} names it; fetch it")
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise DataError(f"{where} is a pointer of Git LFS and not the weights; fetch them with git lfs pull")
    try:
        with safe_open(path, framework="np") as stored:
            return list(stored.keys())
    except (SafetensorError, OSError) as error:
        raise DataError(f"{where} cannot be read, it is cut or damaged ({line(error)}); fetch it again") from error


def widening(folder: Path) -> int:
    """Returns the factor by which packed weights of a folder grow when they are widened; 1 for plain weights."""
    try:
        packed = packed_format(folder, document(folder))
    except OffsiteError:
        return 1  # whoever loads the model names the fault
    return 1 if packed is None else WIDE_BITS // packed.bits

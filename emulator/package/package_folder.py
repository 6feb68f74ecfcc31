"""The files of a package's folder and their hashes: which files are copied in, and which are refused."""

import hashlib
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from offsite.emulator.package.manifest import CONFIG, MANIFEST, FileEntry
from offsite.errors import ConfigError, DataError, DigestMismatch
from offsite.trust.files import sync_folder

# A tokenizer or an image processor is read from these; no other file is copied from the model's folder.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "scheduler_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
MANIFEST_LIMIT = 1 << 26
# A character of a name in JSON takes up to 12 bytes; dtype, shape and offsets of a tensor take less than 512.
HEADER_CHARACTER, HEADER_ENTRY, HEADER_ROOM = 12, 512, 4096


def prepare(directory: Path) -> Path:
    """Returns the folder that a package is written to; makes the folder if it is missing.

    Raises:
      ConfigError: the path is a file, or the folder is not empty.
    """
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ConfigError(f"directory={str(directory)!r} exists and is not empty; choose another or remove it")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def copy_tokenizer(source: Path | str | None, target: Path) -> None:
    """Copies the tokenizer files of a model's folder into a package; a source of None copies nothing.

    Raises:
      DataError: the model's folder holds no tokenizer file.
    """
    if source is None:
        return
    present = [Path(source) / name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
    if not present:
        raise DataError(f"tokenizer={str(source)!r} holds no tokenizer file; give the model's folder")
    for file in present:
        shutil.copyfile(file, target / file.name)


def sync(folder: Path) -> None:
    """Flushes every file of a folder to the disk, and the names of the files and of the folder itself.

    Raises:
      DataError: the disk does not take the files.
    """
    try:
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(folder)
        sync_folder(folder.resolve().parent)
    except OSError as error:
        raise DataError(
            f"package={str(folder)!r}: cannot be written ({error.strerror}); free disk space, then build again"
        ) from error


def entries(folder: Path) -> dict[str, FileEntry]:
    """Returns hash and size of every file of a folder, by name."""
    paths = sorted(folder.iterdir())
    return {path.name: FileEntry(_sha256(path), path.stat().st_size) for path in paths}


def read_manifest_bytes(folder: Path, expected_digest: str | None) -> bytes:
    """Returns the bytes of a package's manifest, checked against a digest unless that is None.

    Raises:
      DataError: the folder has no manifest.
      DigestMismatch: the manifest's SHA-256 is not the expected one, or the file is too long for a manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"package={str(folder)!r} has no {MANIFEST}; build the emulator or fetch its package")
    if path.stat().st_size > MANIFEST_LIMIT:
        raise DigestMismatch(
            f"{MANIFEST}: over {MANIFEST_LIMIT} bytes, no manifest is that long; fetch the package again"
        )
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if expected_digest is not None and digest != expected_digest:
        raise DigestMismatch(f"{MANIFEST}: sha256={digest}, announced {expected_digest}; fetch the package again")
    return content


def check(folder: Path, announced: Mapping[str, FileEntry]) -> None:
    """Refuses a package whose files are not exactly the announced ones.

    Raises:
      DigestMismatch: a file is missing, was added, is a link, or has another size or hash.
    """
    present = {path.name: path for path in folder.iterdir() if path.name != MANIFEST}
    if different := sorted(present.keys() ^ announced.keys()):
        raise DigestMismatch(f"file={different[0]!r} is missing or was added; fetch the package again")
    for name, entry in announced.items():
        path = present[name]
        if path.is_symlink() or not path.is_file():
            raise DigestMismatch(f"file={name!r} is not a plain file; fetch the package again")
        if path.stat().st_size != entry.bytes or _sha256(path) != entry.sha256:
            raise DigestMismatch(f"file={name!r} is not the one its manifest announces; fetch the package again")


def check_header(path: Path, names: Collection[str]) -> None:
    """Refuses a safetensors file whose header is longer than its tensors need, before the header is parsed.

    The format takes headers of 100 MB, whose parsing holds all threads of a process for seconds.

    Args:
      path: the file.
      names: names of its tensors.

    Raises:
      DigestMismatch: the header is longer than these names allow, so a tensor was added.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    limit = HEADER_ROOM + sum(HEADER_ENTRY + HEADER_CHARACTER * len(name) for name in names)
    if limit < length <= path.stat().st_size:  # a longer one than its file is refused unread
        raise DigestMismatch(
            f"{path.name}: a header of {length} bytes, but its {len(names)} tensors need at most {limit}: a tensor is "
            "missing or was added; fetch the package again"
        )


def read_checked(path: Path, entry: FileEntry) -> bytes:
    """Returns the bytes of one file, checked as they are read: the file may have changed since `check`.

    Raises:
      DigestMismatch: the file is missing, is a link, or has another size or hash.
    """
    plain = path.is_file() and not path.is_symlink() and path.stat().st_size == entry.bytes
    content = path.read_bytes() if plain else b""
    if not plain or hashlib.sha256(content).hexdigest() != entry.sha256:
        raise DigestMismatch(f"file={path.name!r} is not the one its manifest announces; fetch the package again")
    return content


def tokenizer_sha256(announced: Mapping[str, FileEntry]) -> str:
    """Returns one SHA-256 over names and hashes of a package's tokenizer files, 64 hexadecimal digits."""
    return _together({name: entry.sha256 for name, entry in announced.items() if name in TOKENIZER_FILES})


def model_files(folder: Path) -> list[Path]:
    """Returns the files that make a model: its configuration and its weights."""
    return [path for path in (*sorted(folder.glob("*.safetensors")), folder / CONFIG) if path.is_file()]


def model_sha256(hashes: Mapping[str, str]) -> str:
    """Returns one SHA-256 over names and hashes of a model's files, of `model_files`, 64 hexadecimal digits."""
    return _together(hashes)


def tensor_sha256(tensor: Tensor) -> str:
    """Returns the SHA-256 of a contiguous tensor's bytes, 64 hexadecimal digits."""
    content = tensor.cpu().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(content)).hexdigest()


def check_tensors(pieces: Mapping[str, Tensor], announced: Mapping[str, str]) -> None:
    """Refuses a tensor whose bytes are not the announced ones: the file may have changed since `check`.

    Raises:
      DigestMismatch: a tensor has another hash.
    """
    for name, piece in pieces.items():
        if tensor_sha256(piece) != announced[name]:
            raise DigestMismatch(f"tensor={name} is not the one its manifest announces; fetch the package again")


def _together(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

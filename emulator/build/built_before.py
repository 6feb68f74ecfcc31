"""A package that was built before a job: whether it is of this very model, and its copy for the job's run folder."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offsite.adapter.auxiliary import AuxiliaryTensors
from offsite.emulator.calibration.source import MemorySource, Source
from offsite.emulator.package import auxiliary_file, package_folder, storage
from offsite.emulator.package.manifest import CONFIG, GIVEN, MANIFEST, WEIGHTS, FileEntry, Manifest
from offsite.emulator.package.package_reader import read_manifest
from offsite.emulator.structure.from_config import config_text
from offsite.emulator.structure.geometry import Geometry
from offsite.errors import DigestMismatch, MalformedMessage
from offsite.trust.files import sha256_file, unwritable, write_atomically

CHUNK = 1 << 20
# Keys of a configuration that depend on the dtype and the release of a build, and not on the model.
OF_THE_BUILD = ("dtype", "torch_dtype", "transformers_version", "use_cache")


@dataclass(frozen=True)
class BuiltPackage:
    """A package of an earlier build.

    Attributes:
      folder: folder of the package; it is read, and never written.
      manifest: manifest of the package.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> "BuiltPackage":
        """Returns the package of a folder, of which only the manifest is read.

        Raises:
          DataError: the folder or its manifest is missing.
          DigestMismatch, MalformedMessage: the file is not a manifest.
        """
        return cls(folder, read_manifest(folder))

    def check_files(self) -> None:
        """Checks every byte of the package against the manifest.

        Raises:
          DigestMismatch: a file is missing, was added, is a link, or has another size or hash.
        """
        package_folder.check(self.folder, self.manifest.files)

    def misfits(self, first: int, last: int, shape: str, model: Path) -> Iterator[str]:
        """Yields a sentence for each way in which the package does not fit a job, from the manifest alone.

        Args:
          first: number of verbatim blocks of the job at the input end.
          last: number of verbatim blocks of the job at the output end.
          shape: shape of the job's emulator, "sandwich" or "parallel".
          model: folder of the full model, whose tokenizer files the package must have.
        """
        own = self.manifest.geometry
        for name, wanted, built in (("first", first, own.first), ("last", last, own.last), ("shape", shape, own.shape)):
            if wanted != built:
                written = json.dumps(built)
                yield f"was built with {name}={built!r}, and the file has {wanted!r}; set emulator.{name} = {written}"
        files = self.manifest.files
        if GIVEN in files:
            yield f"holds {GIVEN}, the tensors of another job's adapter; give a package of offsite emulator build"
        theirs = {name: entry.sha256 for name, entry in files.items() if name not in (WEIGHTS, CONFIG, GIVEN)}
        paths = (model / name for name in package_folder.TOKENIZER_FILES)
        mine = {path.name: sha256_file(path) for path in paths if path.is_file()}
        different = sorted(name for name in theirs.keys() | mine.keys() if theirs.get(name) != mine.get(name))
        if different:
            yield (
                f"has another {different[0]} than the model's folder {str(model)!r} ({len(different)} files differ); "
                "give the model of this package, or build the package again"
            )

    def differences(self, model: nn.Module | Source) -> Iterator[str]:
        """Yields a sentence for the first thing outside the middle that a build of this model would write otherwise.

        Every tensor outside the middle is stored as it is or in codes that follow from its values alone. So the stored
        bytes must be those of the model. The middle cannot be compared: the gate judges the middle by its gradients.

        Args:
          model: the full model, or a source whose blocks may be on disk; in any floating dtype that holds its values.
        """
        source = MemorySource(model) if isinstance(model, nn.Module) else model
        mine = json.loads(config_text(source.model))
        theirs = _json(self.folder / CONFIG)
        if key := _different_key(mine, theirs):
            yield f"is of another model: its config.json differs in {key!r}; give the model that this package is of"
            return
        manifest = self.manifest
        if Geometry.of(source.model, 1, 1).tower != manifest.geometry.tower:
            yield f"has the tower {manifest.geometry.tower!r}, which is not the model's; build the package again"
            return
        inside = tuple(f"{path}." for path in manifest.geometry.middle(source.model))
        for name, tensor in self._outside(source, inside):
            if reason := self._difference(name, tensor):
                yield f"is of another model: tensor={name} {reason}; give the model that this package is of"
                return

    def copy_to(self, folder: Path, auxiliary: AuxiliaryTensors) -> Manifest:
        """Copies the package, each file checked as it is read, and returns the manifest of the copy.

        Args:
          folder: target folder; must be empty or absent.
          auxiliary: tensors that the job's adapter needs and does not train; they become part of the copy.

        Raises:
          DigestMismatch: a file is not the announced one.
          ConfigError: the target is not empty.
          DataError: the disk does not take the files.
        """
        target, files = package_folder.prepare(folder), dict(self.manifest.files)
        for name, entry in files.items():
            _copy(self.folder / name, target / name, entry)
        auxiliary_file.write(target, auxiliary)
        if auxiliary:
            path = target / GIVEN
            files[GIVEN] = FileEntry(sha256_file(path), path.stat().st_size)
        manifest = replace(self.manifest, files=files)
        package_folder.sync(target)  # as in a build: the listed files are on disk before the manifest
        write_atomically(target / MANIFEST, manifest.to_bytes())
        return manifest

    def _outside(self, source: Source, inside: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        """Yields the model's tensors outside the middle by name, a tensor of several names under each name."""
        model = source.model
        blocks = self.manifest.geometry.ends(model)
        within = tuple(f"{path}." for path in blocks)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not name.startswith(inside) and not name.startswith(within):
                yield name, tensor
        for path in blocks:
            with source.open(path) as block:
                yield from block.state_dict(keep_vars=True, prefix=f"{path}.").items()

    def _difference(self, name: str, tensor: Tensor) -> str:
        """Returns how a tensor of the model differs from the package's, "" where both are the same."""
        stored = self.manifest.tied.get(name, name)
        how = self.manifest.storage.get(stored)
        if how is None:
            return "is not in the package"
        tensor = tensor.detach().cpu()
        if storage.is_verbatim(how):
            kept = tensor.to(storage.DTYPES[how])
            if kept.is_floating_point() != tensor.is_floating_point() or not torch.equal(kept.to(tensor.dtype), tensor):
                return "has other values"
        for piece, value in storage.encode(stored, tensor, how).items():
            if package_folder.tensor_sha256(value.contiguous()) != self.manifest.tensors.get(piece):
                return "has other values"
        return ""


def _copy(source: Path, target: Path, entry: FileEntry) -> None:
    """Copies a file in pieces; the bytes that were copied are the bytes that were checked."""
    state = hashlib.sha256()
    if source.is_symlink() or not source.is_file():
        raise DigestMismatch(f"file={source.name!r} is missing, or is not a plain file; build the package again")
    try:
        with source.open("rb") as read, target.open("wb") as written:
            left = entry.bytes + 1
            while piece := read.read(min(CHUNK, left)):
                state.update(piece)
                written.write(piece)
                left -= len(piece)
    except OSError as error:
        raise unwritable(target, error) from error
    if state.hexdigest() != entry.sha256:
        raise DigestMismatch(f"file={source.name!r} is not the one its manifest announces; build the package again")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MalformedMessage(f"{path.name}: cannot be read as JSON ({error}); build the package again") from error


def _different_key(mine: Any, theirs: Any, where: str = "") -> str:
    """Returns the path of the first key in which two configurations differ, "" where they agree."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted(mine.keys() | theirs.keys()):
            if key in OF_THE_BUILD:
                continue
            if (key in mine) != (key in theirs):
                return f"{where}{key}"
            if different := _different_key(mine[key], theirs[key], f"{where}{key}."):
                return different
        return ""
    return "" if mine == theirs and type(mine) is type(theirs) else where.rstrip(".") or "its kind"

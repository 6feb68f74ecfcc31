"""The emulator as a folder of plain files: built by the model's owner, checked byte by byte where it is loaded.

manifest.json holds every fact and hash, emulator.safetensors the tensors, config.json the model's structure. Tokenizer
files lie beside them, and given.safetensors if the adapter needs auxiliary tensors. A package holds no code, and no
name in it is ever imported.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from offsite.emulator.package import package_folder, storage
from offsite.emulator.package.apply_manifest import apply_manifest
from offsite.emulator.package.manifest import CONFIG, WEIGHTS, Manifest
from offsite.emulator.package.storage import MODEL_DTYPES
from offsite.emulator.structure.from_config import empty_model
from offsite.errors import DigestMismatch, MalformedMessage, lookup


def read_manifest(directory: Path | str, *, expected_digest: str | None = None) -> Manifest:
    """Returns the manifest of a package, checked against an expected digest; no other file is opened.

    Args:
      directory: the package's folder.
      expected_digest: `Manifest.digest()` as announced, 64 hexadecimal digits; None checks nothing.

    Raises:
      DataError: the folder or its manifest is missing.
      DigestMismatch: the manifest is not the expected one.
      MalformedMessage: the file is not a manifest.
    """
    content = package_folder.read_manifest_bytes(Path(directory), expected_digest)
    return Manifest.from_bytes(content)


def load(directory: Path | str, *, dtype: torch.dtype | None = None, expected_digest: str | None = None) -> nn.Module:
    """Returns the emulator of a package: frozen, in evaluation mode, every module under its name in the full model.

    Args:
      directory: the package's folder; a file that its manifest does not list is refused.
      dtype: floating dtype of the emulator; None is the full model's dtype at the build.
      expected_digest: `Manifest.digest()` as announced, 64 hexadecimal digits; None checks nothing.

    Raises:
      DataError: the folder or its manifest is missing.
      DigestMismatch: a byte, file or tensor is not the announced one.
      MalformedMessage: the manifest or the configuration contradicts itself or asks for code.
      RangeError: a tensor's shape is not the model's, or a value is not finite.
    """
    folder = Path(directory)
    manifest = read_manifest(folder, expected_digest=expected_digest)
    package_folder.check(folder, manifest.files)
    own = lookup(MODEL_DTYPES, manifest.dtype, "dtype")
    model = empty_model((folder / CONFIG).read_text(encoding="utf-8"), manifest.auto, dtype or own)
    _check_slots(model, manifest)
    apply_manifest(model, manifest, dtype or own)
    targets = model.state_dict(keep_vars=True)
    if manifest.storage.keys() | manifest.tied.keys() != targets.keys() or manifest.storage.keys() & manifest.tied:
        raise MalformedMessage("storage: its names are not the model's; build the package again")
    package_folder.check_header(folder / WEIGHTS, manifest.tensors)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as stored, torch.no_grad():
            _check_names(set(stored.keys()), manifest)
            for name, how in manifest.storage.items():
                pieces = {piece: stored.get_tensor(piece) for piece in storage.names(name, how)}
                package_folder.check_tensors(pieces, manifest.tensors)
                targets[name].copy_(storage.decode(name, how, pieces, tuple(targets[name].shape)))
    except SafetensorError as error:
        raise MalformedMessage(f"{WEIGHTS}: not a safetensors file ({error}); fetch the package again") from error
    _copy_tied(targets, manifest)
    return model


def _check_slots(model: nn.Module, manifest: Manifest) -> None:
    """Refuses a package whose end blocks are not verbatim: sites rely on these being the model's own."""
    ends = tuple(f"{path}." for path in manifest.geometry.ends(model))
    ways = {**manifest.storage, **{alias: manifest.storage.get(name, "") for alias, name in manifest.tied.items()}}
    if wrong := sorted(name for name, how in ways.items() if name.startswith(ends) and not storage.is_verbatim(how)):
        raise MalformedMessage(f"tensor={wrong[0]}: a block at the end must be verbatim; refuse this package")


def _check_names(stored: set[str], manifest: Manifest) -> None:
    expected = {piece for name, how in manifest.storage.items() for piece in storage.names(name, how)}
    if different := sorted((stored ^ expected) | (manifest.tensors.keys() ^ expected)):
        raise DigestMismatch(f"tensor={different[0]!r} is missing or was added; fetch the package again")


def _copy_tied(targets: dict[str, Tensor], manifest: Manifest) -> None:
    for alias, name in manifest.tied.items():
        if name not in manifest.storage or targets[alias].shape != targets[name].shape:
            raise MalformedMessage(f"tied={alias!r}: {name!r} is not a stored tensor of its shape; build again")
        if targets[alias] is not targets[name]:
            with torch.no_grad():
                targets[alias].copy_(targets[name])

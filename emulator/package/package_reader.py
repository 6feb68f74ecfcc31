"""The emulator as a folder of plain files: built by the model's owner, checked byte by byte where it is loaded.

manifest.json holds every fact and hash, emulator.safetensors the tensors, config.json the model's structure. Tokenizer
files lie beside them, and given.safetensors if the adapter needs auxiliary tensors. A package holds no code, and no
name in it is ever imported.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from offsite.emulator.package import package_folder, storage
from offsite.emulator.package.apply_manifest import apply_manifest
from offsite.emulator.package.manifest import CONFIG, WEIGHTS, Manifest
from offsite.emulator.package.storage import MODEL_DTYPES
from offsite.emulator.package.stored_weight import StoredWeight
from offsite.emulator.package.tensor_file import TensorReader
from offsite.emulator.structure.from_config import empty_model
from offsite.errors import DigestMismatch, MalformedMessage, lookup
from offsite.task.device import CPU

# The places of one parameter: modules, each with the parameter's name there.
Users = tuple[tuple[nn.Module, str], ...]
# A function that takes a tensor in its stored form, and returns the function that puts it where it runs.
Taker = Callable[[StoredWeight], Callable[[], None]]
# (model without weights, manifest, places of each stored parameter) -> by name, the takers of some tensors; a tensor
# that nobody takes becomes a parameter.
Hold = Callable[[nn.Module, Manifest, Mapping[str, Users]], Mapping[str, Taker]]


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


def load(
    directory: Path | str,
    *,
    dtype: torch.dtype | None = None,
    expected_digest: str | None = None,
    device: torch.device | str = CPU,
    hold: Hold | None = None,
) -> nn.Module:
    """Returns the emulator of a package: frozen, in evaluation mode, every module under its name in the full model.

    The weights are read one tensor at a time, straight to their place, so memory peaks at the emulator's own size and
    one tensor.

    Args:
      directory: the package's folder; a file that its manifest does not list is refused.
      dtype: floating dtype of the emulator; None is the full model's dtype at the build.
      expected_digest: `Manifest.digest()` as announced, 64 hexadecimal digits; None checks nothing.
      device: device of the emulator.
      hold: function that takes tensors in their stored form, see `Hold`; None widens them all.

    Raises:
      DataError: the folder or its manifest is missing.
      DigestMismatch: a byte, file or tensor is not the announced one.
      MalformedMessage: the manifest or the configuration contradicts itself or asks for code.
      RangeError: a tensor's shape is not the model's, or a value is not finite.
    """
    folder, device = Path(directory), torch.device(device)
    manifest = read_manifest(folder, expected_digest=expected_digest)
    package_folder.check(folder, manifest.files)
    kind = dtype or lookup(MODEL_DTYPES, manifest.dtype, "dtype")
    model = empty_model((folder / CONFIG).read_text(encoding="utf-8"), manifest.auto, kind, allocated=False)
    _check_slots(model, manifest)
    apply_manifest(model, manifest, kind)
    targets = model.state_dict(keep_vars=True)
    _check_targets(targets, manifest)
    package_folder.check_header(folder / WEIGHTS, manifest.tensors)
    users = _users(model, targets, manifest)
    takers = hold(model, manifest, users) if hold is not None else {}
    puts: list[Callable[[], None]] = []
    try:
        with TensorReader(folder / WEIGHTS) as file, torch.no_grad():
            _check_names(file.names, manifest)
            for name, how in manifest.storage.items():
                pieces = {piece: file.read(piece) for piece in storage.names(name, how)}
                package_folder.check_tensors(pieces, manifest.tensors)
                shape = tuple(targets[name].shape)
                if name in takers:
                    puts.append(takers[name](storage.held(name, how, pieces, shape, targets[name].dtype).to(device)))
                    continue
                pieces = {piece: tensor.to(device) for piece, tensor in pieces.items()}
                _fill(targets[name], users[name], storage.decode(name, how, pieces, shape))
    except SafetensorError as error:
        raise MalformedMessage(f"{WEIGHTS}: not a safetensors file ({error}); fetch the package again") from error
    for put in puts:  # now that the other parameters of the replaced layers are read
        put()
    return model.to(device)


def _fill(target: Tensor, users: Users, values: Tensor) -> None:
    """Gives a tensor of the model its values: a parameter gets memory now, a buffer has memory already."""
    if not isinstance(target, nn.Parameter):
        target.copy_(values)
        return
    parameter = nn.Parameter(values.to(target.dtype), requires_grad=False)
    for module, leaf in users:
        module._parameters[leaf] = parameter


def _users(model: nn.Module, targets: Mapping[str, Tensor], manifest: Manifest) -> dict[str, Users]:
    """Returns every place of each stored parameter: its own, those of weights tied to it, and of blocks that share it.

    Raises:
      MalformedMessage: a tied tensor is not a stored tensor of its shape.
    """
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, leaf))
    owners = {id(targets[name]): name for name in manifest.storage}
    users = {name: list(found.get(id(targets[name]), ())) for name in manifest.storage}
    for alias, name in manifest.tied.items():
        if name not in manifest.storage or targets[alias].shape != targets[name].shape:
            raise MalformedMessage(f"tied={alias!r}: {name!r} is not a stored tensor of its shape; build again")
        if id(targets[alias]) not in owners:
            owners[id(targets[alias])] = name
            users[name] += found.get(id(targets[alias]), ())
    return {name: tuple(places) for name, places in users.items()}


def _check_targets(targets: Mapping[str, Tensor], manifest: Manifest) -> None:
    if manifest.storage.keys() | manifest.tied.keys() != targets.keys() or manifest.storage.keys() & manifest.tied:
        raise MalformedMessage("storage: its names are not the model's; build the package again")


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

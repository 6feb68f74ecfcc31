"""The emulator as a folder of plain files: built by the model's owner, checked byte by byte where it is loaded.

manifest.json holds every fact and hash, emulator.safetensors the tensors, config.json the model's structure; tokenizer
files lie beside. Nothing in a package is code, and nothing in it is imported by name.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from emulator import files, storage
from emulator.compressors import VERBATIM, Middle, Plan, embedding_names, embedding_storage, make_plan
from emulator.geometry import Geometry
from emulator.manifest import CONFIG, FORMAT, MANIFEST, WEIGHTS, Manifest
from emulator.rebuild import config_text, empty_model, find_auto, tied_names
from emulator.skip import Calibration, skipped
from errors import DigestMismatch, MalformedMessage, UnsupportedModel, lookup
from trust.files import write_whole

MODEL_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


def build(
    model: nn.Module,
    geometry: Geometry,
    recipe: tuple[str, ...],
    embedding: str,
    calibration: Calibration | None,
    directory: Path | str,
    *,
    tokenizer: Path | str | None = None,
) -> Manifest:
    """Writes the emulator package of a model and returns its manifest; the same input gives the same bytes.

    Args:
      model: a transformers model with finite weights; left as it was.
      geometry: which blocks are slots' blocks, shipped bit for bit, and which the middle.
      recipe: compressors of the middle, in order, for example ("skip_importance:0.25", "int4:64"); () ships all.
      embedding: "verbatim", "int8" or "int4" (with ":GROUP"), for the input embedding and the head.
      calibration: runs the model it is given on public examples; needed by the skip compressors only.
      directory: where to write; must not exist, or be empty.
      tokenizer: folder of the model, whose tokenizer files become part of the package.

    Raises:
      UnsupportedModel: a weight is not finite or does not fit the storage, or the configuration does not rebuild the
        model.
      ConfigError: the geometry, recipe, embedding or directory does not fit.
      UnknownName: the recipe names no compressor, or the geometry no tower.
      DataError: the tokenizer's folder holds none, or the disk does not take the files.
    """
    target = files.prepare(Path(directory))
    text = config_text(model)
    dtype = _dtype(model)
    _check_finite(model)
    auto, _ = find_auto(model, text, dtype)
    middle = Middle(model, geometry, calibration)
    plan = make_plan(middle, tuple(recipe))
    forms = {path: middle.observations[path].form for path in plan.skipped}
    kept = _kept(model, plan.skipped)
    table = _storage_table(model, geometry, plan, embedding, kept)
    pieces = {piece: t for name in table for piece, t in storage.encode(name, kept[name], table[name]).items()}
    save_file(pieces, target / WEIGHTS)
    (target / CONFIG).write_text(text, encoding="utf-8")
    files.copy_tokenizer(tokenizer, target)
    manifest = Manifest(
        format=FORMAT,
        auto=auto,
        dtype=str(dtype).removeprefix("torch."),
        geometry=geometry,
        recipe=tuple(recipe),
        embedding=embedding,
        skipped=forms,
        storage=table,
        tied=tied_names(kept),
        tensors={name: files.tensor_sha256(piece) for name, piece in pieces.items()},
        files=files.entries(target),
        **_sizes(model, geometry, table, pieces),
    )
    # Written last: a folder without a manifest is not a package. What it lists is on disk before, or a loss of power
    # could leave torn weights under a whole manifest, and a job would be bound to them.
    files.sync(target)
    write_whole(target / MANIFEST, manifest.to_bytes())
    return manifest


def read_manifest(directory: Path | str, *, expected_digest: str | None = None) -> Manifest:
    """Returns the manifest of a package, checked against its digest where one is expected; no other file is opened.

    Raises:
      DataError: the folder or its manifest is missing.
      DigestMismatch: the manifest is not the expected one.
      MalformedMessage: it is not a manifest.
    """
    content = files.read_manifest_bytes(Path(directory), expected_digest)
    return Manifest.from_bytes(content)


def load(directory: Path | str, *, dtype: torch.dtype | None = None, expected_digest: str | None = None) -> nn.Module:
    """Returns the emulator of a package: every name where the full model has it, frozen, in evaluation mode.

    Args:
      directory: the package; a file that its manifest does not list is refused.
      dtype: floating dtype of the emulator; None is the full model's when it was built.
      expected_digest: `Manifest.digest()` as it was announced, 64 hexadecimal digits.

    Raises:
      DataError: the folder or its manifest is missing.
      DigestMismatch: a byte, file or tensor is not the one announced.
      MalformedMessage: the manifest or configuration contradicts itself or asks for code.
      RangeError: a tensor has another shape than the model, or a value is not finite.
    """
    folder = Path(directory)
    manifest = read_manifest(folder, expected_digest=expected_digest)
    files.check(folder, manifest.files)
    own = lookup(MODEL_DTYPES, manifest.dtype, "dtype")
    model = empty_model((folder / CONFIG).read_text(encoding="utf-8"), manifest.auto, dtype or own)
    _check_slots(model, manifest)
    for path, form in manifest.skipped.items():
        model.set_submodule(path, skipped(model.get_submodule(path), form))
    targets = model.state_dict(keep_vars=True)
    if manifest.storage.keys() | manifest.tied.keys() != targets.keys() or manifest.storage.keys() & manifest.tied:
        raise MalformedMessage("storage: its names are not the model's; build the package again")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as stored, torch.no_grad():
            _check_names(set(stored.keys()), manifest)
            for name, how in manifest.storage.items():
                pieces = {piece: stored.get_tensor(piece) for piece in storage.names(name, how)}
                files.check_tensors(pieces, manifest.tensors)
                targets[name].copy_(storage.decode(name, how, pieces, tuple(targets[name].shape)))
    except SafetensorError as error:
        raise MalformedMessage(f"{WEIGHTS}: not a safetensors file ({error}); fetch the package again") from error
    _copy_tied(targets, manifest)
    return model


def _dtype(model: nn.Module) -> torch.dtype:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= set(MODEL_DTYPES.values()):
        raise UnsupportedModel(
            f"dtypes={sorted(map(str, dtypes))}: a package needs one of {', '.join(MODEL_DTYPES)} for all parameters; "
            "load the model with from_pretrained(dtype=...)"
        )
    dtype: torch.dtype = dtypes.pop()
    return dtype


def _check_finite(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UnsupportedModel(f"tensor={name}: a weight is NaN or infinite; repair the model's file")


def _kept(model: nn.Module, blocks: tuple[str, ...]) -> dict[str, Tensor]:
    """Returns the model's stored tensors by name, without those of the blocks that are left out."""
    tensors = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_inside(blocks))}


def _inside(blocks: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{path}." for path in blocks)


def _storage_table(
    model: nn.Module,
    geometry: Geometry,
    plan: Plan,
    embedding: str,
    kept: dict[str, Tensor],
) -> dict[str, str]:
    """Returns how each tensor is stored, tied ones under their first name only."""
    tied = tied_names(kept)
    chosen = {**embedding_storage(model, embedding), **plan.storage}
    slots = _inside(geometry.slots(model))
    # A tensor that a slot's block shares with another place is the slot's: verbatim, whatever the other place asks.
    shared = {name for alias, name in tied.items() if alias.startswith(slots)}
    ways = {name: VERBATIM if name in shared else chosen.get(name, VERBATIM) for name in kept if name not in tied}
    return {name: storage.verbatim(kept[name]) if way == VERBATIM else way for name, way in ways.items()}


def _sizes(model: nn.Module, geometry: Geometry, table: dict[str, str], pieces: dict[str, Tensor]) -> dict[str, int]:
    parameters = {name: 2 * parameter.numel() for name, parameter in model.named_parameters()}
    slots, middle = _inside(geometry.slots(model)), _inside(geometry.middle(model))
    sizes = {"slot": 0, "embedding": 0, "middle": 0, "other": 0}
    for name, how in table.items():
        where = "slot" if name.startswith(slots) else "middle" if name.startswith(middle) else "other"
        where = "embedding" if name in embedding_names(model) else where
        sizes[where] += sum(pieces[piece].numel() * pieces[piece].element_size() for piece in storage.names(name, how))
    same = (name for name, how in table.items() if name in parameters and storage.parse(how) is None)
    return {
        "full_bytes": sum(parameters.values()),
        "middle_full_bytes": sum(size for name, size in parameters.items() if name.startswith(middle)),
        "verbatim_bytes": sum(parameters[name] for name in same),
        **{f"{where}_bytes": size for where, size in sizes.items()},
    }


def _check_slots(model: nn.Module, manifest: Manifest) -> None:
    """A site may count on this: slots' blocks are the model's own, and only the middle is left out."""
    middle = manifest.geometry.middle(model)
    if wrong := sorted(set(manifest.skipped) - set(middle)):
        raise MalformedMessage(f"skipped={wrong[0]!r} is not a block of the middle; refuse this package")
    slots = _inside(manifest.geometry.slots(model))
    ways = {**manifest.storage, **{alias: manifest.storage.get(name, "") for alias, name in manifest.tied.items()}}
    if wrong := sorted(name for name, how in ways.items() if name.startswith(slots) and storage.parse(how)):
        raise MalformedMessage(f"tensor={wrong[0]}: a slot's block must be verbatim; refuse this package")


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

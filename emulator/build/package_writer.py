"""Writes the package of a full model's emulator, segment by segment: each is written before the next is made."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offsite.adapter.auxiliary import NO_AUXILIARY, AuxiliaryTensors
from offsite.adapter.targets import is_linear
from offsite.emulator.calibration.draft import DraftSegment
from offsite.emulator.calibration.middle import Calibration, Middle
from offsite.emulator.calibration.source import MemorySource, Source
from offsite.emulator.compressors import apply, make_plan
from offsite.emulator.package import auxiliary_file, package_folder, storage
from offsite.emulator.package.manifest import CONFIG, FORMAT, MANIFEST, WEIGHTS, Manifest
from offsite.emulator.package.plan import Plan
from offsite.emulator.package.quantize import Quantised
from offsite.emulator.package.recipe_arguments import scheme
from offsite.emulator.package.storage import MODEL_DTYPES, is_verbatim
from offsite.emulator.package.tensor_file import TensorFile
from offsite.emulator.structure.from_config import config_text, find_auto, tied_names
from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.structure.replacements import LowRank, spec_of, weight_of
from offsite.emulator.structure.towers import find_towers, token_embeddings
from offsite.errors import ConfigError, UnsupportedModel
from offsite.trust.files import write_atomically

VERBATIM = "verbatim"


@dataclass(frozen=True)
class EmulatorDesign:
    """The decisions about one emulator.

    Attributes:
      geometry: roles of the blocks: shipped bit for bit, carrying adapters, or middle.
      recipe: compressors of the middle, in order, for example ("skip_importance:0.25", "int4:64"); () ships all blocks.
      embedding: storage of the input embedding and the head: "verbatim", "int8" or "int4", with an optional ":GROUP".
    """

    geometry: Geometry
    recipe: tuple[str, ...]
    embedding: str


def write_package(
    model: nn.Module | Source,
    design: EmulatorDesign,
    calibration: Calibration | None,
    directory: Path | str,
    *,
    tokenizer: Path | str | None = None,
    auxiliary: AuxiliaryTensors = NO_AUXILIARY,
) -> Manifest:
    """Writes the emulator package of a model and returns the manifest; the same input gives the same bytes.

    Args:
      model: a transformers model with finite weights, left unchanged; or a source, whose blocks may be on disk.
      design: geometry, recipe and storage of the word tables.
      calibration: public examples, for the compressors that look at examples; None without such compressors.
      directory: target folder; must be empty or absent.
      tokenizer: folder with tokenizer files, usually the model's; the files become part of the package.
      auxiliary: tensors that the adapter needs and does not train, by name; they become part of the package.

    Raises:
      UnsupportedModel: a weight is not finite or does not fit the storage, or the configuration does not rebuild the
        model.
      ConfigError: the geometry, recipe, embedding or directory does not fit.
      UnknownName: the recipe names an unknown compressor, or the geometry an unknown tower.
      DataError: the tokenizer's folder holds no tokenizer file, or the disk does not take the files.
    """
    target = package_folder.prepare(Path(directory))
    source = MemorySource(model) if isinstance(model, nn.Module) else model
    text = config_text(source.model)
    dtype = _dtype(source.model)
    auto, _ = find_auto(source.model, text, dtype)
    middle = Middle(source, design.geometry, calibration)
    writer = _PackageWriter(middle, design, TensorFile(target / WEIGHTS))
    plan = writer.write_tensors()
    (target / CONFIG).write_text(text, encoding="utf-8")
    package_folder.copy_tokenizer(tokenizer, target)
    auxiliary_file.write(target, auxiliary)
    manifest = Manifest(
        format=FORMAT,
        auto=auto,
        dtype=str(dtype).removeprefix("torch."),
        geometry=design.geometry,
        recipe=tuple(design.recipe),
        embedding=design.embedding,
        skipped={path: middle.stream.forms[path] for path in plan.skipped},
        shared=plan.shared,
        files=package_folder.entries(target),
        **writer.facts(),
    )
    # The manifest is written last: a folder without a manifest is not a package. The listed files are on disk before,
    # or a loss of power could leave torn weights under a whole manifest, and a job would be bound to them.
    package_folder.sync(target)
    write_atomically(target / MANIFEST, manifest.to_bytes())
    return manifest


def embedding_storage(model: nn.Module, setting: str) -> dict[str, str]:
    """Returns the storage of the input embedding and the head, by parameter name; {} if both stay verbatim.

    Args:
      model: a model; `get_input_embeddings` and `get_output_embeddings`, if present, name its tables.
      setting: "verbatim", or "int8" or "int4" with an optional group, for example "int8:64" or "int4:32/6".

    Raises:
      ConfigError: the setting is not one of these.
    """
    if setting == VERBATIM:
        return {}
    name, _, argument = setting.partition(":")
    if name not in ("int8", "int4"):
        raise ConfigError(f"embedding={setting!r} is not verbatim, int8 or int4; use embedding='int8'")
    chosen = scheme("int", int(name[3:]), argument)
    shapes = {path: tuple(model.get_parameter(path).shape) for path in embedding_names(model)}
    return {path: str(chosen) for path, shape in shapes.items() if chosen.worth(shape)}


def embedding_names(model: nn.Module) -> tuple[str, ...]:
    """Returns the parameter names of the input embedding and the head; tied weights have one name.

    For a tower whose blocks stand apart, these are all matrices and kernels around the blocks, most of such a model.
    """
    for tower in find_towers(model):
        if tower.apart:
            inside = _inside(tower.blocks)
            return tuple(name for name, p in model.named_parameters() if p.dim() >= 2 and not name.startswith(inside))
    getter = getattr(model, "get_output_embeddings", None)
    modules = [*token_embeddings(model), getter() if getter is not None else None]
    tables = [getattr(module, "weight", None) for module in modules]
    wanted = {id(table) for table in tables if isinstance(table, nn.Parameter) and table.dim() >= 2}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in wanted)


def macs(block: nn.Module) -> int:
    """Returns the multiply-adds for each position in all dense layers of a block."""
    layers = [m for m in block.modules() if is_linear(m)]
    thin = sum(m.down.numel() + m.up.numel() for m in layers if isinstance(m, LowRank))
    return thin + sum(weight_of(m).numel() for m in layers if not isinstance(m, LowRank))


@dataclass
class _PackageWriter:
    """Collects the tensors of a package and the manifest's tables while the weights file is written."""

    middle: Middle
    design: EmulatorDesign
    file: TensorFile
    table: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    _verbatim: set[str] = field(default_factory=set)
    _macs: int = 0

    def write_tensors(self) -> Plan:
        """Writes the weights file, and returns the plan of the middle; a failure leaves no file behind."""
        recipe = tuple(self.design.recipe)
        try:
            plan = make_plan(self.middle, recipe)
            self._add_outside()
            for draft in apply(self.middle, recipe, plan):
                self._add_segment(draft)
            self.file.finish()
        except BaseException:
            self.file.drop()
            raise
        return plan

    def _add_outside(self) -> None:
        """Writes all tensors outside the middle."""
        model = self.middle.source.model
        inside = _inside(self.middle.blocks)
        names = {n: t for n, t in model.state_dict(keep_vars=True).items() if not n.startswith(inside)}
        aliases = tied_names(names)
        chosen = embedding_storage(model, self.design.embedding)
        ends = _inside(self.middle.geometry.ends(model))
        # A tensor that a verbatim block shares with another place stays verbatim, whatever the other place asks for.
        for shared in {name for alias, name in aliases.items() if alias.startswith(ends)}:
            chosen.pop(shared, None)
        self.tied |= aliases
        tower = _inside(self.middle.tower)
        for name, tensor in names.items():
            if name not in aliases and not name.startswith(tower):
                self._write(name, tensor, chosen.get(name))
        for path in self.middle.geometry.ends(model):
            with self.middle.source.open(path) as block:
                for name, tensor in block.state_dict(keep_vars=True, prefix=f"{path}.").items():
                    if name not in aliases:
                        self._write(name, tensor, None)

    def _add_segment(self, draft: DraftSegment) -> None:
        """Writes one segment of the middle."""
        full = self.middle.source.model
        for path, block in draft.blocks.items():
            self._macs += macs(block)
            originals = dict(full.get_submodule(path).named_modules(prefix=path))
            for name, module in block.named_modules(prefix=path):
                if is_linear(module) and (name not in originals or spec_of(module) != spec_of(originals[name])):
                    self.parts[name] = spec_of(module)
            tensors = block.state_dict(keep_vars=True, prefix=f"{path}.")
            if path == draft.segment.head and draft.segment.owner is not None:
                self.tied |= {name: f"{draft.segment.owner}{name[len(path) :]}" for name in tensors}
                continue
            aliases = tied_names(tensors)
            self.tied |= aliases
            for name, tensor in tensors.items():
                if name not in aliases:
                    self._write_middle(draft, name, tensor)

    def facts(self) -> dict[str, Any]:
        """Returns the manifest's facts about tensors by field: parts, storage, ties, hashes, sizes, multiply-adds."""
        tables = {"parts": self.parts, "storage": self.table, "tied": self.tied, "tensors": self.file.hashes}
        return {**tables, **self._sizes()}

    def _sizes(self) -> dict[str, int]:
        model, middle = self.middle.source.model, self.middle
        numbers = {name: 2 * parameter.numel() for name, parameter in model.named_parameters()}
        ends, inside = _inside(middle.geometry.ends(model)), _inside(middle.blocks)
        shipped = {"slot": 0, "embedding": 0, "middle": 0, "other": 0}
        tables = embedding_names(model)
        for name, how in self.table.items():
            where = "slot" if name.startswith(ends) else "middle" if name.startswith(inside) else "other"
            where = "embedding" if name in tables else where
            shipped[where] += sum(self.file.sizes[piece] for piece in storage.names(name, how))
        return {
            "full_bytes": sum(numbers.values()),
            "middle_full_bytes": sum(size for name, size in numbers.items() if name.startswith(inside)),
            "verbatim_bytes": sum(numbers[name] for name in self._verbatim if name in numbers),
            **{f"{where}_bytes": size for where, size in shipped.items()},
            "middle_macs": self._macs,
            "middle_full_macs": sum(macs(model.get_submodule(path)) for path in middle.blocks),
        }

    def _write_middle(self, draft: DraftSegment, name: str, tensor: Tensor) -> None:
        how = draft.storage.get(name)
        if how is None and name in draft.changed and tensor.is_floating_point():
            how = "fp16" if bool((tensor.abs() < torch.finfo(torch.float16).max).all()) else "fp32"
        self._write(name, tensor, how, draft.pieces.get(name), same=name not in draft.changed)

    def _write(
        self, name: str, tensor: Tensor, how: str | None, chosen: Quantised | None = None, *, same: bool = True
    ) -> None:
        tensor = tensor.cpu()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UnsupportedModel(f"tensor={name}: a weight is NaN or infinite; repair the model's file")
        self.table[name] = how = how or storage.verbatim(tensor)
        for piece, stored in storage.encode(name, tensor, how, chosen).items():
            self.file.add(piece, stored.cpu())
        if same and is_verbatim(how):
            self._verbatim.add(name)


def _dtype(model: nn.Module) -> torch.dtype:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= set(MODEL_DTYPES.values()):
        raise UnsupportedModel(
            f"dtypes={sorted(map(str, dtypes))}: a package needs one of {', '.join(MODEL_DTYPES)} for all parameters; "
            "load the model with from_pretrained(dtype=...)"
        )
    dtype: torch.dtype = dtypes.pop()
    return dtype


def _inside(blocks: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{path}." for path in blocks)

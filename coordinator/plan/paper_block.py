"""One block of the middle on paper: what the steps of a recipe make of its shapes and its storage."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from offsite.adapter.targets import is_linear, lengths, sublayers
from offsite.coordinator.plan.meta_run import META
from offsite.coordinator.plan.model_outline import FLOAT32
from offsite.emulator.package.quantization_scheme import Scheme
from offsite.emulator.package.recipe import Step
from offsite.emulator.package.recipe_arguments import fraction, scheme
from offsite.emulator.package.storage import SPARSE, parse
from offsite.emulator.structure.replacements import LowRank
from offsite.errors import UnsupportedModel

HALF = 2
QUANTISERS = ("int", "gptq")


@dataclass(frozen=True)
class PaperBlock:
    """One block of the middle after a recipe.

    Attributes:
      block: the block on the meta device, with other layers where the recipe makes such.
      storage: storage of each parameter that is not stored as it is, by the name inside the block.
    """

    block: nn.Module
    storage: Mapping[str, str]

    def stored(self, verbatim: int) -> int:
        """Returns the bytes of the block as stored; `verbatim` is the size of a number that is stored as it is."""
        return sum(
            stored_bytes(tuple(p.shape), self.storage.get(name, ""), verbatim)
            for name, p in self.block.named_parameters()
        )

    @property
    def widened(self) -> int:
        """Bytes of the block in float32."""
        return FLOAT32 * sum(parameter.numel() for parameter in self.block.parameters())

    def in_memory(self, verbatim: int) -> int:
        """Returns the bytes of the block at a site that holds dense layers as stored, and all else in float32."""
        held = held_names(self.block)
        return sum(
            memory_bytes(tuple(p.shape), self.storage.get(name, ""), verbatim, held=name in held)
            for name, p in self.block.named_parameters()
        )


def rewritten(block: nn.Module, steps: Iterable[Step]) -> PaperBlock:
    """Returns a block after the steps that change weights."""
    block, storage = copy.deepcopy(block), dict[str, str]()
    for step in steps:
        if step.name == "narrow":
            _narrowed(block, float(fraction("narrow", step.argument)), storage)
        elif step.name == "lowrank":
            _thinned(block, float(fraction("lowrank", step.argument)), storage)
        elif step.name.startswith("prune"):
            share = 0.5 if step.name == "prune_2_4" else float(fraction("prune", step.argument))
            storage |= {f"{path}.weight": f"{SPARSE}:{share}" for path, m in block.named_modules() if is_linear(m)}
        elif step.name.rstrip("348") in QUANTISERS:
            bits = int(step.name[-1])
            chosen = scheme(step.name[:-1], bits, step.argument)
            storage |= {n: str(chosen) for n, p in block.named_parameters() if _codes(n, p, chosen)}
    return PaperBlock(block.requires_grad_(False), storage)


def _codes(name: str, parameter: Tensor, chosen: Scheme) -> bool:
    return parameter.dim() >= 2 and chosen.worth(tuple(parameter.shape))


def _narrowed(block: nn.Module, share: float, storage: dict[str, str]) -> None:
    """Keeps a share of the feed-forward network's channels, as `narrow` does."""
    try:
        writer = sublayers(block).writer
    except UnsupportedModel as error:
        raise UnsupportedModel(
            f"narrow: no feed-forward network of dense layers; use skip_importance or gptq4 ({error})"
        ) from error
    dense = {path: lengths(m) for path, m in block.named_modules() if is_linear(m)}
    channels = dense[writer][0]
    kept = max(1, ceil(share * channels))
    parent = writer.rpartition(".")[0]
    for path, (reads, writes) in dense.items():
        beside = path.rpartition(".")[0] == parent or parent.startswith(path.rpartition(".")[0])
        if path == writer:
            _replace(block, path, (kept, writes), storage)
        elif beside and writes in (channels, 2 * channels) and list(dense).index(path) < list(dense).index(writer):
            _replace(block, path, (reads, writes // channels * kept), storage)


def _replace(block: nn.Module, path: str, sizes: tuple[int, int], storage: dict[str, str]) -> None:
    layer = block.get_submodule(path)
    bias = getattr(layer, "bias", None) is not None
    with torch.device(META):
        turned = isinstance(layer, Conv1D)
        block.set_submodule(path, Conv1D(sizes[1], sizes[0]) if turned else nn.Linear(*sizes, bias=bias))
    storage |= {f"{path}.weight": "fp16"} | ({f"{path}.bias": "fp16"} if bias else {})


def _thinned(block: nn.Module, share: float, storage: dict[str, str]) -> None:
    """Replaces each dense layer by two thin ones, as `lowrank` does."""
    for path, layer in [(path, m) for path, m in block.named_modules() if is_linear(m)]:
        reads, writes = lengths(layer)
        rank = max(1, int(share * reads * writes / (reads + writes)))
        if rank * (reads + writes) < reads * writes:
            with torch.device(META):
                block.set_submodule(path, LowRank(reads, writes, rank, bias=getattr(layer, "bias", None) is not None))
            storage |= {f"{path}.{leaf}": "fp16" for leaf in ("down", "up")}


def stored_bytes(shape: tuple[int, ...], how: str, verbatim: int) -> int:
    """Returns the bytes of a tensor in its storage; `verbatim` is the size of a number that is stored as it is."""
    count = torch.Size(shape).numel()
    if how.startswith(SPARSE):
        return ceil(HALF * count * (1 - float(how.partition(":")[2]))) + (count + 7) // 8
    chosen = parse(how) if how else None
    if chosen is not None:
        return chosen.stored_bytes(shape)
    return count * (HALF if how == "fp16" else verbatim)


def held_names(module: nn.Module) -> set[str]:
    """Returns the names of the weights that a site can hold as they are stored: of dense layers and tables of words."""
    kinds = (nn.Linear, Conv1D, nn.Embedding)
    return {f"{path}.weight" for path, layer in module.named_modules() if type(layer) in kinds}


def memory_bytes(shape: tuple[int, ...], how: str, verbatim: int, *, held: bool) -> int:
    """Returns the bytes of a tensor in a site's memory: as it is stored where that is narrower, else in float32."""
    wide = FLOAT32 * torch.Size(shape).numel()
    return stored_bytes(shape, how, verbatim) if held and (how or verbatim < FLOAT32) else wide


def is_narrow(how: str, verbatim: int) -> bool:
    """Whether a storage is narrower than float32, so that a site can keep it as it is."""
    return not how.startswith(SPARSE) and (bool(how) or verbatim < FLOAT32)

"""Blocks on the meta device whose dense layers keep codes, as a site with stored weights runs them."""

import copy
from collections.abc import Mapping
from math import ceil

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from offsite.coordinator.plan.meta_run import META
from offsite.coordinator.plan.paper_block import PaperBlock, is_narrow
from offsite.emulator.package.quantization_scheme import FINE_BITS, packed_bytes
from offsite.emulator.package.storage import parse
from offsite.emulator.package.stored_weight import Codes, StoredWeight, Verbatim
from offsite.emulator.runtime.quantized_linear import DequantizingLinear


def with_codes(paper: PaperBlock, verbatim: torch.dtype) -> nn.Module:
    """Returns a copy of a block whose dense layers keep their codes and widen them at each call, on the meta device."""
    block = copy.deepcopy(paper.block)
    keep_codes(block, paper.storage, verbatim)
    return block


def keep_codes(model: nn.Module, storage: Mapping[str, str], verbatim: torch.dtype, except_in: str = "") -> None:
    """Replaces dense layers that share their weight with no other place by layers that keep codes, in place.

    Args:
      model: a block, or a model.
      storage: storage of each parameter that is not stored as it is, by name.
      verbatim: dtype of what is stored as it is.
      except_in: path inside which layers stay; empty for no such path.
    """
    own = {name for name, _ in model.named_parameters()}
    for path, layer in [(path, m) for path, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)]:
        how, name = storage.get(f"{path}.weight", ""), f"{path}.weight"
        inside = bool(except_in) and path.startswith(f"{except_in}.")
        if name in own and not inside and is_narrow(how, verbatim.itemsize):
            model.set_submodule(path, DequantizingLinear(layer, _codes_of(layer, how, verbatim)).eval())


def _codes_of(layer: nn.Module, how: str, verbatim: torch.dtype) -> StoredWeight:
    weight = layer.get_parameter("weight")
    shape, runs = tuple(weight.shape), weight.dtype
    chosen = parse(how) if how else None
    if chosen is None:
        dtype = torch.float16 if how == "fp16" else verbatim
        return Verbatim(shape, runs, torch.empty(shape, dtype=dtype, device=META))
    rows, groups = shape[0], ceil(shape[1] / chosen.group)
    codes = _bytes(packed_bytes(shape[0] * shape[1], chosen.bits))
    if chosen.fine:
        side = packed_bytes(rows * groups, FINE_BITS)
        spans = torch.empty((rows, 2), dtype=torch.float16, device=META)
        return Codes(shape, runs, chosen, codes, _bytes(side), _bytes(side), spans)
    scales, minima = (torch.empty((rows, groups), dtype=torch.float16, device=META) for _ in range(2))
    return Codes(shape, runs, chosen, codes, scales, minima)


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=META)

"""Blocks on the meta device whose dense layers keep codes, as a site with stored weights runs them."""

import copy
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
    for path, layer in [(path, m) for path, m in block.named_modules() if type(m) in (nn.Linear, Conv1D)]:
        how = paper.storage.get(f"{path}.weight", "")
        if is_narrow(how, verbatim.itemsize):
            block.set_submodule(path, DequantizingLinear(layer, _codes_of(layer, how, verbatim)).eval())
    return block


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

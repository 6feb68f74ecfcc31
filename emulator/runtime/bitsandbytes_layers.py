"""Rounds frozen dense layers of the middle to 8 or 4 bits by bitsandbytes, an optional extra.

Only the numbers of bitsandbytes' own layers are used, not their products. `Linear8bitLt` rounds its inputs, too: with a
threshold it picks columns over the whole batch, so that one record changes another record's gradient, by 10 % on a
model of 135 million weights; without a threshold its backward pass is another function's derivative. `Linear4bit`
computes in bf16 on some processors when no gradient is asked for, and repacks its weight for that. Here a layer is a
plain product with the widened weight, the same in every mode, and no row affects another.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from offsite.emulator.package import storage
from offsite.emulator.package.manifest import Manifest
from offsite.emulator.package.stored_weight import Pieces, StoredWeight
from offsite.emulator.structure.geometry import slot_paths
from offsite.emulator.structure.towers import blocks_at
from offsite.errors import ConfigError, RangeError, lookup

BLOCK = 64  # weights that share a scale in nf4, bitsandbytes' own default
LARGEST_CODE = 127.0
FETCHER = "kernels"
Widen = Callable[[Tensor, Tensor], Tensor]
Rounded = tuple[Tensor, Tensor, Widen]


@dataclass(frozen=True)
class Rounding:
    """One of bitsandbytes' ways to store a weight.

    Attributes:
      bits: width of a code.
      of: function that returns codes and scales of a weight, (out, in), float32 and contiguous, and the function that
        makes the rounded weight of the two.
    """

    bits: int
    of: Callable[[Tensor], Rounded]


def library() -> Any:
    """Returns the module bitsandbytes.

    Raises:
      ConfigError: bitsandbytes is not installed, its compiled part does not load, or it would fetch code from a
        network.
    """
    if importlib.util.find_spec(FETCHER) is not None:
        raise ConfigError(
            f"package={FETCHER!r}: bitsandbytes would fetch compiled code through it; pip uninstall {FETCHER}, or set "
            "weights = 'stored'"
        )
    try:
        module = importlib.import_module("bitsandbytes")  # not at the top: it is optional, and takes a second
    except ImportError as error:
        raise ConfigError(f"bitsandbytes cannot be imported ({error}); pip install 'offsite[bitsandbytes]'") from error
    if "Mock" in type(module.cextension.lib).__name__:  # then it would compile code of its own at the first call
        raise ConfigError("bitsandbytes: its compiled part does not load here; set weights = 'stored' in site.toml")
    return module


def may_round(model: nn.Module, manifest: Manifest, weights: str) -> frozenset[str]:
    """Returns the paths of the dense layers that a site rounds: of blocks of the middle that carry no adapter.

    Layers that the package stores in no more bits stay exactly as they are. So do blocks that carry adapters, which are
    all blocks of a parallel emulator: four such blocks, rounded, turn the gradients nearly as much as all 26 others,
    and the adapter would learn at the site to repair what is not broken at the coordinator.

    Args:
      model: the emulator before its weights are read.
      manifest: the package's manifest.
      weights: "int8", with one scale for each output (Dettmers et al. 2022, arXiv 2208.07339, section 3.1), or "nf4",
        with one scale for 64 weights (Dettmers et al. 2023, arXiv 2305.14314, section 3), whose scales stay float32.

    Raises:
      UnknownName: `weights` is neither "int8" nor "nf4".
      ConfigError: bitsandbytes cannot be used; see `library`.
    """
    bits = lookup(ROUNDINGS, weights, "weights").bits
    library()
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    inside = tuple(f"{path}." for path in (*lists, *blocks_at(model, manifest.geometry.tower)))
    slots = tuple(f"{path}." for path in slot_paths(model, manifest.geometry)[0])
    return frozenset(
        path
        for path, layer in model.named_modules()
        if path.startswith(inside)
        and not path.startswith(slots)
        and type(layer) in (nn.Linear, Conv1D)
        and _rounds(layer, manifest.storage.get(f"{path}.weight", ""), bits)
    )


def _rounds(layer: nn.Module, how: str, bits: int) -> bool:
    shape = layer.get_parameter("weight").shape
    odd = (
        shape[0 if isinstance(layer, Conv1D) else 1] % 2
    )  # such rows bitsandbytes unpacks by code compiled at the site
    scheme = storage.parse(how) if how else None
    return bool(how) and not odd and not (scheme and scheme.bits <= bits)


def round_weight(weight: StoredWeight, weights: str, name: str, turned: bool) -> StoredWeight:
    """Returns a dense layer's weight rounded by bitsandbytes; the layer is then vetted and run with this weight.

    A model can be made to turn into another one by rounding (Egashira et al. 2024, arXiv 2405.18137), so the rounded
    weight is the only one that the emulator ever has.

    Args:
      weight: weight as the package stores it.
      weights: "int8" or "nf4".
      name: name of the tensor, for the message.
      turned: whether the weight is (in, out), as GPT-2 has it.

    Raises:
      RangeError: the weight is too large for float16, through which int8 takes its scales.
    """
    matrix = weight.widened(torch.float32)
    first, second, widen = ROUNDINGS[weights].of((matrix.T if turned else matrix).contiguous())
    form = partial(_transposed, widen) if turned else widen
    if not bool(torch.isfinite(form(first, second)).all()):
        raise RangeError(f"weights={weights!r}: {name} is too large for it; set weights = 'stored' in site.toml")
    return Pieces(weight.shape, weight.dtype, first, second, form)


def _transposed(widen: Widen, first: Tensor, second: Tensor) -> Tensor:
    return widen(first, second).T


def _int8(weight: Tensor) -> Rounded:
    codes, scales, _ = library().functional.int8_vectorwise_quant(weight.half())
    codes[scales == 0] = 0  # 0 / 0 as an integer differs between processors
    return codes, scales, _from_int8


def _from_int8(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float().mul_(scales.unsqueeze(1).mul(1.0 / LARGEST_CODE))


def _nf4(weight: Tensor) -> Rounded:
    codes, state = library().functional.quantize_4bit(
        weight, blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
    )
    return codes, state.absmax, partial(_from_nf4, shape=tuple(weight.shape))


def _from_nf4(codes: Tensor, scales: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    form = importlib.import_module("bitsandbytes").functional
    # As one row: on processors with AVX-512, 0.50.2 takes wrong scales for blocks that lie in two rows of a matrix.
    row = (1, math.prod(shape))
    state = form.QuantState(absmax=scales, shape=row, dtype=torch.float32, blocksize=BLOCK, quant_type="nf4")
    widened: Tensor = form.dequantize_4bit(codes, state)
    return widened.reshape(shape)


ROUNDINGS = {"int8": Rounding(8, _int8), "nf4": Rounding(4, _nf4)}

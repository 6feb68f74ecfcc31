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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from offsite.emulator.package import storage
from offsite.emulator.package.manifest import Manifest
from offsite.emulator.runtime.quantized_linear import StoredWeight, dense
from offsite.emulator.structure.geometry import slot_paths
from offsite.emulator.structure.towers import blocks_at
from offsite.errors import ConfigError, RangeError, lookup

BLOCK = 64  # weights that share a scale in nf4, bitsandbytes' own default
LARGEST_CODE = 127.0
FETCHER = "kernels"


@dataclass(frozen=True)
class Rounding:
    """One of bitsandbytes' ways to store a weight.

    Attributes:
      bits: width of a code.
      of: function that returns the stored form of a weight, (out, in), float32 and contiguous.
    """

    bits: int
    of: Callable[[Tensor], StoredWeight]


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


def round_layers(model: nn.Module, manifest: Manifest, weights: str) -> dict[str, StoredWeight]:
    """Rounds dense layers of blocks that carry no adapter, in place, and returns their weights in the rounded form.

    The model keeps its modules, now with the rounded weights, so that the vetted emulator is the one that will run: a
    model can be made to turn into another one by rounding (Egashira et al. 2024, arXiv 2405.18137). Layers that the
    package stores in no more bits stay exactly as they are. So do blocks that carry adapters, which are all blocks of a
    parallel emulator: four such blocks, rounded, turn the gradients nearly as much as all 26 others, and the adapter
    would learn at the site to repair what is not broken at the coordinator.

    Args:
      model: the emulator as `package_reader.load` returned it, float32, before vetting.
      manifest: the package's manifest.
      weights: "int8", with one scale for each output (Dettmers et al. 2022, arXiv 2208.07339, section 3.1), or "nf4",
        with one scale for 64 weights (Dettmers et al. 2023, arXiv 2305.14314, section 3), whose scales stay float32.

    Returns:
      The rounded weights by layer path, as `quantized_linear.replace_linears` takes them.

    Raises:
      UnknownName: `weights` is neither "int8" nor "nf4".
      ConfigError: bitsandbytes cannot be used; see `library`.
      RangeError: a weight is too large for float16, through which int8 takes its scales.
    """
    rounding = lookup(ROUNDINGS, weights, "weights")
    library()
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    inside = tuple(f"{path}." for path in (*lists, *blocks_at(model, manifest.geometry.tower)))
    slots = tuple(f"{path}." for path in slot_paths(model, manifest.geometry)[0])
    rounded = {}
    for path, layer, how in dense(model, manifest):
        scheme = storage.parse(how)
        if not path.startswith(inside) or path.startswith(slots) or (scheme and scheme.bits <= rounding.bits):
            continue
        weight = layer.get_parameter("weight").detach()
        matrix = weight.T if isinstance(layer, Conv1D) else weight  # a view, through which the layer is written
        if matrix.shape[1] % 2:
            continue  # bitsandbytes unpacks rows of odd length by code that it compiles at the site
        stored = rounding.of(matrix.float().contiguous())
        matrix.copy_(stored.widen(stored.pieces))
        if not bool(torch.isfinite(matrix).all()):
            raise RangeError(f"weights={weights!r}: {path} is too large for it; set weights = 'stored' in site.toml")
        rounded[path] = stored
    return rounded


def _int8(weight: Tensor) -> StoredWeight:
    codes, scales, _ = library().functional.int8_vectorwise_quant(weight.half())
    codes[scales == 0] = 0  # 0 / 0 as an integer differs between processors
    return StoredWeight((codes, scales), _from_int8)


def _from_int8(pieces: Sequence[Tensor]) -> Tensor:
    codes, scales = pieces
    return codes.float().mul_(scales.unsqueeze(1).mul(1.0 / LARGEST_CODE))


def _nf4(weight: Tensor) -> StoredWeight:
    codes, state = library().functional.quantize_4bit(
        weight, blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
    )
    return StoredWeight((codes, state.absmax), partial(_from_nf4, shape=tuple(weight.shape)))


def _from_nf4(pieces: Sequence[Tensor], *, shape: tuple[int, ...]) -> Tensor:
    codes, scales = pieces
    form = importlib.import_module("bitsandbytes").functional
    # As one row: on processors with AVX-512, 0.50.2 takes wrong scales for blocks that lie in two rows of a matrix.
    row = (1, math.prod(shape))
    state = form.QuantState(absmax=scales, shape=row, dtype=torch.float32, blocksize=BLOCK, quant_type="nf4")
    widened: Tensor = form.dequantize_4bit(codes, state)
    return widened.reshape(shape)


ROUNDINGS = {"int8": Rounding(8, _int8), "nf4": Rounding(4, _nf4)}

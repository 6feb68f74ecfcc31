"""Quantisation that looks at what enters: each rounding error is passed on to the weights that can make good for it."""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from emulator.compressors.arguments import group
from emulator.compressors.integers import worth
from emulator.draft import Station
from emulator.fit import position_weights
from emulator.parts import LowRank, weight_of
from emulator.quantize import Quantised, grid, pack, quantize
from errors import RangeError

DAMPING = 0.01
BLOCK = 64  # inputs whose errors are passed on together to those behind
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of the grid that covers a whole group


def gptq(bits: int, station: Station, argument: str) -> None:
    """Takes so many bits for a weight; Frantar et al. 2023 (GPTQ), algorithm 1, on what arrives in the emulator.

    Grids are fixed before and inputs taken in the order of their size ("act-order" in the authors' code).

    Matrices that are no dense layer, and the factors of low-rank ones, are rounded to nearest.
    """
    length = group(f"gptq{bits}", argument)
    layers = {path: m for path, m in station.span.layers().items() if not isinstance(m, LowRank)}
    seen = station.observe(layers)
    done: set[str] = set()
    known: list[tuple[Tensor, Entering]] = []  # layers side by side see the same
    for path, inputs in seen.items():
        weight = weight_of(layers[path])
        parameter = f"{path}.weight"
        if worth(tuple(weight.shape), bits, length):
            turned = isinstance(layers[path], Conv1D)
            entering = next((one for same, one in known if torch.equal(same, inputs)), None)
            if entering is None:
                entering = Entering.of(second_moments(inputs))
                known.append((inputs, entering))
            station.span.store(parameter, bits, length, quantize_rows(weight, entering, bits, length, turned=turned))
        done.add(parameter)
    for parameter, matrix in station.span.matrices().items():
        if parameter not in done and worth(tuple(matrix.shape), bits, length):
            station.span.store(parameter, bits, length, quantize(matrix, bits, length))


def second_moments(inputs: Tensor) -> Tensor:
    """Returns the damped second moments (in, in), float64, of inputs (positions, in), each position counting alike."""
    scaled = inputs.double() * position_weights(inputs).sqrt().unsqueeze(-1).double()
    moments = scaled.T @ scaled / max(len(scaled), 1)
    dead = moments.diagonal() == 0
    moments.diagonal()[dead] = 1.0
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    return moments


@dataclass(frozen=True)
class Entering:
    """What enters a layer, as rounding needs it.

    Attributes:
      sizes: second moment of each input, float32 (in,).
      order: of the inputs, the largest first.
      passed: upper triangle U (in, in) with U^T U = inverse of the moments in that order: its row i passes the error of
        input i on to those behind.
    """

    sizes: Tensor
    order: Tensor
    passed: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> "Entering":
        """Takes second moments (in, in), positive definite, float64."""
        order = moments.diagonal().argsort(descending=True, stable=True)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments[order][:, order]))
        return cls(moments.diagonal().float(), order, torch.linalg.cholesky(inverse, upper=True).float())


def quantize_rows(weight: Tensor, entering: Entering, bits: int, length: int, *, turned: bool = False) -> Quantised:
    """Returns codes of a matrix (out, in) such that the layer's output on its inputs changes least.

    The grids are chosen first, for the least weighted error of rounding to nearest, so that inputs may then be taken in
    the order of their size: the largest are rounded while all others can still make good for them.

    Args:
      weight: (out, in), finite.
      entering: of the inputs.
      bits: 3, 4 or 8.
      length: weights that share a scale.
      turned: the tensor is stored as (in, out), so that a group runs over outputs and not over inputs.

    Raises:
      RangeError: a weight is not finite, or a group does not fit fp16.
    """
    matrix = weight.detach().float()
    stored = matrix.T if turned else matrix
    minima, scales = _grids(stored, entering.sizes.unsqueeze(1) if turned else entering.sizes, bits, length)
    low, step = (one.float().repeat_interleave(length, dim=1)[:, : stored.shape[1]] for one in (minima, scales))
    order = entering.order
    rest, bottom, steps = ((one if turned else one.T)[order] for one in (stored, low, step))
    codes = torch.empty(rest.shape, dtype=torch.uint8)
    codes[order] = _rounded(rest, bottom, steps, entering.passed, bits)
    flat = (codes if turned else codes.T).contiguous().reshape(-1)
    return Quantised(pack(flat, bits), scales, minima)


def _rounded(rest: Tensor, low: Tensor, step: Tensor, passed: Tensor, bits: int) -> Tensor:
    """Returns the code of each weight of (in, out), rounded from the first input to the last; `rest` is used up."""
    codes = torch.empty(rest.shape, dtype=torch.uint8)
    steps_in = torch.where(step == 0, 0.0, 1 / step)
    for start in range(0, len(rest), BLOCK):
        block = rest[start : start + BLOCK]
        errors = torch.empty_like(block)
        for i, row in enumerate(block, start):
            code = row.sub(low[i]).mul_(steps_in[i]).round_().clamp_(0, 2**bits - 1)
            codes[i] = code
            errors[i - start] = row.sub(code.mul_(step[i]).add_(low[i])).div_(passed[i, i])
            behind = i + 1 - start
            block[behind:].addr_(passed[i, i + 1 : i + 1 + len(block) - behind], errors[i - start], alpha=-1)
        stop = start + len(block)
        rest[stop:] -= passed[start:stop, stop:].T @ errors
    return codes


def _grids(stored: Tensor, sizes: Tensor, bits: int, length: int) -> tuple[Tensor, Tensor]:
    """Returns fp16 (minima, scales), each (rows, groups): of several narrower grids the one of least weighted error."""
    rows, columns = stored.shape
    groups = ceil(columns / length)
    padding = (0, groups * length - columns)
    # The last weight repeated widens no grid, and with size 0 it counts for none.
    filled = torch.cat([stored, stored[:, -1:].expand(rows, padding[1])], dim=1).reshape(rows, groups, length)
    weights = functional.pad(sizes.expand(rows, columns), padding).reshape(rows, groups, length)
    middle = (filled.amax(-1, keepdim=True) + filled.amin(-1, keepdim=True)) / 2
    best = torch.full((rows, groups), torch.inf)
    minima, scales = (torch.zeros(rows, groups, dtype=torch.float16) for _ in range(2))
    for share in SHARES:
        low, step = grid(middle + share * (filled - middle), 2**bits - 1)
        wide_low, wide_step = low.float().unsqueeze(-1), step.float().unsqueeze(-1)
        back = _nearest(filled, wide_low, wide_step, bits) * wide_step + wide_low
        error = (weights * (filled - back).square()).sum(-1)
        better = error < best
        best, minima, scales = (
            torch.where(better, new, old) for new, old in ((error, best), (low, minima), (step, scales))
        )
    if torch.isinf(best).any():
        raise RangeError("weight group outside +-65504 or not finite: its scale does not fit fp16; ship it verbatim")
    return minima, scales


def _nearest(values: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    return ((values - low) / torch.where(step == 0, 1.0, step)).round().clamp(0, 2**bits - 1)

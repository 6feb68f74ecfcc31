"""Quantisation that looks at what enters: each rounding error is passed on to the weights that can make good for it."""

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from emulator.compressors.arguments import group
from emulator.compressors.integers import worth
from emulator.draft import Station
from emulator.fit import position_weights
from emulator.parts import LowRank, weight_of
from emulator.quantize import Quantised, grid, pack, quantize

DAMPING = 0.01


def gptq(bits: int, station: Station, argument: str) -> None:
    """Takes so many bits for a weight; Frantar et al. 2023 (GPTQ), algorithm 1, on what arrives in the emulator.

    Matrices that are no dense layer, and the factors of low-rank ones, are rounded to nearest.
    """
    length = group(f"gptq{bits}", argument)
    layers = {path: m for path, m in station.span.layers().items() if not isinstance(m, LowRank)}
    seen = station.observe(layers)
    done: set[str] = set()
    for path, inputs in seen.items():
        weight = weight_of(layers[path])
        parameter = f"{path}.weight"
        if worth(tuple(weight.shape), bits, length):
            turned = isinstance(layers[path], Conv1D)
            quantised = quantize_rows(weight, second_moments(inputs), bits, length, turned=turned)
            station.span.store(parameter, bits, length, quantised)
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


def quantize_rows(weight: Tensor, moments: Tensor, bits: int, length: int, *, turned: bool = False) -> Quantised:
    """Returns codes of a matrix (out, in) such that the layer's output on its inputs changes least.

    Args:
      weight: (out, in), finite.
      moments: (in, in) of the inputs, positive definite.
      bits: 3, 4 or 8.
      length: weights that share a scale.
      turned: the tensor is stored as (in, out), so that a group runs over outputs and not over inputs.
    """
    rest = weight.detach().double().clone()
    columns = rest.shape[1]
    # The upper triangle U with U^T U = inverse: row i of it passes the error of input i on to the inputs behind it.
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True).to(rest)
    codes = torch.empty(rest.shape, dtype=torch.uint8)
    scales, minima = [], []
    block = length if not turned else 1
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        low, scale = _grids(rest[:, start:stop], bits, length, turned=turned)
        minima.append(low)
        scales.append(scale)
        errors = torch.empty(len(rest), stop - start, dtype=torch.float64)
        for i in range(start, stop):
            column = rest[:, i]
            step, bottom = (_spread(one, length, len(rest), turned=turned) for one in (scale, low))
            code = ((column - bottom) / torch.where(step == 0, 1.0, step)).round().clamp(0, 2**bits - 1)
            codes[:, i] = code.to(torch.uint8)
            error = (column - (code * step + bottom)) / inverse[i, i]
            errors[:, i - start] = error
            rest[:, i + 1 : stop] -= torch.outer(error, inverse[i, i + 1 : stop])
        rest[:, stop:] -= errors @ inverse[start:stop, stop:]
    stacked = (torch.stack(one, dim=0 if turned else 1) for one in (scales, minima))
    flat = (codes.T if turned else codes).contiguous().reshape(-1)
    scale_table, minimum_table = stacked
    return Quantised(pack(flat, bits), scale_table.contiguous(), minimum_table.contiguous())


def _grids(part: Tensor, bits: int, length: int, *, turned: bool) -> tuple[Tensor, Tensor]:
    """Returns fp16 (minima, scales): one for each output of one group of inputs, or for each group of outputs."""
    if not turned:
        minima, scales = grid(part.float().unsqueeze(1), 2**bits - 1)
        return minima[:, 0], scales[:, 0]
    row = part[:, 0].float()
    padding = row[-1:].expand(-len(row) % length)
    minima, scales = grid(torch.cat([row, padding]).reshape(1, -1, length), 2**bits - 1)
    return minima[0], scales[0]


def _spread(values: Tensor, length: int, rows: int, *, turned: bool) -> Tensor:
    values = values.double()
    return values.repeat_interleave(length)[:rows] if turned else values

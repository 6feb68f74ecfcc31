"""Quantisation by a layer's inputs: each rounding error is passed on to weights that can still make up for it."""

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from offsite.emulator.calibration.draft import SegmentContext
from offsite.emulator.calibration.least_squares import position_weights
from offsite.emulator.package.quantization_scheme import Scheme
from offsite.emulator.package.quantize import FINEST, HALF, Fine, Grid, Quantised, covering, grouped, nearest, quantize
from offsite.emulator.package.recipe_arguments import scheme
from offsite.emulator.structure.replacements import LowRank, weight_of
from offsite.errors import RangeError

DAMPING = 0.01
BLOCK = 64  # inputs whose errors are passed on together to the inputs behind
SMALLEST = 2.0**-24  # smallest fp16 number above 0; as the smallest unit it keeps tiny weights from becoming all zeros
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # candidate grids, as shares of the grid that covers a whole group


def gptq(bits: int, context: SegmentContext, argument: str) -> None:
    """Quantises a segment's dense layers by Frantar et al. 2023 (GPTQ), algorithm 1, on the emulator's own inputs.

    The grids are fixed first, and inputs are rounded in the order of their size ("act-order" in the authors' code).
    Matrices outside dense layers, and the factors of low-rank layers, are rounded to nearest.

    Args:
      bits: width of a code: 3, 4 or 8.
      context: the segment with its examples.
      argument: size of a group, as in `arguments.scheme`.
    """
    chosen = scheme("gptq", bits, argument)
    layers = {path: m for path, m in context.draft.layers().items() if not isinstance(m, LowRank)}
    seen = context.observe(layers)
    done: set[str] = set()
    known: list[tuple[Tensor, InputMoments]] = []  # layers side by side have the same inputs
    for path, inputs in seen.items():
        weight = weight_of(layers[path])
        parameter = f"{path}.weight"
        if chosen.worth(tuple(weight.shape)):
            turned = isinstance(layers[path], Conv1D)
            moments = next((moments for same, moments in known if torch.equal(same, inputs)), None)
            if moments is None:
                moments = InputMoments.of(second_moments(inputs))
                known.append((inputs, moments))
            context.draft.store(parameter, chosen, quantize_rows(weight, moments, chosen, turned=turned))
        done.add(parameter)
    for parameter, matrix in context.draft.matrices().items():
        if parameter not in done and chosen.worth(tuple(matrix.shape)):
            context.draft.store(parameter, chosen, quantize(matrix, chosen))


def second_moments(inputs: Tensor) -> Tensor:
    """Returns damped second moments of inputs (positions, in), float64 (in, in); each position counts alike."""
    scaled = inputs.double() * position_weights(inputs).sqrt().unsqueeze(-1).double()
    moments = scaled.T @ scaled / max(len(scaled), 1)
    dead = moments.diagonal() == 0
    moments.diagonal()[dead] = 1.0
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    return moments


@dataclass(frozen=True)
class InputMoments:
    """The second moments of a layer's inputs, in the form that rounding needs.

    Attributes:
      sizes: second moment of each input, float32 (in,).
      order: indices of the inputs (in,), the largest moment first.
      passed: upper triangle U, float32 (in, in), with U^T U = inverse of the moments in that order; row i passes the
        error of input i on to the inputs behind.
    """

    sizes: Tensor
    order: Tensor
    passed: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> "InputMoments":
        """Returns the input moments of second moments (in, in), positive definite, float64."""
        order = moments.diagonal().argsort(descending=True, stable=True)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments[order][:, order]))
        return cls(moments.diagonal().float(), order, torch.linalg.cholesky(inverse, upper=True).float())


def quantize_rows(weight: Tensor, moments: InputMoments, scheme: Scheme, *, turned: bool = False) -> Quantised:
    """Returns the codes of a matrix (out, in) that change the layer's output on its inputs least.

    The grids are chosen first, for the least weighted error of rounding to nearest, so that inputs can then be rounded
    in the order of their size: the largest are rounded while all other inputs can still make up for the error.

    Args:
      weight: matrix (out, in), finite.
      moments: second moments of the layer's inputs.
      scheme: bits, group and kind of scales.
      turned: True if the tensor is stored as (in, out), so that a group runs over outputs and not over inputs.

    Raises:
      RangeError: a weight is not finite, or a group does not fit fp16.
    """
    matrix = weight.detach().float()
    stored = matrix.T if turned else matrix
    grid = _grid(stored, moments.sizes.unsqueeze(1) if turned else moments.sizes, scheme)
    columns, sides = stored.shape[1], (grid.minima, grid.scales)
    low, step = (side.repeat_interleave(scheme.group, dim=1)[:, :columns] for side in sides)
    order = moments.order
    rest, bottom, steps = ((matrix if turned else matrix.T)[order] for matrix in (stored, low, step))
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    codes[order] = _rounded(rest, bottom, steps, moments.passed, scheme.bits)
    flat = (codes if turned else codes.T).contiguous().reshape(-1)
    return Quantised.of(flat, grid, scheme.bits)


def _rounded(rest: Tensor, low: Tensor, step: Tensor, passed: Tensor, bits: int) -> Tensor:
    """Returns the code of each weight of (in, out), rounded from the first input to the last; overwrites `rest`."""
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
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


def _grid(stored: Tensor, sizes: Tensor, scheme: Scheme) -> Grid:
    """Returns, for each group, the grid of least weighted error among several grids."""
    rows, columns = stored.shape
    groups = grouped(stored, scheme.group)
    padding = (0, groups.shape[1] * scheme.group - columns)  # the filled-up weights count for nothing
    choice = _BestGrid(groups, functional.pad(sizes.expand(rows, columns), padding).reshape(groups.shape), scheme.bits)
    middle = (groups.amax(-1, keepdim=True) + groups.amin(-1, keepdim=True)) / 2
    for share in SHARES:
        choice.offer(covering(middle + share * (groups - middle), replace(scheme, fine=False)))
    if torch.isinf(choice.error).any():
        raise RangeError("a weight or an input of its layer is too large to be rounded; ship the layer verbatim")
    return _snapped(choice) if scheme.fine else choice.best


class _BestGrid:
    """The best of the grids offered so far, group by group."""

    def __init__(self, groups: Tensor, weights: Tensor, bits: int) -> None:
        """Takes the weights to round and the factor of each square error, both (rows, groups, group)."""
        self.groups, self.weights, self.bits = groups, weights, bits
        self.error = torch.full(groups.shape[:2], torch.inf, device=groups.device)
        self.best = Grid(torch.zeros_like(self.error), torch.zeros_like(self.error))

    def offer(self, grid: Grid) -> None:
        """Takes a grid for each group whose weighted square error it lessens."""
        back = nearest(self.groups, grid, self.bits) * grid.scales.unsqueeze(-1) + grid.minima.unsqueeze(-1)
        error = (self.weights * (self.groups - back).square()).sum(-1)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        pairs = ((grid.minima, self.best.minima), (grid.scales, self.best.scales))
        self.best = Grid(*(torch.where(better, new, old) for new, old in pairs))


def _snapped(plain: _BestGrid) -> Grid:
    """Returns the fine grid of least error around a plain one: each code is the nearest or one of its neighbours."""
    wanted = (plain.best.scales, (-plain.best.minima).clamp_min(0))
    spans = torch.stack([side.amax(-1) / FINEST for side in wanted], dim=-1).to(HALF).clamp_min(SMALLEST)
    units = [span.float().unsqueeze(-1) for span in spans.unbind(-1)]
    scales, minima = ((side / unit).round() for side, unit in zip(wanted, units, strict=True))
    choice = _BestGrid(plain.groups, plain.weights, plain.bits)
    for up, down in product((0, -1, 1), repeat=2):
        choice.offer(_fine(scales + up, minima + down, spans))
    return _fine((choice.best.scales / units[0]).round(), (-choice.best.minima / units[1]).round(), spans)


def _fine(scales: Tensor, minima: Tensor, spans: Tensor) -> Grid:
    return Fine(scales.clamp(0, FINEST).to(torch.uint8), minima.clamp(0, FINEST).to(torch.uint8), spans).grid()

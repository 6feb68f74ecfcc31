"""Checks of weights that would carry a record out in its own gradient, by statistics that honest weights do not have.

Each trap is published: rows that all point one way, whose biases sort records into bins (Fowl et al. 2022, Robbing the
Fed; Zhao et al. 2024, LOKI); identity, permutation and one-hot maps that hand an input on unmixed (Fowl et al. 2023,
Decepticons; PEFTLeak 2025); amplified rows that latch one example (Feng and Tramer 2024, Privacy Backdoors).
"""

from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor, nn

from offsite.adapter.targets import is_linear, is_norm
from offsite.emulator.runtime.quantized_linear import own_weights
from offsite.emulator.structure.towers import token_embeddings
from offsite.emulator.vetting.limits import Check, VettingThresholds
from offsite.emulator.vetting.weight_blocks import Weight, matrix_shape, norms, peak, root_mean_square, sample, zeros
from offsite.task.device import device_of

# Statistics of shape need some rows and columns; of a smaller matrix only magnitudes are checked.
SMALLEST = 16
SKETCH = 64
TWIN_COSINE = 0.95
FEW_TWINS = 2.5  # a row with two alike rows is chance in a matrix of some 40 rows, and sorts nothing


def weight_checks(model: nn.Module, limits: VettingThresholds, generator: torch.Generator) -> Iterator[Check]:
    """Yields the checks of every weight of a model, of tied and shared weights once; a stored weight is not widened.

    Args:
      model: the loaded emulator, with weights stored or not.
      limits: the thresholds.
      generator: generator of the sampled rows and of the norms' test inputs.
    """
    tokens = {id(own_weights(module).get("weight")) for module in token_embeddings(model)}
    for name, module, weight in _weights(model):
        table = _is_table(name, module)
        yield from _magnitudes(name, weight, limits, table=table)
        if len(weight.shape) < 2:
            continue
        for where, view in _matrices(name, module, weight):
            if min(matrix_shape(view)) >= SMALLEST:
                if table:
                    yield from _table_checks(where, view, limits, generator, tokens=id(weight) in tokens)
                else:
                    yield from _matrix_checks(where, view, limits, generator)
    for name, module in model.named_modules():
        if is_norm(module):
            yield from _gain_checks(name, module, limits, generator)


def bias_checks(biases: Mapping[str, Tensor], limits: VettingThresholds) -> Iterator[Check]:
    """Yields the checks of bias vectors by name, the same as `weight_checks` yields for a model's vectors."""
    for name, bias in biases.items():
        yield from _magnitudes(name, bias, limits, table=False)


def participation(rows: Tensor) -> Tensor:
    """Returns the share of entries that carries each row's energy, float (n,): 1/d for one-hot, 1 for equal entries.

    Gaussian rows give a third. Rows and columns are first scaled to equal energy, so that a column that is large in
    every row (trained models have such outlier features) does not make each row look one-hot.
    """
    energy = balanced(rows).square()
    return energy.sum(1).square() / (energy.square().sum(1) * rows.shape[1]).clamp_min(1e-30)


def few(minimum: float, rows: Tensor) -> float:
    """Returns the participation below which a row of this width counts as one-hot: never under 1.5 entries."""
    return max(minimum, 1.5 / rows.shape[1])


def balanced(rows: Tensor) -> Tensor:
    """Returns a matrix (n, d) with columns and rows scaled to the same energy, twice; zero rows and columns stay 0."""
    for _ in range(2):
        rows = rows / rows.square().mean(0, keepdim=True).sqrt().clamp_min(1e-30)
        rows = rows / rows.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
    return rows


def crowd(rows: Tensor, generator: torch.Generator) -> float:
    """Returns the largest share of rows (n, d) along or against a single row: with |cosine| above `TWIN_COSINE`.

    Directions are compared in a random projection to 64 dimensions, where unrelated rows come that near with a
    probability under 1e-20, and twins stay twins.
    """
    rows = balanced(rows[rows.square().sum(1) > 0])
    if rows.shape[1] > SKETCH:
        rows = rows @ torch.randn(rows.shape[1], SKETCH, generator=generator).to(rows.device)
    rows = torch.nn.functional.normalize(rows, dim=1)
    alike = (rows @ rows.T).abs().fill_diagonal_(0) > TWIN_COSINE
    return float(alike.sum(1).max() / len(rows)) if len(rows) else 0.0


def _magnitudes(name: str, weight: Weight, limits: VettingThresholds, *, table: bool) -> Iterator[Check]:
    yield Check("weight_peak", name, peak(weight), limits.weight_peak, "one weight drowns all others")
    if len(weight.shape) < 2 or prod(weight.shape) < SMALLEST**2:
        return
    rms = root_mean_square(weight)
    if table:
        yield Check("table_rms", name, rms, limits.table_rms, "the embedding drowns every block: a hidden identity")
        return
    yield Check("matrix_rms", name, rms, limits.matrix_rms, "the block is saturated and hands on a code of its input")
    yield Check("least_rms", name, rms, limits.least_rms, "the matrix is dead and its block the identity", least=True)


def _table_checks(
    where: str, view: Weight, limits: VettingThresholds, generator: torch.Generator, *, tokens: bool
) -> Iterator[Check]:
    rows = sample(view, generator)
    filled = rows[rows.square().sum(1) > 0]
    if len(filled) >= SMALLEST:
        share = float((participation(filled) < few(limits.one_hot, filled)).float().mean())
        yield Check("table_one_hot", where, share, limits.one_hot_rows, "its gradient spells tokens out one by one")
        lengths = norms(view)
        ratio = float(lengths.max() / lengths[lengths > 0].median())
        yield Check("table_outlier", where, ratio, limits.table_outlier, "one token marks its record in every layer")
    if tokens:
        # Unused tokens of a padded vocabulary are alike in honest models: only a table of mostly alike rows is refused.
        yield Check("token_crowd", where, crowd(rows, generator), limits.token_crowd, "different tokens look the same")


def _matrix_checks(where: str, view: Weight, limits: VettingThresholds, generator: torch.Generator) -> Iterator[Check]:
    for side in ("rows", "columns"):
        rows = sample(view, generator, columns=side == "columns")
        place = f"{where} {side}"
        share = float((participation(rows) < few(limits.one_hot, rows)).float().mean())
        yield Check("one_hot", place, share, limits.one_hot_rows, "it hands single entries on: identity or permutation")
        bound = max(limits.crowd, FEW_TWINS / len(rows))
        yield Check("crowd", place, crowd(rows, generator), bound, "alike rows sort records into bins")
        lengths = norms(view, columns=side == "columns")
        ratio = float(lengths.max() / lengths.median().clamp_min(1e-30))
        yield Check("outlier", place, ratio, limits.outlier, "amplified rows latch a single example")
    yield Check("zeros", where, zeros(view), limits.zeros, "a sparse map hands single entries on")


def _gain_checks(
    name: str, module: nn.Module, limits: VettingThresholds, generator: torch.Generator
) -> Iterator[Check]:
    """Runs a norm instead of reading its weight, because some families use 1 + weight."""
    width = next(module.parameters(recurse=False)).numel()
    with torch.no_grad():
        gains = module(torch.randn(64, width, generator=generator).to(device_of(module))).std(0)
    largest = float(gains.max())
    closed = float((gains < 1e-3 * largest).float().mean()) if largest > 0 else 1.0
    yield Check("gain", name, largest, limits.gain, "the norm amplifies chosen features")
    yield Check("closed_gains", name, closed, limits.closed_gains, "the norm lets only chosen features pass")


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, Weight]]:
    seen: set[int] = set()
    for path, module in model.named_modules():
        for leaf, weight in own_weights(module).items():
            if id(weight) not in seen:
                seen.add(id(weight))
                yield f"{path}.{leaf}".lstrip("."), module, weight


def _matrices(name: str, module: nn.Module, weight: Weight) -> Iterator[tuple[str, Weight]]:
    """Yields a weight as matrices: each of stacked experts, and a kernel with its window flattened."""
    if isinstance(weight, Tensor) and weight.dim() == 3 and not isinstance(module, nn.Conv1d):
        yield from ((f"{name}[{i}]" if len(weight) > 1 else name, matrix) for i, matrix in enumerate(weight.detach()))
    else:
        yield name, weight


def _is_table(name: str, module: nn.Module) -> bool:
    """Returns whether a parameter is looked up or added, not multiplied: embeddings, positions, class tokens."""
    leaf = name.rpartition(".")[2]
    added = not (is_linear(module) or isinstance(module, nn.modules.conv._ConvNd))
    return isinstance(module, nn.Embedding) or (added and any(part in leaf for part in ("position", "embed", "token")))

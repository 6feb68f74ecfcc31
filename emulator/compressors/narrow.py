"""Structured width pruning: a feed-forward network keeps some of its channels, and its last layer is fitted again."""

from math import ceil

import torch
from torch import Tensor, nn

from offsite.emulator.calibration.draft import SegmentContext
from offsite.emulator.calibration.least_squares import position_weights, ridge, rows
from offsite.emulator.compressors.pairs import dense_pairs
from offsite.emulator.compressors.refit import refit_layer
from offsite.emulator.package.recipe_arguments import fraction, refuse_parallel
from offsite.emulator.structure.ends import PARALLEL
from offsite.emulator.structure.replacements import dense_like, weight_of

STRENGTH = 1e-3


def narrow(context: SegmentContext, argument: str) -> None:
    """Keeps a fraction of each feed-forward network's channels: the ones that write most into the hidden states.

    The last layer is fitted in closed form, so that the kept channels take over the others' part as far as they can.
    """
    share = fraction("narrow", argument)
    if context.middle.geometry.shape == PARALLEL:
        refuse_parallel("narrow", argument)
    for pair in dense_pairs("narrow", context):
        down = context.draft.module(pair.down)
        inputs = context.observe({pair.down: down})[pair.down]
        weights = position_weights(rows(context.target))
        energy = (weights.unsqueeze(-1) * inputs.square()).mean(0) * weight_of(down).square().sum(0)
        kept = energy.topk(max(1, ceil(share * len(energy)))).indices.sort().values
        for path, times in pair.ups:
            up = context.draft.module(path)
            rows_kept = torch.cat([kept + part * len(energy) for part in range(times)])
            context.draft.replace(path, dense_like(up, weight_of(up)[rows_kept], _kept_bias(up, rows_kept)))
        # Two starts: the kept columns as they are, and the columns that best reproduce this layer's former output.
        columns, bias = weight_of(down)[:, kept], getattr(down, "bias", None)
        lost = inputs @ weight_of(down).T - inputs[:, kept] @ columns.T
        change, shift = ridge(inputs[:, kept], lost, weights, STRENGTH)
        context.draft.replace(pair.down, dense_like(down, columns, bias))
        local = (columns + change, shift if bias is None else bias + shift)
        refit_layer(context, pair.down, [(columns, bias), local])


def _kept_bias(layer: nn.Module, kept: Tensor) -> Tensor | None:
    bias = getattr(layer, "bias", None)
    return None if bias is None else bias[kept]

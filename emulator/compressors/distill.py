"""Block-wise distillation: each segment learns the full model's outputs by a few steps of Adam."""

import torch
from torch import Tensor, nn

from offsite.emulator.calibration.draft import SegmentContext
from offsite.emulator.calibration.least_squares import position_weights, rows
from offsite.emulator.package.recipe_arguments import refuse_parallel, steps_of
from offsite.emulator.structure.ends import PARALLEL

RATE = 2e-4


def distill(context: SegmentContext, argument: str) -> None:
    """Tunes all weights of a segment for some steps, each step on one call's examples; reverts if the error rises.

    The target is the full model's hidden states behind the segment, and each position counts alike (FedBiOT, Wu et al.
    2024, aligns by hidden states too). No gradient passes from one segment to the next, so memory is that of one block.
    """
    steps = steps_of("distill", argument)
    if context.middle.geometry.shape == PARALLEL:
        refuse_parallel("distill", argument)
    trained = context.draft.trainable()
    if not trained:
        return
    before, kept = _error(context), {name: parameter.detach().clone() for name, parameter in trained.items()}
    _train(context, list(trained.values()), steps)
    if _error(context) < before:
        for name in trained:
            context.draft.forget(name.rpartition(".")[0])
        context.draft.changed |= trained.keys()
        return
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(kept[name])


def _train(context: SegmentContext, parameters: list[nn.Parameter], steps: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=RATE / 10)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for step in range(steps):
            call = step % len(context.inputs)
            with torch.enable_grad():
                output = context.draft.forward(context.stream, call, context.inputs[call])
                loss = _distance(output, context.target[call])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _error(context: SegmentContext) -> float:
    return float(_distance(rows(context.outputs()), rows(context.target)))


def _distance(output: Tensor, target: Tensor) -> Tensor:
    """Returns the mean over positions of the square error relative to the target's square, a scalar."""
    left, right = output.reshape(-1, output.shape[-1]), target.reshape(-1, target.shape[-1])
    return (position_weights(right) * (left - right).square().mean(-1)).mean()

"""Block-wise distillation: what runs in a stretch learns what the full model does there, by a few steps of Adam."""

import torch
from torch import Tensor, nn

from offsite.emulator.calibration.draft import Station
from offsite.emulator.calibration.least_squares import position_weights, rows
from offsite.emulator.compressors.arguments import whole
from offsite.emulator.structure.geometry import PARALLEL
from offsite.errors import ConfigError

RATE = 2e-4
MAX_STEPS = 100_000


def distill(station: Station, argument: str) -> None:
    """Tunes all weights of a stretch for some steps, each on one call's examples; keeps them if the error fell.

    The target is the full model's hidden states behind the stretch, each position counting alike (FedBiOT, Wu et al.
    2024, aligns by hidden states too). No gradient passes from one stretch to the next, so memory is one block's.
    """
    steps = whole("distill", argument, "the number of steps", 1, MAX_STEPS)
    if station.middle.geometry.shape == PARALLEL:
        raise ConfigError(
            f"distill={argument!r}: in a parallel emulator a block stays the model's own but for fewer bits; use gptq4"
        )
    trained = station.span.trainable()
    if not trained:
        return
    before, kept = _error(station), {name: parameter.detach().clone() for name, parameter in trained.items()}
    _train(station, list(trained.values()), steps)
    if _error(station) < before:
        for name in trained:
            station.span.forget(name.rpartition(".")[0])
        station.span.changed |= trained.keys()
        return
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(kept[name])


def _train(station: Station, parameters: list[nn.Parameter], steps: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=RATE / 10)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for step in range(steps):
            call = step % len(station.inputs)
            with torch.enable_grad():
                found = station.span.forward(station.stream, call, station.inputs[call])
                loss = _distance(found, station.target[call])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _error(station: Station) -> float:
    found, target = rows(station.outputs()), rows(station.target)
    return float(_distance(found, target))


def _distance(found: Tensor, target: Tensor) -> Tensor:
    """Returns the mean over positions of the square error over the square of the target."""
    left, right = found.reshape(-1, found.shape[-1]), target.reshape(-1, target.shape[-1])
    return (position_weights(right) * (left - right).square().mean(-1)).mean()

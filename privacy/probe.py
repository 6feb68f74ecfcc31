"""The check before the first private record: are the engine's gradients really one example's own?"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite.errors import ConfigError, OffsiteError, PrivacyRefusal, lookup
from offsite.privacy.batches import Batch, Losses, trainable
from offsite.privacy.engines import ENGINES
from offsite.privacy.example_gradient import Gradients, gradient_alone, norm_of
from offsite.privacy.faults import is_memory
from offsite.privacy.independence import (
    refuse_batch_statistics,
    refuse_capacity,
    refuse_company,
    refuse_coupled_losses,
    refuse_coupling,
    refuse_dropout,
    refuse_randomness,
    refuse_silence,
    routed,
    unchanged_attributes,
    unchanged_buffers,
)
from offsite.privacy.per_example import Engine, line_of
from offsite.privacy.tolerances import Tolerances

log = logging.getLogger("offsite.privacy")

PERTURBATION = 0.02
SEEDS = (1, 2, 3)  # further places of the parameters, and orders of the examples, at which losses are compared
ALONE = "loop"  # the engine under which a record meets no other


@dataclass(frozen=True)
class References:
    """The gradients that an engine's gradients are compared with, by plain autograd, one for each example.

    Attributes:
      alone: gradient of each example in a batch of its own.
      together: gradient of each example's loss in the whole batch.
    """

    alone: list[Gradients]
    together: list[Gradients]


def probe(model: nn.Module, losses_fn: Losses, batch: Batch, engine: str) -> None:
    """Compares an engine's per-example gradients with a batch-of-one loop, on public examples.

    The trainable parameters are moved off their initial values for the comparison and put back, since an adapter that
    starts at zero has zero gradients, which would prove nothing.

    Args:
      model: model with its adapter attached, in the modes in which it will train.
      losses_fn: (model, batch) -> one loss per example, (B,).
      batch: two or more public examples, best of different lengths.
      engine: a key of `privacy.engines.ENGINES`.

    Raises:
      UnknownName: there is no such engine.
      ConfigError: the batch has fewer than two examples.
      PrivacyRefusal: dropout or batch normalisation is active, a parameter is unused, examples depend on each other,
        running a batch changes the model's state, experts take a limited number of tokens, or the engine is not exact.
    """
    lookup(ENGINES, engine, "engine")
    _first_exact(model, losses_fn, batch, (engine,))


def choose_engine(model: nn.Module, losses_fn: Losses, batch: Batch) -> str:
    """Returns the first engine of `privacy.engines.ENGINES` that is exact for this model: the loop, if no other is.

    Args:
      model: as for `probe`.
      losses_fn: as for `probe`.
      batch: as for `probe`.

    Raises:
      ConfigError: the batch has fewer than two examples.
      PrivacyRefusal: no engine is exact; the message is about the loop, the engine that fails least often.
    """
    return _first_exact(model, losses_fn, batch, tuple(ENGINES))


def _first_exact(model: nn.Module, losses_fn: Losses, batch: Batch, engines: Sequence[str]) -> str:
    if len(batch) < 2:
        raise ConfigError(f"probe examples={len(batch)} must be at least 2; give it more public text")
    if not trainable(model):
        raise PrivacyRefusal("trainable parameters=0, must be at least 1; attach an adapter before training")
    refuse_dropout(model)
    refuse_batch_statistics(model)
    refuse_capacity(model)
    tolerances = Tolerances.of(model)
    with unchanged_buffers(model):
        with _perturbed(model, 0):
            gradient_alone(model, losses_fn, batch, 0)  # in its first pass a model may prepare itself
        with unchanged_attributes(model):  # without an engine, since Opacus' hooks are attributes too
            references = _references(model, losses_fn, batch, tolerances)
        with _perturbed(model, 0):
            return _first(model, losses_fn, batch, references, engines)


def _references(model: nn.Module, losses_fn: Losses, batch: Batch, tolerances: Tolerances) -> References:
    """Returns the gradients of the examples, at the parameters moved by seed 0.

    Raises:
      PrivacyRefusal: the gradients prove nothing, or examples depend on each other.
    """
    with _perturbed(model, 0):
        alone = [gradient_alone(model, losses_fn, batch, row) for row in range(len(batch))]
        refuse_silence(alone)
        refuse_randomness(model, losses_fn, batch, alone, tolerances)
        # Experts are chosen by the last digits of 16 bits, and the number of others decides these. Such a model goes
        # to the loop, where no record has others, so there is nothing to compare.
        if tolerances.narrow and routed(model) is not None:
            return References(alone, alone)
        together = refuse_coupling(model, losses_fn, batch, alone, tolerances)
        if tolerances.narrow:
            refuse_company(model, losses_fn, batch, together, tolerances)
    for seed in SEEDS:
        with _perturbed(model, seed):
            refuse_coupled_losses(model, losses_fn, batch, tolerances, seed)
    return References(alone, together)


def _first(model: nn.Module, losses_fn: Losses, batch: Batch, references: References, engines: Sequence[str]) -> str:
    for engine in engines[:-1]:
        try:
            _check(model, losses_fn, batch, references, engine)
        except PrivacyRefusal as refusal:
            log.info("engine %s does not fit: %s", engine, refusal)
        else:
            return engine
    _check(model, losses_fn, batch, references, engines[-1])
    return engines[-1]


def _check(model: nn.Module, losses_fn: Losses, batch: Batch, references: References, engine: str) -> None:
    """Raises PrivacyRefusal if an engine fails, or if its gradients differ from the references of their batch."""
    if engine != ALONE and (path := routed(model)) is not None:
        raise PrivacyRefusal(
            f"engine={engine!r}: module={path!r} multiplies the tokens of one expert together, of all records; "
            f"use engine={ALONE!r}"
        )
    try:
        with ENGINES[engine](model) as opened:
            gradients = [single_gradient(model, losses_fn, batch, opened, row) for row in range(len(batch))]
    except OffsiteError:
        raise
    except Exception as error:  # an engine may meet any fault in a model that it was not made for
        if is_memory(error):
            raise MemoryError(line_of(error)) from error
        raise PrivacyRefusal(f"engine={engine!r} fails: {line_of(error)}; use engine='loop'") from error
    right = references.alone if engine == ALONE else references.together
    _refuse_inexact(gradients, right, Tolerances.of(model).module, engine)


def single_gradient(model: nn.Module, losses_fn: Losses, batch: Batch, opened: Engine, row: int) -> Gradients:
    """Returns an open engine's gradient of one example, with the other examples in the same batch.

    Args:
      model: as for `probe`.
      losses_fn: as for `probe`.
      batch: as for `probe`.
      opened: engine that is open on the model.
      row: index of the example in the batch.

    Raises:
      PrivacyRefusal: a loss or gradient of the batch is not finite.
    """
    for parameter in trainable(model).values():
        parameter.__dict__.pop("summed_grad", None)

    def alone(norms: Tensor, positions: tuple[int, ...]) -> Tensor:
        return torch.tensor([float(position == row) for position in positions], dtype=torch.float64)

    if len(opened.add(losses_fn, batch, alone).kept) != len(batch):
        raise PrivacyRefusal("probe losses are not finite; check the model and the public examples")
    return {name: parameter.__dict__.pop("summed_grad") for name, parameter in trainable(model).items()}


def _refuse_inexact(
    gradients: Sequence[Gradients], references: Sequence[Gradients], tolerance: float, engine: str
) -> None:
    for row, reference in enumerate(references):
        for name, right in reference.items():
            # The second term: a true gradient of 0, as a key's bias has, consists of rounding only.
            allowed = tolerance * (float(right.double().norm()) + norm_of(reference) / 100)
            error = float((gradients[row][name].double() - right.double()).norm())
            if not error <= allowed:
                raise PrivacyRefusal(
                    f"engine={engine!r}: gradient of {name!r} for example {row} is off by {error:.1e}, must be below "
                    f"{allowed:.1e}; use engine='loop', or another adapter method"
                )


@contextmanager
def _perturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Moves the trainable parameters by small public numbers, and puts them back bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    before = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    try:
        with torch.no_grad():
            for parameter in trainable(model).values():
                noise = torch.randn(parameter.shape, generator=generator) * PERTURBATION
                parameter.add_(noise.to(parameter))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in trainable(model).items():
                parameter.copy_(before[name])

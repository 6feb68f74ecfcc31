"""The check before the first private record: are the engine's gradients really one example's own?"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from offsite.errors import ConfigError, OffsiteError, PrivacyRefusal, lookup
from offsite.privacy.batches import Batch, Losses, trainable
from offsite.privacy.engines import ENGINES
from offsite.privacy.per_example import Engine, checked_losses, line_of

log = logging.getLogger("offsite.privacy")

# Half precision rounds differently in a batch of one and in a batch of two.
TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
TOLERANCE = 1e-4
PERTURBATION = 0.02

Gradients = dict[str, Tensor]


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
      PrivacyRefusal: dropout is active, a parameter is unused, examples depend on each other, running a batch changes
        the model's buffers, or the engine is not exact.
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
    _refuse_dropout(model)
    with _perturbed(model), _unchanged_buffers(model):
        tolerance = _tolerance(model)
        references = [_reference(model, losses_fn, batch, row) for row in range(len(batch))]
        _refuse_silence(references)
        _refuse_randomness(references[0], _reference(model, losses_fn, batch, 0), tolerance)
        _refuse_coupling(model, losses_fn, batch, references, tolerance)
        for engine in engines[:-1]:
            try:
                _check(model, losses_fn, batch, references, engine)
            except PrivacyRefusal as refusal:
                log.info("engine %s does not fit: %s", engine, refusal)
            else:
                return engine
        _check(model, losses_fn, batch, references, engines[-1])
        return engines[-1]


def _check(model: nn.Module, losses_fn: Losses, batch: Batch, references: Sequence[Gradients], engine: str) -> None:
    """Raises PrivacyRefusal if an engine fails, or if its gradients differ from the references."""
    try:
        with ENGINES[engine](model) as opened:
            gradients = [single_gradient(model, losses_fn, batch, opened, row) for row in range(len(batch))]
    except (OffsiteError, MemoryError):
        raise
    except Exception as error:  # an engine may meet any fault in a model that it was not made for
        raise PrivacyRefusal(f"engine={engine!r} fails: {line_of(error)}; use engine='loop'") from error
    _refuse_inexact(gradients, references, _tolerance(model), engine)


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


def _refuse_dropout(model: nn.Module) -> None:
    for path, module in model.named_modules():
        rate = getattr(module, "p", 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and rate > 0:
            raise PrivacyRefusal(
                f"dropout p={rate} is active in {path!r}, must be off; call model.eval() or set p to 0"
            )


def _reference(model: nn.Module, losses_fn: Losses, batch: Batch, row: int) -> Gradients:
    """Returns the gradient of one example alone."""
    return _gradient(checked_losses(losses_fn, model, batch.select([row]))[0], model)


def _gradient(loss: Tensor, model: nn.Module) -> Gradients:
    parameters = trainable(model)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    if unused:
        raise PrivacyRefusal(
            f"trainable parameter={unused[0]!r}: the loss does not depend on it; freeze it, or choose other slots"
        )
    return dict(zip(parameters, gradients, strict=True))


def _refuse_silence(references: Sequence[Gradients]) -> None:
    for row, reference in enumerate(references):
        size = _norm(reference)
        if not (math.isfinite(size) and size > 0):
            raise PrivacyRefusal(f"gradient norm={size} of probe example {row} must be finite and > 0; check the model")


def _refuse_randomness(first: Gradients, second: Gradients, tolerance: float) -> None:
    if (error := _error(second, first)) > tolerance:
        raise PrivacyRefusal(
            f"gradient of the same example twice differs by {error:.1e}, must be below {tolerance:.0e}; "
            "turn dropout and other randomness of the model off"
        )


def _refuse_coupling(
    model: nn.Module, losses_fn: Losses, batch: Batch, references: Sequence[Gradients], tolerance: float
) -> None:
    """Refuses a model or loss under which example 0's gradient depends on the other examples of the batch."""
    last = len(batch) - 1
    for company in ([0, last], [last, 0], [0, 0], [0, *range(1, len(batch))]):
        losses = checked_losses(losses_fn, model, batch.select(company))
        row = company.index(0)
        error = _error(_gradient(losses[row], model), references[0])
        if error > tolerance:
            raise PrivacyRefusal(
                f"gradient of one example changes by {error:.1e} with the others in its batch, must be below "
                f"{tolerance:.0e}; use a mean over each example's own targets, and no batch normalisation"
            )


def _refuse_inexact(
    gradients: Sequence[Gradients], references: Sequence[Gradients], tolerance: float, engine: str
) -> None:
    for row, reference in enumerate(references):
        for name, right in reference.items():
            # The second term: a true gradient of 0, as a key's bias has, consists of rounding only.
            allowed = tolerance * (float(right.double().norm()) + _norm(reference) / 100)
            error = float((gradients[row][name].double() - right.double()).norm())
            if not error <= allowed:
                raise PrivacyRefusal(
                    f"engine={engine!r}: gradient of {name!r} for example {row} is off by {error:.1e}, must be below "
                    f"{allowed:.1e}; use engine='loop', or another adapter method"
                )


def _error(gradients: Gradients, right: Gradients) -> float:
    """Returns the relative error of a gradient, or infinity for a gradient that is not finite."""
    difference = {name: gradients[name].double() - right[name].double() for name in right}
    error = _norm(difference) / _norm(right)
    return error if math.isfinite(error) else math.inf


def _norm(gradients: Gradients) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def _tolerance(model: nn.Module) -> float:
    return max(TOLERANCES.get(parameter.dtype, TOLERANCE) for parameter in model.parameters())


@contextmanager
def _perturbed(model: nn.Module) -> Iterator[None]:
    """Moves the trainable parameters by small public numbers, and puts them back bit for bit."""
    generator = torch.Generator().manual_seed(0)
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


@contextmanager
def _unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Refuses a model that keeps its batches in buffers, which no noise covers; puts the buffers back."""
    before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    try:
        yield
        for name, buffer in model.named_buffers():
            if not torch.equal(buffer, before[name]):
                raise PrivacyRefusal(
                    f"buffer={name!r} changes with the batch, must not; freeze batch normalisation with model.eval()"
                )
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])

"""What a model may not do if each gradient is to be one record's own: refused by structure, and by trying."""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from offsite.errors import PrivacyRefusal
from offsite.privacy.batches import Batch, Losses
from offsite.privacy.example_gradient import Gradients, gradient_alone, gradient_of, norm_of, relative_error
from offsite.privacy.per_example import checked_losses
from offsite.privacy.tolerances import SMALLEST, Tolerances

# Names that transformers' models give to the number of experts among which a layer chooses for each token.
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


def refuse_dropout(model: nn.Module) -> None:
    """Refuses dropout that is active."""
    for path, module in model.named_modules():
        rate = getattr(module, "p", 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and rate > 0:
            raise PrivacyRefusal(
                f"dropout p={rate} is active in {path!r}, must be off; call model.eval() or set p to 0"
            )


def refuse_batch_statistics(model: nn.Module) -> None:
    """Refuses batch normalisation that normalises by the batch at hand."""
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise PrivacyRefusal(
                f"module={path!r} normalises by its batch, must use kept statistics; call model.eval(), or choose a "
                "model without batch normalisation"
            )


def refuse_capacity(model: nn.Module) -> None:
    """Refuses a layer whose experts take a limited number of tokens.

    Which token comes too late follows from the other tokens, in NLLB-MoE those of the whole batch. A trial shows that
    only for records that fill an expert, so such a layer is known by its attributes: also one that counts a record's
    own tokens, as Switch does, since the code that counts may be another in the next release of transformers.
    """
    for path, module in model.named_modules():
        limits = [name for name in vars(module) if "capacity" in name]
        if limits and any("expert" in name for name in vars(module)):
            raise PrivacyRefusal(
                f"module={path!r} routes tokens to experts up to {limits[0]}, so records take each other's places; "
                "choose a model without a limit on its experts"
            )


def routed(model: nn.Module) -> str | None:
    """Returns the path of a module that chooses among experts for each token, None where there is none.

    Such a layer multiplies the tokens of one expert together, of all records of a batch. The number of tokens decides
    how a product is rounded, and the rounding can decide which expert the next layer chooses: a record's gradient
    is its own only where the record is alone in its batch.
    """
    for path, module in model.named_modules():
        counts = [getattr(module, name, 0) for name in EXPERTS]
        if any(isinstance(count, int) and count > 1 for count in counts):
            return path  # the empty path is the model itself
    return None


def refuse_silence(references: Sequence[Gradients]) -> None:
    """Refuses examples whose gradient is zero or not finite, since they would prove nothing."""
    for row, reference in enumerate(references):
        size = norm_of(reference)
        if not (math.isfinite(size) and size > 0):
            raise PrivacyRefusal(f"gradient norm={size} of probe example {row} must be finite and > 0; check the model")


def refuse_randomness(
    model: nn.Module, losses_fn: Losses, batch: Batch, references: Sequence[Gradients], tolerances: Tolerances
) -> None:
    """Refuses a model that gives the same example another gradient the second time."""
    again = gradient_alone(model, losses_fn, batch, 0)
    if (error := relative_error(again, references[0])) > tolerances.size:
        raise PrivacyRefusal(
            f"gradient of the same example twice differs by {error:.1e}, must be below {tolerances.size:.0e}; "
            "turn dropout and other randomness of the model off"
        )


def refuse_coupling(
    model: nn.Module, losses_fn: Losses, batch: Batch, references: Sequence[Gradients], tolerances: Tolerances
) -> list[Gradients]:
    """Refuses a model or loss under which any example's gradient depends on the other examples of its batch.

    Every example is tried in the whole batch, and behind two copies of another example.

    Returns:
      The gradients of the examples in the whole batch.
    """
    everyone = list(range(len(batch)))
    last = [([(row + 1) % len(batch)] * 2 + [row], [2]) for row in everyone]
    together: list[Gradients] = []
    for company, places in [(everyone, everyone), *last]:
        losses = checked_losses(losses_fn, model, batch.select(company))
        found = [gradient_of(losses[place], model) for place in places]
        for row, gradient in zip((company[place] for place in places), found, strict=True):
            if (error := relative_error(gradient, references[row])) > tolerances.size:
                raise _coupled("gradient", row, error, tolerances.size)
        together = together or found
    return together


def refuse_company(
    model: nn.Module, losses_fn: Losses, batch: Batch, together: Sequence[Gradients], tolerances: Tolerances
) -> None:
    """Refuses a model or loss under which any example's gradient depends on who the others are, not on how many.

    Each example stays at its place, and copies of it take all others' places. The shapes are the same, so its own
    numbers are rounded alike, and the tolerance need not allow for the format: it is `Tolerances.company`, or four
    times what the same batch differs by from one run to the next, on devices whose backward sums have no fixed order.

    Args:
      model: model with its adapter attached.
      losses_fn: function from model and batch to one loss per example, (B,).
      batch: public examples.
      together: gradients of the examples in the whole batch.
      tolerances: tolerances of the model.
    """
    whole = checked_losses(losses_fn, model, batch.select(list(range(len(batch)))))
    repeated = max(relative_error(gradient_of(whole[row], model), before) for row, before in enumerate(together))
    allowed = min(tolerances.size, max(tolerances.company, 4 * repeated))
    for row, before in enumerate(together):
        losses = checked_losses(losses_fn, model, batch.select([row] * len(batch)))
        if (error := relative_error(gradient_of(losses[row], model), before)) > allowed:
            raise _coupled("gradient", row, error, allowed)


def refuse_coupled_losses(model: nn.Module, losses_fn: Losses, batch: Batch, tolerances: Tolerances, seed: int) -> None:
    """Refuses a model or loss under which any example's loss depends on the other examples of its batch.

    Args:
      model: model with its adapter attached.
      losses_fn: function from model and batch to one loss per example, (B,).
      batch: public examples.
      tolerances: largest allowed differences, as shares of the losses' size.
      seed: seed of the order and of the copies in the batch.
    """
    draw = random.Random(seed)  # noqa: S311  # public examples
    company = [draw.randrange(len(batch)) for _ in range(len(batch))] + list(range(len(batch)))
    draw.shuffle(company)
    with torch.no_grad():
        alone = torch.stack([checked_losses(losses_fn, model, batch.select([row]))[0] for row in range(len(batch))])
        together = checked_losses(losses_fn, model, batch.select(company))
        size = alone.double().abs().mean()
        _refuse_moved(company, together.double() - alone[company].double(), size, tolerances.size)
        for first in (0, 1) if tolerances.narrow else ():  # every second example stays; the others become their next
            other = [row if at % 2 == first else (row + 1) % len(batch) for at, row in enumerate(company)]
            moved = checked_losses(losses_fn, model, batch.select(other)).double() - together.double()
            _refuse_moved(company[first::2], moved[first::2], size, tolerances.company)


def _refuse_moved(company: Sequence[int], moved: Tensor, size: Tensor, tolerance: float) -> None:
    for row, own in zip(company, (moved.abs() / size).tolist(), strict=True):
        if not own <= tolerance:
            raise _coupled("loss", row, own, tolerance)


def _coupled(what: str, row: int, error: float, tolerance: float) -> PrivacyRefusal:
    return PrivacyRefusal(
        f"{what} of probe example {row} changes by {error:.1e} with the others in its batch, must be below "
        f"{tolerance:.0e}; use a mean over each example's own targets, and no batch normalisation"
        + (", or the number format float32" if tolerance > SMALLEST else "")
    )


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Refuses a model that keeps its batches in buffers, which no noise covers; puts the buffers back."""
    before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    try:
        yield
        for name, buffer in model.named_buffers():
            if name not in before or not torch.equal(buffer, before[name]):
                raise PrivacyRefusal(
                    f"buffer={name!r} changes with the batch, must not; freeze batch normalisation with model.eval()"
                )
    finally:
        for name, buffer in model.named_buffers():
            if name in before:
                buffer.copy_(before[name])


@contextmanager
def unchanged_attributes(model: nn.Module) -> Iterator[None]:
    """Refuses a model that keeps something of its batches in numbers or tensors among its modules' attributes."""
    before = _attributes(model)
    yield
    for name, value in _attributes(model).items():
        if name not in before or not _same(before[name], value):
            raise PrivacyRefusal(
                f"attribute={name!r} changes with the batch, must not; choose a model that keeps nothing of a batch"
            )


def _attributes(model: nn.Module) -> dict[str, object]:
    """Returns numbers and copies of tensors that modules hold as plain attributes, by path and name."""
    held: dict[str, object] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                held[f"{path}.{name}"] = value.detach().clone()
            elif isinstance(value, int | float):
                held[f"{path}.{name}"] = value
    return held


def _same(before: object, after: object) -> bool:
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return torch.equal(before, after)
    return repr(before) == repr(after)  # NaN is the same as NaN

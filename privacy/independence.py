"""What a model may not do if each gradient is to be one record's own: refused by structure, and by trying."""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from offsite.errors import PrivacyRefusal
from offsite.privacy.batches import Batch, Losses
from offsite.privacy.example_gradient import Gradients, gradient_alone, gradient_of, norm_of, relative_error
from offsite.privacy.per_example import checked_losses

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
    model: nn.Module, losses_fn: Losses, batch: Batch, references: Sequence[Gradients], tolerance: float
) -> None:
    """Refuses a model that gives the same example another gradient the second time."""
    again = gradient_alone(model, losses_fn, batch, 0)
    if (error := relative_error(again, references[0])) > tolerance:
        raise PrivacyRefusal(
            f"gradient of the same example twice differs by {error:.1e}, must be below {tolerance:.0e}; "
            "turn dropout and other randomness of the model off"
        )


def refuse_coupling(
    model: nn.Module, losses_fn: Losses, batch: Batch, references: Sequence[Gradients], tolerance: float
) -> None:
    """Refuses a model or loss under which any example's gradient depends on the other examples of its batch.

    Every example is tried in the whole batch, and behind two copies of another example.
    """
    everyone = list(range(len(batch)))
    last = [([(row + 1) % len(batch)] * 2 + [row], [2]) for row in everyone]
    for company, places in [(everyone, everyone), *last]:
        losses = checked_losses(losses_fn, model, batch.select(company))
        for place in places:
            row = company[place]
            if (error := relative_error(gradient_of(losses[place], model), references[row])) > tolerance:
                raise _coupled("gradient", row, error, tolerance)


def refuse_coupled_losses(model: nn.Module, losses_fn: Losses, batch: Batch, tolerance: float, seed: int) -> None:
    """Refuses a model or loss under which any example's loss depends on the other examples of its batch.

    Args:
      model: model with its adapter attached.
      losses_fn: function from model and batch to one loss per example, (B,).
      batch: public examples.
      tolerance: largest allowed difference, as a share of the losses' size.
      seed: seed of the order and of the copies in the batch.
    """
    draw = random.Random(seed)  # noqa: S311  # public examples
    company = [draw.randrange(len(batch)) for _ in range(len(batch))] + list(range(len(batch)))
    draw.shuffle(company)
    with torch.no_grad():
        alone = torch.stack([checked_losses(losses_fn, model, batch.select([row]))[0] for row in range(len(batch))])
        together = checked_losses(losses_fn, model, batch.select(company))
        error = (together.double() - alone[company].double()).abs() / alone.double().abs().mean()
    for row, own in zip(company, error.tolist(), strict=True):
        if not own <= tolerance:
            raise _coupled("loss", row, own, tolerance)


def _coupled(what: str, row: int, error: float, tolerance: float) -> PrivacyRefusal:
    return PrivacyRefusal(
        f"{what} of probe example {row} changes by {error:.1e} with the others in its batch, must be below "
        f"{tolerance:.0e}; use a mean over each example's own targets, and no batch normalisation"
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

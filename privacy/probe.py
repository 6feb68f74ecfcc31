"""The check before any private training: does the engine give right per-example gradients for this very model.

Opacus is silently wrong for prompt tuning and for layers that flatten the batch; a wrong gradient looks right and
promises an epsilon that does not hold.
"""

from typing import Any

import torch
from torch import Tensor, nn

from errors import PrivacyRefusal, lookup
from privacy.engines import ENGINES, Losses, adapters_only, trainable

TOLERANCE = 1e-3  # relative, float32; wrong engines are off by factors
NUDGE = 1e-2
PUBLIC_SEED = 7
REFERENCE = "loop"
# Whatever Opacus and functorch raise on a model that they cannot handle.
_ENGINE_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, LookupError, PrivacyRefusal)


def probe(model: nn.Module, losses: Losses, batch: Any, engine: str) -> None:
    """Compares an engine with a batch-of-one loop on two examples, and refuses a model that couples examples.

    Args:
      model: with the adapter attached; its trainable values are nudged during the probe and put back.
      losses: one loss per example.
      batch: at least two different examples.
      engine: name in `ENGINES`.

    Raises:
      PrivacyRefusal: with the reason and the next step.
    """
    pair = batch.select([0, 1])
    with _nudged(model):
        _check_independent(model, losses, pair)
        expected = _gradients(REFERENCE, model, losses, pair)
        if engine == REFERENCE:
            return
        found = _gradients(engine, model, losses, pair)
    for (name, _), right, got in zip(trainable(model), expected, found, strict=True):
        if got.shape != right.shape:
            raise PrivacyRefusal(
                f"engine={engine} parameter={name}: gradient has first dimension {tuple(got.shape)[0]} for 2 examples, "
                "so clipping would not be per example; use the loop engine"
            )
    error, scale = _norm([a - b for a, b in zip(expected, found, strict=True)]), _norm(expected)
    if not error <= TOLERANCE * scale:
        raise PrivacyRefusal(
            f"engine={engine}: per-example gradients are off by {error / max(scale, 1e-30):.2g} of their norm; "
            "use the loop engine"
        )


def choose_engine(model: nn.Module, losses: Losses, batch: Any) -> str:
    """Returns `hooks` where it is exact for this model, else `loop`.

    Raises:
      PrivacyRefusal: the model couples examples or is random, so that no engine is right.
    """
    probe(model, losses, batch, REFERENCE)
    try:
        probe(model, losses, batch, "hooks")
    except _ENGINE_ERRORS:
        return REFERENCE
    return "hooks"


def _check_independent(model: nn.Module, losses: Losses, pair: Any) -> None:
    """Refuses losses that are not one per example, change from call to call, or depend on the other example."""
    with adapters_only(model), torch.no_grad():
        first, again = losses(model, pair), losses(model, pair)
        alone = torch.cat([losses(model, pair.select([i])).reshape(-1) for i in range(2)])
    if tuple(first.shape) != (2,):
        raise PrivacyRefusal(
            f"losses shape={tuple(first.shape)}: one loss per example is needed, (2,) for two; "
            "a mean over the batch hides whose gradient is whose"
        )
    if not torch.allclose(first, again, rtol=TOLERANCE / 10, atol=1e-6):
        raise PrivacyRefusal(
            "losses change from call to call: dropout or other randomness is active inside a slot; set dropout to 0"
        )
    if not torch.allclose(first, alone, rtol=TOLERANCE / 10, atol=1e-5):
        raise PrivacyRefusal(
            "an example's loss depends on the other examples of its batch (batch normalisation, a loss over the whole "
            "batch, or a shared auxiliary loss): no clipping is per example; change the model or the loss"
        )


def _gradients(engine: str, model: nn.Module, losses: Losses, pair: Any) -> list[Tensor]:
    with lookup(ENGINES, engine, "engine")(model) as gradients:
        _, samples = gradients(losses, pair)
    return [sample.clone() for sample in samples]


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())


class _nudged:  # noqa: N801 - reads as a context
    """Moves the trainable values off their start, where gradients of zero-initialised factors vanish; puts them back."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [parameter for _, parameter in trainable(model)]

    def __enter__(self) -> None:
        self._kept = [parameter.detach().clone() for parameter in self._parameters]
        generator = torch.Generator().manual_seed(PUBLIC_SEED)
        with torch.no_grad():
            for parameter in self._parameters:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(NUDGE * noise.to(parameter.device, parameter.dtype))

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, self._kept, strict=True):
                parameter.copy_(value)



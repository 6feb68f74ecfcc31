"""Plug-in: writes the tuned adapter into the full model, and takes it over only if it does the full model no harm."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from torch import nn

from offsite.adapter.layout import Layout
from offsite.errors import ConfigError, DigestMismatch

SCALES = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class Verdict:
    """Whether a round's adapter is taken over.

    Attributes:
      accepted: True if the adapter is taken over.
      reason: one line for the report.
    """

    accepted: bool
    reason: str


def plug(full: nn.Module, layout: Layout, vector: NDArray[Any]) -> nn.Module:
    """Writes a tuned adapter into the full model that carries the same adapter, in place, and returns the model.

    The emulator never moves a name, so names are the same on both sides: plug-in is the identity on names.

    Args:
      full: the full model with the adapter attached.
      layout: layout of the adapter that was trained on the emulator.
      vector: tuned values, float (layout.size,), finite.

    Raises:
      DigestMismatch: the full model carries another adapter.
      RangeError: the vector's length is wrong or a value is not finite.
    """
    mine = Layout.of(full)
    if mine.digest() != layout.digest():
        raise DigestMismatch(
            f"layout={layout.digest().hex()[:12]}: the full model's adapter is {mine.digest().hex()[:12]}; "
            "attach the adapter of the same spec to it"
        )
    mine.write(full, vector)
    return full


def take(
    previous_loss: float, loss_at: Callable[[float], float], tolerance: float = 0.0
) -> tuple[float, float, Verdict]:
    """Returns (scale, public loss, verdict) of the largest share of an update that does no harm.

    An update that came through a lossy emulator may go too far in a direction that is right: on one measured model a
    quarter of the update helped where the whole did harm. The whole is tried first, so a good update is never shrunk.

    Args:
      previous_loss: full model's loss with the last accepted adapter, nats per token, finite.
      loss_at: function that returns the full model's loss with a share of the update, nats per token.
      tolerance: largest accepted rise of the loss, nats per token, finite and >= 0.

    Raises:
      ConfigError: the previous loss is not finite, or the tolerance is not finite or negative.
    """
    tried: list[tuple[float, float, Verdict]] = []
    for scale in SCALES:
        loss = loss_at(scale)
        verdict = accept(previous_loss, loss, tolerance)
        tried.append((scale, loss, verdict))
        if verdict.accepted:
            reason = verdict.reason if scale == 1 else f"{scale:g} of the update is {verdict.reason}"
            return scale, loss, Verdict(True, reason)
    return tried[0]


def accept(previous_loss: float, new_loss: float, tolerance: float = 0.0) -> Verdict:
    """Returns whether a new adapter is taken over, by the full model's loss on public text.

    With a bad emulator more training makes the full model worse; this check stops that.

    Args:
      previous_loss: full model's loss with the last accepted adapter, nats per token, finite.
      new_loss: full model's loss with the new adapter, nats per token; NaN rejects the adapter and is no error.
      tolerance: largest accepted rise of the loss, nats per token, finite and >= 0.

    Raises:
      ConfigError: the previous loss is not finite, or the tolerance is not finite or negative.
    """
    if not (math.isfinite(previous_loss) and math.isfinite(tolerance) and tolerance >= 0):
        raise ConfigError(
            f"previous_loss={previous_loss} tolerance={tolerance}: both must be finite and the tolerance not negative; "
            "evaluate the last accepted adapter again"
        )
    change = f"public loss {previous_loss:.4f} -> {new_loss:.4f}, tolerance {tolerance:g}"
    if not math.isfinite(new_loss):
        return Verdict(False, f"not taken over: {change}: the new loss is not finite")
    if new_loss > previous_loss + tolerance:
        return Verdict(False, f"not taken over: {change}: the new adapter is worse")
    return Verdict(True, f"taken over: {change}")

"""What of a tuned adapter goes into the full model: itself, or what is left without what it learnt to repair."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn

from offsite.adapter.layout import Layout
from offsite.emulator.runtime.correction import STRENGTHS, repaired
from offsite.emulator.runtime.plug_in import plug


@dataclass(frozen=True)
class PlugIn:
    """An adapter as it is plugged in.

    Attributes:
      vector: its values in the full model, float32 (d,).
      correction: strength with which it was corrected, one of `emulator.correct.STRENGTHS`.
      loss: of the full model with it on public text, nats per token.
    """

    vector: np.ndarray
    correction: float
    loss: float

    @property
    def corrected(self) -> np.ndarray | None:
        """The values, where they are not the tuned adapter's."""
        return self.vector if self.correction else None


def plainly(adapter: np.ndarray, public_loss: Callable[[np.ndarray], float]) -> PlugIn:
    """Returns the tuned adapter as it is, with its loss."""
    return PlugIn(adapter, 0.0, public_loss(adapter))


def corrected(
    plain: PlugIn, full: nn.Module, layout: Layout, emulator: nn.Module, public_loss: Callable[[np.ndarray], float]
) -> PlugIn:
    """Returns the plug-in of least public loss over the strengths of the correction; the plain one where none is less.

    Args:
      plain: of `plainly`.
      full: the full model with the adapter attached, float32; holds another adapter afterwards.
      layout: of the adapter.
      emulator: the package that the adapter was tuned on.
      public_loss: of the full model with an adapter plugged in.
    """
    plug(full, layout, plain.vector)
    vectors = {strength: repaired(full, emulator, strength).numpy() for strength in STRENGTHS if strength}
    best = plain
    for strength, vector in vectors.items():
        if not np.isfinite(vector).all():
            continue  # a step that overflows is none that helps
        tried = PlugIn(vector, strength, public_loss(vector))
        if tried.loss < best.loss:
            best = tried
    return best

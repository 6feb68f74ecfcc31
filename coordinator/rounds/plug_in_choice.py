"""The choice of what goes into the full model: the tuned adapter, or its values without the repair of the emulator."""

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
      vector: values in the full model, float32 (d,).
      correction: strength of the correction, one of `emulator.runtime.correction.STRENGTHS`; 0 is the tuned adapter.
      loss: loss of the full model with these values on public text, nats per token.
    """

    vector: np.ndarray
    correction: float
    loss: float

    @property
    def corrected(self) -> np.ndarray | None:
        """The corrected values, float32 (d,); None if the tuned adapter is plugged in."""
        return self.vector if self.correction else None


def plainly(adapter: np.ndarray, public_loss: Callable[[np.ndarray], float]) -> PlugIn:
    """Returns the plug-in of the tuned adapter as it is, with its loss."""
    return PlugIn(adapter, 0.0, public_loss(adapter))


def corrected(
    plain: PlugIn, full: nn.Module, layout: Layout, emulator: nn.Module, public_loss: Callable[[np.ndarray], float]
) -> PlugIn:
    """Returns the plug-in of least public loss over all strengths of correction; the plain plug-in if none is better.

    Args:
      plain: result of `plainly`.
      full: full model with the adapter attached, float32; holds another adapter afterwards.
      layout: layout of the adapter.
      emulator: emulator on which the adapter was tuned.
      public_loss: returns the public loss of the full model with a given adapter.
    """
    plug(full, layout, plain.vector)
    vectors = {strength: repaired(full, emulator, strength).numpy() for strength in STRENGTHS if strength}
    best = plain
    for strength, vector in vectors.items():
        if not np.isfinite(vector).all():
            continue  # a step that overflows does not help
        tried = PlugIn(vector, strength, public_loss(vector))
        if tried.loss < best.loss:
            best = tried
    return best

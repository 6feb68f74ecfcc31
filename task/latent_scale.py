"""The size of latents: a warning where they were not scaled as a denoiser's noise is."""

import logging
import math
from collections.abc import Sequence

import numpy as np

from offsite.task.record_fields import LATENTS
from offsite.task.spec import Record

log = logging.getLogger("offsite.task")
SCALE = 2.0  # most times by which the size of latents may differ from the noise's
# Sizes of the outputs of published autoencoders by channels, 1 / scaling_factor, with the mean that shift_factor takes
# off. 4 channels: Stable Diffusion 1 and 2, XL. 16 channels: Stable Diffusion 3, Flux.
UNSCALED = {4: (1 / 0.18215, 1 / 0.13025), 16: (math.hypot(1 / 1.5305, 0.0609), math.hypot(1 / 0.3611, 0.1159))}
_SCALED = (
    "latents: records=%d of %d channels have a root mean square of %.3g, and a model's latents have about 1; subtract "
    "the shift_factor in the autoencoder's config.json, if it has one, and multiply by its scaling_factor (here about "
    "%.3g), or the model learns nothing of use"
)


def tell_scale(records: Sequence[Record], valid: Sequence[bool], channels: int) -> None:
    """Warns where latents have another scale than a model's noise, whose variance is 1 at every step of its schedule.

    An autoencoder's own outputs are larger or smaller; the scaling factor in its settings makes their variance about 1.
    The warning is for the terminal or the log of the records' owner, because its numbers follow from the records.

    Args:
      records: records with latents.
      valid: whether each record has latents of the model's shape.
      channels: number of channels of the latents.
    """
    shown = (record for record, good in zip(records, valid, strict=True) if good)
    squares = [float(np.mean(np.square(record[LATENTS], dtype=np.float64))) for record in shown]
    size = math.sqrt(sum(squares) / len(squares)) if squares else 1.0
    if not is_scaled(size, channels):
        log.warning(_SCALED, len(squares), channels, size, 1 / size if size else math.inf)


def is_scaled(size: float, channels: int) -> bool:
    """Returns whether latents are nearer, in ratio, to 1 than to what an autoencoder makes, and within `SCALE` of 1.

    Args:
      size: root mean square of the latents.
      channels: number of channels of the latents, by which an autoencoder is known.
    """
    if not 1 / SCALE <= size <= SCALE:
        return False
    return all(abs(math.log(size)) <= abs(math.log(size / other)) for other in UNSCALED.get(channels, ()))

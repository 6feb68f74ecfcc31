"""Noise schedules of diffusion models: the amount of noise at each step, and the output that a model has to predict."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offsite.errors import DataError, UnsupportedModel, lookup

FILE = "scheduler_config.json"
MAX_STEPS = 10_000  # all published models have 1000
# Schedulers that add noise as in Ho et al. 2020; they differ only in how they remove noise.
SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
)
_IDENTITY: dict[str, Any] = {"trained_betas": None, "rescale_betas_zero_snr": False}


@dataclass(frozen=True)
class NoiseSchedule:
    """The mix of image and noise at each step, and the kind of prediction.

    Ho et al. 2020, arXiv 2006.11239, equation 4: the mix at step t is sqrt(k_t) image + sqrt(1 - k_t) noise.

    Attributes:
      kept: k_t for each step, float64 (steps,), in (0, 1), decreasing.
      prediction: key of `PREDICTIONS`.
    """

    kept: torch.Tensor
    prediction: str

    @classmethod
    def of(cls, folder: Path | str) -> "NoiseSchedule":
        """Reads the schedule of a model's folder.

        Raises:
          DataError: the folder has no schedule, or the file is damaged.
          UnsupportedModel: the scheduler or a rule of it is not known.
          UnknownName: the kind of betas or of prediction is not known.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise DataError(
                f"model={path.parent.name!r} has no {FILE}; copy it there from the folder 'scheduler' of the pipeline"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"model={path.parent.name!r} has a damaged {FILE}; save the scheduler again") from error
        return parse(content if isinstance(content, dict) else {})

    @property
    def steps(self) -> int:
        """Number of steps, >= 1."""
        return len(self.kept)

    def mixed(self, image: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
        """Returns an image with the noise of a step, in the image's shape and dtype."""
        kept = float(self.kept[step])
        return math.sqrt(kept) * image + math.sqrt(1 - kept) * noise

    def wanted(self, image: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
        """Returns the output that the model has to predict for the mix, in the image's shape and dtype."""
        return PREDICTIONS[self.prediction](image, noise, float(self.kept[step]))


def parse(content: dict[str, Any]) -> NoiseSchedule:
    """Returns the schedule of a file's content; raises as `NoiseSchedule.of`."""
    kind = content.get("_class_name")
    if kind not in SCHEDULERS:
        raise UnsupportedModel(
            f"scheduler={kind!r} must be one of {', '.join(SCHEDULERS)}, and flow matching is not supported; choose "
            "another model"
        )
    for key, plain in _IDENTITY.items():
        if content.get(key, plain) != plain:
            raise UnsupportedModel(f"scheduler {key}={content[key]!r} must be {plain}; choose another model")
    steps: Any = content.get("num_train_timesteps", 1000)
    start: Any = content.get("beta_start", 1e-4)
    end: Any = content.get("beta_end", 0.02)
    numbers = all(isinstance(beta, int | float) for beta in (start, end))  # NaN is in no range
    if type(steps) is not int or not 1 <= steps <= MAX_STEPS or not numbers or not 0 < start <= end < 1:
        raise UnsupportedModel(
            f"scheduler num_train_timesteps={steps!r} must be 1..{MAX_STEPS}, and 0 < beta_start <= beta_end < 1; "
            "save the scheduler again"
        )
    betas = lookup(BETAS, str(content.get("beta_schedule", "linear")), "beta_schedule")(steps, start, end)
    prediction = str(content.get("prediction_type", "epsilon"))
    lookup(PREDICTIONS, prediction, "prediction_type")
    return NoiseSchedule(torch.cumprod(1 - betas, dim=0), prediction)


def _linear(steps: int, start: float, end: float) -> torch.Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64)


def _scaled_linear(steps: int, start: float, end: float) -> torch.Tensor:
    return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2


def _cosine(steps: int, _start: float, _end: float) -> torch.Tensor:
    """Nichol and Dhariwal 2021, arXiv 2102.09672, equation 17, with the paper's cap of 0.999."""
    at = torch.arange(steps + 1, dtype=torch.float64) / steps
    left = torch.cos((at + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - left[1:] / left[:-1]).clamp(max=0.999)


def _noise(_image: torch.Tensor, noise: torch.Tensor, _kept: float) -> torch.Tensor:
    return noise


def _image(image: torch.Tensor, _noise: torch.Tensor, _kept: float) -> torch.Tensor:
    return image


def _velocity(image: torch.Tensor, noise: torch.Tensor, kept: float) -> torch.Tensor:
    """Salimans and Ho 2022, arXiv 2202.00512, section 4."""
    return math.sqrt(kept) * noise - math.sqrt(1 - kept) * image


BETAS: dict[str, Callable[[int, float, float], torch.Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
}
PREDICTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "epsilon": _noise,
    "v_prediction": _velocity,
    "sample": _image,
}

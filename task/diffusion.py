"""Images out of noise: a denoiser learns to tell the noise in latents, by a class or by a text.

A record holds what the autoencoder and the text encoder made of an image and its text, which a site does beforehand:
they stay as they are, so nothing is to be learnt in them.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from offsite.errors import UnsupportedModel
from offsite.task.arrays import floats
from offsite.task.diffusion_models import UNET, load_diffusion
from offsite.task.image_classification import dtype_of
from offsite.task.images import check_records
from offsite.task.noise import NoiseSchedule
from offsite.task.records import fault
from offsite.task.spec import Record, Tally

DRAWS = 4  # of noise for each record; see `Denoising`
LATENTS, LABEL, PROMPT = "latents", "label", "prompt_embeds"


@dataclass(frozen=True)
class Noised:
    """Latents with noise, and what a model is to say of them; one row is one record, with all its draws.

    Attributes:
      noisy: float32 (n, draws, channels, height, width).
      steps: of noise, int64 (n, draws).
      wanted: float32, of the shape of `noisy`.
      given: argument of the model -> what it is told of each record, (n, ...).
      scored: int64 (n,), 1, or 0 for a record without a loss.
    """

    noisy: Tensor
    steps: Tensor
    wanted: Tensor
    given: Mapping[str, Tensor]
    scored: Tensor

    def __len__(self) -> int:
        return len(self.scored)

    @property
    def targets(self) -> Tensor:
        """1 for each record that is scored, else 0, int64 (n,)."""
        return self.scored

    def select(self, indices: Any) -> "Noised":
        """Returns the rows at the indices, in that order; integers of any sequence, array or tensor, none too."""
        rows = torch.as_tensor(indices, dtype=torch.long, device=self.scored.device).reshape(-1)
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> "Noised":
        """Returns the examples on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def within(self, model: nn.Module) -> "Noised":
        """Returns the examples without the loss of those whose class the model does not have."""
        if "class_labels" not in self.given:
            return self
        config: Any = model.config
        labels = self.given["class_labels"]
        fits = (labels >= 0) & (labels < int(config["num_embeds_ada_norm"]))
        given = {**self.given, "class_labels": labels * fits.long()}
        return Noised(self.noisy, self.steps, self.wanted, given, self.scored * fits.long())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Noised":
        given = {name: change(tensor) for name, tensor in self.given.items()}
        return Noised(change(self.noisy), change(self.steps), change(self.wanted), given, change(self.scored))


class Denoising(ABC):
    """What both tasks share: the noise, and the loss.

    Noise and step of a record follow from its own content by SHA-256, once for all: a loss asked for twice is the same,
    and no record's noise depends on another's, so that leaving one out changes nothing for the others. With several
    draws for each record, at steps spread over the schedule, its gradient is a mean over them before it is clipped,
    which costs time but no privacy: Dockhorn et al. 2022, arXiv 2210.09929, section 3.2.

    Args:
      draws: of noise for each record, >= 1.
    """

    name: ClassVar[str]
    kind: ClassVar[str] = "diffusion"
    columns: ClassVar[Mapping[str, type]]
    models: ClassVar[tuple[str, ...]]

    def __init__(self, draws: int = DRAWS) -> None:
        self._draws = draws

    def load(self, path: Path | str, *, dtype: torch.dtype) -> Any:
        """Returns the model of a directory; see `task.diffusion_models.load_diffusion`."""
        return load_diffusion(path, dtype=dtype, names=self.models)

    def load_processor(self, path: Path | str) -> NoiseSchedule:
        """Returns the noise schedule of a directory; see `task.noise.NoiseSchedule.of`."""
        return NoiseSchedule.of(path)

    def encode(
        self, processor: NoiseSchedule, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> Noised:
        """Returns each record as an example.

        Args:
          processor: of `load_processor`.
          records: each with latents, floating (channels, height, width), scaled as the model wants them, and what the
            image is to be told by.
          length: tokens of a text; longer ones are cut.
          split: "truncate".
          model_config: of the model.

        Raises:
          ConfigError: the split is not "truncate".
          DataError: there is no record, or what a record holds is not of the model's shape; names its place.
          UnsupportedModel: the model says something else than the noise.
        """
        check_records(records, split, self.name)
        _check_output(model_config)
        given, right = self.given(records, length, model_config)
        shape = (model_config["in_channels"], model_config["sample_size"], model_config["sample_size"])
        rows = []
        for index, record in enumerate(records):
            latents = floats(records, index, LATENTS, shape)
            right[index] = right[index] and latents is not None
            latents = torch.zeros(shape) if latents is None else latents
            rows.append(_noised(latents, processor, self._draws, _generator(record, self.columns)))
        noisy, wanted = (torch.stack([row[at] for row in rows]) for at in (0, 2))
        steps = torch.tensor([row[1] for row in rows], dtype=torch.long)
        return Noised(noisy, steps, wanted, given, torch.tensor(right, dtype=torch.long))

    @abstractmethod
    def given(self, records: Sequence[Record], length: int, model_config: Any) -> tuple[dict[str, Tensor], list[bool]]:
        """Returns what a model is told of each record, by the name of its argument, and which records are right."""

    def losses(self, model: nn.Module, batch: Noised) -> Tensor:
        """Returns the mean squared error over each record's latents and draws, float32 (B,), 0 where nothing counts."""
        draws = range(batch.noisy.shape[1])
        errors = torch.stack([self._errors(model, batch, draw) for draw in draws])
        return errors.mean(dim=0) * batch.scored

    def tally(self, model: nn.Module, batch: Noised) -> Tally:
        """Returns the sum of the losses, and how much of what is to be said is said: 1 - error / mean square."""
        with torch.no_grad():
            losses = self.losses(model, batch).double()
        powers = batch.wanted.double().square().flatten(1).mean(dim=1)
        count = int(batch.scored.sum())
        explained = float((batch.scored * (1 - losses / powers.clamp(min=1e-12))).sum())
        return Tally(float(losses.sum()), count, {"explained": (explained, count)})

    def run(self, model: nn.Module, batch: Noised) -> None:
        """Calls a model once with the first draw of each record, without gradients."""
        with torch.no_grad():
            self._errors(model, batch, 0)

    def invented(self, model: nn.Module, length: int, *, seed: int) -> Noised:
        """Returns two records that nobody made, one with a shorter text."""
        config: Any = model.config
        generator = torch.Generator().manual_seed(seed)
        shape = (2, self._draws, config["in_channels"], config["sample_size"], config["sample_size"])
        noisy, wanted = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        steps = torch.randint(1000, shape[:2], generator=generator)
        given = self.told(config, length, generator)
        return Noised(noisy, steps, wanted, given, torch.ones(2, dtype=torch.long))

    @abstractmethod
    def told(self, model_config: Any, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns what `given` does, of two records that nobody made."""

    def _errors(self, model: nn.Module, batch: Noised, draw: int) -> Tensor:
        """Returns the mean squared error of one draw of each record, float32 (B,)."""
        dtype = dtype_of(model)
        given = {name: one.to(dtype) if one.is_floating_point() else one for name, one in batch.given.items()}
        # The latents' argument has a name of its own in each class, and is the first in all.
        said = model(batch.noisy[:, draw].to(dtype), timestep=batch.steps[:, draw], **given).sample
        # Where a model also says how sure it is, that is the second half of its channels, and stays as it is.
        said = said[:, : batch.noisy.shape[2]].float()
        return (said - batch.wanted[:, draw]).square().flatten(1).mean(dim=1)


class ClassToImage(Denoising):
    """The task of DiT: latents of an image, and its class by number."""

    name: ClassVar[str] = "class_to_image"
    columns: ClassVar[Mapping[str, type]] = {LATENTS: object, LABEL: object}
    models: ClassVar[tuple[str, ...]] = ("DiTTransformer2DModel",)

    def given(self, records: Sequence[Record], length: int, model_config: Any) -> tuple[dict[str, Tensor], list[bool]]:
        """Returns the classes of records, 0 where a wrong one is forgiven, and which are right."""
        count, labels, right = model_config["num_embeds_ada_norm"], [], []
        for index, record in enumerate(records):
            label = record[LABEL]
            good = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < count
            if not good:
                fault(records, index, LABEL, f"must be a whole number, 0..{count - 1}; correct it")
            labels.append(label if good else 0)
            right.append(good)
        return {"class_labels": torch.tensor(labels, dtype=torch.long)}, right

    def told(self, model_config: Any, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns two different classes."""
        return {"class_labels": torch.randperm(model_config["num_embeds_ada_norm"], generator=generator)[:2]}


class TextToImage(Denoising):
    """The task of PixArt and Stable Diffusion's U-net: image latents, and what a text encoder made of a text."""

    name: ClassVar[str] = "text_to_image"
    columns: ClassVar[Mapping[str, type]] = {LATENTS: object, PROMPT: object}
    models: ClassVar[tuple[str, ...]] = ("PixArtTransformer2DModel", UNET)

    def given(self, records: Sequence[Record], length: int, model_config: Any) -> tuple[dict[str, Tensor], list[bool]]:
        """Returns the texts of records with the places that are looked at, and which records are right.

        Of a wrong one too a place is looked at: attention to none is not a number.
        """
        width = text_width(model_config)
        found = [floats(records, index, PROMPT, (None, width)) for index in range(len(records))]
        table = torch.zeros(len(found), length, width)
        texts = [torch.zeros(1, width) if text is None else text[:length] for text in found]
        for row, text in zip(table, texts, strict=True):
            row[: len(text)] = text
        return _texts(table, torch.tensor([len(text) for text in texts])), [text is not None for text in found]

    def told(self, model_config: Any, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns two texts, one half as long as the other."""
        table = torch.randn((2, length, text_width(model_config)), generator=generator)
        return _texts(table, torch.tensor([length, max(length // 2, 1)]))


def _generator(record: Record, fields: Iterable[str]) -> torch.Generator:
    """Returns a generator that depends on what a record holds, and on nothing else."""
    content = b"".join(np.asarray(record[field]).tobytes() for field in fields)
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(content).digest()[:7], "big"))


def _noised(latents: Tensor, schedule: NoiseSchedule, draws: int, generator: torch.Generator) -> tuple[Any, ...]:
    """Returns noisy latents, steps and what is to be said of them; one step in each of as many parts as draws."""
    spread = (torch.arange(draws) + torch.rand(draws, generator=generator)) * schedule.steps / draws
    steps = [min(int(step), schedule.steps - 1) for step in spread]
    noises = [torch.randn(latents.shape, generator=generator) for _ in steps]
    noisy = torch.stack([schedule.mixed(latents, noise, step) for noise, step in zip(noises, steps, strict=True)])
    wanted = torch.stack([schedule.wanted(latents, noise, step) for noise, step in zip(noises, steps, strict=True)])
    return noisy, steps, wanted


def _check_output(model_config: Any) -> None:
    channels, said = model_config["in_channels"], model_config["out_channels"]
    if said not in (None, channels, 2 * channels):
        raise UnsupportedModel(
            f"out_channels={said} must be in_channels={channels} or twice that; choose another model"
        )
    sized = model_config.get("use_additional_conditions")
    if sized is None and "caption_channels" in model_config:
        sized = model_config["sample_size"] == 128  # as the class has it
    if sized:
        raise UnsupportedModel(
            "use_additional_conditions=True: the model wants to be told the size of its image; choose one that does not"
        )


def text_width(model_config: Any) -> int:
    """Returns how wide a token of a text is for a model.

    Raises:
      UnsupportedModel: its blocks want different widths.
    """
    width = model_config.get("caption_channels") or model_config["cross_attention_dim"]
    if type(width) is not int:
        raise UnsupportedModel(f"cross_attention_dim={width!r} must be one width for all blocks; choose another model")
    return width


def _texts(table: Tensor, widths: Tensor) -> dict[str, Tensor]:
    mask = (torch.arange(table.shape[1])[None, :] < widths[:, None]).long()
    return {"encoder_hidden_states": table, "encoder_attention_mask": mask}

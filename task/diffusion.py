"""Diffusion: a denoiser learns to predict the noise in latents, conditioned on a class or on a text.

A record holds the outputs of the autoencoder and of the text encoder for an image and its text. A site computes them
beforehand, because both encoders stay frozen and nothing has to be learnt in them.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from offsite.errors import UnsupportedModel
from offsite.task.arrays import floats
from offsite.task.device import device_of
from offsite.task.diffusion_models import UNET, load_diffusion
from offsite.task.examples import all_but
from offsite.task.images import check_records
from offsite.task.label_numbers import whole
from offsite.task.latent_scale import tell_scale
from offsite.task.noise import NoiseSchedule
from offsite.task.number_format import dtype_of
from offsite.task.record_fields import FIELDS, LABEL, LATENTS, PROMPT
from offsite.task.records import fault
from offsite.task.spec import Record, Tally

DRAWS = 4  # draws of noise for each record; see `Denoising`


@dataclass(frozen=True)
class Noised:
    """Noisy latents with the output that a model has to predict; each row is one record, with all its draws.

    Attributes:
      noisy: latents with noise, float32 (n, draws, channels, height, width).
      steps: steps of the noise schedule, int64 (n, draws).
      wanted: output that the model has to predict, float32, in the shape of `noisy`.
      conditions: name of a model's argument -> its value for each record, (n, ...).
      scored: 1 for each record with a loss, else 0, int64 (n,).
    """

    noisy: Tensor
    steps: Tensor
    wanted: Tensor
    conditions: Mapping[str, Tensor]
    scored: Tensor

    def __len__(self) -> int:
        return len(self.scored)

    @property
    def targets(self) -> Tensor:
        """1 for each scored record, else 0, int64 (n,)."""
        return self.scored

    def select(self, indices: Any) -> "Noised":
        """Returns the rows at integer indices, in that order; a sequence, an array or a tensor, which may be empty."""
        rows = torch.as_tensor(indices, dtype=torch.long, device=self.scored.device).reshape(-1)
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> "Noised":
        """Returns the examples on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def within(self, model: nn.Module) -> "Noised":
        """Returns the examples; an example whose class the model does not have loses its loss and gets class 0."""
        if "class_labels" not in self.conditions:
            return self
        config: Any = model.config
        labels = self.conditions["class_labels"]
        fits = (labels >= 0) & (labels < int(config["num_embeds_ada_norm"]))
        conditions = {**self.conditions, "class_labels": labels * fits.long()}
        return Noised(self.noisy, self.steps, self.wanted, conditions, self.scored * fits.long())

    def emptied(self, rows: Sequence[int]) -> "Noised":
        """Returns the examples; those at the indices `rows` lose their loss."""
        return replace(self, scored=self.scored * all_but(rows, len(self), self.scored.device).long())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Noised":
        conditions = {name: change(tensor) for name, tensor in self.conditions.items()}
        return Noised(change(self.noisy), change(self.steps), change(self.wanted), conditions, change(self.scored))


class Denoising(ABC):
    """The noise and the loss that all tasks of diffusion share.

    The noise and the steps of a record follow from its content by SHA-256 and never change. So the same loss can be
    computed twice, and no record's noise depends on another record: leaving a record out changes nothing for the
    others. A record has several draws, at steps spread over the schedule, and its gradient is the mean over these draws
    before it is clipped, which costs time but no privacy: Dockhorn et al. 2022, arXiv 2210.09929, section 3.2.

    Args:
      draws: number of draws of noise for each record, >= 1.
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
          processor: noise schedule from `load_processor`.
          records: records with latents, floating (channels, height, width), scaled as the model needs them, and with
            the conditions of the image.
          length: maximum number of tokens of a text; longer texts are cut.
          split: "truncate".
          model_config: configuration of the model.

        Raises:
          ConfigError: the split is not "truncate".
          DataError: there is no record, or a record does not have the model's shapes; the message names the record's
            place.
          UnsupportedModel: the model predicts something else than the noise.
        """
        check_records(records, split, self.name)
        _check_output(model_config)
        conditions, valid = self.conditions(records, length, model_config)
        shape = (model_config["in_channels"], model_config["sample_size"], model_config["sample_size"])
        rows = []
        for index, record in enumerate(records):
            latents = floats(records, index, LATENTS, shape)
            valid[index] = valid[index] and latents is not None
            latents = torch.zeros(shape) if latents is None else latents
            content = record if valid[index] else {}  # an object that is no array has no bytes of its own
            rows.append(_noised(latents, processor, self._draws, _generator(content, self.columns)))
        tell_scale(records, valid, shape[0])
        noisy, wanted = (torch.stack([row[at] for row in rows]) for at in (0, 2))
        steps = torch.tensor([row[1] for row in rows], dtype=torch.long)
        return Noised(noisy, steps, wanted, conditions, torch.tensor(valid, dtype=torch.long))

    @abstractmethod
    def conditions(
        self, records: Sequence[Record], length: int, model_config: Any
    ) -> tuple[dict[str, Tensor], list[bool]]:
        """Returns the arguments of the model that condition each record, by name, and whether each record is valid."""

    def losses(self, model: nn.Module, batch: Noised) -> Tensor:
        """Returns the mean squared error of each record's latents and draws, float32 (B,), 0 for an unscored record."""
        batch = batch.to(device_of(model))
        draws = range(batch.noisy.shape[1])
        errors = torch.stack([self._errors(model, batch, draw) for draw in draws])
        return errors.mean(dim=0) * batch.scored

    def tally(self, model: nn.Module, batch: Noised) -> Tally:
        """Returns the sum of the losses, and the explained share of the wanted output: 1 - error / mean square."""
        batch = batch.to(device_of(model))
        with torch.no_grad():
            losses = self.losses(model, batch).double()
        powers = batch.wanted.double().square().flatten(1).mean(dim=1)
        count = int(batch.scored.sum())
        explained = float((batch.scored * (1 - losses / powers.clamp(min=1e-12))).sum())
        return Tally(float(losses.sum()), count, {"explained": (explained, count)})

    def run(self, model: nn.Module, batch: Noised) -> None:
        """Calls a model once with the first draw of each record, without gradients."""
        batch = batch.to(device_of(model))
        with torch.no_grad():
            self._errors(model, batch, 0)

    def dummy_batch(self, model: nn.Module, length: int, *, seed: int) -> Noised:
        """Returns two random records, one with a shorter text."""
        config: Any = model.config
        generator = torch.Generator().manual_seed(seed)
        shape = (2, self._draws, config["in_channels"], config["sample_size"], config["sample_size"])
        noisy, wanted = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        steps = torch.randint(1000, shape[:2], generator=generator)
        conditions = self.dummy_conditions(config, length, generator)
        return Noised(noisy, steps, wanted, conditions, torch.ones(2, dtype=torch.long))

    @abstractmethod
    def dummy_conditions(self, model_config: Any, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns random conditions of two records, in the form of `conditions`."""

    def _errors(self, model: nn.Module, batch: Noised, draw: int) -> Tensor:
        """Returns the mean squared error of one draw of each record, float32 (B,)."""
        dtype = dtype_of(model)
        conditions = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in batch.conditions.items()
        }
        # Each class has another name for the argument with the latents, but it is always the first argument.
        output = model(batch.noisy[:, draw].to(dtype), timestep=batch.steps[:, draw], **conditions).sample
        # A model that also predicts a variance has it in the second half of its channels, which is not trained.
        predicted = output[:, : batch.noisy.shape[2]].float()
        return (predicted - batch.wanted[:, draw]).square().flatten(1).mean(dim=1)


class ClassToImage(Denoising):
    """The task of DiT: latents of an image, and the number of its class."""

    name: ClassVar[str] = "class_to_image"
    columns: ClassVar[Mapping[str, type]] = FIELDS["class_to_image"]
    models: ClassVar[tuple[str, ...]] = ("DiTTransformer2DModel",)

    def conditions(
        self, records: Sequence[Record], length: int, model_config: Any
    ) -> tuple[dict[str, Tensor], list[bool]]:
        """Returns the classes of records, 0 for an invalid class in `LenientRecords`, and whether each is valid."""
        count, labels, valid = model_config["num_embeds_ada_norm"], [], []
        for index, record in enumerate(records):
            label = whole(record[LABEL])
            good = label is not None and 0 <= label < count
            if not good:
                fault(records, index, LABEL, f"must be a whole number in 0..{count - 1}; correct it")
            labels.append(label if good and label is not None else 0)
            valid.append(good)
        return {"class_labels": torch.tensor(labels, dtype=torch.long)}, valid

    def dummy_conditions(self, model_config: Any, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns two different classes."""
        return {"class_labels": torch.randperm(model_config["num_embeds_ada_norm"], generator=generator)[:2]}


class TextToImage(Denoising):
    """The task of PixArt and Stable Diffusion's U-net: latents of an image, and a text encoder's output for a text."""

    name: ClassVar[str] = "text_to_image"
    columns: ClassVar[Mapping[str, type]] = FIELDS["text_to_image"]
    models: ClassVar[tuple[str, ...]] = ("PixArtTransformer2DModel", UNET)

    def conditions(
        self, records: Sequence[Record], length: int, model_config: Any
    ) -> tuple[dict[str, Tensor], list[bool]]:
        """Returns the texts of records with their attention masks, and whether each record is valid.

        An invalid record also attends to one token: attention to no token would give NaN.
        """
        width = text_width(model_config)
        prompts = [floats(records, index, PROMPT, (None, width)) for index in range(len(records))]
        table = torch.zeros(len(prompts), length, width)
        texts = [torch.zeros(1, width) if text is None else text[:length] for text in prompts]
        for row, text in zip(table, texts, strict=True):
            row[: len(text)] = text
        return _texts(table, torch.tensor([len(text) for text in texts])), [text is not None for text in prompts]

    def dummy_conditions(self, model_config: Any, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns two texts, one half as long as the other."""
        table = torch.randn((2, length, text_width(model_config)), generator=generator)
        return _texts(table, torch.tensor([length, max(length // 2, 1)]))


def _generator(record: Record, fields: Iterable[str]) -> torch.Generator:
    """Returns a generator that depends only on the content of a record's fields."""
    content = b"".join(np.asarray(record[field]).tobytes() for field in fields if field in record)
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(content).digest()[:7], "big"))


def _noised(latents: Tensor, schedule: NoiseSchedule, draws: int, generator: torch.Generator) -> tuple[Any, ...]:
    """Returns noisy latents, steps and wanted outputs; each draw has its own part of the schedule, and a step in it."""
    spread = (torch.arange(draws) + torch.rand(draws, generator=generator)) * schedule.steps / draws
    steps = [min(int(step), schedule.steps - 1) for step in spread]
    noises = [torch.randn(latents.shape, generator=generator) for _ in steps]
    noisy = torch.stack([schedule.mixed(latents, noise, step) for noise, step in zip(noises, steps, strict=True)])
    wanted = torch.stack([schedule.wanted(latents, noise, step) for noise, step in zip(noises, steps, strict=True)])
    return noisy, steps, wanted


def _check_output(model_config: Any) -> None:
    channels, outputs = model_config["in_channels"], model_config["out_channels"]
    if outputs not in (None, channels, 2 * channels):
        raise UnsupportedModel(
            f"out_channels={outputs} must be in_channels={channels} or twice that; choose another model"
        )
    sized = model_config.get("use_additional_conditions")
    if sized is None and "caption_channels" in model_config:
        sized = model_config["sample_size"] == 128  # the default of diffusers' class
    if sized:
        raise UnsupportedModel(
            "use_additional_conditions=True must be False, because records hold no image size; choose another model"
        )


def text_width(model_config: Any) -> int:
    """Returns the width of a text's tokens that a model reads.

    Raises:
      UnsupportedModel: the model's blocks read tokens of different widths.
    """
    width = model_config.get("caption_channels") or model_config["cross_attention_dim"]
    if type(width) is not int:
        raise UnsupportedModel(f"cross_attention_dim={width!r} must be one width for all blocks; choose another model")
    return width


def _texts(table: Tensor, widths: Tensor) -> dict[str, Tensor]:
    mask = (torch.arange(table.shape[1])[None, :] < widths[:, None]).long()
    return {"encoder_hidden_states": table, "encoder_attention_mask": mask}

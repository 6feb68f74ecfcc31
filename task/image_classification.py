"""Image classification: one label of the model for each image (ViT and similar models)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from offsite.task import checkpoint
from offsite.task.device import device_of
from offsite.task.examples import all_but
from offsite.task.images import ImageProcessor, Pixels, check_records, plain_pixels
from offsite.task.labels import IGNORED, Labels, names_of
from offsite.task.number_format import dtype_of
from offsite.task.record_fields import FIELDS
from offsite.task.sequence_classification import class_tally
from offsite.task.spec import Record, Tally

SEVERAL = 5  # number of best guesses in the top-5 accuracy


@dataclass(frozen=True)
class LabelledImages:
    """Images with one label each; each row is one record.

    Attributes:
      pixels: pixels of n images.
      labels: numbers of labels, int64 (n,); `IGNORED` for an image without a label.
    """

    pixels: Pixels
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def targets(self) -> torch.Tensor:
        """1 for each scored image, else 0, int64 (n,)."""
        return (self.labels != IGNORED).long()

    def select(self, indices: Any) -> "LabelledImages":
        """Returns the rows at integer indices, in that order; a sequence, an array or a tensor, which may be empty."""
        rows = torch.as_tensor(indices, dtype=torch.long, device=self.labels.device).reshape(-1)
        return LabelledImages(self.pixels.select(rows), self.labels[rows])

    def to(self, device: torch.device | str) -> "LabelledImages":
        """Returns the examples on a device."""
        return LabelledImages(self.pixels.to(device), self.labels.to(device))

    def within(self, model: nn.Module) -> "LabelledImages":
        """Returns the examples; a label that the model does not have becomes `IGNORED`."""
        config: Any = model.config
        fits = (self.labels >= 0) & (self.labels < int(config.num_labels))
        return LabelledImages(self.pixels, torch.where(fits, self.labels, IGNORED))

    def emptied(self, rows: Sequence[int]) -> "LabelledImages":
        """Returns the examples; the labels at the indices `rows` become `IGNORED`."""
        kept = all_but(rows, len(self), self.labels.device)
        return LabelledImages(self.pixels, torch.where(kept, self.labels, IGNORED))


class ImageClassification:
    """The task of any image classifier of transformers that takes images of one size."""

    name: ClassVar[str] = "image_classification"
    kind: ClassVar[str] = "image_classification"
    columns: ClassVar[Mapping[str, type]] = FIELDS["image_classification"]

    def load(self, path: Path | str, *, dtype: torch.dtype) -> Any:
        """Returns the model of a directory; see `task.checkpoint.load`."""
        return checkpoint.load(path, dtype=dtype, kind=self.kind)

    def load_processor(self, path: Path | str) -> ImageProcessor:
        """Returns the image processor of a directory; see `task.images.ImageProcessor.of`."""
        return ImageProcessor.of(path)

    def encode(
        self, processor: ImageProcessor, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> LabelledImages:
        """Returns each record as an example; `length` is ignored.

        Raises:
          ConfigError: the split is not "truncate".
          DataError: there is no record, a record has no valid image, or its label is not a label of the model.
          UnsupportedModel: the model needs another image size than its processor makes, or has no labels.
        """
        check_records(records, split, self.name)
        return labelled_images(processor, records, model_config, model_config)

    def losses(self, model: nn.Module, batch: LabelledImages) -> torch.Tensor:
        """Returns the negative log-likelihood of each image's label, nats, float32 (B,), 0 without a label."""
        batch = batch.to(device_of(model))
        return label_losses(self._logits(model, batch), batch.labels)

    def tally(self, model: nn.Module, batch: LabelledImages) -> Tally:
        """Returns the sums of a batch; see `label_tally`."""
        batch = batch.to(device_of(model))
        with torch.no_grad():
            return label_tally(self._logits(model, batch), batch.labels)

    def run(self, model: nn.Module, batch: LabelledImages) -> None:
        """Calls a model once with examples, without gradients."""
        batch = batch.to(device_of(model))
        with torch.no_grad():
            self._logits(model, batch)

    def dummy_batch(self, model: nn.Module, length: int, *, seed: int) -> LabelledImages:
        """Returns two random images with two different labels of the model."""
        config: Any = model.config
        return LabelledImages(plain_pixels(config, 2, seed=seed), two_labels(len(names_of(config)), seed))

    def _logits(self, model: nn.Module, batch: LabelledImages) -> torch.Tensor:
        logits: torch.Tensor = model(pixel_values=batch.pixels.scaled(dtype_of(model))).logits
        return logits


def label_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the negative log-likelihood of each label, nats, float32 (B,), 0 for `IGNORED`.

    Args:
      logits: scores of the classes, floating (B, classes).
      labels: numbers of labels, int64 (B,).
    """
    losses: torch.Tensor = functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
    return losses


def labelled_images(
    processor: ImageProcessor, records: Sequence[Record], model_config: Any, vision_config: Any
) -> LabelledImages:
    """Returns the images of records with their labels.

    Args:
      processor: image processor of the model.
      records: records with the fields "image" and "label".
      model_config: configuration of the model, with its labels.
      vision_config: configuration of the model's vision part, or of the model itself.
    """
    labels = torch.tensor(Labels(model_config).of(records, "label"), dtype=torch.long)
    pixels, valid = processor.pixels(records, "image", vision_config)
    return LabelledImages(pixels, torch.where(valid, labels, IGNORED))


def label_tally(logits: torch.Tensor, labels: torch.Tensor) -> Tally:
    """Returns the sums of `class_tally`, and the top-5 accuracy for a model of more than five labels."""
    tally, kept = class_tally(logits.float(), labels), labels != IGNORED
    if logits.shape[1] <= SEVERAL:
        return tally
    best = logits[kept].topk(SEVERAL, dim=1).indices
    hits = float((best == labels[kept][:, None]).sum())
    return replace(tally, metrics={**tally.metrics, f"top_{SEVERAL}_accuracy": (hits, tally.targets)})


def two_labels(count: int, seed: int) -> torch.Tensor:
    """Returns two different labels out of `count`, int64 (2,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:2]

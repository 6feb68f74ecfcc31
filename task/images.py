"""Images as a model needs them: resized and cropped by PIL, stored as bytes, and scaled to numbers when used."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from offsite.errors import DataError, UnsupportedModel
from offsite.task.encoded_image import NO_IMAGE, EncodedImage
from offsite.task.image_settings import Settings, Size, read_settings
from offsite.task.records import check_split, fault
from offsite.task.spec import Record

MAX_RATIO = 64  # of long to short side; resizing the short side of a thinner image would make a huge image
INTERPOLATING = ("dinov2", "dinov2_with_registers")  # models that take images of any size


@dataclass(frozen=True)
class Pixels:
    """Images of one size; each row belongs to one record.

    Between resizing and scaling, an image consists of whole numbers, so storing bytes loses nothing and takes a quarter
    of the memory.

    Attributes:
      values: pixel values, uint8 (n, 3, H, W).
      scale: factor of each pixel value, finite.
      mean: number that is subtracted from each scaled channel, finite.
      std: divisor of each channel after the subtraction, finite and > 0.
    """

    values: torch.Tensor
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __len__(self) -> int:
        return len(self.values)

    def select(self, rows: torch.Tensor) -> "Pixels":
        """Returns the images at the indices `rows`, int64 (m,), in that order."""
        return replace(self, values=self.values[rows])

    def to(self, device: torch.device | str) -> "Pixels":
        """Returns the images on a device."""
        return replace(self, values=self.values.to(device))

    def scaled(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the model's input `pixel_values`, (n, 3, H, W), computed in float32 and then cast to `dtype`."""
        mean, std = (torch.tensor(three, device=self.values.device).reshape(3, 1, 1) for three in (self.mean, self.std))
        return ((self.values.float() * self.scale - mean) / std).to(dtype)


@dataclass(frozen=True)
class ImageProcessor:
    """Makes `Pixels` from the images of records as the model's own processor does, one image at a time.

    Attributes:
      settings: settings from the model's folder.
    """

    settings: Settings

    @classmethod
    def of(cls, folder: Path | str) -> "ImageProcessor":
        """Reads the processor of a model's folder; raises as `task.image_settings.read_settings`."""
        return cls(read_settings(Path(folder)))

    def pixels(self, records: Sequence[Record], field: str, model_config: Any) -> tuple[Pixels, torch.Tensor]:
        """Returns the images of records, and whether each is valid, bool (n,); an invalid image becomes black.

        Args:
          records: records with one image each, an `EncodedImage` or uint8 (H, W, 3) or (H, W).
          field: name of the field with the image.
          model_config: configuration of the model, or of its vision part.

        Raises:
          DataError: a record's image is invalid, and the records are not `LenientRecords`; the message names the
            record's place.
          UnsupportedModel: the model needs another image size than its processor makes.
        """
        shape = self._shape(model_config)
        values = torch.zeros((len(records), 3, *shape), dtype=torch.uint8)
        valid = torch.zeros(len(records), dtype=torch.bool)
        for index in range(len(records)):
            image = _checked(records, index, field)
            if image is not None:
                values[index] = torch.from_numpy(np.moveaxis(self._resized(image), -1, 0).copy())
                valid[index] = True
        return self.finished(values), valid

    def finished(self, values: torch.Tensor) -> Pixels:
        """Returns pixel values, uint8 (n, 3, H, W), with this processor's scale, mean and std."""
        return Pixels(values, self.settings.scale, self.settings.mean, self.settings.std)

    def _shape(self, model_config: Any) -> Size:
        made, wanted = self.settings.shape, size_of(model_config)
        if getattr(model_config, "num_channels", 3) != 3:
            raise UnsupportedModel(f"num_channels={model_config.num_channels} must be 3; choose another model")
        if made != wanted and getattr(model_config, "model_type", "") not in INTERPOLATING:
            raise UnsupportedModel(
                f"image_size={wanted[0]}x{wanted[1]} must be {made[0]}x{made[1]}, as the image processor makes it; "
                "save the model with the processor that it was trained with"
            )
        return made

    def _resized(self, image: np.ndarray) -> np.ndarray:
        """Returns an image, uint8 (H, W, 3), resized and cropped to the size that the model takes."""
        settings = self.settings
        if settings.resize is not None or settings.shortest is not None:
            height, width = settings.resize or _by_short_side(image.shape[0], image.shape[1], settings.shortest or 1)
            resized = Image.fromarray(image).resize((width, height), Image.Resampling(settings.resample))
            image = np.asarray(resized)
        return _cropped(image, settings.crop) if settings.crop is not None else image


def check_records(records: Sequence[Record], split: str, task: str) -> None:
    """Refuses an empty list of records, and a split that would join records.

    Raises:
      ConfigError: the split is not "truncate".
      DataError: there is no record.
    """
    check_split(split, task)
    if not records:
        raise DataError(f"examples=0 for task={task!r} must be at least 1; give records")


def size_of(model_config: Any) -> Size:
    """Returns height and width of the images that a model's configuration names, in pixels.

    Raises:
      UnsupportedModel: the configuration names no size.
    """
    size = getattr(model_config, "image_size", None)
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or any(type(side) is not int or side < 1 for side in pair):
        raise UnsupportedModel(f"image_size={size!r} must be one or two whole numbers; correct the model's config.json")
    return pair[0], pair[1]


def plain_pixels(model_config: Any, count: int, *, seed: int) -> Pixels:
    """Returns random images of the size that a model's configuration names."""
    shape = (count, 3, *size_of(model_config))
    values = torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Pixels(values, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def _checked(records: Sequence[Record], index: int, field: str) -> np.ndarray | None:
    """Returns a record's image as uint8 (H, W, 3); None for an invalid image in `LenientRecords`."""
    image = records[index][field]
    try:
        image = image.decoded() if isinstance(image, EncodedImage) else image
        rule = _wrong(image)
    except DataError as error:
        rule = str(error)
    if rule:
        fault(records, index, field, rule)
        return None
    return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)


def _wrong(image: Any) -> str:
    """Returns the rule that an image breaks, or "" for a valid image."""
    if isinstance(image, str):
        return NO_IMAGE
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3):
        return "must be an image, uint8 (H, W, 3) or (H, W); use the reader 'images', 'image_parquet' or 'npz'"
    if image.ndim == 3 and image.shape[2] != 3:
        return "must have 3 channels, or the shape (H, W); convert the image to RGB"
    short, long = sorted(image.shape[:2])
    if short < 1 or long > MAX_RATIO * short:
        return f"long side must be at most {MAX_RATIO} times the short side; cut the image first"
    return ""


def _by_short_side(height: int, width: int, shortest: int) -> Size:
    """Returns the size with the short side `shortest` and the same ratio, rounded down, in pixels."""
    if width <= height:
        return int(shortest * height / width), shortest
    return shortest, int(shortest * width / height)


def _cropped(image: np.ndarray, size: Size) -> np.ndarray:
    """Returns the middle of an image in a given size; a smaller image gets a black border."""
    for axis, wanted in enumerate(size):
        missing = max(wanted - image.shape[axis], 0)
        around = [(0, 0)] * image.ndim
        around[axis] = ((missing + 1) // 2, missing // 2)
        start = max((image.shape[axis] - wanted) // 2, 0)
        image = np.take(np.pad(image, around), range(start, start + wanted), axis=axis)
    return image

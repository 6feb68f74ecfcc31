"""The processor of a model of images and text: an image processor and a tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from offsite.task.checkpoint import load_tokenizer
from offsite.task.images import ImageProcessor
from offsite.task.tokenizer import Tokenizer


@dataclass(frozen=True)
class ImageTextProcessor:
    """The image processor and the tokenizer of one model.

    Attributes:
      images: the image processor.
      words: the tokenizer, with its chat template if the folder has one.
    """

    images: ImageProcessor
    words: Tokenizer

    @classmethod
    def of(cls, path: Path | str) -> "ImageTextProcessor":
        """Reads both from a model's folder; see `ImageProcessor.of` and `task.checkpoint.load_tokenizer`."""
        return cls(ImageProcessor.of(path), load_tokenizer(path))

    @property
    def largest_id(self) -> int:
        """The largest token id of the tokenizer; the model's vocabulary must include it."""
        return self.words.largest_id

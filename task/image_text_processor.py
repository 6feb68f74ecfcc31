"""What a folder of a model of images and text has for both: an image processor and a tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from offsite.task.checkpoint import load_tokenizer
from offsite.task.images import ImageProcessor
from offsite.task.tokenizer import Tokenizer


@dataclass(frozen=True)
class ImageTextProcessor:
    """What makes examples of images with words.

    Attributes:
      images: the image processor.
      words: the tokenizer, with its chat template where there is one.
    """

    images: ImageProcessor
    words: Tokenizer

    @classmethod
    def of(cls, path: Path | str) -> "ImageTextProcessor":
        """Returns both of a model's folder; see `ImageProcessor.of` and `task.checkpoint.load_tokenizer`."""
        return cls(ImageProcessor.of(path), load_tokenizer(path))

    @property
    def largest_id(self) -> int:
        """The largest token id that may come out; a model has to know it."""
        return self.words.largest_id

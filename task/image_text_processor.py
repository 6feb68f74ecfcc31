"""The processor of a model of images and text: an image processor and a tokenizer."""

import json
from dataclasses import dataclass
from pathlib import Path

from offsite.errors import DataError
from offsite.task.checkpoint import load_tokenizer
from offsite.task.images import ImageProcessor
from offsite.task.tokenizer import Tokenizer

# Texts by which data sets and processors say where an image stands: LLaVA's own first, which many data sets hold.
MARKERS: tuple[str, ...] = ("<image>", "<|image|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "[IMG]")
MARKERS += ("<image_soft_token>", "<start_of_image>", "<end_of_image>", "<image_placeholder>", "<|image_1|>")
MARKERS += ("<IMG_CONTEXT>",)
FILES = ("processor_config.json", "tokenizer_config.json")  # transformers writes a model's own marker into one of both


@dataclass(frozen=True)
class ImageTextProcessor:
    """The image processor and the tokenizer of one model.

    Attributes:
      images: the image processor.
      words: the tokenizer, with its chat template if the folder has one.
      marker: text that stands for an image in the model's texts.
    """

    images: ImageProcessor
    words: Tokenizer
    marker: str = MARKERS[0]

    @classmethod
    def of(cls, path: Path | str) -> "ImageTextProcessor":
        """Reads all from a model's folder; see `ImageProcessor.of` and `task.checkpoint.load_tokenizer`."""
        return cls(ImageProcessor.of(path), load_tokenizer(path, with_images=True), image_marker(Path(path)))

    @property
    def largest_id(self) -> int:
        """The largest token id of the tokenizer; the model's vocabulary must include it."""
        return self.words.largest_id


def image_marker(folder: Path) -> str:
    """Returns the text that stands for an image in a model's texts, as the processor's files name it.

    Raises:
      DataError: a file is damaged.
    """
    for name in FILES:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"model={folder.name!r} has a damaged {name}; save the processor again") from error
        marker = content.get("image_token") if isinstance(content, dict) else None
        marker = marker.get("content") if isinstance(marker, dict) else marker
        if isinstance(marker, str) and marker.strip():
            return marker.strip()
    return MARKERS[0]


def without_marker(text: str, marker: str) -> str | None:
    """Returns a question without the one marker of its image, which the chat template writes itself.

    As in LLaVA's own code, the blanks beside the marker go with it. Two markers ask for two images, a marker of another
    model's processor is no image for this model, and None stands for both.

    Args:
      text: a question.
      marker: marker of the model; LLaVA's own counts for every model.
    """
    own = [known for known in dict.fromkeys((marker, MARKERS[0])) if known in text]
    if sum(text.count(known) for known in own) > 1:
        return None
    for known in own:
        before, _, after = text.partition(known)
        text = f"{before.rstrip()} {after.lstrip()}".strip()
    return None if holds_marker(text, marker) else text


def holds_marker(text: str, marker: str) -> bool:
    """Says whether a text holds the marker of an image, of this model or of another model's processor."""
    return any(known in text for known in (marker, *MARKERS))

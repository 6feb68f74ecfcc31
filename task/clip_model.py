"""Trained zero-shot classification with CLIP: which of a fixed set of class prompts belongs to an image.

The loss that CLIP was trained with compares each image with the texts of all other images in its batch (InfoNCE,
Radford et al. 2021, arXiv 2103.00020, section 2.3). Under this loss an example's gradient depends on the other examples
of the batch, and is 0 for an example alone, so there is no gradient of one example to clip, and no differential privacy
for a record. With one set of prompts for all images, each loss depends on one example only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from offsite.errors import UnsupportedModel
from offsite.task import checkpoint
from offsite.task.device import device_of
from offsite.task.image_classification import (
    LabelledImages,
    label_losses,
    label_tally,
    labelled_images,
    two_labels,
)
from offsite.task.image_text_processor import ImageTextProcessor
from offsite.task.images import check_records, plain_pixels
from offsite.task.labels import names_of
from offsite.task.number_format import dtype_of
from offsite.task.record_fields import FIELDS
from offsite.task.spec import Record, Tally
from offsite.task.tokenizer import Tokenizer

TEMPLATE = "a photo of a {}."  # arXiv 2103.00020, section 3.1.4
HIGHEST_ENDS = 2  # a wrong end-of-text id of old configurations; CLIP then reads at the highest id of the text


@dataclass(frozen=True)
class PromptedImages:
    """Labelled images with the prompts of all labels; each row is one image, and all rows share the prompts.

    Attributes:
      images: n images with their labels.
      prompts: public token ids, int64 (classes, T); each prompt is padded on the right with its end-of-text token,
        after which CLIP reads nothing.
    """

    images: LabelledImages
    prompts: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def targets(self) -> torch.Tensor:
        """1 for each scored image, else 0, int64 (n,)."""
        return self.images.targets

    def select(self, indices: Any) -> "PromptedImages":
        """Returns the rows at integer indices, in that order; a sequence, an array or a tensor, which may be empty."""
        return replace(self, images=self.images.select(indices))

    def to(self, device: torch.device | str) -> "PromptedImages":
        """Returns the examples on a device."""
        return PromptedImages(self.images.to(device), self.prompts.to(device))

    def within(self, model: nn.Module) -> "PromptedImages":
        """Returns the examples; a label that the model does not have becomes `IGNORED`."""
        return replace(self, images=self.images.within(model))

    def emptied(self, rows: Sequence[int]) -> "PromptedImages":
        """Returns the examples; the labels at the indices `rows` become `IGNORED`."""
        return replace(self, images=self.images.emptied(rows))


class ClipClassification:
    """The task of CLIP: one tower encodes the image, the other the prompts; the output is a likelihood over prompts.

    The prompts go through the model once for each call, whatever the number of images, with gradients where an adapter
    sits in the text tower.

    Args:
      template: text of a prompt, with {} in the place of the label's name.
    """

    name: ClassVar[str] = "clip_classification"
    kind: ClassVar[str] = "encoder"
    columns: ClassVar[Mapping[str, type]] = FIELDS["clip_classification"]

    def __init__(self, template: str = TEMPLATE) -> None:
        self._template = template

    def load(self, path: Path | str, *, dtype: torch.dtype) -> Any:
        """Returns the model of a directory; see `task.checkpoint.load`.

        Raises:
          UnsupportedModel: the model is an encoder, but not CLIP.
        """
        model = checkpoint.load(path, dtype=dtype, kind=self.kind)
        if model.config.model_type != "clip":
            raise UnsupportedModel(
                f"model_type={model.config.model_type!r} must be 'clip'; choose another model or task"
            )
        return model

    def load_processor(self, path: Path | str) -> ImageTextProcessor:
        """Returns the image processor and the tokenizer of a directory."""
        return ImageTextProcessor.of(path)

    def encode(
        self, processor: ImageTextProcessor, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> PromptedImages:
        """Returns each record as an example, with prompts from the names in the model's id2label; `length` is ignored.

        Raises:
          ConfigError: the split is not "truncate".
          DataError: there is no record, a record has no valid image, or its label is not a label of the model.
          UnsupportedModel: the labels have no names, or processor and model do not belong together.
        """
        check_records(records, split, self.name)
        images = labelled_images(processor.images, records, model_config, model_config.vision_config)
        return PromptedImages(images, class_prompts(processor.words, model_config, self._template))

    def losses(self, model: nn.Module, batch: PromptedImages) -> torch.Tensor:
        """Returns the negative log-likelihood of each image's label among the prompts, nats, float32 (B,)."""
        batch = batch.to(device_of(model))
        return label_losses(self._logits(model, batch), batch.images.labels)

    def tally(self, model: nn.Module, batch: PromptedImages) -> Tally:
        """Returns the sums of a batch; see `task.image_classification.label_tally`."""
        batch = batch.to(device_of(model))
        with torch.no_grad():
            return label_tally(self._logits(model, batch), batch.images.labels)

    def run(self, model: nn.Module, batch: PromptedImages) -> None:
        """Calls a model once with images and prompts, without gradients."""
        batch = batch.to(device_of(model))
        with torch.no_grad():
            self._logits(model, batch)

    def dummy_batch(self, model: nn.Module, length: int, *, seed: int) -> PromptedImages:
        """Returns two random images, with random prompts of different lengths."""
        config: Any = model.config
        count, text = len(names_of(config)), config.text_config
        generator = torch.Generator().manual_seed(seed)
        end = text.vocab_size - 1 if text.eos_token_id == HIGHEST_ENDS else int(text.eos_token_id)
        others = torch.tensor([number for number in range(text.vocab_size) if number != end])
        width = int(text.max_position_embeddings)
        prompts = others[torch.randint(len(others), (count, width), generator=generator)]
        ends = torch.randint(1, width, (count, 1), generator=generator)
        prompts[torch.arange(width) >= ends] = end
        pixels = plain_pixels(config.vision_config, 2, seed=seed)
        return PromptedImages(LabelledImages(pixels, two_labels(count, seed)), prompts)

    def _logits(self, model: nn.Module, batch: PromptedImages) -> torch.Tensor:
        pixels = batch.images.pixels.scaled(dtype_of(model))
        logits: torch.Tensor = model(input_ids=batch.prompts, pixel_values=pixels).logits_per_image
        return logits


def class_prompts(words: Tokenizer, model_config: Any, template: str) -> torch.Tensor:
    """Returns the prompt of each label of a CLIP model, int64 (classes, T), padded with the prompt's last token.

    Raises:
      UnsupportedModel: the labels have no names, or the tokenizer does not end a text with the token that CLIP reads.
    """
    names, text = names_of(model_config), model_config.text_config
    if names == [f"LABEL_{number}" for number in range(len(names))]:
        raise UnsupportedModel(
            "id2label must name the labels, because CLIP reads the names; write them into config.json"
        )
    encodings = words.singles([template.format(name) for name in names], int(text.max_position_embeddings))
    prompts = [encoding.ids for encoding in encodings]
    for name, ids in zip(names, prompts, strict=True):
        if not ids or not 0 <= max(ids) < text.vocab_size or _read_at(ids, text) != len(ids) - 1:
            raise UnsupportedModel(
                f"label={name!r}: its prompt must end with the model's end-of-text token, where CLIP reads the text; "
                "copy the model's own tokenizer.json"
            )
    width = max(len(ids) for ids in prompts)
    return torch.tensor([ids + ids[-1:] * (width - len(ids)) for ids in prompts], dtype=torch.long)


def _read_at(ids: Sequence[int], text_config: Any) -> int:
    """Returns the place at which CLIP reads a text: its first end-of-text token, or its highest id; -1 for neither."""
    end = max(ids) if text_config.eos_token_id == HIGHEST_ENDS else int(text_config.eos_token_id)
    return ids.index(end) if end in ids else -1

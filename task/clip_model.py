"""Zero-shot classification with CLIP, trained: which of a fixed set of class prompts belongs to an image.

The loss that CLIP was trained with compares each image with the texts of all others in its batch (InfoNCE, Radford et
al. 2021, arXiv 2103.00020, section 2.3). Under it an example's gradient depends on who else was drawn, and alone it
is 0, so there is no gradient of one example to clip, and no differential privacy for a record. Against a set of prompts
that is the same for all, the loss is one example's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from offsite.errors import UnsupportedModel
from offsite.task import checkpoint
from offsite.task.image_classification import (
    LabelledImages,
    dtype_of,
    label_losses,
    label_tally,
    labelled_images,
    two_labels,
)
from offsite.task.image_text_processor import ImageTextProcessor
from offsite.task.images import check_records, plain_pixels
from offsite.task.labels import names_of
from offsite.task.spec import Record, Tally
from offsite.task.tokenizer import Tokenizer

TEMPLATE = "a photo of a {}."  # arXiv 2103.00020, section 3.1.4
HIGHEST_ENDS = 2  # an end-of-text id that old configurations have by mistake; CLIP then reads at the highest id


@dataclass(frozen=True)
class PromptedImages:
    """Labelled images with the prompts of all labels; one row is one image, and every row has the same prompts.

    Attributes:
      images: n images with their labels.
      prompts: int64 (classes, T), public; padded on the right with their own end, behind which CLIP does not look.
    """

    images: LabelledImages
    prompts: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def targets(self) -> torch.Tensor:
        """1 for each image that is scored, else 0, int64 (n,)."""
        return self.images.targets

    def select(self, indices: Any) -> "PromptedImages":
        """Returns the rows at the indices, in that order; integers of any sequence, array or tensor, none too."""
        return replace(self, images=self.images.select(indices))

    def to(self, device: torch.device | str) -> "PromptedImages":
        """Returns the examples on a device."""
        return PromptedImages(self.images.to(device), self.prompts.to(device))

    def within(self, model: nn.Module) -> "PromptedImages":
        """Returns the examples with the label taken from those whose label the model does not have."""
        return replace(self, images=self.images.within(model))


class ClipClassification:
    """The task of CLIP: the image through one tower, the prompts through the other, a likelihood over the prompts.

    The prompts go through the model once a call, whatever the number of images, with gradients where an adapter sits in
    the text tower.

    Args:
      template: text of a prompt, with {} for the label's name.
    """

    name: ClassVar[str] = "clip_classification"
    kind: ClassVar[str] = "encoder"
    columns: ClassVar[Mapping[str, type]] = {"image": object, "label": object}

    def __init__(self, template: str = TEMPLATE) -> None:
        self._template = template

    def load(self, path: Path | str, *, dtype: torch.dtype) -> Any:
        """Returns the model of a directory; see `task.checkpoint.load`.

        Raises:
          UnsupportedModel: it is an encoder, but not CLIP.
        """
        model = checkpoint.load(path, dtype=dtype, kind=self.kind)
        if model.config.model_type != "clip":
            raise UnsupportedModel(f"model_type={model.config.model_type!r}: prompts need 'clip'; choose another model")
        return model

    def load_processor(self, path: Path | str) -> ImageTextProcessor:
        """Returns the image processor and the tokenizer of a directory."""
        return ImageTextProcessor.of(path)

    def encode(
        self, processor: ImageTextProcessor, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> PromptedImages:
        """Returns each record as an example; prompts are as long as the names in the model's id2label make them.

        Raises:
          ConfigError: the split is not "truncate".
          DataError: there is no record, a record's image is none, or its label is none of the model's.
          UnsupportedModel: the labels have no names, or processor and model do not belong together.
        """
        check_records(records, split, self.name)
        images = labelled_images(processor.images, records, model_config, model_config.vision_config)
        return PromptedImages(images, class_prompts(processor.words, model_config, self._template))

    def losses(self, model: nn.Module, batch: PromptedImages) -> torch.Tensor:
        """Returns the negative log-likelihood of each image's label among the prompts, nats, float32 (B,)."""
        return label_losses(self._logits(model, batch), batch.images.labels)

    def tally(self, model: nn.Module, batch: PromptedImages) -> Tally:
        """Returns the sums of a batch; see `task.image_classification.label_tally`."""
        with torch.no_grad():
            return label_tally(self._logits(model, batch), batch.images.labels)

    def run(self, model: nn.Module, batch: PromptedImages) -> None:
        """Calls a model once with images and prompts, without gradients."""
        with torch.no_grad():
            self._logits(model, batch)

    def invented(self, model: nn.Module, length: int, *, seed: int) -> PromptedImages:
        """Returns two images that nobody took, with prompts of different lengths that nobody wrote."""
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
    """Returns the prompt of each label of a CLIP model, int64 (classes, T), padded with its own last token.

    Raises:
      UnsupportedModel: the labels have no names, or the tokenizer does not end a text where the model reads it.
    """
    names, text = names_of(model_config), model_config.text_config
    if names == [f"LABEL_{number}" for number in range(len(names))]:
        raise UnsupportedModel("id2label: the names of the labels are what CLIP reads; write them into config.json")
    found = words.singles([template.format(name) for name in names], int(text.max_position_embeddings))
    for name, one in zip(names, found, strict=True):
        if not one.ids or not 0 <= max(one.ids) < text.vocab_size or _read_at(one.ids, text) != len(one.ids) - 1:
            raise UnsupportedModel(
                f"label={name!r}: its prompt does not end with the model's end-of-text token, where CLIP reads it; "
                "copy the model's own tokenizer.json"
            )
    width = max(len(one.ids) for one in found)
    return torch.tensor([one.ids + one.ids[-1:] * (width - len(one.ids)) for one in found], dtype=torch.long)


def _read_at(ids: Sequence[int], text_config: Any) -> int:
    """Returns the place at which CLIP reads a text: its first end, or its highest id; -1 where there is none."""
    end = max(ids) if text_config.eos_token_id == HIGHEST_ENDS else int(text_config.eos_token_id)
    return ids.index(end) if end in ids else -1

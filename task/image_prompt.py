"""Diffusion conditioned on a text and on another image, which only the method `ip_adapter` reads."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from offsite.task.arrays import floats
from offsite.task.diffusion import TextToImage, text_width
from offsite.task.record_fields import FIELDS, IMAGES
from offsite.task.records import fault
from offsite.task.spec import Record

MAX_TOKENS = 257  # of one image, at most: CLIP's 256 patches and its class token; an IP-Adapter has 4 or 16
UNSEEN, IMAGE = 0, -1  # values in a mask, which `adapter.cross_attention` reads
_STATES, _MASK = "encoder_hidden_states", "encoder_attention_mask"


class ImagePromptToImage(TextToImage):
    """The task of an IP-Adapter: `TextToImage` with another image, as an image encoder and a projection encode it.

    The image's tokens follow the text's tokens and have the same width. The mask hides the image's tokens from the
    model and also marks them, so that an adapter can attend to them (Ye et al. 2023, arXiv 2308.06721, section 3.2).
    Texts and images have each as many places as the job says: padding to the largest image of the data would let that
    record change the rounding of every other record's loss, and a slope of DP-ZO divides such differences by a small
    spacing.
    """

    name: ClassVar[str] = "image_prompt_to_image"
    columns: ClassVar[Mapping[str, type]] = FIELDS["image_prompt_to_image"]

    def conditions(
        self, records: Sequence[Record], length: int, model_config: Any
    ) -> tuple[dict[str, Tensor], list[bool]]:
        """Returns the texts of records, followed by the images, and whether each record is valid.

        Images have `places` places, whatever the records hold; an image of more tokens is a fault.
        """
        room = places(length)
        conditions, valid = super().conditions(records, length, model_config)
        width = text_width(model_config)
        images = [floats(records, index, IMAGES, (None, width)) for index in range(len(records))]
        for index, image in enumerate(images):
            if image is not None and len(image) > room:
                rule = f"tokens={len(image)} must be at most {room}, as data.length says; pool them, or raise it"
                fault(records, index, IMAGES, rule)
                images[index] = None
        valid = [good and image is not None for good, image in zip(valid, images, strict=True)]
        shown = [torch.zeros(1, width) if image is None else image for image in images]
        return _append_images(conditions, shown, room), valid

    def dummy_conditions(self, model_config: Any, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns two random texts and two random images, in both cases one shorter than the other."""
        conditions = super().dummy_conditions(model_config, length, generator)
        width, room = text_width(model_config), places(length)
        sizes = (min(2, room), min(4, room))
        images = [torch.randn((size, width), generator=generator) for size in sizes]
        return _append_images(conditions, images, room)


def places(length: int) -> int:
    """Returns the number of places for an image's tokens in every example of a job with texts of `length` tokens."""
    return min(length, MAX_TOKENS)


def _append_images(conditions: dict[str, Tensor], images: list[Tensor], room: int) -> dict[str, Tensor]:
    """Returns texts followed by images, and their mask; images of fewer than `room` tokens are padded."""
    states, mask = conditions[_STATES], conditions[_MASK]
    table = torch.zeros(len(images), room, states.shape[-1])
    marks = torch.full(table.shape[:2], UNSEEN)
    for row, mark, image in zip(table, marks, images, strict=True):
        row[: len(image)], mark[: len(image)] = image, IMAGE
    return {_STATES: torch.cat([states, table], dim=1), _MASK: torch.cat([mask, marks], dim=1)}

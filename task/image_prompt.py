"""Images out of noise by a text and by another image, which the method `ip_adapter` looks at and no other."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from offsite.task.arrays import floats
from offsite.task.diffusion import LATENTS, PROMPT, TextToImage, text_width
from offsite.task.records import fault
from offsite.task.spec import Record

IMAGES = "image_embeds"
MOST = 257  # tokens of one image: CLIP's 256 patches and its class; an IP-Adapter has 4 or 16
UNSEEN, IMAGE = 0, -1  # in a mask; `adapter.cross_attention` reads them
_STATES, _MASK = "encoder_hidden_states", "encoder_attention_mask"


class ImagePromptToImage(TextToImage):
    """The task of an IP-Adapter: as `TextToImage`, and what an image encoder and projection made of another image.

    The image's tokens stand behind the text's, as wide as these. A model does not see them, since their mask says so;
    the mask also says which they are, so that an adapter can (Ye et al. 2023, arXiv 2308.06721, section 3.2).
    """

    name: ClassVar[str] = "image_prompt_to_image"
    columns: ClassVar[Mapping[str, type]] = {LATENTS: object, PROMPT: object, IMAGES: object}

    def given(self, records: Sequence[Record], length: int, model_config: Any) -> tuple[dict[str, Tensor], list[bool]]:
        """Returns the texts of records, images behind them, and which records are right."""
        given, right = super().given(records, length, model_config)
        width = text_width(model_config)
        found = [floats(records, index, IMAGES, (None, width)) for index in range(len(records))]
        for index, image in enumerate(found):
            if image is not None and len(image) > MOST:
                fault(records, index, IMAGES, f"has {len(image)} tokens, at most {MOST} are read; pool them")
                found[index] = None
        right = [one and image is not None for one, image in zip(right, found, strict=True)]
        return _behind(given, [torch.zeros(1, width) if image is None else image for image in found]), right

    def told(self, model_config: Any, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns two texts and images, of each one shorter than the other."""
        given = super().told(model_config, length, generator)
        width = text_width(model_config)
        return _behind(given, [torch.randn((size, width), generator=generator) for size in (2, 4)])


def _behind(given: dict[str, Tensor], images: list[Tensor]) -> dict[str, Tensor]:
    """Returns texts and their mask with images behind, shorter ones padded."""
    states, mask = given[_STATES], given[_MASK]
    table = torch.zeros(len(images), max(map(len, images)), states.shape[-1])
    marks = torch.full(table.shape[:2], UNSEEN)
    for row, mark, image in zip(table, marks, images, strict=True):
        row[: len(image)], mark[: len(image)] = image, IMAGE
    return {_STATES: torch.cat([states, table], dim=1), _MASK: torch.cat([mask, marks], dim=1)}

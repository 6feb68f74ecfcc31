"""Images as their files hold them: decoded one at a time when a record is encoded, and never all at once.

A limit on the memory of all decoded images together would let the size of one image decide about every other one.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from offsite.errors import DataError
from offsite.task.image_ends import is_whole

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # of a file with several images only the first is read
NO_IMAGE = (
    "is a text and no image, because no path is followed; give encoded images (reader 'image_parquet'), or a folder of "
    "images for each class (reader 'images')"
)
DAMAGED = (
    f"is not a readable image ({', '.join(FORMATS)}); convert another format, copy a damaged file again, or remove it"
)
MAX_PIXELS = 1 << 26  # of one image; a file of few bytes can need more memory than the machine has
DEEP = ("I", "F")  # PIL's modes of 16 and 32 bits; a conversion would turn every value over 255 white
# PIL's names for values of more bits in a file, as in "RGB;16B"; "BGR;16" has 16 bits for all three channels together.
_WIDE = re.compile(r"(?!BGR)[A-Za-z]+;(?:12|16|32|64)")
_BITS_OF_SAMPLES, _SAMPLE_FORMAT, _UNSIGNED = 258, 339, (1, 4)  # tags of TIFF, and its formats of plain numbers


@dataclass(frozen=True)
class EncodedImage:
    """One image of a data file.

    Attributes:
      source: content of the image's file, or the path of the file.
    """

    source: bytes | Path

    def decoded(self) -> np.ndarray:
        """Returns the image as uint8: (H, W) for a grey image, else (H, W, 3); turned as its EXIF orientation says.

        Raises:
          DataError: the image is damaged, cut off, too large or too deep; the message is a rule that names no file.
          OSError: the file cannot be read now, which has nothing to do with its content.
        """
        content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if rule := _broken_rule(image, content):
                    raise DataError(rule)
                upright = ImageOps.exif_transpose(image)  # as transformers' loader turns it
                return np.array(upright if upright.mode == "L" else upright.convert("RGB"))
        except DataError:
            raise
        except Exception:  # a damaged image can make PIL fail in any way, and the way tells about the image
            raise DataError(DAMAGED) from None


def _broken_rule(image: Image.Image, content: bytes) -> str:
    if image.width * image.height > MAX_PIXELS:
        return f"must have at most {MAX_PIXELS} pixels; make the image smaller"
    if _is_deep(image):
        return (
            "must have at most 8 bits a channel; choose the range of values that matters, and write the image with "
            "8 bits"
        )
    if not is_whole(content, image.format or ""):
        return DAMAGED
    return ""


def _is_deep(image: Image.Image) -> bool:
    """Says whether a file holds more than 8 bits of a channel; PIL would keep 8 of these bits without a word.

    PIL's mode does not tell, since PIL makes 8 bits of the 16 of a colour, or of a grey with alpha. PIL's names for the
    values in the file tell, and in a TIFF file the tags.
    """
    tags: Any = getattr(image, "tag_v2", {})
    samples = tags.get(_BITS_OF_SAMPLES, (1,))
    kinds = tags.get(_SAMPLE_FORMAT, (1,))
    names = [name for tile in getattr(image, "tile", ()) for name in _texts(tile)]
    return (
        image.mode.startswith(DEEP)
        or any(_WIDE.match(name) for name in names)
        or max(samples) > 8
        or any(kind not in _UNSIGNED for kind in kinds)
    )


def _texts(value: Any) -> Iterator[str]:
    """Yields every text in nested tuples and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _texts(part)

"""Images as their files hold them: decoded one at a time when a record is encoded, and never all at once.

A limit on the memory of all decoded images together would let the size of one image decide about every other one.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from offsite.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # of a file with several images only the first is read
MAX_PIXELS = 1 << 26  # of one image; a file of few bytes can need more memory than the machine has
DEEP = ("I", "F")  # PIL's modes of 16 and 32 bits; a conversion would turn every value over 255 white


@dataclass(frozen=True)
class EncodedImage:
    """One image of a data file.

    Attributes:
      source: content of the image's file, or the path of the file.
    """

    source: bytes | Path

    def decoded(self) -> np.ndarray:
        """Returns the image as uint8: (H, W) for a grey image, else (H, W, 3).

        Raises:
          DataError: the image is damaged, too large or too deep; the message is a rule that names no file.
          OSError: the file cannot be read now, which has nothing to do with its content.
        """
        content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if rule := _broken_rule(image):
                    raise DataError(rule)
                return np.array(image if image.mode == "L" else image.convert("RGB"))
        except DataError:
            raise
        except Exception:  # a damaged image can make PIL fail in any way, and the way tells about the image
            raise DataError("is not a readable image; remove it") from None


def _broken_rule(image: Image.Image) -> str:
    if image.width * image.height > MAX_PIXELS:
        return f"must have at most {MAX_PIXELS} pixels; make the image smaller"
    if image.mode.startswith(DEEP):
        return (
            "must have at most 8 bits a channel; choose the range of values that matters, and write the image with "
            "8 bits"
        )
    return ""

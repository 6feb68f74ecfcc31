"""task.encoded_image: images are turned as transformers turns them, and none is narrowed or filled up silently."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from offsite.errors import DataError
from offsite.task.encoded_image import EncodedImage
from offsite.task.image_ends import ZEROS

GENERATOR = np.random.default_rng(3)
COLOUR = GENERATOR.integers(0, 256, (9, 14, 3), dtype=np.uint8)
GREY = GENERATOR.integers(0, 256, (9, 14), dtype=np.uint8)
WRITTEN = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


# Orientation -> the upright image, by the definition of the tag: the sides at which the stored row 0 and column 0 lie.
UPRIGHT = {
    1: lambda stored: stored,  # top, left
    2: lambda stored: stored[:, ::-1],  # top, right
    3: lambda stored: stored[::-1, ::-1],  # bottom, right
    4: lambda stored: stored[::-1],  # bottom, left
    5: lambda stored: stored.swapaxes(0, 1),  # left, top
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda stored: stored.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda stored: stored.swapaxes(0, 1)[::-1],  # left, bottom
}


def content_of(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def turned(array, form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return content_of(Image.fromarray(array), form, exif=exif, **WRITTEN[form])


def rgb(array):
    return array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2)


@pytest.mark.parametrize("form", WRITTEN)
def test_every_orientation_is_turned_as_transformers_turns_it(form):
    """From bytes: Pillow reads an uncompressed grey TIFF by its path in another way, and then turns it wrongly."""
    for orientation in range(1, 9):
        for array in (COLOUR, GREY):
            content = turned(array, form, orientation)
            found = rgb(EncodedImage(content).decoded())
            assert np.array_equal(found, np.asarray(load_image(Image.open(io.BytesIO(content))))), orientation
            if form != "JPEG":
                assert np.array_equal(found, UPRIGHT[orientation](rgb(array))), orientation


def test_an_orientation_that_does_not_exist_turns_nothing():
    assert np.array_equal(EncodedImage(turned(COLOUR, "PNG", 9)).decoded(), COLOUR)


def deep_png(kind, channels, bits=16):
    """Returns a PNG of a colour type with random values of 16 bits, or of 8."""
    values = GENERATOR.integers(0, 256, (4, 5 * channels * bits // 8), dtype=np.uint8)
    lines = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 4, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def tiff(order, bits, photometric=1, kind=None, extra=()):
    """Returns an uncompressed TIFF of 4 x 3 pixels whose samples have the given numbers of bits."""
    size = 4 * 3 * sum(bits) // 8
    entries = [(256, 3, [4]), (257, 3, [3]), (258, 3, list(bits)), (259, 3, [1]), (262, 3, [photometric])]
    entries += [(273, 4, [8]), (277, 3, [len(bits)]), (278, 3, [3]), (279, 4, [size])]
    entries += [(338, 3, list(extra))] if extra else []
    entries += [(339, 3, [kind] * len(bits))] if kind else []
    data, at = GENERATOR.integers(1, 255, size, dtype=np.uint8).tobytes(), 8 + size + size % 2
    later, table = b"", struct.pack(order + "H", len(entries))
    behind = at + 2 + 12 * len(entries) + 4
    for tag, width, values in entries:
        packed = b"".join(struct.pack(order + ("H" if width == 3 else "I"), value) for value in values)
        if len(packed) > 4:
            field, later = struct.pack(order + "I", behind + len(later)), later + packed
        else:
            field = packed.ljust(4, b"\0")
        table += struct.pack(order + "HHI", tag, width, len(values)) + field
    mark = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, at)
    return mark + data + b"\0" * (size % 2) + table + struct.pack(order + "I", 0) + later


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["grey", "RGB", "LA", "RGBA"])
def test_a_png_of_16_bits_is_refused_and_the_same_of_8_is_read(kind, channels):
    with pytest.raises(DataError, match="at most 8 bits a channel"):
        EncodedImage(deep_png(kind, channels)).decoded()
    assert EncodedImage(deep_png(kind, channels, bits=8)).decoded().shape[:2] == (4, 5)


DEEP_TIFF = [(1, (12,), None, ()), (1, (16,), None, ()), (0, (16,), None, ()), (1, (16,), 2, ()), (1, (32,), 3, ())]
DEEP_TIFF += [(2, (16, 16, 16), None, ()), (2, (16, 16, 16, 16), None, (2,)), (5, (16, 16, 16, 16), None, ())]
DEEP_TIFF += [(1, (8,), 2, ())]  # 8 bits with a sign, which PIL reads as if there were none


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("photometric", "bits", "kind", "extra"), DEEP_TIFF)
def test_a_tiff_that_pil_would_narrow_is_refused(order, photometric, bits, kind, extra):
    content = tiff(order, bits, photometric, kind, extra)
    with pytest.raises(DataError, match=r"at most 8 bits a channel|not a readable image"):
        EncodedImage(content).decoded()
    flat = tiff(order, (8,) * len(bits), photometric, None, extra)
    assert EncodedImage(flat).decoded().shape[:2] == (3, 4)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
def test_images_of_up_to_8_bits_stay_what_pil_makes_of_them(mode):
    image = Image.fromarray(COLOUR).convert(mode)
    form = "TIFF" if mode == "CMYK" else "PNG"
    assert np.array_equal(rgb(EncodedImage(content_of(image, form)).decoded()), np.asarray(image.convert("RGB")))


def test_five_bits_a_channel_are_no_sixteen():
    header = struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 0, 8, 0, 0, 0, 0)
    content = (
        b"BM" + struct.pack("<IHHI", 54 + 8, 0, 0, 54) + header + struct.pack("<4H", 0x7FFF, 0x7C00, 0x03E0, 0x001F)
    )
    assert EncodedImage(content).decoded()[1].tolist() == [[255, 255, 255], [255, 0, 0]]


CUT = {
    "JPEG": {},
    "JPEG progressive": {"progressive": True},
    "PNG": {},
    "WEBP": {},
    "WEBP lossless": {"lossless": True},
}
CUT |= {"GIF": {}, "TIFF": {"compression": "tiff_lzw"}, "BMP": {}, "TIFF plain": {}}
RAW = ("BMP", "TIFF plain")  # zeros are pixels there


@pytest.mark.parametrize("kind", ["noise", "slope"])
@pytest.mark.parametrize("name", CUT)
def test_a_truncated_image_is_refused_wherever_it_ends(name, kind):
    """Also where a copy that stopped was filled up with zeros, of which the library makes pixels without a word."""
    slope = (np.add.outer(2 * np.arange(72), np.arange(112))[:, :, None] % 256).repeat(3, 2).astype(np.uint8)
    array = GENERATOR.integers(0, 256, slope.shape, dtype=np.uint8) if kind == "noise" else slope
    whole = content_of(Image.fromarray(array), name.split()[0], **CUT[name])
    shown = EncodedImage(whole).decoded()
    for share in (0.3, 0.5, 0.7, 0.9, 0.97):
        cut = whole[: int(len(whole) * share)]
        rest = len(whole) - len(cut)
        for content in (cut,) if name in RAW or rest < ZEROS else (cut, cut + bytes(rest)):
            with contextlib.suppress(DataError):
                assert np.array_equal(EncodedImage(content).decoded(), shown), share
        if share < 0.9:
            with pytest.raises(DataError, match="is not a readable image"):
                EncodedImage(cut).decoded()
    assert np.array_equal(EncodedImage(whole + b"a camera's trailer").decoded(), shown)


def test_a_thumbnail_in_front_is_no_end_of_the_image():
    small = content_of(Image.fromarray(COLOUR), "JPEG")
    exif = b"\xff\xe1" + struct.pack(">H", len(small) + 8) + b"Exif\0\0" + small
    array = np.repeat(np.repeat(COLOUR, 8, axis=0), 8, axis=1)
    plain = content_of(Image.fromarray(array), "JPEG")
    whole = plain[:2] + exif + plain[2:]
    assert np.array_equal(EncodedImage(whole).decoded(), EncodedImage(plain).decoded())
    with pytest.raises(DataError, match="is not a readable image"):
        EncodedImage(whole[: len(whole) // 2 + len(exif) // 2] + bytes(500)).decoded()

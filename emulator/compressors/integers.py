"""Round to nearest: every matrix of the middle becomes small integers in groups, whatever goes through it."""

from math import prod

from emulator.compressors.arguments import group
from emulator.draft import Station
from emulator.quantize import quantize, stored_bytes
from errors import RangeError, UnsupportedModel


def worth(shape: tuple[int, ...], bits: int, length: int) -> bool:
    """Returns whether codes, scales and minima are smaller than the 16-bit tensor; they are not for very short rows."""
    return stored_bytes(shape, bits, length) < 2 * prod(shape)


def rounded(bits: int, station: Station, argument: str) -> None:
    """Rounds every matrix to so many bits."""
    length = group(f"int{bits}", argument)
    for path, weight in station.span.matrices().items():
        if worth(tuple(weight.shape), bits, length):
            try:
                station.span.store(path, bits, length, quantize(weight, bits, length))
            except RangeError as error:
                raise UnsupportedModel(f"tensor={path}: {error}") from error

"""Round to nearest: every matrix of the middle becomes small integers in groups, whatever goes through it."""

from offsite.emulator.calibration.draft import Station
from offsite.emulator.compressors.arguments import scheme
from offsite.emulator.package.quantize import quantize
from offsite.errors import RangeError, UnsupportedModel


def rounded(bits: int, station: Station, argument: str) -> None:
    """Rounds every matrix to so many bits."""
    chosen = scheme("int", bits, argument)
    for path, weight in station.span.matrices().items():
        if chosen.worth(tuple(weight.shape)):
            try:
                station.span.store(path, chosen, quantize(weight, chosen))
            except RangeError as error:
                raise UnsupportedModel(f"tensor={path}: {error}") from error

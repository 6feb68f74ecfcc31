"""Rounding to nearest: every matrix of the middle becomes small integers in groups, without public examples."""

from offsite.emulator.calibration.draft import SegmentContext
from offsite.emulator.package.quantize import quantize
from offsite.emulator.package.recipe_arguments import scheme
from offsite.errors import RangeError, UnsupportedModel


def rounded(bits: int, context: SegmentContext, argument: str) -> None:
    """Rounds every matrix of a segment to codes of 3, 4 or 8 bits."""
    chosen = scheme("int", bits, argument)
    for path, weight in context.draft.matrices().items():
        if chosen.worth(tuple(weight.shape)):
            try:
                context.draft.store(path, chosen, quantize(weight, chosen))
            except RangeError as error:
                raise UnsupportedModel(f"tensor={path}: {error}") from error

"""Numbers as people read them; a dash stands for a missing number."""

import math

NONE = "\N{EN DASH}"


def number(value: float | None, digits: int = 3) -> str:
    """Returns a number with `digits` digits after the point, or a dash for a missing number."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.{digits}f}"


def short(value: float | None) -> str:
    """Returns a number with three significant digits, with an exponent only far from 1."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.3g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.2e}"


def size(count: float | None) -> str:
    """Returns a number of bytes in decimal units."""
    if count is None:
        return NONE
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(value) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def percent(share: float | None) -> str:
    """Returns a share as a percentage."""
    return NONE if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def count(value: float | None) -> str:
    """Returns a whole number with a comma between thousands."""
    return NONE if value is None else f"{value:,}"


def signed(value: float | None) -> str:
    """Returns a change with its sign and three digits after the point."""
    return NONE if value is None or not math.isfinite(value) else f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")

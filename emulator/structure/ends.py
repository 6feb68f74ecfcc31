"""The numbers that an emulator's geometry takes; readable without a model library."""

from offsite.errors import ConfigError

SANDWICH, PARALLEL = "sandwich", "parallel"


def check_ends(first: int, last: int, shape: str) -> None:
    """Checks the numbers of verbatim blocks and the shape; the number of a model's blocks shows in the model alone.

    Raises:
      ConfigError: a count is negative, no block would carry an adapter, or the shape is not known.
    """
    if shape not in (SANDWICH, PARALLEL):
        raise ConfigError(f"shape={shape!r} is neither {SANDWICH} nor {PARALLEL}; choose one")
    min_ends = 1 if shape == SANDWICH else 0
    if first < 0 or last < 0 or first + last < min_ends:
        raise ConfigError(
            f"first={first} last={last}: neither may be negative and one must be at least 1, "
            "or no block carries an adapter; set first=2 last=2"
        )

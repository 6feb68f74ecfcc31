"""The ranges of a plan's public numbers: inside, sums and products stay far from the ends of 32-bit numbers."""

from offsite.errors import ConfigError

# Nothing honest lies outside: a clip is the norm of a gradient, and learning rates are some powers of ten around 1.
LOWEST, HIGHEST = 1e-9, 1e9
# The largest entry of an update is a product: of a clip, a learning rate, a number of steps and a share of an adapter.
LOWEST_UPDATE, HIGHEST_UPDATE = 1e-27, 1e27
# Weights and losses are 32-bit numbers: below, a step along a direction is lost in the rounding of both.
LOWEST_SPACING = 1e-5
# Records in one forward pass. Some hundred keep every processor busy, and the engines are tested up to this number.
MAX_PHYSICAL_BATCH = 1 << 10


def check_range(name: str, value: float, lowest: float = LOWEST, highest: float = HIGHEST) -> None:
    """Checks that a number lies in [lowest, highest].

    Raises:
      ConfigError: the number lies outside, or is NaN.
    """
    if not lowest <= value <= highest:  # False for NaN; a whole number of any length is compared and not converted
        raise ConfigError(f"{name}={value!s:.24} must be from {lowest:g} to {highest:g}; correct the plan")

"""Quantisation schemes: bits of a code, inputs that share a scale, and whether the scales are codes, too."""

from dataclasses import dataclass
from math import ceil, prod

from offsite.errors import ConfigError

BITS = (3, 4, 8)
FINE_BITS = 6
FINE = f"/{FINE_BITS}"
MAX_GROUP = 2**20
LANES = {3: (8, 3), 4: (2, 1), 6: (4, 3), 8: (1, 1)}  # bits -> (codes that lie together, bytes that hold them)


@dataclass(frozen=True)
class Scheme:
    """One way to quantise a tensor, written as "int4:64" or "int4:32/6".

    Attributes:
      bits: width of a code: 3, 4 or 8.
      group: number of inputs that share a scale and a minimum, 2 <= group < 2**20.
      fine: True if scales and minima are 6-bit multiples of two fp16 numbers for each row (double quantisation,
        Dettmers et al. 2023, section 3), so that small groups cost few bits; with 3 and 4 bits only.

    Raises:
      ConfigError: an attribute is out of range.
    """

    bits: int
    group: int
    fine: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS or not 2 <= self.group < MAX_GROUP or (self.fine and self.bits == max(BITS)):
            raise ConfigError(
                f"bits={self.bits} group={self.group} fine={self.fine}: bits must be 3, 4 or 8, the group at least 2, "
                "and scales fine with 3 or 4 bits only; use int4:64, int4:32/6 or int8:64"
            )

    def __str__(self) -> str:
        """Returns the text that stands in manifests."""
        return f"int{self.bits}:{self.group}{FINE if self.fine else ''}"

    @classmethod
    def of(cls, name: str, argument: str) -> "Scheme | None":
        """Returns the scheme of a name and an argument, such as "int4" and "32/6"; None if they are not a scheme."""
        group = argument.removesuffix(FINE)
        known = {f"int{bits}": bits for bits in BITS}
        if name not in known or not (group.isascii() and group.isdecimal() and len(group) < 10):
            return None
        try:
            return cls(known[name], int(group), fine=argument.endswith(FINE))
        except ConfigError:
            return None

    @property
    def pieces(self) -> tuple[str, ...]:
        """Names of the pieces in which a tensor is stored."""
        return ("codes", "scales", "minima", "spans") if self.fine else ("codes", "scales", "minima")

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Returns the bytes of a stored tensor: codes, scales and minima, and the units of a fine scheme."""
        rows, columns = shape[0], prod(shape[1:])
        groups = rows * ceil(columns / self.group)
        grids = 2 * packed_bytes(groups, FINE_BITS) + 2 * 2 * rows if self.fine else 2 * 2 * groups
        return packed_bytes(rows * columns, self.bits) + grids

    def worth(self, shape: tuple[int, ...]) -> bool:
        """Returns whether the codes take fewer bytes than the tensor at 16 bits; for very short rows they do not."""
        return self.stored_bytes(shape) < 2 * prod(shape)


def packed_bytes(count: int, bits: int) -> int:
    """Returns the number of bytes that `bit_packing.pack` makes of `count` codes."""
    together, size = LANES[bits]
    return ceil(count / together) * size

"""What the sites of a job were given: the emulators that a report tells of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ShippedEmulator:
    """One emulator and the sites that got it.

    Attributes:
      sites: names of the sites, sorted.
      sha256: digest of the package's manifest, hexadecimal.
      shipped_bytes: bytes of the weights.
      package_bytes: bytes of all files of the package.
      recipe: compressors of the blocks between the slots, in order.
      embedding: storage of the word tables.
      gradient_cosine: result of the gate.
      public_loss: loss on public records before any training.
    """

    sites: tuple[str, ...]
    sha256: str
    shipped_bytes: int
    package_bytes: int
    recipe: tuple[str, ...]
    embedding: str
    gradient_cosine: float
    public_loss: float


@dataclass(frozen=True)
class Composition:
    """What the default emulator consists of, in bytes and shares of the full model at 16 bits.

    Attributes:
      full_bytes: bytes of the full model.
      slot_bytes: bytes of the blocks that carry the adapter.
      embedding_bytes: bytes of the word tables.
      middle_bytes: bytes of the compressed blocks.
      middle_ratio: the same as a share of these blocks in the full model.
      verbatim_share: share of the full model that is shipped bit for bit.
      gate: least gradient cosine that was allowed.
    """

    full_bytes: int
    slot_bytes: int
    embedding_bytes: int
    middle_bytes: int
    middle_ratio: float
    verbatim_share: float
    gate: float


@dataclass(frozen=True)
class EmulatorFacts:
    """All emulators of a job: the default, what the default consists of, and the others."""

    default: ShippedEmulator
    composition: Composition
    variants: tuple[ShippedEmulator, ...] = ()

    @property
    def all(self) -> tuple[ShippedEmulator, ...]:
        """All emulators, the default first."""
        return (self.default, *self.variants)

"""The emulators that the sites of a job got, as a report shows them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ShippedEmulator:
    """One emulator and its sites.

    Attributes:
      sites: names of the sites that got the emulator, sorted.
      sha256: SHA-256 of the package's manifest, hexadecimal.
      shipped_bytes: bytes of the weights.
      package_bytes: bytes of all files of the package.
      recipe: compressors of the blocks between the slots, in order.
      embedding: storage of the word tables.
      gradient_cosine: result of the gate, from -1 to 1.
      public_loss: loss on public records before any training, in the task's unit.
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
    """The parts of the default emulator, in bytes and in shares of the full model at 16 bits.

    Attributes:
      full_bytes: bytes of the full model.
      slot_bytes: bytes of the blocks that carry the adapter.
      embedding_bytes: bytes of the word tables.
      middle_bytes: bytes of the compressed blocks between.
      middle_ratio: middle_bytes as a share of these blocks in the full model.
      verbatim_share: share of the full model that is shipped bit for bit, from 0 to 1.
      gate: smallest allowed gradient cosine, from -1 to 1.
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
    """All emulators of a job: the default, the parts of the default, and the others."""

    default: ShippedEmulator
    composition: Composition
    variants: tuple[ShippedEmulator, ...] = ()

    @property
    def all(self) -> tuple[ShippedEmulator, ...]:
        """All emulators, the default first."""
        return (self.default, *self.variants)

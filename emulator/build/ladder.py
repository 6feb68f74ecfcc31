"""The ladder of a search: the states that one block can have, from dear to cheap, for each shape of emulator."""

from dataclasses import dataclass

from offsite.emulator.structure.ends import PARALLEL, SANDWICH

SKIP = "skip"
State = tuple[int, int]  # (number of the width, number of the storage)


@dataclass(frozen=True)
class Ladder:
    """The possible states of one block: a width and a storage, each from dear to cheap.

    A left-out block needs no storage. Neighbouring widths and bits differ measurably on real models. With a third of
    the channels, a block of the usual proportions (attention is a quarter of the work) needs just under half of the
    compute.

    Attributes:
      widths: compressors that set each width, in order of cost; ("skip",) leaves the block out.
      storages: compressors that set each storage, in order of cost.
    """

    widths: tuple[tuple[str, ...], ...]
    storages: tuple[tuple[str, ...], ...]

    def states(self) -> list[State]:
        """Returns every state, the dearest first."""
        return [(i, j) for i, width in enumerate(self.widths) for j in range(self._storages(width))]

    def below(self, state: State) -> list[State]:
        """Returns the states one step down."""
        i, j = state
        narrower = [(i + 1, min(j, self._storages(self.widths[i + 1]) - 1))] if i + 1 < len(self.widths) else []
        return narrower + ([(i, j + 1)] if j + 1 < self._storages(self.widths[i]) else [])

    def actions(self, state: State) -> tuple[str, ...]:
        """Returns the compressors of a state, in order."""
        width = self.widths[state[0]]
        return width if width == (SKIP,) else (*width, *self.storages[state[1]])

    def _storages(self, width: tuple[str, ...]) -> int:
        return 1 if width == (SKIP,) else len(self.storages)


LADDERS = {
    SANDWICH: Ladder(
        widths=((), ("narrow:0.5",), ("narrow:0.33",), ("narrow:0.2",), (SKIP,)),
        storages=(("int8:128",), ("gptq4:64",)),
    ),
    PARALLEL: Ladder(
        widths=((),), storages=(("int8:128",), ("gptq4:32/6",), ("gptq4:128",), ("gptq3:32/6",), ("gptq3:128",))
    ),
}

"""The plan of a build: each block of the middle stays, is left out, or runs on another block's weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

KEEP, SKIP, SHARE = "keep", "skip", "share:"


@dataclass(frozen=True)
class Plan:
    """The structure of the middle.

    Attributes:
      actions: action for each block path: "keep", "skip", or "share:OWNER" with the path of a block that is kept.
      apart: True if other modules stand between the blocks.
    """

    actions: Mapping[str, str]
    apart: bool = False

    @classmethod
    def whole(cls, blocks: Iterable[str], *, apart: bool) -> "Plan":
        """Returns the plan that keeps every block."""
        return cls(dict.fromkeys(blocks, KEEP), apart)

    @property
    def kept(self) -> tuple[str, ...]:
        """Paths of the blocks that stay with weights of their own."""
        return tuple(path for path, action in self.actions.items() if action == KEEP)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Paths of the blocks that are left out."""
        return tuple(path for path, action in self.actions.items() if action == SKIP)

    @property
    def shared(self) -> dict[str, str]:
        """Paths of the blocks that run on another block's weights, each with the owner's path."""
        return {path: a.removeprefix(SHARE) for path, a in self.actions.items() if a.startswith(SHARE)}

    def skip(self, paths: Iterable[str]) -> "Plan":
        """Returns the plan without some blocks."""
        return self._with(dict.fromkeys(paths, SKIP))

    def share(self, owners: Mapping[str, str]) -> "Plan":
        """Returns the plan in which some blocks run on another block's weights, path to the owner's path."""
        return self._with({path: f"{SHARE}{owner}" for path, owner in owners.items()})

    def segments(self) -> list["Segment"]:
        """Returns the middle as segments, in order: each a block that runs and the left-out blocks behind it.

        Blocks that stand apart are a segment each: the output of a block is not the input of the next.
        """
        segments: list[Segment] = []
        for path, action in self.actions.items():
            if action != SKIP:
                segments.append(Segment(path, (), self.shared.get(path)))
            elif segments and not self.apart:
                segments[-1] = Segment(segments[-1].head, (*segments[-1].gone, path), segments[-1].owner)
            else:
                segments.append(Segment(None, (path,), None))
        return segments

    def _with(self, changes: Mapping[str, str]) -> "Plan":
        return Plan({path: changes.get(path, action) for path, action in self.actions.items()}, self.apart)


@dataclass(frozen=True)
class Segment:
    """A block that runs and the left-out blocks behind it.

    Attributes:
      head: path of the block that runs; None if the middle begins with left-out blocks.
      gone: paths of the left-out blocks, in order.
      owner: path of the block whose weights the head runs on; None if the head has weights of its own.
    """

    head: str | None
    gone: tuple[str, ...]
    owner: str | None

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all blocks of the segment, in order."""
        return ((self.head,) if self.head else ()) + self.gone

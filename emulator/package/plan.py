"""What becomes of each block of the middle: it stays, is left out, or runs on another block's weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

KEEP, SKIP, SHARE = "keep", "skip", "share:"


@dataclass(frozen=True)
class Plan:
    """The structure of the middle.

    Attributes:
      actions: by block path, "keep", "skip" or "share:OWNER", where OWNER is the path of a block that is kept.
      apart: whether other modules stand between the blocks.
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
        """Paths of the blocks that run on another's weights, to that one's path."""
        return {path: a.removeprefix(SHARE) for path, a in self.actions.items() if a.startswith(SHARE)}

    def skip(self, paths: Iterable[str]) -> "Plan":
        """Returns the plan without some blocks."""
        return self._with(dict.fromkeys(paths, SKIP))

    def share(self, owners: Mapping[str, str]) -> "Plan":
        """Returns the plan in which some blocks, by path, run on another's weights."""
        return self._with({path: f"{SHARE}{owner}" for path, owner in owners.items()})

    def spans(self) -> list["Segment"]:
        """Returns the middle as stretches, each a block that runs and those behind it that are left out.

        Blocks that stand apart are a stretch each: what one makes is not what the next gets.
        """
        found: list[Segment] = []
        for path, action in self.actions.items():
            if action != SKIP:
                found.append(Segment(path, (), self.shared.get(path)))
            elif found and not self.apart:
                found[-1] = Segment(found[-1].head, (*found[-1].gone, path), found[-1].owner)
            else:
                found.append(Segment(None, (path,), None))
        return found

    def _with(self, changes: Mapping[str, str]) -> "Plan":
        return Plan({path: changes.get(path, action) for path, action in self.actions.items()}, self.apart)


@dataclass(frozen=True)
class Segment:
    """A block that runs and the ones behind it that are left out.

    Attributes:
      head: path of the block that runs; None for a middle that begins with blocks that are left out.
      gone: paths of the blocks that are left out.
      owner: the block whose weights the head runs on, where it has none of its own.
    """

    head: str | None
    gone: tuple[str, ...]
    owner: str | None

    @property
    def paths(self) -> tuple[str, ...]:
        """All blocks, in order."""
        return ((self.head,) if self.head else ()) + self.gone

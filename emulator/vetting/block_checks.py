"""Checks of what each block does to its input: a block that hands it on, or drowns it, is a trap."""

from collections.abc import Iterator

from torch import Tensor

from offsite.emulator.vetting.limits import Check, VettingThresholds

USUAL_CHANGE = 0.1  # of a block's input; the loudest block of a trained model changes more
LOUD = 10.0  # root mean square of the first block's input; behind embeddings and their norm it is 1 or less
Seen = dict[str, tuple[Tensor, Tensor]]  # path of a block -> hidden states before and after the block


def changes_of(seen: Seen) -> dict[str, float]:
    """Returns by how much each block changes its input, relative to the input's size: the median over all tokens."""
    return {
        path: float(((after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-30)).median())
        for path, (before, after) in seen.items()
    }


def quiet(seen: Seen, changes: dict[str, float]) -> float:
    """Returns how quiet the loudest block is, from each block's change; 1 for a usual model.

    In a narrow model with freshly drawn weights every block changes its input by little (ModernBERT: 0.0002 of it at
    width 16). Such a model is measured against its own loudest block: what stands out as an identity is still a trap.
    A model whose input is loud gets no such measure, since a loud input makes an identity of every block.
    """
    first = next(iter(seen.values()))[0]
    loud = float(first.square().mean().sqrt()) > LOUD
    return 1.0 if loud else min(1.0, max(changes.values()) / USUAL_CHANGE)


def block_checks(seen: Seen, changes: dict[str, float], limits: VettingThresholds) -> Iterator[Check]:
    """Yields the checks of blocks: each changes its input, measured against the loudest, and none saturates."""
    scale, loudest = quiet(seen, changes), max(changes.values())
    yield Check("least_loudest", "blocks", loudest, limits.least_loudest, "each is the identity", least=True)
    for path, (before, after) in seen.items():
        growth = float(after.norm() / before.norm().clamp_min(1e-30))
        change = changes[path] / max(scale, 1e-30)
        yield Check(
            "least_change", path, change, limits.least_change, "the block is the identity, undeclared", least=True
        )
        yield Check("growth", path, growth, limits.growth, "the block is saturated")

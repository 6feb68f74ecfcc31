"""How alike emulator and full model are, block by block: what an observer of the emulator learns of the model."""

from torch import nn
from torch.nn import functional

from offsite.emulator.calibration.least_squares import rows
from offsite.emulator.calibration.middle import Middle
from offsite.emulator.calibration.source import MemorySource
from offsite.emulator.calibration.stream import begin, private


def similarity(middle: Middle, emulator: nn.Module) -> dict[str, float]:
    """Returns for each block of the tower the mean cosine of what leaves it in the emulator and in the full model.

    Args:
      middle: of the full model, with public examples.
      emulator: the loaded package, float32.

    Returns:
      By block path, in -1..1; 1 means that up to there the emulator computes what the model does. Hidden states are
      centred first, since most of them share a large part that tells nothing.
    """
    found: dict[str, float] = {}
    mine = theirs = middle.stream.inputs
    student = middle.stream
    if middle.apart and middle.calibration is not None:
        student = begin(MemorySource(emulator), middle.tower, (), middle.calibration.run, apart=True)
    for path in middle.tower:
        mine, theirs = student.entering(path, mine), middle.stream.entering(path, theirs)
        with middle.source.open(path) as block:
            theirs = middle.stream.run(private(block), path, theirs)
        mine = student.run(emulator.get_submodule(path), path, mine)
        left, right = rows(mine), rows(theirs)
        left, right = left - left.mean(0), right - right.mean(0)
        found[path] = float(functional.cosine_similarity(left, right, dim=-1).mean())
    return found
